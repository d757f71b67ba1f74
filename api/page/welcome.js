/** What a newcomer reads before the first image: how to read a verdict, and what Lineup knows at all. */

import { h, icon } from "./dom.js";
import { plural } from "./words.js";

const known = h("div", { class: "known" });

const step = (title, text) => h("li", {}, h("strong", {}, title), " ", text);

/** The text that makes room for the first verdict. */
export const welcome = h(
  "section",
  { class: "explanation", "aria-label": "How to read a verdict" },
  h(
    "ol",
    {},
    step(
      "The line-up.",
      "Lineup looks for the images most like yours among reference images whose origin is known: real photos, " +
        "and images by known generators.",
    ),
    step(
      "The verdict.",
      "“Probably generated”, “probably a real photograph”, or “cannot tell”, with a score and how often " +
        "real photos score that high.",
    ),
    step(
      "The evidence.",
      "You see the neighbours, what each method says, where in the image it comes from, and whether it survives " +
        "re-encoding. Judge for yourself.",
    ),
  ),
  known,
  h(
    "p",
    { class: "hint" },
    "Of an image that is judged Lineup keeps at most its fingerprint, the verdict and, where the service is set so, a " +
      "thumbnail.",
  ),
);

/** Say what there is to compare with, from `/v1/status`. */
export function tellKnown({ references, generators, sources }) {
  const names = generators.filter((one) => one.references).map(({ name }) => name);
  const shown = names.length > 8 ? `${names.slice(0, 8).join(", ")} and ${names.length - 8} more` : names.join(", ");
  known.replaceChildren(
    ...[
      h(
        "p",
        {},
        h("strong", {}, "What it compares with."),
        references.real + references.fake
          ? ` ${plural(references.real, "real photo")} and ${plural(references.fake, "image")} by ` +
              `${plural(names.length, "generator")}${names.length ? `: ${shown}` : ""}. A generator unlike all of ` +
              "these may pass unseen. "
          : " Nothing yet: without reference images there is no line-up. ",
        h("a", { href: "#/generators" }, "See them, or enrol more"),
      ),
      simulated(sources) && h("p", { class: "note" }, icon("problem"), h("span", {}, SIMULATED)),
    ].filter(Boolean),
  );
}

const SIMULATED =
  "All references are simulated, as the demo makes them. They show how Lineup works; about photographs of yours, a " +
  "verdict says nothing until real references are enrolled and a model is trained on real images.";

function simulated(sources) {
  const used = (sources ?? []).filter((one) => one.references);
  return used.length > 0 && used.every(({ name }) => name === "simulated");
}
