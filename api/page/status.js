/** The view of the service itself: what answers, from how many references, how well calibrated, what it said lately. */

import { ask, serviceState } from "./client.js";
import { announce, badge, facts, fileName, h, table } from "./dom.js";
import { reliabilityPlot, scorePlot } from "./plot.js";
import { problemBox } from "./problems.js";
import { count, decimal, figure, labelWord, oneIn, percent, sentence, when } from "./words.js";

const PAGE = 20;
const view = document.getElementById("view-status");
const state = h("div");
const calibration = h("section", { "aria-labelledby": "title-calibration" });
const recent = h("section", { "aria-labelledby": "title-recent" });

/** Build the view. */
export function setUp() {
  view.append(
    h(
      "div",
      { class: "buttons" },
      h(
        "button",
        {
          type: "button",
          onclick: async () => {
            await show();
            announce("Refreshed");
          },
        },
        "Refresh",
      ),
    ),
    state,
    calibration,
    recent,
  );
}

/** Called each time the view is shown. */
export async function show() {
  await Promise.all([
    fill(state, async () => cards(await serviceState())),
    fill(
      calibration,
      async () => calibrated(await ask("/v1/calibration")),
      h("h2", { id: "title-calibration" }, "Calibration"),
    ),
    showRecent(),
  ]);
}

async function fill(place, make, ...before) {
  try {
    place.replaceChildren(...before, ...[await make()].flat());
  } catch (problem) {
    place.replaceChildren(...before, problemBox(problem, show));
  }
}

/** Whether the last complete day was like the four weeks before it. */
function drifted({ day, rate, p_values: { before } }) {
  if (before === null) return "too few verdicts are kept to tell whether it changed";
  const like = before < rate ? "unlike" : "like";
  return `on ${day} ${like} the four weeks before (p ${decimal(before, 3)})`;
}

function cards(status) {
  const { index, references, model } = status;
  const lag = status.revision - index.revision;
  return [
    status.degraded ? h("p", { class: "note" }, "The database or the search engine is away: numbers below may be the last that were seen.") : null,
    h(
      "div",
      { class: "cards" },
      h(
        "section",
        { class: "card" },
        h("h2", {}, "References"),
        h("p", { class: "big" }, count(references.real + references.fake)),
        h(
          "p",
          {},
          `${count(references.real)} real photos and ${count(references.fake)} generated images by ` +
            `${count(status.generators.filter((one) => one.references).length)} generators`,
        ),
      ),
      h(
        "section",
        { class: "card" },
        h("h2", {}, "Index"),
        h("p", { class: "big" }, `Revision ${index.revision}`),
        h("p", {}, lag > 0 ? `${lag} behind the database` : "up to date with the database"),
        facts([
          ["Images", count(index.size)],
          ["Kind", index.kind],
          ["Device", index.device],
          ["Neighbours that vote", status.k],
          ["What came in", status.drift && drifted(status.drift)],
        ]),
      ),
      h(
        "section",
        { class: "card" },
        h("h2", {}, "Checkpoint"),
        h("p", { class: "big" }, model?.name ?? "–"),
        facts([
          ["Id", h("code", {}, status.checkpoint)],
          ["Heads", model?.heads ? h("code", {}, model.heads) : "none"],
          ["Engine", model?.engine],
          ["Lineup", status.version],
        ]),
      ),
    ),
  ].filter(Boolean);
}

function calibrated(found) {
  const { calibration: base, thresholds } = found;
  const promise = (threshold, text) =>
    threshold === null ? "cannot be promised with so few calibration images" : text;
  return [
    base
      ? h(
          "p",
          { class: "lead" },
          `Fitted with ${count(base.real)} real and ${count(base.fake)} generated images that trained neither ` +
            `model nor heads, each judged without itself and its own group, at revision ${base.revision}. Generators that ` +
            "were enrolled after training are among them. " +
            (base.new_sources
              ? "At most that many false alarms are promised for photos of the sources they are from, and for nine of " +
                `ten new sources, judging by ${count(base.new_sources)} sources.`
              : "At most that many false alarms are promised for photos of the sources they are from alone: under 9 " +
                "sources say nothing of a new one."),
        )
      : h("p", { class: "lead" }, "Nothing is calibrated: every verdict is “cannot tell”."),
    found.reason ? h("p", { class: "note" }, sentence(found.reason)) : null,
    facts([
      [
        "“Generated” from",
        promise(
          thresholds.fake,
          `score ${decimal(thresholds.fake, 3)}: at most ${oneIn(found.max_false_alarm)} real photos wrongly ` +
            `called generated`,
        ),
      ],
      [
        "“Real” below",
        promise(
          thresholds.real,
          `score ${decimal(thresholds.real, 3)}: at most ${oneIn(found.max_miss)} generated images wrongly called real`,
        ),
      ],
      ["Prior", `${percent(found.prior)} of images generated, before looking`],
    ]),
    found.histogram
      ? h(
          "div",
          { class: "plots" },
          h("div", {}, h("h3", {}, "How far apart real and generated images score"), scorePlot(found)),
          h("div", {}, h("h3", {}, "Does a score mean what it says?"), reliabilityPlot(found)),
        )
      : null,
  ].filter(Boolean);
}

async function showRecent(after = null) {
  await fill(
    recent,
    async () => {
      const { detections, next } = await ask("/v1/detections", { query: { limit: PAGE, after } });
      if (!detections.length) return h("p", { class: "none" }, "None yet.");
      const rows = detections.map((one) => [
        h("a", { href: `#/record/${one.id}` }, fileName(one.file ?? "unnamed")),
        when(one.at),
        badge(one.verdict),
        figure(one),
        one.feedback ? `disputed: ${labelWord(one.feedback.label)}` : "",
      ]);
      return [
        table("Recent verdicts, newest first", ["File", "When", "Verdict", "Score", "Feedback"], rows, {
          numeric: [3],
          className: "stacking",
          hideCaption: true,
        }),
        h(
          "nav",
          { class: "pager", "aria-label": "Pages of recent verdicts" },
          h("button", { type: "button", disabled: after === null, onclick: () => showRecent() }, "Newest"),
          h("button", { type: "button", disabled: next === null, onclick: () => showRecent(next) }, "Older →"),
        ),
      ];
    },
    h("h2", { id: "title-recent" }, "Recent verdicts"),
  );
}
