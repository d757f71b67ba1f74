/** The view of what Lineup knows: generators, what each enrolment changed, and a form for the next one. */

import { ask, serviceState } from "./client.js";
import { announce, confirmed, h, table } from "./dom.js";
import { enrolment } from "./enrol.js";
import { arrow, days, effectOver, oneAfterTheOther, sentTogether, undo, whole } from "./enrolments.js";
import { problemBox } from "./problems.js";
import { count, ended, plural, when } from "./words.js";

const view = document.getElementById("view-generators");
/** Of an enrolment, in two columns. */
const EFFECT = ["Found by the vote", "False alarms of the vote"];
/** What can be told of a generator beside its images, each with the kind of its field. */
const FACTS = { vendor: "text", family: "text", version: "text", released_on: "date" };
const TERMS = { vendor: "Vendor", family: "Family", version: "Version", released_on: "Released on" };
const place = h("div");
const history = h("div");
let form = null;

/** Build the view. */
export function setUp() {
  form = enrolment(view, load);
  view.append(
    h(
      "p",
      { class: "lead" },
      "Lineup recognises a generator by images of it. A new one is enrolled with a few dozen, at once and " +
        "without training.",
    ),
    place,
    h("section", { "aria-labelledby": "title-enrol" }, h("h2", { id: "title-enrol" }, "Enrol a generator"), form.form),
    h("section", { "aria-labelledby": "title-history" }, h("h2", { id: "title-history" }, "Enrolments"), history),
  );
}

/** Called each time the view is shown. */
export const show = load;

async function load() {
  try {
    const [{ generators }, { enrolments }, status] = await Promise.all([
      ask("/v1/generators"),
      ask("/v1/enrolments", { query: { limit: 1000 } }),
      serviceState(),
    ]);
    place.replaceChildren(...[known(generators, enrolments, status.references.real)].flat());
    history.replaceChildren(past(whole(enrolments, sentTogether)));
  } catch (problem) {
    place.replaceChildren(problemBox(problem, load));
    history.replaceChildren();
  }
}

/** Enrolments that brought images of a generator: those of its own, and mixed ones that counted it. */
function broughtBy(name, enrolments) {
  return enrolments.filter(
    ({ generator, report, references }) =>
      references !== 0 && (generator === name || (!generator && report?.generators?.[name])),
  );
}

function known(generators, enrolments, real) {
  if (!generators.length && !real)
    return h(
      "p",
      { class: "none" },
      "No reference images yet. Lineup cannot compare before some are enrolled, real and generated.",
    );
  const rows = generators.map((generator) => {
    const own = broughtBy(generator.name, enrolments);
    const [first, last] = days(own);
    const [{ recall, alarms } = { recall: null, alarms: null }] = whole(own, oneAfterTheOther)
      .map(({ reports }) => effectOver(reports, generator.name))
      .filter((effect) => effect.recall);
    const details = [
      generator.vendor,
      generator.family,
      generator.version,
      generator.released_on && `released ${generator.released_on}`,
    ]
      .filter(Boolean)
      .join(", ");
    return [
      [generator.name, details ? h("span", { class: "hint" }, ` ${details}`) : ""],
      count(generator.references),
      first,
      last,
      arrow(recall),
      arrow(alarms),
      h(
        "span",
        { class: "changes" },
        changeButton("Edit", generator, edit),
        changeButton("Delete", generator, remove),
      ),
    ];
  });
  const [first, last] = days(broughtBy("real", enrolments));
  rows.push(["Real photos", count(real), first, last, "", "", ""]);
  const warnings = enrolments.find(({ report }) => report?.warnings)?.report.warnings ?? [];
  return [
    table(
      "Reference images by generator",
      ["Generator", "Images", "First added", "Last added", ...EFFECT, "Change"],
      rows,
      { numeric: [1], className: "stacking", hideCaption: true },
    ),
    h(
      "p",
      { class: "hint" },
      "The vote is one of four ways to judge. Found: how many of a generator’s images it calls generated, before " +
        "→ after they were enrolled (of images sent in parts, before the first and after the last part), where both were " +
        "measured; false alarms: how many real photos it calls generated. Where both are " +
        "high, the vote alone cannot tell them apart. A verdict rests on all ways together, and its cut keeps its own " +
        "false alarms below the rate that Status shows.",
    ),
    warnings.length > 0 &&
      h(
        "details",
        { class: "warnings" },
        h("summary", {}, `${plural(warnings.length, "warning")} about the reference set`),
        h(
          "p",
          { class: "hint" },
          "Where the kind of file alone tells real from generated, Lineup may have learned that instead. Enrol " +
            "both in the same formats and sizes.",
        ),
        h(
          "ul",
          {},
          warnings.map((warning) => h("li", {}, ended(warning))),
        ),
      ),
  ].filter(Boolean);
}

function changeButton(action, generator, change) {
  const onclick = async () => {
    try {
      await change(generator);
    } catch (problem) {
      place.prepend(problemBox(problem));
    }
  };
  return h("button", { type: "button", "aria-label": `${action} ${generator.name}`, onclick }, action);
}

const address = ({ name }) => `/v1/generators/${encodeURIComponent(name)}`;

async function edit(generator) {
  const field = ([fact, type]) => h("input", { type, name: fact, maxlength: 200, value: generator[fact] ?? "" });
  const inputs = Object.entries(FACTS).map(field);
  const fields = inputs.map((input) => h("label", {}, TERMS[input.name], " ", input));
  if (!(await confirmed(`What is known of ${generator.name}`, h("div", {}, fields), "Save"))) return;
  const json = Object.fromEntries(inputs.map(({ name, value }) => [name, value.trim() || null]));
  await ask(address(generator), { method: "PATCH", json });
  announce(`${generator.name} changed`);
  await load();
}

async function remove(generator) {
  const images = plural((await ask(address(generator))).references, "reference image");
  const text = `${images} of it will be removed, and vote no more. Past verdicts stay as they are.`;
  if (!(await confirmed(`Delete ${generator.name}?`, text, "Delete it"))) return;
  const { references } = await ask(address(generator), { method: "DELETE" });
  announce(`${generator.name} deleted: ${plural(references, "reference")} removed`);
  form.clear(); // its report may be of this one
  await load();
}

function past(enrolments) {
  if (!enrolments.length) return h("p", { class: "none" }, "None yet.");
  const rows = enrolments.map((one) => {
    const { recall, alarms } = effectOver(one.reports);
    const [first, last] = [one.ids[0], one.ids.at(-1)];
    const numbers = first === last ? `${first}` : `${first}–${last}`;
    const left =
      one.reports[0] === null && !one.references
        ? "unfinished"
        : !one.references && one.added
          ? "undone"
          : one.references === null || one.references === one.added
            ? count(one.added)
            : `${count(one.references)} of ${count(one.added)} left`;
    const button = one.references
      ? h("button", { type: "button", "aria-label": `Undo enrolment ${numbers}`, onclick: () => undoOne(one) }, "Undo")
      : "";
    return [h("span", { class: "arrow" }, numbers), when(one.at), one.what, one.source, left, arrow(recall), arrow(alarms), button];
  });
  return table(
    "Enrolments, newest first",
    ["No.", "When", "What", "Source", "Images", ...EFFECT, "Undo"],
    rows,
    { numeric: [4], className: "stacking", hideCaption: true },
  );
}

async function undoOne(one) {
  try {
    const removed = await undo(one.ids, `${plural(one.references, "image")} (${one.what})`);
    if (removed === null) return;
    announce(`Undone: ${plural(removed, "reference")} removed`);
    form.clear(); // its report may be of this one
    await load();
    document.getElementById("title-history").scrollIntoView({ block: "nearest" });
  } catch (problem) {
    history.prepend(problemBox(problem));
  }
}
