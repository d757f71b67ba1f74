/** The view that judges images: several at a time, each with its whole account. */

import { ask, problemFrom } from "./client.js";
import { announce, badge, download, fileName, h } from "./dom.js";
import { intake } from "./intake.js";
import { problemBox } from "./problems.js";
import { account } from "./verdict.js";
import { decimal, headline, oneIn, plural, rarity } from "./words.js";

const AT_ONCE = 2;
const view = document.getElementById("view-detect");

/** Blobs of images judged in this tab, by the id of their record: the service keeps none. */
export const addresses = new Map();

let rates = null;
const items = [];
const queue = [];
let running = 0;
let stopping = new AbortController();

const closer = h("input", { type: "checkbox", checked: true });
const strictness = h(
  "select",
  {},
  h("option", { value: "" }, "as the service is set"),
  [0.1, 0.05, 0.02, 0.01, 0.001].map((share) => h("option", { value: share }, oneIn(share))),
);
const bar = h("progress", { max: 1, value: 0, "aria-label": "Images judged" });
const counter = h("span", { class: "counter" });
const progress = h(
  "div",
  { class: "progress", hidden: true },
  bar,
  counter,
  h("button", { type: "button", onclick: stop }, "Stop"),
);
const tally = h("p", { class: "tally" });
const tools = h(
  "div",
  { class: "tools", hidden: true },
  tally,
  h(
    "div",
    { class: "buttons" },
    h("button", { type: "button", onclick: exportAll }, "Export all as JSON"),
    h("button", { type: "button", onclick: clear }, "Clear"),
  ),
);
const results = h("div", { class: "results" });

const zone = intake({
  view,
  title: "Drop images here",
  hint:
    "or paste one. JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF. Use the original file where you can: each copy " +
    "loses traces.",
  onfiles: add,
});

const explanation = h(
  "section",
  { class: "explanation", "aria-label": "How to read a verdict" },
  h(
    "ol",
    {},
    h(
      "li",
      {},
      h("strong", {}, "The line-up. "),
      "Lineup looks for the images most like yours among reference images whose origin is known: real photos, " +
        "and images by known generators.",
    ),
    h(
      "li",
      {},
      h("strong", {}, "The verdict. "),
      "“Probably generated”, “probably a real photograph”, or “cannot tell”, with a score and how often " +
        "real photos score that high.",
    ),
    h(
      "li",
      {},
      h("strong", {}, "The evidence. "),
      "You see the neighbours, what each method says, where in the image it comes from, and whether it survives " +
        "re-encoding. Judge for yourself.",
    ),
  ),
  h("p", { class: "hint" }, "Lineup keeps a fingerprint of the image and the verdict, never the image."),
);

/** Build the view. */
export function setUp() {
  view.append(
    zone,
    h(
      "div",
      { class: "options" },
      h("label", { class: "choice" }, closer, " Also score regions and re-encoded copies (slower)"),
      h("label", {}, "Real photos called generated, at most: ", strictness),
    ),
    progress,
    tools,
    results,
    explanation,
  );
}

/** Called each time the view is shown. */
export async function show() {
  if (rates) return;
  try {
    const state = await ask("/v1/calibration");
    rates = { false_alarm: state.max_false_alarm, miss: state.max_miss };
    strictness.options[0].textContent = `${oneIn(rates.false_alarm)}, as the service is set`;
  } catch {
    rates = null; // the verdicts then say less about their cuts, and nothing else fails
  }
}

function add(files) {
  explanation.hidden = true;
  zone.classList.add("compact");
  const options = { explain: closer.checked ? "regions,stability" : "", max_false_alarm: strictness.value };
  const alone = files.length === 1;
  const added = files.map((file) => ({
    file,
    options,
    alone,
    address: URL.createObjectURL(file),
    place: h("div", { class: "result" }),
    result: null,
  }));
  for (const item of added) {
    item.place.append(waiting(item, "waiting"));
    items.push(item);
    queue.push(item);
  }
  results.prepend(...added.map((item) => item.place));
  tools.hidden = false;
  announce(`${plural(files.length, "image")} to judge`);
  while (running < AT_ONCE && queue.length) work();
  update();
  if (tools.getBoundingClientRect().top > innerHeight / 2) tools.scrollIntoView();
}

async function work() {
  running += 1;
  while (queue.length) await judge(queue.shift());
  running -= 1;
  if (!running) finished();
}

async function judge(item) {
  item.place.replaceChildren(waiting(item, "being judged"));
  const body = new FormData();
  body.append("image", item.file, item.file.name || "pasted.png");
  try {
    const {
      results: [found],
    } = await ask("/v1/detect", { method: "POST", query: item.options, body, signal: stopping.signal });
    if (found.error) throw problemFrom(found.error);
    item.result = found;
    item.at = new Date().toISOString();
    addresses.set(found.id, item.address);
  } catch (problem) {
    item.problem =
      problem.name === "AbortError" ? { title: "Not judged", detail: "Stopped before its turn." } : problem;
  }
  item.place.replaceChildren(item.result ? judged(item) : failed(item));
  update();
}

function waiting(item, state) {
  return h(
    "div",
    { class: "waiting" },
    h("span", { class: "spinner", "aria-hidden": "true" }),
    fileName(item.file.name),
    h("span", { class: "hint" }, state),
  );
}

function failed(item) {
  const again = () => {
    item.problem = null;
    queue.push(item);
    if (running < AT_ONCE) work();
    update();
  };
  return h(
    "div",
    { class: "failed" },
    h("p", { class: "of" }, fileName(item.file.name)),
    problemBox(item.problem, again),
  );
}

function judged(item) {
  const verdict = item.result;
  const own = item.options.max_false_alarm ? Number(item.options.max_false_alarm) : rates?.false_alarm;
  const options = { address: item.address, at: item.at, rates: { ...rates, false_alarm: own } };
  if (item.alone) return account(verdict, options);
  const preview = h("img", { src: item.address, alt: "", width: 56, height: 56 });
  preview.onerror = () => preview.classList.add("missing");
  const details = h(
    "details",
    {
      class: `one ${verdict.verdict}`,
      ontoggle: () => {
        if (details.open && details.childElementCount === 1) details.append(account(verdict, options));
      },
    },
    h(
      "summary",
      {},
      preview,
      h(
        "span",
        { class: "row-words" },
        fileName(verdict.file),
        h(
          "span",
          { class: "row-verdict" },
          badge(verdict.verdict, headline(verdict)),
          verdict.score === null
            ? null
            : h("span", { class: "hint" }, `score ${decimal(verdict.score)}. ${rarity(verdict) ?? ""}`),
        ),
      ),
    ),
  );
  return details;
}

function update() {
  const done = items.filter((item) => item.result || item.problem).length;
  progress.hidden = done === items.length;
  bar.max = items.length || 1;
  bar.value = done;
  counter.textContent = `${done} of ${items.length} judged`;
  tally.textContent = counts();
}

function counts() {
  const number = (test) => items.filter(test).length;
  const parts = [
    ["generated", number((item) => item.result?.verdict === "fake")],
    ["real", number((item) => item.result?.verdict === "real")],
    ["cannot tell", number((item) => item.result?.verdict === "uncertain")],
    ["failed", number((item) => item.problem)],
  ];
  return parts
    .filter(([, value]) => value)
    .map(([word, value]) => `${value} ${word}`)
    .join(" · ");
}

function finished() {
  const last = items.at(-1);
  if (!last) return;
  if (items.length === 1 && last.result)
    announce(
      `${headline(last.result)}. ${last.result.score === null ? "" : `Score ${decimal(last.result.score)}.`} ` +
        `${rarity(last.result) ?? ""}`,
    );
  else announce(`Done: ${counts()}`);
}

function stop() {
  for (const item of queue.splice(0)) {
    item.problem = { title: "Not judged", detail: "Stopped before its turn." };
    item.place.replaceChildren(failed(item));
  }
  stopping.abort();
  stopping = new AbortController();
  update();
}

function exportAll() {
  const written = items
    .filter((item) => item.result || item.problem)
    .map(
      (item) =>
        item.result ?? {
          file: item.file.name,
          error: { title: item.problem.title, status: item.problem.status, detail: item.problem.detail },
        },
    );
  download({ results: written }, "lineup-verdicts.json");
}

function clear() {
  stop();
  for (const item of items.splice(0)) URL.revokeObjectURL(item.address);
  addresses.clear();
  results.replaceChildren();
  tools.hidden = true;
  explanation.hidden = false;
  zone.classList.remove("compact");
  update();
  announce("Cleared");
}
