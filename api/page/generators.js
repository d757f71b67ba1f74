/** The view of what Lineup knows: generators, what each enrolment changed, and a form for the next one. */

import { ask } from "./client.js";
import { announce, h, table } from "./dom.js";
import { enrolment } from "./enrol.js";
import { arrow, days, effectOver, oneAfterTheOther, sentTogether, undo, whole } from "./enrolments.js";
import { problemBox } from "./problems.js";
import { count, ended, plural, when } from "./words.js";

const view = document.getElementById("view-generators");
/** Of an enrolment, in two columns. */
const EFFECT = ["Found by the vote: before → after", "False alarms of the vote: before → after"];
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
      ask("/v1/status"),
    ]);
    form.offer(generators.map(({ name }) => name));
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
    ];
  });
  const [first, last] = days(broughtBy("real", enrolments));
  rows.push(["Real photos", count(real), first, last, "", ""]);
  const warnings = enrolments.find(({ report }) => report?.warnings)?.report.warnings ?? [];
  return [
    table(
      "Reference images by generator",
      ["Generator", "Images", "First added", "Last added", ...EFFECT],
      rows,
      { numeric: [1], className: "stacking", hideCaption: true },
    ),
    h(
      "p",
      { class: "hint" },
      "The vote is one of four ways to judge. Found: share of a generator’s images that it calls generated, before " +
        "and after they were enrolled; false alarms: share of real photos that it calls generated. Where both are " +
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
    return [h("span", { class: "arrow" }, numbers), when(one.at), one.what, one.source ?? "–", left, arrow(recall), arrow(alarms), button];
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
