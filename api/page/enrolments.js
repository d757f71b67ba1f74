/** What an enrolment did and changed, from its report. Of an older or unfinished one parts are missing. */

import { call } from "./client.js";
import { bar, confirmed, fileName, h } from "./dom.js";
import { count, day, percent, plural } from "./words.js";

/** Recall and false alarms before and after, {recall: [before, after], false_alarms: [before, after]}, each or both null. */
export function effect(report) {
  const pair = (value) => (value && typeof value.after === "number" ? [value.before ?? null, value.after] : null);
  const changed = report?.effect ?? report ?? {};
  return { recall: pair(changed.recall), false_alarms: pair(changed.false_alarms ?? changed.false_alarm) };
}

/** "41 % → 96 %", or a dash where it was not measured. */
export function arrow(pair) {
  if (!pair) return h("span", { class: "none" }, "not measured");
  return h("span", { class: "arrow" }, percent(pair[0]), h("span", { "aria-hidden": "true" }, " → "), h("span", { class: "unseen" }, " then "), percent(pair[1]));
}

/** Before and after as bars. */
export function effectBars(report) {
  const { recall, false_alarms: alarms } = effect(report);
  if (!recall && !alarms) return h("p", { class: "hint" }, "How recall and false alarms changed was not measured for this enrolment.");
  const lines = (title, pair, kind, says) => pair && h("div", { class: "effect" },
    h("h4", {}, title),
    ["before", "after"].map((name, index) => pair[index] === null ? null : h("p", {}, h("span", { class: "name" }, name), bar(pair[index], kind), h("span", { class: "number" }, percent(pair[index])))),
    h("p", { class: "hint" }, says));
  return h("div", { class: "effects" },
    lines("Found as generated", recall, "fake", "Share of images of this generator that Lineup calls generated, each judged without itself."),
    lines("False alarms", alarms, "real", "Share of real calibration photos that Lineup wrongly calls generated."));
}

/** The integers of a report, and what was left out of it and why. */
export function reportWords(report) {
  const { added = 0, known = 0, embedded = 0, conflicts = [], rejected = [] } = report;
  const list = (title, rows) => rows.length > 0 && h("details", {}, h("summary", {}, title), h("ul", {}, rows));
  return [
    h("p", {}, [
      `${plural(added, "image")} added`,
      known ? `${count(known)} known already` : null,
      embedded ? `${count(embedded)} known, now also to this checkpoint` : null,
    ].filter(Boolean).join(", "), "."),
    list(`${plural(conflicts.length, "image is", "images are")} known as something else and left as they were`,
      conflicts.map(({ file, has, wants }) => h("li", {}, fileName(file), `: known as ${has}, not ${wants}`))),
    list(`${plural(rejected.length, "file")} could not be used`,
      rejected.map(({ file, reason }) => h("li", {}, fileName(file), `: ${reason}`))),
  ];
}

/** Undo enrolments, after asking. Answers how many references went, or null where the reader thought better of it. */
export async function undo(enrolments, what) {
  const sure = await confirmed("Undo this enrolment?", `${what} will be removed from the reference set, and vote no more. Past verdicts stay as they are.`, "Undo it");
  if (!sure) return null;
  let removed = 0;
  for (const id of enrolments) removed += (await (await call(`/v1/enrolments/${id}`, { method: "DELETE" })).json()).references;
  return removed;
}

/** First and last day on which images of a generator came. */
export function days(enrolments) {
  const times = enrolments.map(({ at }) => at).sort();
  return times.length ? [day(times[0]), day(times.at(-1))] : ["–", "–"];
}
