/** Groups of judged images that no reference explains: each may be a generator that nobody has enrolled. */

import { ask, showThumbnail } from "./client.js";
import { recent } from "./detect.js";
import { announce, badge, facts, fileName, generatorInput, h } from "./dom.js";
import { effectBars, reportWords, undo } from "./enrolments.js";
import { suspect } from "./lineup.js";
import { problemBox } from "./problems.js";
import { count, decimal, labelWord, pValue, percent, plural, when } from "./words.js";

const view = document.getElementById("view-candidates");
const place = h("div", { class: "candidates", "aria-live": "polite" });

/** Build the view. */
export function setUp() {
  view.append(
    h(
      "p",
      { class: "lead" },
      "Among the verdicts kept, these images are alike, and nothing that Lineup knows explains them: a generator that " +
        "nobody has enrolled, perhaps, or the photographs of one camera. Look at them, then enrol what you know to be " +
        "generated.",
    ),
    place,
  );
}

/** Called each time the view is shown. */
export async function show() {
  place.replaceChildren(h("p", { class: "hint" }, "Grouping the latest images, which takes some seconds…"));
  try {
    const { candidates, images, ungrouped, left_out: leftOut } = await ask("/v1/candidates");
    const older = leftOut ? ` ${plural(leftOut, "older one")} were not looked at.` : "";
    place.replaceChildren(
      h(
        "p",
        { class: "tally" },
        candidates.length
          ? `${plural(candidates.length, "group")} among ${plural(images, "image")} that no reference explains; ` +
              `${count(ungrouped)} are in none.${older}`
          : `No group among ${plural(images, "image")} that no reference explains: it takes at least 5 that are alike.${older}`,
      ),
      ...candidates.map(account),
    );
  } catch (problem) {
    place.replaceChildren(problemBox(problem, show));
  }
}

/** One group, with a form that enrols it. */
function account(candidate) {
  const outcome = h("div");
  const generator = generatorInput({ name: "generator" });
  const enrol = async (event) => {
    event.preventDefault();
    button.disabled = true;
    try {
      outcome.replaceChildren(...(await enrolled(candidate, generator.value.trim(), form, outcome)));
    } catch (problem) {
      outcome.replaceChildren(problemBox(problem));
    }
    button.disabled = false;
  };
  const button = h("button", { type: "submit", class: "primary" }, "Enrol these images");
  const form = h(
    "form",
    { class: "buttons", onsubmit: enrol },
    h("label", {}, "Made by the generator ", generator),
    button,
  );
  const title = `candidate-${candidate.name}`;
  const nearest = candidate.nearest.map(
    ({ label, generator, images }) => `${label === "fake" ? (generator ?? "generated") : "real photos"} ${count(images)}`,
  );
  return h(
    "section",
    { class: "report candidate", "aria-labelledby": title },
    h("h2", { id: title }, plural(candidate.images, "image"), " ", h("code", {}, candidate.name)),
    facts([
      ["First seen", when(candidate.first)],
      ["Last seen", when(candidate.last)],
      ["Verdicts", Object.entries(candidate.verdicts).map(([kind, images]) => `${labelWord(kind)} ${images}`).join(", ")],
      ["Nearest references", nearest.join(", ")],
      ["Alike to the nearest", decimal(candidate.similarity, 3)],
      [
        "Far from all that is known",
        candidate.novelty === null
          ? null
          : `${pValue(candidate.novelty)}: ${percent(candidate.novelty)} of calibration images lie as far off`,
      ],
    ]),
    h("h3", {}, candidate.examples.length < candidate.images ? "Some of its images" : "Its images"),
    h("ul", { class: "judged" }, candidate.examples.map(judged)),
    h("details", {}, h("summary", {}, "The references nearest to them"), lineUp(candidate)),
    form,
    outcome,
  );
}

/** An image that was judged, as a link to the record, with its picture where the service or this tab has it. */
function judged({ detection, file, verdict, thumbnail }) {
  const address = thumbnail ? null : recent.get(detection)?.address; // perhaps of a format that browsers do not show
  const picture = (thumbnail || address) && h("img", { alt: "", src: address, width: 96, height: 96 });
  if (thumbnail) showThumbnail(picture, thumbnail);
  return h("li", {}, picture, h("a", { href: `#/record/${detection}` }, fileName(file)), badge(verdict));
}

function lineUp({ examples }) {
  const references = new Map(examples.filter(({ nearest }) => nearest).map(({ nearest }) => [nearest.id, nearest]));
  return h(
    "ol",
    { class: "suspects", tabindex: "0", "aria-label": "Nearest references" },
    [...references.values()].map((nearest) => suspect(nearest)),
  );
}

/** Enrol a group; what is shown of it then, with a button that undoes it. */
async function enrolled(candidate, generator, form, outcome) {
  const path = `/v1/candidates/${candidate.name}/enrol`;
  const report = await ask(path, { method: "POST", json: { generator } });
  form.hidden = true;
  announce(`${plural(report.added, "image")} enrolled as ${generator}`);
  const takeBack = async () => {
    try {
      const removed = await undo([report.enrolment], `${plural(report.added, "image")} of ${generator}`);
      if (removed === null) return;
      form.hidden = false;
      outcome.replaceChildren(h("p", { class: "done" }, `Undone: ${plural(removed, "reference")} removed.`));
    } catch (problem) {
      outcome.append(problemBox(problem));
    }
  };
  return [
    h("h3", {}, report.added ? `Enrolled: ${generator}` : "Nothing was enrolled"),
    h("div", {}, reportWords(report)),
    ...(report.added ? effectBars([report], generator) : []).flat(),
    report.enrolment !== null && h("div", { class: "buttons" }, h("button", { type: "button", onclick: takeBack }, "Undo")),
  ].filter(Boolean);
}
