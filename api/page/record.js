/** One recorded verdict, shown again: what was said then, what was disputed, and what would be said now. */

import { ask } from "./client.js";
import { correction } from "./correction.js";
import { recent } from "./detect.js";
import { h, table } from "./dom.js";
import { problemBox } from "./problems.js";
import { account } from "./verdict.js";
import { decimal, labelWord, precision, when } from "./words.js";

const view = document.getElementById("view-record");
const place = h("div");

/** Build the view. */
export function setUp() {
  view.append(place);
}

/** Show the record of this id. */
export async function show(id) {
  place.replaceChildren(h("p", { class: "hint" }, "Looking it up…"));
  try {
    const { at, result, feedback } = await ask(`/v1/detections/${encodeURIComponent(id)}`);
    const { address = null, file = null } = recent.get(id) ?? {};
    const today = h("div", { class: "today", "aria-live": "polite" });
    place.replaceChildren(
      h(
        "p",
        { class: "lead" },
        `Judged on ${when(at)}. The image was not kept; its fingerprint (SHA-256) and the evidence were.`,
      ),
      ...(feedback
        ? [
            h("h2", {}, "What somebody said of it"),
            h("p", { class: "note plain" }, disputed(feedback)),
            correction(result, feedback.label, file),
          ]
        : []),
      h(
        "div",
        { class: "buttons" },
        h("button", { type: "button", onclick: () => replay(id, today) }, "Judge again with today’s references"),
      ),
      today,
      account(result, { address, file, at, record: true }),
    );
  } catch (problem) {
    place.replaceChildren(problemBox(problem, () => show(id)));
  }
}

function disputed(feedback) {
  const by = feedback.by ? ` (${feedback.by})` : "";
  return [
    `Somebody${by} says that it is ${labelWord(feedback.label)}.`,
    feedback.note ? ` “${feedback.note}”` : "",
  ].join("");
}

/** What each field of a replay means. */
const FIELDS = {
  verdict: "Verdict",
  basis: "Decided by",
  score: "Score",
  "thresholds.fake": "Generated from",
  "thresholds.real": "Real below",
  "heads.knn.score": "Vote of the neighbours",
  "heads.knn.label": "Vote says",
  "heads.nn1.id": "Nearest neighbour",
  "heads.nn1.label": "Nearest neighbour is",
  "heads.linear.score": "Linear classifier",
  "heads.svm.score": "Outlier test",
  "generators.0.name": "Likeliest generator",
  unknown_generator: "Unknown generator",
  novelty: "Novelty",
  "known.id": "Known as",
  "model.heads": "Heads",
  "index.revision": "Index revision",
  "index.size": "Reference images",
  "calibration.revision": "Calibration revision",
};

async function replay(id, place) {
  place.replaceChildren(h("p", { class: "hint" }, "Judging again…"));
  try {
    const { before, after, changed } = await ask(`/v1/detections/${encodeURIComponent(id)}/replay`, { method: "POST" });
    const shown = (value, other) =>
      typeof value === "number" && !(Number.isInteger(value) && (other === null || Number.isInteger(other)))
        ? decimal(value, precision([value], [other], 3))
        : value === null
          ? "–"
          : typeof value === "boolean"
            ? value
              ? "yes"
              : "no"
            : ["fake", "real", "uncertain"].includes(value)
              ? labelWord(value)
              : String(value);
    const same = before.verdict === after.verdict;
    place.replaceChildren(
      h(
        "p",
        {},
        h(
          "strong",
          {},
          same
            ? `The verdict stays: ${labelWord(after.verdict)}.`
            : `The verdict would change from ${labelWord(before.verdict)} to ${labelWord(after.verdict)}.`,
        ),
      ),
      changed.length
        ? table(
            "What is different today",
            ["Field", "Then", "Now"],
            changed.map(({ field, before, after }) => [FIELDS[field] ?? field, shown(before, after), shown(after, before)]),
            { numeric: [1, 2] },
          )
        : h("p", {}, "Nothing is different today."),
    );
  } catch (problem) {
    place.replaceChildren(problemBox(problem));
  }
}
