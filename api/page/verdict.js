/** One verdict, from the word down to the version that answered. */

import { ask } from "./client.js";
import { correction } from "./correction.js";
import { download, fileName, h, icon } from "./dom.js";
import { evidence } from "./evidence.js";
import { picture } from "./picture.js";
import { problemBox } from "./problems.js";
import { figure, headline, labelWord, meaning, percent, promise, rarity } from "./words.js";

/**
 * The whole account of one image.
 *
 * `address` is a blob of the image or null, `file` the same as a file, `rates` the error rates that the thresholds promise ({false_alarm, miss}),
 * `at` when it was judged, `record` whether this is shown from its record, `pending` whether regions and re-encoded
 * copies are still being scored, and `level` that of its heading.
 */
export function account(verdict, options = {}) {
  const { address = null, file = null, rates = null, at = null, record = false, pending = false, level = 2 } = options;
  const id = `verdict-${verdict.id}`;
  return h(
    "article",
    { class: `verdict ${verdict.verdict}`, "aria-labelledby": id },
    verdict.degraded
      ? note(
          verdict.heads.knn
            ? "The database is away. Lineup judged from memory: nothing was recorded, and whether this file is known " +
                "was not checked."
            : "The database or the search engine is away. Lineup judged without neighbours, and recorded nothing.",
        )
      : null,
    h(
      "div",
      { class: "ruling" },
      picture(verdict, address),
      h(
        "div",
        { class: "words" },
        h("p", { class: "of" }, fileName(verdict.file)),
        h(`h${level}`, { id, class: "headline" }, icon(verdict.verdict), h("span", {}, headline(verdict))),
        scoreWords(verdict),
        scale(verdict),
        h("p", { class: "meaning" }, `${meaning(verdict)} ${promise(verdict, rates)}`.trim()),
        cautions(verdict),
        pending ? coming() : actions(verdict, record, file),
      ),
    ),
    evidence(verdict, at, level + 1),
  );
}

function note(text) {
  return h("p", { class: "note" }, icon("problem"), h("span", {}, text));
}

/** In place of the buttons, most of which need the record. */
function coming() {
  return h(
    "p",
    { class: "coming" },
    h("span", { class: "spinner", "aria-hidden": "true" }),
    "Regions and re-encoded copies are still being scored.",
  );
}

function scoreWords(verdict) {
  if (verdict.score === null) return null;
  const known = verdict.basis === "known" ? "Judged as if it were not known: score " : "Score ";
  const means = rarity(verdict);
  return h(
    "p",
    { class: "score" },
    known,
    h("strong", {}, figure(verdict)),
    " of 1.",
    means ? ` ${means}` : null,
  );
}

/** The score on a line from real to generated, with the zones that the thresholds cut. */
function scale(verdict) {
  const { score, thresholds } = verdict;
  if (score === null) return null;
  const upper = thresholds.fake ?? 1;
  const lower = Math.min(thresholds.real ?? 0, upper);
  const zone = (kind, from, to, text) => {
    const element = h("span", { class: `zone ${kind}` }, to - from > 0.024 * text.length ? text : "");
    element.style.left = `${100 * from}%`;
    element.style.width = `${Math.max(0, 100 * (to - from))}%`;
    return element;
  };
  const marker = h("span", { class: "marker" });
  marker.style.left = `${100 * score}%`;
  return h(
    "div",
    { class: "scale", "aria-hidden": "true" },
    h(
      "div",
      { class: "zones" },
      zone("real", 0, lower, "real"),
      zone("uncertain", lower, upper, "cannot tell"),
      zone("fake", upper, 1, "generated"),
      marker,
    ),
    h("div", { class: "ends" }, h("span", {}, "0"), h("span", {}, "1")),
  );
}

function cautions(verdict) {
  const { novelty, stability, provenance } = verdict;
  return [
    verdict.unknown_generator
      ? note(
          "It looks generated, but unlike the images of every enrolled generator: perhaps one that Lineup does " +
            "not know.",
        )
      : null,
    novelty !== null && novelty < 0.05
      ? note(
          `Unlike the reference images: only ${percent(novelty)} of calibration images lie this far from their ` +
            `nearest one. The verdict stands on thin ground.`,
        )
      : null,
    onlySimulated(verdict)
      ? note(
          "Compared with simulated images only, as the demo makes them: this shows how Lineup works, and says nothing " +
            "about a photograph of yours.",
        )
      : null,
    stability?.flips && verdict.basis === "score"
      ? note("The verdict changes when the image is re-encoded or rescaled.")
      : null,
    provenance.says_generated
      ? h(
          "p",
          { class: "note plain" },
          icon("fake"),
          h("span", {}, "The file itself says that a generator made it. That did not enter the score."),
        )
      : null,
  ];
}

function onlySimulated({ neighbours }) {
  return neighbours.length > 0 && neighbours.every(({ source }) => source === "simulated");
}

function actions(verdict, record, file) {
  const form = h("div", { class: "dispute" });
  return [
    h(
      "div",
      { class: "buttons" },
      verdict.recorded && !record ? h("a", { class: "button", href: `#/record/${verdict.id}` }, "Record") : null,
      verdict.recorded || record
        ? h(
            "button",
            {
              type: "button",
              "aria-expanded": "false",
              onclick: (event) => dispute(event.currentTarget, form, verdict, file),
            },
            "This is wrong",
          )
        : null,
      h("button", { type: "button", onclick: (event) => printOne(event.currentTarget.closest(".verdict")) }, "Print"),
      h("button", { type: "button", onclick: () => download(verdict, `lineup-${verdict.id}.json`) }, "JSON"),
    ),
    form,
  ];
}

/** Print this verdict and nothing else of the page. */
function printOne(article) {
  article.classList.add("printed");
  document.body.classList.add("print-one");
  addEventListener(
    "afterprint",
    () => {
      article.classList.remove("printed");
      document.body.classList.remove("print-one");
    },
    { once: true },
  );
  print();
}

function dispute(button, place, verdict, file) {
  const open = place.childElementCount > 0;
  button.setAttribute("aria-expanded", String(!open));
  if (open) return place.replaceChildren();
  const choice = (label, text) =>
    h(
      "label",
      { class: "choice" },
      h("input", {
        type: "radio",
        name: `truth-${verdict.id}`,
        value: label,
        required: true,
        checked: verdict.verdict === (label === "fake" ? "real" : "fake"),
      }),
      ` ${text}`,
    );
  const noteField = h("textarea", { rows: 2, maxlength: 2000 });
  const outcome = h("div", { "aria-live": "polite" });
  const form = h(
    "form",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        const label = new FormData(form).get(`truth-${verdict.id}`);
        try {
          await ask(`/v1/detections/${verdict.id}/feedback`, {
            method: "POST",
            json: { label, note: noteField.value },
          });
          place.replaceChildren(
            h(
              "p",
              { class: "done", tabindex: "-1" },
              `Noted: you say it is ${labelWord(label)}. The record keeps this; verdicts do not change by it.`,
            ),
            correction(verdict, label, file),
          );
          place.firstChild.focus();
          button.setAttribute("aria-expanded", "false");
        } catch (problem) {
          outcome.replaceChildren(problemBox(problem));
        }
      },
    },
    h(
      "fieldset",
      {},
      h("legend", {}, "What is it really?"),
      choice("fake", "Generated"),
      choice("real", "A real photo"),
    ),
    h("label", {}, "How do you know? ", noteField),
    h("div", { class: "buttons" }, h("button", { type: "submit", class: "primary" }, "Send")),
    outcome,
  );
  place.replaceChildren(form);
  form.querySelector("input:checked, input").focus();
}
