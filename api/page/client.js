/** Calls to the service: the key or token, problems in words, and thumbnails, which need it as well. */

import { sentence } from "./words.js";

const KEY = "lineup-key";

/** What went wrong, as RFC 9457 says it or as near as can be said. */
export class Problem extends Error {
  constructor({ kind, status = 0, title, detail = "", retryAfter = null, conflicts = null, requestId = null }) {
    super(detail || title);
    Object.assign(this, { kind, status, title, detail, retryAfter, conflicts, requestId });
  }
}

/** What a reader can do about each kind of problem. */
const ADVICE = {
  unreadable: "The file is damaged or cut off. Try to get another copy of it.",
  "not-fetched": "Check the address; only public servers are asked. Or save the image, and drop it here.",
  "not-an-image": "If it is an image of another kind, save it as PNG, which loses nothing.",
  "too-large": "Whoever runs the service sets this limit. A smaller copy is another file, and may be judged otherwise.",
  unauthorized: "Reload the page, or try again, to enter a key.",
  forbidden: "Ask whoever runs the service.",
  "too-many-requests": "Wait a little, then try again.",
  "not-ready": "The service is starting, or its database is away. Try again in a moment.",
  "not-installed": "Ask whoever runs the service; the command works wherever the library is installed.",
  internal: "The service's log says more under the number given here.",
  unreachable: "Is it still running? Is the network there?",
};

export function advice(problem) {
  return ADVICE[problem.kind] ?? null;
}

export function key() {
  return sessionStorage.getItem(KEY);
}

export function forgetKey() {
  sessionStorage.removeItem(KEY);
  document.dispatchEvent(new Event("lineup-key"));
}

/** Keep the token of the link that the service printed, and take it out of the address. */
export function keepToken() {
  const token = new URLSearchParams(location.search).get("token");
  if (!token) return;
  sessionStorage.setItem(KEY, token);
  history.replaceState(null, "", location.pathname + location.hash);
}

let keyAsked = null;

/** Ask for a key, once, however many calls wait for it. Answers whether there is another one to try. */
function askForKey(reason) {
  keyAsked ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key-input");
    const done = (found) => {
      keyAsked = null;
      input.value = "";
      dialog.close();
      document.dispatchEvent(new Event("lineup-key"));
      resolve(found);
    };
    document.getElementById("key-reason").textContent = reason;
    document.getElementById("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, input.value.trim());
      done(true);
    };
    document.getElementById("key-cancel").onclick = () => done(false);
    dialog.oncancel = () => done(false);
    if (!dialog.open) dialog.showModal();
  });
  return keyAsked;
}

/**
 * One call. Answers the response when that is good.
 *
 * `query` values that are null or empty are left out; `json` becomes the body.
 * Throws `Problem`, and AbortError where `signal` ended it.
 */
export async function call(path, { method = "GET", query = {}, json, body, signal } = {}) {
  const asked = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const url = asked.length ? `${path}?${new URLSearchParams(asked)}` : path;
  for (;;) {
    const used = key();
    const headers = used ? { authorization: `Bearer ${used}` } : {};
    if (json !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(url, { method, headers, body: json === undefined ? body : JSON.stringify(json), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem({
        kind: "unreachable",
        title: "The service does not answer",
        detail: "No connection to the service.",
      });
    }
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (problem.status !== 401) throw problem;
    if (key() !== used) continue; // another call has got a key meanwhile
    if (used) sessionStorage.removeItem(KEY);
    if (
      !(await askForKey(used ? `${sentence(problem.detail)} Enter another one.` : "Nothing can be shown without one."))
    )
      throw problem;
  }
}

/** One call whose answer is JSON. */
export async function ask(path, options) {
  return (await call(path, options)).json();
}

/** The state of the service. Whoever shows it in every view hears of it. */
export async function serviceState() {
  const state = await ask("/v1/status");
  document.dispatchEvent(new CustomEvent("lineup-state", { detail: state }));
  return state;
}

async function problemOf(response) {
  const said = await response.json().catch(() => ({}));
  const title = `The service, or what stands before it, answered ${response.status} ${response.statusText}`.trim();
  return problemFrom({ status: response.status, title, ...said }, response.headers.get("retry-after"));
}

/** A problem from its JSON, as it also comes inside a batch. */
export function problemFrom(json, retryAfter = null) {
  return new Problem({
    kind: String(json.type ?? "").replace("urn:lineup:", "") || "other",
    status: json.status,
    title: json.title || `The service answered ${json.status}`,
    detail: json.detail ?? "",
    retryAfter: retryAfter === null ? null : Number(retryAfter),
    conflicts: json.conflicts ?? null,
    requestId: json.request_id ?? null,
  });
}

const thumbnails = new Map();
const KEPT = 500;

/** Show a thumbnail in an image element, or mark it as missing. The same one is fetched once. */
export async function showThumbnail(image, path) {
  try {
    if (!thumbnails.has(path)) {
      thumbnails.set(path, fetchThumbnail(path));
      if (thumbnails.size > KEPT) forgetOldest();
    }
    image.src = await thumbnails.get(path);
  } catch {
    thumbnails.delete(path);
    image.classList.add("missing");
    image.alt = `${image.alt} (no picture)`;
  }
}

const fetchThumbnail = (path) => patiently(async () => URL.createObjectURL(await (await call(path)).blob()));

/** What some work gives. Where the service is too busy and says for how long, it is waited for, and asked again. */
export async function patiently(work, tries = 3) {
  try {
    return await work();
  } catch (problem) {
    if (tries === 1 || !problem.retryAfter || problem.retryAfter > 30) throw problem;
    await new Promise((resolve) => setTimeout(resolve, 1000 * problem.retryAfter));
    return patiently(work, tries - 1);
  }
}

function forgetOldest() {
  const [path, address] = thumbnails.entries().next().value;
  thumbnails.delete(path);
  address.then(URL.revokeObjectURL, () => {});
}
