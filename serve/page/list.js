// One list of recommendations, in a card of the page.

import { button, element, nameOf, number, title } from "./dom.js";
import { failure } from "./failure.js";
import { similar } from "./service.js";
import { bar, legend, viewsOf } from "./views.js";
import { why } from "./why.js";
import { words } from "./words.js";

const SIMILAR = 5;

// `list`: {answer, mark, explained}: mark, what an item's row says of a comparison, and explained, the same answer with
// reasons, may be absent. `add(item, clicked)` is called for what is clicked; without it there is nobody to add to.
export function showList(card, heading, list, add) {
  const { answer } = list;
  const rows = answer.items.map((item) => row(item, list, add));
  const told = [words().rungs[answer.rung] ?? answer.rung];
  if (answer.degraded) told.push(words().degraded);
  if (add && rows.length) told.push(words().addHint);
  const items = element("ol", "items", ...rows);
  items.setAttribute("role", "list");
  if (!rows.length) items.append(element("li", "quiet", words().empty));
  const top = Object.assign(element("h2", "", heading), { id: `${card.id}-title` });
  card.replaceChildren(top, element("p", "rung", told.join(words().gap)), element("div", "legend"), items);
  if (list.explained) explainList(card, list);
}

// Reasons take longer than the list, and come into their places when they are there.
export function explainList(card, { explained }) {
  const views = viewsOf(explained);
  const first = explained.items.find((item) => item.views);
  if (first) card.querySelector(".legend").replaceWith(legend(words().legend, views, first.views, true));
  const items = new Map(explained.items.map((item) => [item.item_id, item]));
  for (const place of card.querySelectorAll(".item")) {
    const item = items.get(place.dataset.item);
    const ask = place.querySelector(".why");
    ask.hidden = !item?.views;
    if (ask.hidden) continue;
    place.querySelector(".bar").replaceWith(bar(item.views, views));
    ask.disabled = false;
    unfolds(ask, place, async () => why(item, views));
  }
}

function row(item, { answer, mark }, add) {
  const made = element("li", "item");
  made.dataset.item = item.item_id;
  const reasons = button("small why", words().why);
  reasons.disabled = true;
  reasons.setAttribute("aria-label", words().whyOf(nameOf(item)));
  const alike = button("small similar", words().similar);
  alike.setAttribute("aria-label", words().similarTo(nameOf(item)));
  unfolds(alike, made, () => neighbours(item, answer.model_version, add));
  const rank = element("span", "rank", item.rank);
  const move = mark?.(item) || element("span", "move");
  const score = element("span", "facts score", number(item.score));
  const head = element("div", "head", name(item, add), move);
  made.append(element("div", "line", rank, head, element("div", "bar"), score, reasons, alike));
  return made;
}

function name(item, add) {
  if (!add) return title(item);
  const plus = element("span", "plus", "+");
  plus.setAttribute("aria-hidden", "true");
  const made = button("add", plus, title(item));
  made.setAttribute("aria-label", words().add(nameOf(item)));
  made.addEventListener("click", () => add(item, made));
  return made;
}

async function neighbours(item, version, add) {
  const { items } = await similar({ item_id: item.item_id, k: SIMILAR, model_version: version });
  const entries = items.map((near) => element("li", "", name(near, add), element("span", "facts", number(near.score))));
  return element("div", "panel", element("p", "quiet", words().likeness), element("ul", "neighbours", ...entries));
}

// The button opens a panel under the row, and closes it.
function unfolds(opener, place, make) {
  let panel = null;
  opener.setAttribute("aria-expanded", "false");
  opener.addEventListener("click", async () => {
    const opens = panel === null;
    opener.setAttribute("aria-expanded", String(opens));
    if (!opens) {
      panel.remove();
      panel = null;
      return;
    }
    panel = element("div", "panel quiet", words().loading);
    place.append(panel);
    const waiting = panel;
    const made = await make().catch(failure);
    if (panel !== waiting) return; // closed meanwhile
    waiting.replaceWith(made);
    panel = made;
  });
}
