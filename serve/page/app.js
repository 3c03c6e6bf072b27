// The page: who is asked for, what was answered, and what changes it.

import { $, element, nameOf } from "./dom.js";
import { failure } from "./failure.js";
import { explainHistory, showHistory } from "./history.js";
import { explainList, showList } from "./list.js";
import { difference, mark, ranksOf } from "./moves.js";
import * as service from "./service.js";
import { changeLanguage, words } from "./words.js";

const CARDS = [$("first"), $("second")];

let asked = new AbortController(); // the request under way, dropped when another follows
let adding = false;
let largest = Infinity; // k: the size of the catalogue
let live = []; // versions
let shown = null; // {user, lists: [{request, answer, mark, explained}], events, told}: kept for the other language

// `added`: the item that the user has just been given; the new list tells what it changed.
async function ask(added = null) {
  asked.abort();
  asked = new AbortController();
  const { signal } = asked;
  const user = $("user").value.trim();
  say(words().loading);
  $("answer").setAttribute("aria-busy", "true");
  try {
    const requests = wanted(user);
    const [past, ...answers] = await Promise.all([
      service.history(user, signal),
      ...requests.map((request) => service.recommend(request, signal)),
    ]);
    const lists = answers.map((answer, place) => ({ request: requests[place], answer }));
    shown = { user, lists, events: past.events, ...comparison(lists, added) };
    window.history.replaceState(null, "", user ? `?user=${encodeURIComponent(user)}` : "/");
    show();
    $("answer").removeAttribute("aria-busy");
    explain(lists, signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    clear();
    fail(error);
  }
}

// A request for each list.
function wanted(user) {
  const request = { k: Math.min(Number($("k").value), largest), exclude_seen: !$("seen").checked };
  if (user) request.user_id = user;
  const versions = [$("version").value, ...($("other").value ? [$("other").value] : [])];
  return versions.map((version) => (version ? { ...request, model_version: version } : request));
}

// What is told of the lists, {told}, a function of the language; and what is marked in them, list.mark.
function comparison(lists, added) {
  const [first, second] = lists;
  const begins = () => (added ? words().added(nameOf(added)) + words().gap : "");
  if (second) {
    const [left, right] = lists.map((list) => ranksOf(list.answer));
    first.mark = (item) => !right.has(item.item_id) && mark(item, right, words().onlyHere);
    second.mark = (item) => mark(item, left, words().onlyHere);
    const { moved, same } = difference(second.answer, left);
    const alike = first.answer.model_version === second.answer.model_version;
    const compared = () => (alike ? words().sameVersion : words().compared(moved + same, left.size, same));
    return { told: () => begins() + compared() };
  }
  if (!added || !shown) return { told: begins };
  const before = ranksOf(shown.lists[0].answer);
  first.mark = (item) => mark(item, before, words().fresh);
  const { fresh, moved } = difference(first.answer, before);
  return { told: () => begins() + words().changed(fresh, moved) };
}

// Reasons cost the service more than the list does, so the list does not wait for them.
async function explain(lists, signal) {
  try {
    for (const [place, list] of lists.entries()) {
      const { request, answer } = list;
      const exact = { ...request, explain: true, model_version: answer.model_version };
      list.explained = await service.recommend(exact, signal);
      explainList(CARDS[place], list);
      if (place === 0) explainHistory($("history"), list.explained);
    }
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  }
}

async function add(item, clicked) {
  if (adding) return;
  adding = true;
  const { user } = shown;
  const card = clicked.closest(".card");
  const place = [...card.querySelectorAll(".item")].indexOf(clicked.closest(".item"));
  try {
    await service.addEvent(user, item.item_id);
    if (shown?.user !== user) return; // another user has been asked for meanwhile
    $("user").value = user; // whatever is being typed
    await ask(item);
    if (document.activeElement === document.body) { // what was clicked is gone
      const rows = card.querySelectorAll(".item");
      rows[Math.min(place, rows.length - 1)]?.querySelector("button").focus();
    }
  } catch (error) {
    fail(error);
  } finally {
    adding = false;
  }
}

function show() {
  const { user, lists, events, told } = shown;
  const comparing = lists.length > 1;
  lists.forEach((list, place) => {
    const heading = comparing ? words().by(list.answer.model_version) : words().recommendations;
    showList(CARDS[place], heading, list, user ? add : null);
  });
  CARDS[1].hidden = !comparing;
  $("answer").classList.toggle("comparing", comparing);
  showHistory($("history"), events);
  if (lists[0].explained) explainHistory($("history"), lists[0].explained);
  $("model").textContent = [...new Set(lists.map((list) => list.answer.model_version))].join(", ");
  say(told());
}

function say(...content) {
  $("status").replaceChildren(...content);
}

async function fail(error) {
  say(failure(error));
  if (error.code === "unauthorized") $("locked").hidden = false;
  live = await service.versions(); // the one asked for may be gone
  showVersions();
}

function clear() {
  shown = null;
  $("answer").removeAttribute("aria-busy");
  for (const card of $("answer").children) card.replaceChildren();
}

function showVersions() {
  $("versions").hidden = live.length < 2;
  const option = ([value, text]) => Object.assign(element("option", "", text), { value });
  const named = live.map(({ model_version: name, share }) => [name, words().share(name, Math.round(100 * share))]);
  for (const [select, nothing] of [[$("version"), words().ownVersion], [$("other"), words().noVersion]]) {
    const { value } = select;
    select.replaceChildren(...[["", nothing], ...named].map(option));
    select.value = live.length > 1 && live.some((version) => version.model_version === value) ? value : "";
  }
}

function speak() {
  document.documentElement.lang = words().language;
  for (const place of document.querySelectorAll("[data-word]")) place.textContent = words()[place.dataset.word];
  $("user").placeholder = words().userHint;
  $("language").textContent = words().other;
  $("language").lang = words().otherLanguage;
  showVersions();
  if (shown) show();
}

async function suggest() {
  const users = await service.users($("user").value.trim());
  $("users").replaceChildren(...users.map((user) => Object.assign(element("option"), { value: user })));
  return users;
}

function listen() {
  $("language").addEventListener("click", () => {
    changeLanguage();
    speak();
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("key").addEventListener("change", () => {
    const key = $("key").value.trim();
    if (!/^[!-~]+$/.test(key)) return; // no header can hold it
    sessionStorage.setItem("key", key); // for this tab alone
    learn();
  });
  for (const id of ["k", "seen", "version", "other"]) $(id).addEventListener("change", () => ask());
  let typing;
  $("user").addEventListener("input", ({ inputType = "" }) => {
    clearTimeout(typing);
    const picked = ["", "insertReplacementText"].includes(inputType); // a whole value from the list, not a key
    if (picked && [...$("users").options].some((option) => option.value === $("user").value)) ask();
    else typing = setTimeout(suggest, 150);
  });
}

async function start() {
  speak();
  listen();
  const wanted = new URLSearchParams(location.search).get("user");
  if (wanted !== null) $("user").value = wanted;
  const users = await learn();
  if (wanted === null && users.length) $("user").value = users[0];
  ask();
}

// What there is: users, versions, and how many items.
async function learn() {
  const [users, size, versions] = await Promise.all([suggest(), service.catalogueSize(), service.versions()]);
  largest = size;
  live = versions;
  if (versions.length) $("seen").checked = !versions[0].exclude_seen;
  showVersions();
  return users;
}

start();
