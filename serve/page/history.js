// What a user did, in a card of the page.

import { day, element, title } from "./dom.js";
import { legend, viewsOf } from "./views.js";
import { words } from "./words.js";

export function showHistory(card, events) {
  const list = element("ol", "events", ...events.map(row));
  list.setAttribute("role", "list");
  list.tabIndex = 0; // it scrolls, also by keyboard
  const heading = Object.assign(element("h2", "", words().history), { id: `${card.id}-title` });
  card.replaceChildren(heading, events.length ? list : element("p", "quiet", words().noHistory));
}

// The mean weights of the views in the history.
export function explainHistory(card, answer) {
  const weights = answer.views ?? {};
  if (Object.keys(weights).length) card.querySelector("h2").after(legend(words().historyLegend, viewsOf(answer), weights));
}

function row(event) {
  const made = element("li", "", title(event));
  if (event.live) made.append(element("span", "facts live", words().live));
  if (event.timestamp !== null) made.append(day(event.timestamp, words().language));
  return made;
}
