/** The view of what Lineup knows: generators, what each enrolment changed, and a form for the next one. */

import { ask } from "./client.js";
import { announce, h, table } from "./dom.js";
import { enrolment } from "./enrol.js";
import { arrow, days, effect, undo } from "./enrolments.js";
import { problemBox } from "./problems.js";
import { count, ended, plural, when } from "./words.js";

const view = document.getElementById("view-generators");
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
    history.replaceChildren(past(enrolments));
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
    const { recall, alarms } = effect(
      own.find(({ report }) => effect(report, generator.name).recall)?.report,
      generator.name,
    );
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
      ["Generator", "Images", "First added", "Last added", "Found: before → after", "False alarms: before → after"],
      rows,
      { numeric: [1], className: "stacking", hideCaption: true },
    ),
    h(
      "p",
      { class: "hint" },
      "Found: share of a generator’s images that the neighbours’ vote alone calls generated, without and with " +
        "its enrolment. The verdict also hears the other heads, and its cut keeps false alarms below the rate that " +
        "Status shows.",
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
    const { recall, alarms } = effect(one.report);
    const added = one.report?.added;
    const gone = one.references === 0 && added > 0;
    const state =
      one.report === null && !one.references
        ? "unfinished"
        : gone
          ? "undone"
          : one.references === null || one.references === added || added === undefined
            ? count(added ?? one.references)
            : `${count(one.references)} of ${count(added)} left`;
    const what = one.generator ?? mixed(one.report);
    const button = one.references
      ? h(
          "button",
          { type: "button", "aria-label": `Undo enrolment ${one.id}`, onclick: () => undoOne(one, what) },
          "Undo",
        )
      : "";
    return [one.id, when(one.at), what, one.source ?? "–", state, arrow(recall), arrow(alarms), button];
  });
  return table(
    "Enrolments, newest first",
    ["No.", "When", "What", "Source", "Images", "Found: before → after", "False alarms: before → after", "Undo"],
    rows,
    { numeric: [4], className: "stacking", hideCaption: true },
  );
}

function mixed(report) {
  const names = Object.keys(report?.generators ?? {}).map((name) => (name === "real" ? "real photos" : name));
  return names.length > 3 ? `${names.slice(0, 3).join(", ")} and ${names.length - 3} more` : names.join(", ") || "–";
}

async function undoOne(one, what) {
  try {
    const removed = await undo([one.id], `${plural(one.references, "image")} (${what})`);
    if (removed === null) return;
    announce(`Undone: ${plural(removed, "reference")} removed`);
    form.clear(); // its report may be of this one
    await load();
    document.getElementById("title-history").scrollIntoView({ block: "nearest" });
  } catch (problem) {
    history.prepend(problemBox(problem));
  }
}
