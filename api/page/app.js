/** Which view is shown, the key, and whether the service is ready. */

import * as candidates from "./candidates.js";
import * as detect from "./detect.js";
import * as generators from "./generators.js";
import * as map from "./map.js";
import * as record from "./record.js";
import * as references from "./references.js";
import * as search from "./search.js";
import * as status from "./status.js";
import { forgetKey, keepToken, key } from "./client.js";
import { h } from "./dom.js";
import { stateWords } from "./words.js";

const VIEWS = { detect, record, search, references, map, generators, candidates, status };
const TITLES = { detect: "Detect", record: "Record", search: "Search", references: "References", map: "Map", generators: "Generators", candidates: "Discover", status: "Status" };
const notice = document.getElementById("service-notice");

/** The view and its argument from an address such as #/record/ID. */
function route() {
  const [, name, argument] = location.hash.split("/");
  return name in VIEWS ? [name, argument ? decodeURIComponent(argument) : null] : ["detect", null];
}

function go(moved) {
  const [name, argument] = route();
  for (const other of Object.keys(VIEWS)) document.getElementById(`view-${other}`).hidden = other !== name;
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === (name === "map" ? "references" : name)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${TITLES[name]} · Lineup`;
  if (moved) {
    scrollTo(0, 0);
    const title = document.getElementById(`title-${name}`);
    title.tabIndex = -1;
    title.focus({ preventScroll: true });
  }
  VIEWS[name].show(argument);
}

function showKey() {
  document.getElementById("key-state").hidden = !key();
}

/** Wait until the service has loaded its checkpoint and index, and say so meanwhile. */
async function awaitReady() {
  for (;;) {
    const response = await fetch("/health/ready").catch(() => null);
    if (response?.ok) {
      if (notice.textContent) notice.textContent = "";
      return;
    }
    const said = await response?.json().catch(() => null);
    notice.textContent = response
      ? `The service is not ready: ${said?.detail ?? "it is starting"}. Waiting…`
      : "The service does not answer. Waiting…";
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
}

keepToken();
for (const view of Object.values(VIEWS)) view.setUp();
document.getElementById("forget-key").onclick = forgetKey;
document.addEventListener("lineup-key", showKey);
document.addEventListener("lineup-state", ({ detail }) => {
  notice.textContent = stateWords(detail);
  const names = detail.generators.map(({ name }) => h("option", { value: name }));
  document.getElementById("generator-names").replaceChildren(...names);
});
document.getElementById("skip").onclick = (event) => {
  event.preventDefault(); // the hash names the view
  document.getElementById("content").focus();
};
addEventListener("hashchange", () => go(true));
showKey();
await awaitReady();
go(false);
