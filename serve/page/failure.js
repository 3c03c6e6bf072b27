// What to say when a call fails.

import { element } from "./dom.js";
import { words } from "./words.js";

export function failure(error) {
  const { errors } = words();
  const sentence = errors[error.code] ?? errors.other;
  const made = element("p", "wrong", sentence);
  if (/[:：]$/.test(sentence)) { // the service says it best
    const detail = element("span", "", error.message);
    detail.lang = "en";
    made.append(" ", detail);
  }
  return made;
}
