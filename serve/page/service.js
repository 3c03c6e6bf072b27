// Calls to the service. They throw a ServiceError, or an AbortError once `signal` says that nobody waits any more.

const HISTORY = 50;

export class ServiceError extends Error {
  constructor(code, message, status) {
    super(message);
    this.code = code; // as in {"error": {"code", "message"}}, or "unreachable"
    this.status = status;
  }
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key"); // where the service asks for one
  const headers = { ...options.headers, ...(key && { "x-api-key": key }) };
  let response, text;
  try {
    response = await fetch(path, { ...options, headers });
    text = await response.text();
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServiceError("unreachable", "");
  }
  const body = parsed(text);
  if (response.ok && body) return body;
  throw new ServiceError(body?.error?.code, body?.error?.message ?? `HTTP ${response.status}`, response.status);
}

// null where it is no JSON: what stands before the service may answer in plain text.
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function post(path, body, signal) {
  return call(path, { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal });
}

export const recommend = (request, signal) => post("/v1/recommend", request, signal);
export const similar = (request) => post("/v1/similar", request);
export const addEvent = (user, item) => post("/v1/events", { user_id: user, events: [{ item_id: item }] });

export async function history(user, signal) {
  if (!user) return { events: [] };
  try {
    return await call(`/v1/users/${encodeURIComponent(user)}/history?limit=${HISTORY}`, { signal });
  } catch (error) {
    if (error.status === 404) return { events: [] }; // an unknown user is welcome
    throw error;
  }
}

// These are a help: without them the page goes on, and the answer itself says what is wrong.
export async function users(prefix) {
  return call(`/v1/users?limit=20&prefix=${encodeURIComponent(prefix)}`).then((body) => body.users, () => []);
}

export async function catalogueSize() {
  return call("/health/ready").then((body) => body.items ?? Infinity, () => Infinity);
}

export async function versions() {
  const live = (body) => body.versions.filter((version) => version.state === "live");
  return call("/v1/versions").then(live, () => []);
}
