/** The view of the reference images: a gallery to filter and sort, with each one's neighbours; relabels and removes them. */

import { ask, serviceState, showThumbnail } from "./client.js";
import { announce, h } from "./dom.js";
import { editing } from "./editing.js";
import { referenceFacts, suspect } from "./lineup.js";
import { problemBox } from "./problems.js";
import { plural } from "./words.js";

const PAGE = 48;
const view = document.getElementById("view-references");

const any = (text) => h("option", { value: "" }, text);
const label = h(
  "select",
  {},
  any("all"),
  h("option", { value: "real" }, "real photos"),
  h("option", { value: "fake" }, "generated images"),
);
const generator = h("select", {}, any("all"));
const source = h("select", {}, any("all"));
const order = h(
  "select",
  { id: "references-order" },
  h("option", { value: "newest" }, "newest first"),
  h("option", { value: "oldest" }, "oldest first"),
  h("option", { value: "label" }, "by kind"),
  h("option", { value: "generator" }, "by generator"),
  h("option", { value: "source" }, "by source"),
);
const orderLabel = h("span", {}, h("label", { for: "references-order" }, "Order "), order);
const filters = h(
  "form",
  { class: "filters", "aria-label": "Filters", onsubmit: (event) => event.preventDefault(), onchange: () => load([0]) },
  h("label", {}, "Kind ", label),
  h("label", {}, "Generator ", generator),
  h("label", {}, "Source ", source),
  orderLabel,
);

const every = h("input", { type: "checkbox", onchange: () => select(every.checked) });
const chosenCount = h("span", { class: "counter" });
const relabelButton = h("button", { type: "button", onclick: () => relabel(selected()) }, "Relabel…");
const removeButton = h("button", { type: "button", onclick: () => remove(selected()) }, "Remove…");
const selection = h(
  "div",
  { class: "selection", role: "group", "aria-label": "Selection", hidden: true },
  h("label", {}, every, " All on this page"),
  chosenCount,
  relabelButton,
  removeButton,
);
const outcome = h("div", { "aria-live": "polite" });
const chosen = h("div");
const gallery = h("div");
const { relabel, change, remove } = editing(outcome, settled, [selection, chosen, gallery]);
const previous = h("button", { type: "button", onclick: () => load(starts.slice(0, -1)) }, "← Back");
const next = h("button", { type: "button", onclick: () => load([...starts, following]) }, "On →");
const place = h("span", { class: "hint" });
const pager = h("nav", { class: "pager", "aria-label": "Pages of the references", hidden: true }, previous, place, next);

/** The reference that the others are compared with, null where all are shown. */
let compared = null;
/** What the filters of the gallery were before one was compared. */
let narrowed = ["", "", ""];
/** Where the pages begin, up to the one that is shown. */
let starts = [0];
let following = null;
let shown = [];
let asked = 0;

/** Build the view. */
export function setUp() {
  view.append(
    h("p", { class: "lead" }, "The known images that every verdict rests on. A wrong label misleads: correct it, or remove the image."),
    h("p", {}, h("a", { href: "#/map" }, "See them as a map")),
    chosen,
    filters,
    selection,
    outcome,
    gallery,
    pager,
  );
}

/** Called each time the view is shown; with the number of a reference it shows the ones most like that. */
export async function show(argument) {
  if (argument !== compared) compare(argument);
  outcome.replaceChildren();
  await Promise.all([offer(), load([0])]);
}

/** Turn to another reference, or to all; what those were narrowed to says nothing of what is similar to one of them. */
function compare(id) {
  if (compared === null) narrowed = [label, generator, source].map(({ value }) => value);
  for (const [n, filter] of [label, generator, source].entries()) filter.value = id === null ? narrowed[n] : "";
  compared = id;
}

/** Let the filters offer what there is now. */
async function offer() {
  try {
    const state = await serviceState();
    const option = (row) => h("option", { value: row.name }, `${row.name} (${row.references})`);
    for (const [filter, rows] of [[generator, state.generators], [source, state.sources ?? []]]) {
      const { value } = filter;
      const there = rows.filter(({ name, references }) => references || name === value);
      filter.replaceChildren(any("all"), ...there.map(option));
      filter.value = rows.some(({ name }) => name === value) ? value : "";
    }
  } catch {
    // the gallery itself will say what is wrong
  }
}

/** What is asked for of the order; within a group the newest come first. */
const sorting = () =>
  ["newest", "oldest"].includes(order.value) ? { newest: order.value === "newest" } : { sort: order.value, newest: true };

async function load(pages) {
  const turn = (asked += 1);
  gallery.setAttribute("aria-busy", "true");
  orderLabel.hidden = compared !== null;
  const query = { label: label.value, generator: generator.value, source: source.value, limit: PAGE };
  try {
    const [one, found] =
      compared === null
        ? [null, await ask("/v1/references", { query: { ...query, ...sorting(), after: pages.at(-1) } })]
        : await Promise.all([
            ask(`/v1/references/${encodeURIComponent(compared)}`),
            ask(`/v1/references/${encodeURIComponent(compared)}/neighbours`, { query }),
          ]);
    if (turn !== asked) return; // something else was asked for meanwhile
    starts = pages;
    following = found.next ?? null;
    shown = found.references ?? found.neighbours;
    chosen.replaceChildren(...(one ? [details(one)] : []));
    reveal();
  } catch (problem) {
    if (turn !== asked) return;
    shown = [];
    chosen.replaceChildren(...(compared === null ? [] : [all()]));
    gallery.replaceChildren(problemBox(problem, () => load(pages)));
    selection.hidden = pager.hidden = true;
  } finally {
    if (turn === asked) gallery.removeAttribute("aria-busy");
  }
}

const all = () => h("p", {}, h("a", { href: "#/references" }, "← All reference images"));

/** The reference that others are compared with, and what can be done with it. */
function details(one) {
  const picture = h("img", { alt: `Reference image ${one.id}` });
  if (one.thumbnail) showThumbnail(picture, one.thumbnail);
  const { former_label: formerLabel, former_generator: formerGenerator = null } = one.attributes;
  const former = formerLabel && kindWords(formerLabel, formerGenerator);
  const back = () => change([one], () => ({ label: formerLabel, generator: formerGenerator }));
  return h(
    "section",
    { "aria-labelledby": "title-reference" },
    all(),
    h("h2", { id: "title-reference" }, `Reference ${one.id}: ${kindWords(one.label, one.generator)}`),
    h(
      "div",
      { class: "chosen" },
      one.thumbnail ? picture : h("p", {}, "Its picture is not here."),
      h(
        "div",
        {},
        referenceFacts(one),
        h(
          "div",
          { class: "buttons" },
          h("button", { type: "button", onclick: () => relabel([one]) }, "Relabel it…"),
          former && h("button", { type: "button", onclick: back }, `Back to ${former}`),
          h("button", { type: "button", onclick: () => remove([one]) }, "Remove it…"),
        ),
      ),
    ),
    h("h3", {}, "Most similar to it"),
  );
}

const kindWords = (kind, name) => (kind === "real" ? "real photo" : (name ?? "generator not named"));

function reveal() {
  const words = compared === null ? `Page ${starts.length}: ${plural(shown.length, "reference")}` : "The most similar";
  gallery.replaceChildren(
    shown.length
      ? h("ol", { class: "gallery pickable", "aria-label": "Reference images" }, shown.map(card))
      : h("p", { class: "none" }, "No reference image fits these filters."),
  );
  selection.hidden = !shown.length;
  pager.hidden = compared !== null || (starts.length === 1 && following === null);
  previous.disabled = starts.length === 1;
  next.disabled = following === null;
  place.textContent = words;
  count();
  announce(shown.length ? words : "No reference image fits these filters.");
}

function card(reference) {
  const item = suspect(reference);
  const box = h("input", { type: "checkbox", value: reference.id, "aria-label": `Select reference ${reference.id}`, onchange: count });
  const similar = h(
    "a",
    { href: `#/references/${reference.id}`, "aria-label": `Similar to reference ${reference.id}` },
    "Similar",
  );
  item.append(h("div", { class: "pick" }, box, similar));
  return item;
}

const boxes = () => [...gallery.querySelectorAll(".pick input")];

function selected() {
  const numbers = new Set(boxes().filter((box) => box.checked).map((box) => Number(box.value)));
  return shown.filter(({ id }) => numbers.has(id));
}

function select(checked) {
  for (const box of boxes()) box.checked = checked;
  count();
}

function count() {
  const number = selected().length;
  every.checked = number > 0 && number === shown.length;
  every.indeterminate = number > 0 && number < shown.length;
  chosenCount.textContent = `${number} selected`;
  relabelButton.disabled = removeButton.disabled = number === 0;
}

/** Show what there is now; `gone` has what is there in place of ids that are not any more, or null. */
async function settled(gone) {
  const now = gone.get(Number(compared));
  if (compared !== null && now !== undefined) {
    if (now) compared = now.id;
    else compare(null);
    history.replaceState(null, "", now ? `#/references/${now.id}` : "#/references");
  }
  await Promise.all([offer(), load(starts)]);
}
