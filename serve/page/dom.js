// Making elements. What the service says enters the page as text, never as HTML.

export const $ = (id) => document.getElementById(id);

// `content`: texts and elements.
export function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

export function button(className, ...content) {
  return Object.assign(element("button", className, ...content), { type: "button" });
}

export const nameOf = (thing) => thing.display || thing.item_id;

export function title(thing) {
  const made = element("span", "title", nameOf(thing));
  made.dir = "auto"; // titles may run from right to left
  return made;
}

// A text for the eye, and another for those who hear the page.
export function spoken(className, shown, heard) {
  const eye = element("span", "", shown);
  eye.setAttribute("aria-hidden", "true");
  return element("span", className, eye, element("span", "unseen", heard));
}

export function day(timestamp, language) {
  const date = new Date(1000 * timestamp);
  const made = element("time", "facts", date.toLocaleDateString(language, { year: "numeric", month: "short", day: "numeric" }));
  made.dateTime = made.title = date.toISOString();
  return made;
}

// 0.5 -> "+0.50", with a minus as long as the plus.
export function number(value, plus = "") {
  const text = Math.abs(value).toFixed(2);
  return value < 0 && text !== "0.00" ? `−${text}` : plus + text;
}
