// Why one item is recommended: the weights of its views, the events that carried its score, its rank without each view.

import { day, element, number, title } from "./dom.js";
import { legend } from "./views.js";
import { words } from "./words.js";

const PARTS = 3; // of an event's score that are told, the largest

export function why(item, views) {
  const panel = element("div", "panel", legend(words().whyWeights, views, item.views));
  if (item.events.length) panel.append(...score(item));
  else if (!Object.keys(item.ranks).length) panel.append(element("p", "", words().whyPopular));
  if (Object.keys(item.ranks).length) panel.append(...ranks(item));
  panel.append(element("p", "quiet", `${words().item} `, element("code", "", item.item_id)));
  return panel;
}

function score(item) {
  const rows = item.events.map(event);
  if (Math.abs(item.others) >= 0.005) rows.push(row(element("span", "title quiet", words().otherEvents), item.others));
  return [
    element("p", "", words().whyScore(number(item.score), number(item.baseline))),
    element("ul", "reasons", ...rows),
  ];
}

function event(one) {
  const what = element("div", "what", title(one));
  if (one.timestamp !== null) what.append(" ", day(one.timestamp, words().language));
  const parts = Object.entries(one.views);
  if (one.again) parts.push([words().sameItem, one.again]);
  const largest = parts.sort(([, a], [, b]) => Math.abs(b) - Math.abs(a)).slice(0, PARTS);
  const told = largest.map(([view, value]) => `${view} ${number(value, "+")}`).join(", ");
  what.append(element("div", "quiet", words().through(told)));
  return row(what, one.score);
}

function row(what, value) {
  return element("li", "", what, element("strong", value < 0 ? "facts less" : "facts more", number(value, "+")));
}

// The views that it needs most come first.
function ranks(item) {
  const order = Object.entries(item.ranks).sort(([, a], [, b]) => b - a);
  const entries = order.map(([view, rank]) =>
    element("li", rank === item.rank ? "quiet" : "", `${words().without(view)}: ${words().rank(rank)}`));
  return [element("p", "", words().whyRanks(item.rank)), element("ul", "ranks", ...entries)];
}
