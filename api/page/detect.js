/** The view that judges images: several at a time, each with its whole account. */

import { ask, serviceState } from "./client.js";
import { announce, badge, download, fileName, h, save } from "./dom.js";
import { intake, looksLikeImage } from "./intake.js";
import { judging } from "./judging.js";
import { problemBox } from "./problems.js";
import { csv } from "./table.js";
import { account } from "./verdict.js";
import { tellKnown, welcome } from "./welcome.js";
import { count, figure, headline, oneIn, plural, rarity } from "./words.js";

/** Problems of the file itself: it would fail again. */
const OF_THE_FILE = new Set([400, 413, 415]);
const view = document.getElementById("view-detect");

/** Files judged in this tab, as {file, address of its blob}, by the id of their record: the service keeps none. */
export const recent = new Map();

let rates = null;
const items = [];
const queue = judging({ onchange: redraw, onend: finished });

const closer = h("input", { type: "checkbox", checked: true });
const strictness = h(
  "select",
  {},
  h("option", { value: "" }, "as the service is set"),
  [0.1, 0.05, 0.02, 0.01, 0.001].map((share) => h("option", { value: share }, oneIn(share))),
);
const judgedBar = progressBar("Images judged");
const closerBar = progressBar("Regions and re-encoded copies");
const progress = h(
  "div",
  { class: "progress", hidden: true },
  h("div", { class: "passes" }, judgedBar.row, closerBar.row),
  h("button", { type: "button", onclick: () => queue.stop() }, "Stop"),
);
const tally = h("p", { class: "tally" });
const tools = h(
  "div",
  { class: "tools", hidden: true },
  tally,
  h(
    "div",
    { class: "buttons" },
    h("button", { type: "button", onclick: () => save(csv(written()), "lineup-verdicts.csv") }, "Export all as CSV"),
    h("button", { type: "button", onclick: () => download({ results: written() }, "lineup-verdicts.json") }, "as JSON"),
    h("button", { type: "button", onclick: clear }, "Clear"),
  ),
);
const results = h("div", { class: "results" });

const leftOut = h("p", { class: "hint", role: "status" });
const zone = intake({
  view,
  title: "Drop images here",
  hint:
    "or paste one. JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC. Use the original file where you can: each copy " +
    "loses traces.",
  folder: true,
  onfiles: (files) => {
    const images = files.filter((file) => !file.webkitRelativePath || looksLikeImage(file)); // a folder holds others too
    const rest = files.length - images.length;
    leftOut.textContent = rest ? `${plural(rest, "other file")} of the folder left out.` : "";
    const nameOf = (file) => file.webkitRelativePath || file.name;
    if (images.length) add(images.map((file) => ({ name: nameOf(file), file, address: URL.createObjectURL(file) })));
  },
});
const link = h("input", {
  type: "url",
  required: true,
  placeholder: "https://…",
  pattern: "https://.*",
  title: "It begins with https://",
  maxlength: 2048,
});
const linkButton = h("button", { type: "submit" }, "Judge it");
const linkForm = h(
  "form",
  {
    class: "options",
    onsubmit: (event) => {
      event.preventDefault();
      add([{ name: link.value.trim(), file: null, address: null }]);
      link.value = "";
    },
  },
  h("label", {}, "Or the address of an image: ", link),
  linkButton,
);

/** A line that says how far a pass over the images is. */
function progressBar(title) {
  const bar = h("progress", { max: 1, value: 0, "aria-label": title });
  const counter = h("span", { class: "counter" });
  const row = h("div", {}, h("span", {}, title), bar, counter);
  const show = (done, all) => {
    row.hidden = !all;
    bar.max = all || 1;
    bar.value = done;
    counter.textContent = `${count(done)} of ${count(all)}`;
  };
  return { row, show };
}

/** Build the view. */
export function setUp() {
  view.append(
    zone,
    leftOut,
    linkForm,
    h(
      "div",
      { class: "options" },
      h("label", { class: "choice" }, closer, " Also score regions and re-encoded copies (slower)"),
      h("label", {}, "Real photos called generated, at most: ", strictness),
    ),
    progress,
    tools,
    results,
    welcome,
  );
}

/**
 * Called each time the view is shown, with the address of an image that is to be judged once its reader says so: any web
 * page may open this one. Where the service cannot answer, verdicts say less about their cuts.
 */
export async function show(address) {
  if (address !== null) {
    link.value = address;
    linkButton.focus();
  }
  if (!welcome.hidden) serviceState().then(tellKnown, () => {});
  if (rates) return;
  try {
    const state = await ask("/v1/calibration");
    rates = { false_alarm: state.max_false_alarm, miss: state.max_miss };
    const [own, ...others] = strictness.options;
    own.textContent = `${oneIn(rates.false_alarm)}, as the service is set`;
    for (const option of others) if (Number(option.value) === rates.false_alarm) option.remove();
  } catch {
    rates = null;
  }
}

/** Judge images {name, file, address of its blob}, see `judging`. */
function add(images) {
  welcome.hidden = true;
  zone.classList.add("compact");
  const alone = images.length === 1;
  const added = images.map((image) => ({
    ...image,
    explain: closer.checked ? "regions,stability" : null,
    max_false_alarm: strictness.value,
    alone,
    place: h("div", { class: "result" }),
    result: null,
    whole: false,
    problem: null,
  }));
  items.push(...added);
  added.forEach(draw);
  results.prepend(...added.map((item) => item.place));
  tools.hidden = false;
  announce(`${plural(added.length, "image")} to judge`);
  queue.add(added);
  update();
  if (tools.getBoundingClientRect().top > innerHeight / 2) tools.scrollIntoView();
}

function redraw(item) {
  if (!items.includes(item)) return; // cleared meanwhile
  if (item.whole && item.file) recent.set(item.result.id, item);
  draw(item);
  update();
  if (item.alone && item.result && !item.whole && !item.busy && !item.problem) announce(spoken(item.result));
}

/** Show an item as it stands. What is open stays open, and the focus stays where it was. */
function draw(item) {
  if (item.result && item.busy) return; // its second part is on the way, as the verdict says already
  const open = item.place.querySelector("details.one")?.open;
  const focused = item.place.contains(document.activeElement) ? nameOf(document.activeElement) : null;
  const shown = item.result ? judged(item) : item.problem ? null : waiting(item);
  item.place.replaceChildren(...[shown, item.problem && failed(item)].filter(Boolean));
  const row = item.place.querySelector("details.one");
  if (open && row) row.open = true;
  const same = (element) => focused !== null && nameOf(element) === focused;
  [...item.place.querySelectorAll("button, summary, [tabindex]")].find(same)?.focus({ preventScroll: true });
}

function nameOf(element) {
  return element.getAttribute("aria-label") ?? element.textContent;
}

function waiting(item) {
  return h(
    "div",
    { class: "waiting" },
    h("span", { class: "spinner", "aria-hidden": "true" }),
    fileName(item.name),
    h("span", { class: "hint" }, item.busy ? "being judged" : "waiting"),
  );
}

function failed(item) {
  const again = () => {
    item.problem = null;
    draw(item);
    queue.add([item]);
    update();
  };
  return h(
    "div",
    { class: "failed" },
    h("p", { class: "of" }, fileName(item.name), item.result ? ": regions and re-encoded copies are missing" : ""),
    problemBox(item.problem, OF_THE_FILE.has(item.problem.status) ? null : again),
  );
}

function judged(item) {
  const verdict = item.result;
  const own = item.max_false_alarm ? Number(item.max_false_alarm) : rates?.false_alarm;
  const options = {
    address: item.address,
    file: item.file,
    at: item.at,
    rates: { ...rates, false_alarm: own },
    pending: !item.whole && !item.problem,
  };
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
            : h("span", { class: "hint" }, `score ${figure(verdict)}. ${rarity(verdict) ?? ""}`),
        ),
      ),
    ),
  );
  return details;
}

function update() {
  const ended = (item) => item.whole || item.problem;
  const explained = items.filter((item) => item.explain);
  progress.hidden = items.every(ended);
  judgedBar.show(number((item) => item.result || item.problem), items.length);
  closerBar.show(explained.filter(ended).length, explained.length);
  tally.textContent = counts();
}

const number = (test) => items.filter(test).length;

function counts() {
  const parts = [
    ["generated", number((item) => item.result?.verdict === "fake")],
    ["real", number((item) => item.result?.verdict === "real")],
    ["cannot tell", number((item) => item.result?.verdict === "uncertain")],
    ["incomplete", number((item) => item.problem && item.result)],
    ["failed", number((item) => item.problem && !item.result)],
  ];
  return parts
    .filter(([, value]) => value)
    .map(([word, value]) => `${value} ${word}`)
    .join(" · ");
}

function finished() {
  const last = items.at(-1);
  if (!last) return;
  if (items.length > 1 || !last.result) announce(`Done: ${counts()}`);
  else if (last.explain && last.whole) announce("Regions and re-encoded copies are scored");
  else announce(spoken(last.result));
}

function spoken(verdict) {
  const score = verdict.score === null ? "" : ` Score ${figure(verdict)}.`;
  return `${headline(verdict)}.${score} ${rarity(verdict) ?? ""}`.trim();
}

/** What became of each image, as the service says it of many. */
function written() {
  return items
    .filter((item) => item.result || item.problem)
    .map(
      (item) =>
        item.result ?? {
          file: item.name,
          error: { title: item.problem.title, status: item.problem.status, detail: item.problem.detail },
        },
    );
}

function clear() {
  queue.stop();
  for (const item of items.splice(0)) URL.revokeObjectURL(item.address);
  recent.clear();
  results.replaceChildren();
  tools.hidden = true;
  welcome.hidden = false;
  zone.classList.remove("compact");
  leftOut.textContent = "";
  update();
  announce("Cleared");
}
