/** What an enrolment did and changed, from its report. Of an older or unfinished one parts are missing. */

import { call } from "./client.js";
import { bar, confirmed, fileName, h, icon } from "./dom.js";
import { count, day, ended, percent, plural } from "./words.js";

/**
 * Recall and false alarms of the neighbours' vote: {recall, alarms}, each [before, after] or null, and {held}, the
 * recall of a fifth that was masked for the measure; {called, calledHeld}, the same of verdicts. Each is a share of so
 * many {share, images}, or null; of several generators that of all their images.
 */
function effect(report, name = null) {
  const rows = (report?.effect?.recall ?? []).filter(
    (row) => row.generator !== "real" && (name === null || row.generator === name),
  );
  const judged = (report?.effect?.verdicts ?? []).filter((row) => rows.some((one) => one.generator === row.generator));
  const alarms = report?.effect?.false_alarms;
  const recall = (when, images) => ofAll(rows.map((row) => ({ share: row.knn?.[when], images: row[images] })));
  const called = (when) => ofAll(judged.map((row) => ({ share: row[when]?.fake, images: row[when]?.images })));
  const alarm = (when) => ofAll([{ share: alarms?.knn?.[when], images: alarms?.images }]);
  const pair = (before, after) => after && [before, after];
  return {
    recall: pair(recall("before", "images"), recall("after", "images")),
    held: recall("held_back", "images_held_back"),
    alarms: pair(alarm("before"), alarm("after")),
    called: pair(called("before"), called("after")),
    calledHeld: called("held_back"),
  };
}

/** The share of all images of these kinds {share, images}; null where no share of any was measured. */
function ofAll(kinds) {
  const known = kinds.filter(({ share, images }) => typeof share === "number" && images);
  const sum = (value) => known.reduce((total, kind) => total + value(kind), 0);
  const images = sum((kind) => kind.images);
  return images ? { share: sum((kind) => kind.images * kind.share) / images, images } : null;
}

/** The same of an enrolment in parts, in order of time: before the first, after the last. */
export function effectOver(reports, name = null) {
  const [first, last] = [effect(reports[0], name), effect(reports.at(-1), name)];
  const pair = (kind) => last[kind] && [first[kind]?.[0] ?? null, last[kind][1]];
  const { held, calledHeld } = last;
  return { recall: pair("recall"), held, alarms: pair("alarms"), called: pair("called"), calledHeld };
}

/** The first enrolment of each folder that this page sent in parts, by the number of each part. */
const folders = new Map();

/** Note the enrolments that one folder became, in order of time. */
export function ofOneFolder(ids) {
  for (const id of ids) folders.set(id, ids[0]);
}

/** Surely parts of one: what is undone together. */
export const sentTogether = (later, one) => folders.has(one.id) && folders.get(one.id) === folders.get(later.ids[0]);

/** Probably parts of one: nothing but a figure hangs on it. A request takes a minute at most. */
export const oneAfterTheOther = (later, one) => new Date(later.at) - new Date(one.at) < 90_000;

/**
 * Enrolments, newest first, with those of the same origin that are parts of one put together.
 *
 * Each is {ids, at, what, source, added, references, reports}; ids and reports in order of time. `parts` tells of a
 * whole and the enrolment before it whether they belong together.
 */
export function whole(enrolments, parts) {
  const groups = [];
  for (const one of enrolments) {
    const what = one.generator ?? mixed(one.report);
    const later = groups.at(-1);
    const here = {
      ids: [one.id],
      at: one.at,
      what,
      source: one.source ?? listed(Object.keys(one.report?.sources ?? {})),
      added: one.report?.added ?? one.references ?? 0,
      references: one.references,
      reports: [one.report],
    };
    const together =
      later &&
      later.what === what &&
      later.source === here.source &&
      Boolean(later.references) === Boolean(one.references) &&
      later.reports.every(Boolean) &&
      one.report &&
      parts(later, one);
    if (!together) groups.push(here);
    else {
      later.ids.unshift(one.id);
      later.reports.unshift(one.report);
      later.at = one.at;
      later.added += here.added;
      later.references += here.references;
    }
  }
  return groups;
}

function mixed(report) {
  return listed(Object.keys(report?.generators ?? {}).map((name) => (name === "real" ? "real photos" : name)));
}

function listed(names) {
  return names.length > 3 ? `${names.slice(0, 3).join(", ")} and ${names.length - 3} more` : names.join(", ") || "–";
}

/** "3 of 6 (50 %)": few images make any share. */
const inFull = ({ share, images }) => `${count(Math.round(share * images))} of ${count(images)} (${percent(share)})`;

/** "0 of 6 (0 %) → 3 of 6 (50 %)", "3 of 6 (50 %) after" where only that was measured, or that neither was. */
export function arrow(pair) {
  if (!pair) return h("span", { class: "none" }, "not measured");
  const [before, after] = pair;
  if (!before) return `${inFull(after)} after`;
  return h(
    "span",
    {},
    h("span", { class: "arrow" }, inFull(before), h("span", { "aria-hidden": "true" }, " →")),
    h("span", { class: "unseen" }, " then"),
    " ",
    h("span", { class: "arrow" }, inFull(after)),
  );
}

/** Before and after as bars, from the first and last report of an enrolment in parts. `name` is its generator. */
export function effectBars(reports, name) {
  const { recall, held, alarms, called, calledHeld } = effectOver(reports);
  const lines = (title, kind, says, rows) =>
    h(
      "div",
      { class: "effect" },
      h("h4", {}, title),
      rows
        .filter(([, part]) => part)
        .map(([name, part]) =>
          h(
            "p",
            {},
            h("span", { class: "name" }, name),
            bar(part.share, kind),
            h("span", { class: "number" }, inFull(part)),
          ),
        ),
      h("p", { class: "hint" }, says),
    );
  const parts = [
    recall &&
      lines(
        "Found by the vote",
        "fake",
        "How many of these images the vote of the neighbours calls generated, each judged without itself. " +
          "“Held back”: of a fifth of them, judged without the whole fifth.",
        [
          ["before", recall[0]],
          ["after", recall[1]],
          ["held back", held],
        ],
      ),
    called &&
      lines(
        "Called generated",
        "fake",
        "How many of these images have the verdict “generated”; most others are undecided. It takes more than the vote: " +
          "where few have it, training with such images helps, and more of them here do not.",
        [
          ["before", called[0]],
          ["after", called[1]],
          ["held back", calledHeld],
        ],
      ),
    alarms &&
      lines(
        "False alarms of the vote",
        "real",
        "How many real calibration photos the vote of the neighbours calls generated.",
        [
          ["before", alarms[0]],
          ["after", alarms[1]],
        ],
      ),
  ].filter(Boolean);
  // The others were there before; the list of generators tells them.
  const warnings = (reports.at(-1)?.warnings ?? []).filter((warning) => name && warning.includes(name));
  return [
    parts.length
      ? h("div", { class: "effects" }, parts)
      : h("p", { class: "hint" }, "How recall and false alarms changed was not measured for this enrolment."),
    parts.length > 0 &&
      reports.length > 1 &&
      h("p", { class: "hint" }, `Sent in ${reports.length} parts: “before” is of the first, the others are of the last.`),
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
