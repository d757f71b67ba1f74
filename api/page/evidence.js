/** What speaks for a verdict: line-up, heads, re-encodings, what the file says, and the version that answered. */

import { badge, bar, facts, h, table } from "./dom.js";
import { generatorShares, indexWords, lineUp } from "./lineup.js";
import {
  CREDENTIALS,
  HEADS,
  count,
  decimal,
  figure,
  labelWord,
  pValue,
  percent,
  precision,
  sentence,
  signed,
  stabilityWords,
  variantName,
  when,
} from "./words.js";

/** Sections with headings of this level. `at` is when it was judged, or null. */
export function evidence(verdict, at, level) {
  const title = (text) => h(`h${level}`, {}, text);
  return [
    h(
      "section",
      { class: "why" },
      title("Why: the line-up"),
      h(
        "p",
        { class: "lead" },
        `The most alike of ${indexWords(verdict)}. Alike in the traces that the model compares, not in what they ` +
          "show: 1 is the same, 0 is nothing in common." +
          (verdict.image.shortfall ? " With so little to see, that says nothing here." : ""),
      ),
      lineUp(verdict),
    ),
    h(
      "div",
      { class: "columns" },
      h("section", { class: "heads" }, title("Four ways to judge"), heads(verdict)),
      h("section", {}, title("Which generator, if any"), generatorShares(verdict)),
      verdict.stability ? h("section", { class: "stability" }, title("Does it hold?"), stability(verdict)) : null,
      h("section", { class: "provenance" }, title("What the file says of itself"), provenance(verdict.provenance)),
    ),
    h("section", { class: "version" }, title("What answered"), version(verdict, at)),
  ];
}

function heads(verdict) {
  const list = h(
    "ul",
    { class: "head-list" },
    HEADS.map(({ name, field, how, said, missing }) => {
      const head = verdict.heads[field];
      return h(
        "li",
        {},
        h(
          "div",
          { class: "line" },
          h("strong", {}, name),
          head ? badge(head.label) : h("span", { class: "none" }, "no answer"),
        ),
        h(
          "p",
          {},
          head ? `${sentence(said(head, verdict))}` : `It ${missing.startsWith("there") ? "cannot answer: " : ""}${missing}.`,
          head ? probabilityWords(head) : "",
          typeof head?.contribution === "number" ? ` It adds ${signed(head.contribution)} to the sum.` : "",
        ),
        h("p", { class: "how" }, how),
      );
    }),
  );
  return [h("p", { class: "lead" }, joinedWords(verdict)), list, sum(verdict)];
}

/** How the score comes of what the heads add. */
function sum({ combination, heads, score, thresholds }) {
  if (!combination || score === null) return null;
  const parts = HEADS.map(({ field }) => heads[field]?.contribution).filter((part) => typeof part === "number");
  return h(
    "p",
    { class: "sum" },
    `The sum: ${parts.map(signed).join(" ")} ${signed(combination.bias)} (bias, from the calibration images) = ` +
      `${signed(combination.logit)}. As a share of 1 that is the score, ${figure({ score, thresholds })}.`,
  );
}

/** What calibration made of a head's own score, and a word where the two disagree. */
function probabilityWords({ label, probability }) {
  if (probability === null || probability === undefined) return "";
  const words = ` Calibrated, the probability of “generated” is ${decimal(probability, precision([probability], [0.5]))}`;
  if (probability >= 0.5 === (label === "fake")) return `${words}.`;
  return `${words}: this way alone says “${labelWord(label)}” of too many others to be trusted here.`;
}

function joinedWords({ score, calibration, image }) {
  if (image.shortfall) return "Each by itself, and none can be trusted with so little to see.";
  if (score === null) return "Each by itself.";
  const learned = calibration
    ? `, learned from ${count(calibration.real)} real and ${count(calibration.fake)} generated images of known origin`
    : "";
  return (
    `The score joins the vote, the classifier and the outlier test by how far each can be trusted${learned}. It is ` +
    "not their majority."
  );
}

function stability(verdict) {
  const rows = [
    ["As it came", verdict.score],
    ...Object.entries(verdict.stability.scores).map(([name, score]) => [variantName(name), score]),
  ];
  const { fake, real } = verdict.thresholds;
  const digits = precision(
    rows.map(([, score]) => score),
    [fake, real],
  );
  const decided = (score) =>
    fake !== null && score >= fake ? "fake" : real !== null && score < real ? "real" : "uncertain";
  return [
    h("p", { class: "lead" }, stabilityWords(verdict)),
    h(
      "ul",
      { class: "strip" },
      rows.map(([name, score]) =>
        h(
          "li",
          {},
          h("span", { class: "name" }, name),
          score === null ? bar(0) : bar(score, decided(score)),
          h("span", { class: "number" }, decimal(score, digits)),
          score === null ? h("span", { class: "none" }, "no score") : badge(decided(score)),
        ),
      ),
    ),
  ];
}

function provenance({ c2pa, metadata }) {
  if (!c2pa && !metadata)
    return h(
      "p",
      {},
      "Nothing: no Content Credentials and no trace of software. That is usual and proves nothing, for such " +
        "marks are easily removed.",
    );
  return [
    c2pa
      ? [
          h("p", {}, h("strong", {}, "Content Credentials. "), CREDENTIALS[c2pa.state] ?? c2pa.state),
          facts([
            ["Made with", c2pa.generator],
            ["Signed by", c2pa.signer],
            ["Signed at", c2pa.signed_at],
            ["Title", c2pa.title],
            ["Actions", c2pa.actions.join(", ")],
            ["Kind of source", c2pa.source_types.join(", ")],
            ["Found wrong", c2pa.issues.join(", ")],
          ]),
        ]
      : h("p", {}, "No Content Credentials."),
    metadata ? table("Fields found in the file", ["Field", "Value"], Object.entries(metadata)) : null,
    h(
      "p",
      { class: "how" },
      "Such statements are easily removed or forged. They stand beside the verdict and never enter the score.",
    ),
  ];
}

function version(verdict, at) {
  const { model, image, calibration, timings_ms: times } = verdict;
  const spent = Object.values(times ?? {}).reduce((sum, value) => sum + value, 0);
  const shifted =
    verdict.probability !== null &&
    verdict.probability !== undefined &&
    Math.abs(verdict.probability - (verdict.score ?? verdict.probability)) > 1e-6;
  return facts([
    ["Checkpoint", [`${model.name} `, h("code", {}, model.checkpoint)]],
    ["Heads", model.heads ? h("code", {}, model.heads) : "none"],
    ["Engine", model.engine],
    ["Index", indexWords(verdict)],
    [
      "Calibration",
      calibration
        ? `${count(calibration.real)} real and ${count(calibration.fake)} generated images, at revision ` +
          `${calibration.revision}`
        : "none",
    ],
    ["Probability", shifted ? `${decimal(verdict.probability)} at the prior that the operator set` : null],
    [
      "Novelty",
      verdict.novelty === null
        ? null
        : `${pValue(verdict.novelty)}: ${percent(verdict.novelty)} of calibration images lie as far off`,
    ],
    ["Image", `${count(image.width)} × ${count(image.height)} ${image.format}`],
    ["SHA-256", h("code", {}, image.sha256)],
    ["Judged", at ? `${when(at)}, in ${Math.round(spent)} ms` : `in ${Math.round(spent)} ms`],
    ["Verdict", h("code", {}, verdict.id)],
  ]);
}
