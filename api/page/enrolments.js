/** What an enrolment did and changed, from its report. Of an older or unfinished one parts are missing. */

import { call } from "./client.js";
import { bar, confirmed, fileName, h, icon } from "./dom.js";
import { count, day, ended, percent, plural } from "./words.js";

/**
 * Recall and false alarms of the neighbours' vote: {recall, alarms}, each [before, after] or null, and {held}, the
 * recall of a fifth that was masked for the measure. Of several generators it is the mean.
 */
export function effect(report, name = null) {
  const rows = (report?.effect?.recall ?? []).filter(
    (row) => row.generator !== "real" && (name === null || row.generator === name),
  );
  const mean = (when) => {
    const known = rows.filter((row) => typeof row.knn?.[when] === "number");
    const images = known.reduce((sum, row) => sum + row.images, 0);
    return images ? known.reduce((sum, row) => sum + row.images * row.knn[when], 0) / images : null;
  };
  const alarms = report?.effect?.false_alarms?.knn ?? null;
  const pair = (before, after) => (after === null || after === undefined ? null : [before ?? null, after]);
  return {
    recall: pair(mean("before"), mean("after")),
    held: mean("held_back"),
    alarms: pair(alarms?.before, alarms?.after),
  };
}

/** "41 % → 96 %", or that it was not measured. */
export function arrow(pair) {
  if (!pair) return h("span", { class: "none" }, "not measured");
  if (pair[0] === null) return percent(pair[1]);
  return h(
    "span",
    { class: "arrow" },
    percent(pair[0]),
    h("span", { "aria-hidden": "true" }, " → "),
    h("span", { class: "unseen" }, " then "),
    percent(pair[1]),
  );
}

/** Before and after as bars, from the first and last report of an enrolment in parts. `name` is its generator. */
export function effectBars(reports, name) {
  const [first, last] = [effect(reports[0]), effect(reports.at(-1))];
  const lines = (title, kind, says, rows) =>
    h(
      "div",
      { class: "effect" },
      h("h4", {}, title),
      rows
        .filter(([, value]) => value !== null && value !== undefined)
        .map(([name, value]) =>
          h(
            "p",
            {},
            h("span", { class: "name" }, name),
            bar(value, kind),
            h("span", { class: "number" }, percent(value)),
          ),
        ),
      h("p", { class: "hint" }, says),
    );
  const parts = [
    last.recall &&
      lines(
        "Found as generated",
        "fake",
        "Share of these images that the vote of the neighbours calls generated, each judged without itself. " +
          "“Held back”: of a fifth of them, judged without the whole fifth.",
        [
          ["before", first.recall?.[0]],
          ["after", last.recall[1]],
          ["held back", last.held],
        ],
      ),
    last.alarms &&
      lines(
        "False alarms",
        "real",
        "Share of real calibration photos that the vote of the neighbours calls generated.",
        [
          ["before", first.alarms?.[0]],
          ["after", last.alarms[1]],
        ],
      ),
  ].filter(Boolean);
  // The others were there before; the list of generators tells them.
  const warnings = (reports.at(-1)?.warnings ?? []).filter((warning) => name && warning.includes(name));
  return [
    parts.length
      ? h("div", { class: "effects" }, parts)
      : h("p", { class: "hint" }, "How recall and false alarms changed was not measured for this enrolment."),
    warnings.map((warning) => h("p", { class: "note" }, icon("problem"), h("span", {}, ended(warning)))),
  ];
}

/** The integers of a report, and what was left out of it and why. */
export function reportWords(report) {
  const { added = 0, known = 0, embedded = 0, conflicts = [], rejected = [] } = report;
  const list = (title, rows) => rows.length > 0 && h("details", {}, h("summary", {}, title), h("ul", {}, rows));
  return [
    h(
      "p",
      {},
      [
        `${plural(added, "image")} added`,
        known ? `${count(known)} known already` : null,
        embedded ? `${count(embedded)} known, now also to this checkpoint` : null,
      ]
        .filter(Boolean)
        .join(", "),
      ".",
    ),
    list(
      `${plural(conflicts.length, "image is", "images are")} known as something else and left as they were`,
      conflicts.map(({ file, has, wants }) => h("li", {}, fileName(file), `: known as ${has}, not ${wants}`)),
    ),
    list(
      `${plural(rejected.length, "file")} could not be used`,
      rejected.map(({ file, reason }) => h("li", {}, fileName(file), `: ${reason}`)),
    ),
  ];
}

/** Undo enrolments, after asking. Answers how many references went, or null where the reader thought better of it. */
export async function undo(enrolments, what) {
  const sure = await confirmed(
    "Undo this enrolment?",
    `${what} will be removed from the reference set, and vote no more. Past verdicts stay as they are.`,
    "Undo it",
  );
  if (!sure) return null;
  let removed = 0;
  for (const id of enrolments)
    removed += (await (await call(`/v1/enrolments/${id}`, { method: "DELETE" })).json()).references;
  return removed;
}

/** First and last day on which images of a generator came. */
export function days(enrolments) {
  const times = enrolments.map(({ at }) => at).sort();
  return times.length ? [day(times[0]), day(times.at(-1))] : ["–", "–"];
}
