"use strict";

// All text from the service enters the page through textContent, never as HTML.
const $ = (id) => document.getElementById(id);
const HISTORY = 50;
let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let asked = null; // the request under way, to be dropped when another follows
let largest = Infinity; // k: the size of the catalogue
let shown = null; // {answer, events, user} on the page, to be shown again in the other language

const words = () => WORDS[language];

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function title(thing) {
  const made = element("span", "title", thing.display || thing.item_id);
  made.dir = "auto"; // titles may run from right to left
  return made;
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key"); // for this tab alone, and only where the service asks for one
  const response = await fetch(path, { ...options, headers: { ...options.headers, ...(key && { "x-api-key": key }) } });
  if (response.status === 401) $("locked").hidden = false;
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.error.message), { status: response.status });
  return body;
}

function post(body, signal) {
  return { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal };
}

async function ask() {
  asked?.abort();
  asked = new AbortController();
  const { signal } = asked;
  const user = $("user").value.trim();
  const body = { k: Math.min(Number($("k").value), largest), exclude_seen: !$("again").checked, explain: true };
  if (user) body.user_id = user;
  $("status").textContent = words().loading;
  $("status").classList.remove("wrong");
  try {
    const [answer, events] = await Promise.all([call("/v1/recommend", post(body, signal)), past(user, signal)]);
    shown = { answer, events, user };
    $("status").textContent = "";
    window.history.replaceState(null, "", user ? `?user=${encodeURIComponent(user)}` : "/");
    show();
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  }
}

function fail(error) {
  $("status").textContent = error.status ? error.message : words().failed + error.message;
  $("status").classList.add("wrong");
}

async function past(user, signal) {
  if (!user) return [];
  try {
    const path = `/v1/users/${encodeURIComponent(user)}/history?limit=${HISTORY}`;
    return (await call(path, { signal })).events;
  } catch (error) {
    if (error.status === 404) return []; // an unknown user is welcome
    throw error;
  }
}

function show() {
  const { answer, events } = shown;
  const views = [...new Set(answer.items.flatMap((item) => Object.keys(item.views || {})))].sort();
  $("rung").hidden = false;
  $("rung").textContent = (words().rungs[answer.rung] || answer.rung) + (answer.degraded ? ` ${words().degraded}` : "");
  $("rung").dataset.rung = answer.rung;
  $("version").textContent = answer.model_version;
  showLegend(views);
  $("items").replaceChildren(...answer.items.map((item) => recommended(item, views)));
  if (!answer.items.length) $("items").append(element("li", "quiet", words().empty));
  $("no-history").hidden = events.length > 0;
  $("no-history").textContent = words().noHistory;
  $("events").replaceChildren(...events.map(happened));
}

function showLegend(views) {
  $("legend").hidden = views.length === 0;
  const entries = views.map((view, place) => {
    const entry = element("li", "", view);
    entry.prepend(element("i", `swatch view-${place % 8}`));
    return entry;
  });
  $("legend").replaceChildren(element("li", "quiet", words().legend), ...entries);
}

function recommended(item, views) {
  const row = element("li", "item");
  const line = element("div", "line");
  const facts = element("span", "facts", `${words().score} ${item.score.toFixed(2)}`);
  line.append(element("span", "rank", String(item.rank)), title(item), facts, addButton(item), similarButton(item, row));
  row.append(line);
  if (item.views) row.append(bar(item.views, views));
  return row;
}

function bar(weights, views) {
  const made = element("div", "bar");
  const percent = (view) => `${view} ${Math.round(100 * (weights[view] || 0))}%`;
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", `${words().weights}: ${views.map(percent).join(", ")}`);
  views.forEach((view, place) => {
    const part = element("span", `view-${place % 8}`);
    part.style.flexGrow = weights[view] || 0;
    part.title = percent(view);
    made.append(part);
  });
  return made;
}

// What the service hears of a user counts at once: the list and the history are asked for again.
function addButton(item) {
  const button = element("button", "small", words().add);
  button.type = "button";
  button.hidden = !shown.user;
  button.setAttribute("aria-label", `${words().add}: ${item.display || item.item_id}`);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await call("/v1/events", post({ user_id: shown.user, events: [{ item_id: item.item_id }] }));
      await ask();
    } catch (error) {
      fail(error);
      button.disabled = false;
    }
  });
  return button;
}

function similarButton(item, row) {
  const button = element("button", "small similar", words().similar);
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  button.addEventListener("click", async () => {
    const open = row.querySelector(".neighbours");
    button.setAttribute("aria-expanded", String(!open));
    if (open) return open.remove();
    const list = element("ul", "neighbours");
    row.append(list);
    try {
      const answer = await call(`/v1/similar/${encodeURIComponent(item.item_id)}?k=5`);
      list.replaceChildren(...answer.items.map((near) => {
        const entry = element("li");
        entry.append(title(near), element("span", "facts", near.score.toFixed(2)));
        return entry;
      }));
    } catch (error) {
      list.replaceChildren(element("li", "wrong", error.message));
    }
  });
  return button;
}

function happened(event) {
  const row = element("li");
  row.append(title(event));
  if (event.live) row.append(element("span", "facts live", words().live));
  if (event.timestamp !== null) {
    const date = new Date(1000 * event.timestamp);
    const day = { year: "numeric", month: "short", day: "numeric" };
    const when = element("time", "facts", date.toLocaleDateString(language === "zh" ? "zh-CN" : "en-GB", day));
    when.dateTime = date.toISOString();
    when.title = date.toISOString();
    row.append(when);
  }
  return row;
}

function speak() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const place of document.querySelectorAll("[data-word]")) place.textContent = words()[place.dataset.word];
  $("user").placeholder = words().userHint;
  $("language").textContent = words().other;
  $("language").lang = language === "zh" ? "en" : "zh-CN";
  if (shown) show();
}

async function suggest() {
  try {
    const { users } = await call(`/v1/users?limit=20&prefix=${encodeURIComponent($("user").value.trim())}`);
    $("users").replaceChildren(...users.map((user) => Object.assign(element("option"), { value: user })));
    return users;
  } catch {
    return []; // suggestions are a help; the answer itself will say what is wrong
  }
}

async function start() {
  speak();
  $("language").addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    localStorage.setItem("language", language);
    speak();
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if ($("key").value) sessionStorage.setItem("key", $("key").value.trim());
    ask();
  });
  $("k").addEventListener("change", ask);
  $("again").addEventListener("change", ask);
  let typing;
  $("user").addEventListener("input", (event) => {
    clearTimeout(typing);
    const picked = [...$("users").options].some((option) => option.value === $("user").value);
    // A pick from the list is a whole value at once, not a key.
    if (picked && event.inputType !== "insertText" && event.inputType !== "deleteContentBackward") ask();
    else typing = setTimeout(suggest, 150);
  });
  const wanted = new URLSearchParams(location.search).get("user");
  if (wanted !== null) $("user").value = wanted;
  const [users, ready] = await Promise.all([suggest(), call("/health/ready").catch(() => ({}))]);
  largest = ready.items ?? Infinity;
  if (wanted === null && users.length) $("user").value = users[0];
  ask();
}

start();
