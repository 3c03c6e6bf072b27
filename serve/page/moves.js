// How a list differs from another one.

import { element, spoken } from "./dom.js";
import { words } from "./words.js";

export const ranksOf = (answer) => new Map(answer.items.map((item) => [item.item_id, item.rank]));

// How many items are not in the other list, how many have another rank there, how many the same.
export function difference(answer, others) {
  const count = { fresh: 0, moved: 0, same: 0 };
  for (const { item_id, rank } of answer.items) {
    if (!others.has(item_id)) count.fresh += 1;
    else if (others.get(item_id) === rank) count.same += 1;
    else count.moved += 1;
  }
  return count;
}

// `lonely`: what to say of an item that the other list lacks.
export function mark(item, others, lonely) {
  const rank = others.get(item.item_id);
  if (rank === undefined) return element("span", "move fresh", lonely);
  if (rank === item.rank) return spoken("move quiet", "=", words().same);
  const steps = Math.abs(rank - item.rank);
  return rank > item.rank
    ? spoken("move up", `▲ ${steps}`, words().up(steps))
    : spoken("move down", `▼ ${steps}`, words().down(steps));
}
