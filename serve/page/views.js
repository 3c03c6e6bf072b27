// The weights of views: bars, and the legend of their colours.

import { element } from "./dom.js";
import { words } from "./words.js";

const COLOURS = 8;

// The views of an answer in the order of their colours: those that items have, then those of the history alone.
export function viewsOf(answer) {
  const items = answer.items.flatMap((item) => Object.keys(item.views ?? {}));
  return [...new Set([...items.sort(), ...Object.keys(answer.views ?? {}).sort()])];
}

const colour = (place) => `view-${place % COLOURS}`;
const percent = (view, weights) => `${view} ${Math.round(100 * weights[view])}%`;

export function bar(weights, views) {
  const here = views.filter((view) => view in weights);
  const made = element("div", "bar");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", `${words().weights}: ${here.map((view) => percent(view, weights)).join(", ")}`);
  for (const view of here) {
    const part = element("span", colour(views.indexOf(view)));
    part.style.flexGrow = weights[view];
    part.title = percent(view, weights);
    made.append(part);
  }
  return made;
}

// What the weights are, or, `named` alone, which views there are.
export function legend(label, views, weights, named = false) {
  const entries = views.filter((view) => view in weights).map((view) => {
    const swatch = element("i", `swatch ${colour(views.indexOf(view))}`);
    return element("li", "", swatch, named ? view : percent(view, weights));
  });
  return element("ul", "legend", element("li", "quiet", label), ...entries);
}
