"use strict";

// The interface, drawn from /openapi.json; unlike the usual viewers it loads nothing from another host.
const main = document.getElementById("routes");

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const named = (schema, api) => (schema?.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema);
const jsonSchema = (part) => part?.content?.["application/json"]?.schema;

function kind(schema, api) {
  if (schema.$ref) return kind(named(schema, api), api);
  const options = schema.anyOf || schema.oneOf;
  if (options) return options.map((option) => kind(option, api)).join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items || {}, api)}`;
  return schema.format || schema.type || "any";
}

// The objects that a schema holds, inside lists and choices too.
function objects(schema, api) {
  const whole = named(schema, api);
  if (whole.properties) return [whole];
  return [...(whole.anyOf || whole.oneOf || []), ...(whole.items ? [whole.items] : [])].flatMap((part) => objects(part, api));
}

function fields(schema, api) {
  const list = element("ul", "fields");
  for (const object of objects(schema, api)) {
    for (const [name, field] of Object.entries(object.properties)) {
      const entry = element("li");
      entry.append(element("code", "", name), ` ${kind(field, api)}`);
      if (object.required?.includes(name)) entry.append(", always");
      else if (field.default !== undefined && field.default !== null) entry.append(`, ${JSON.stringify(field.default)} if absent`);
      if (field.description) entry.append(element("span", "quiet", ` – ${field.description}`));
      if (objects(field, api).length) entry.append(fields(field, api));
      list.append(entry);
    }
  }
  return list;
}

function folded(label, content) {
  const made = element("details");
  made.append(element("summary", "", label), content);
  return made;
}

function route(path, verb, operation, api) {
  const card = element("section", "card route");
  const heading = element("h2");
  heading.append(element("span", "verb", verb.toUpperCase()), path);
  card.append(heading, element("p", "", operation.description || operation.summary));
  const inputs = (operation.parameters || []).map((parameter) => {
    const label = element("label", "parameter", `${parameter.name} (${parameter.in}, ${kind(parameter.schema, api)})`);
    const input = element("input");
    input.value = parameter.schema.default ?? "";
    label.append(input);
    card.append(label);
    return { parameter, input };
  });
  const schema = jsonSchema(operation.requestBody);
  const body = schema ? element("textarea") : null;
  if (body) {
    body.value = JSON.stringify(named(schema, api).examples?.[0] || {}, null, 1);
    body.setAttribute("aria-label", "request body");
    body.spellcheck = false;
    card.append(folded("Request", fields(schema, api)), body);
  }
  for (const [status, response] of Object.entries(operation.responses)) {
    const answer = jsonSchema(response);
    if (status === "200" && answer) card.append(folded("Answer", fields(answer, api)));
  }
  const problems = Object.keys(operation.responses).filter((status) => status !== "200");
  card.append(element("p", "quiet", `Errors: ${problems.join(", ")}, as {"error": {"code", "message", "field"}}`));
  card.append(...trial(path, verb, inputs, body));
  return card;
}

function trial(path, verb, inputs, body) {
  const button = element("button", "main", "Try it");
  const result = element("pre");
  button.type = "button";
  result.hidden = true;
  button.addEventListener("click", async () => {
    let address = path;
    const query = new URLSearchParams();
    for (const { parameter, input } of inputs) {
      if (parameter.in === "path") address = address.replace(`{${parameter.name}}`, encodeURIComponent(input.value));
      else if (input.value !== "") query.set(parameter.name, input.value);
    }
    const key = sessionStorage.getItem("key"); // that was entered on the page
    const headers = { ...(body && { "content-type": "application/json" }), ...(key && { "x-api-key": key }) };
    const options = { headers, ...(body && { body: body.value }) };
    result.hidden = false;
    try {
      const response = await fetch(query.size ? `${address}?${query}` : address, { ...options, method: verb.toUpperCase() });
      const text = await response.text();
      result.textContent = `${response.status}\n${pretty(text)}`;
    } catch (error) {
      result.textContent = error.message;
    }
  });
  return [button, result];
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 1);
  } catch {
    return text;
  }
}

async function start() {
  try {
    const api = await (await fetch("/openapi.json")).json();
    const cards = Object.entries(api.paths).flatMap(([path, verbs]) =>
      Object.entries(verbs).map(([verb, operation]) => route(path, verb, operation, api)));
    main.replaceChildren(element("p", "", `${api.info.title}, interface ${api.info.version}. ${api.info.description}`), ...cards);
  } catch (error) {
    document.getElementById("status").textContent = `The service did not answer: ${error.message}`;
  }
}

start();
