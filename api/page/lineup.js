/** The line-up: reference images beside the one in question, each with where it is from and how alike it is. */

import { ask, showThumbnail } from "./client.js";
import { bar, confirmed, facts, fileName, h, icon, table, webLink } from "./dom.js";
import { problemBox } from "./problems.js";
import { bytes, count, decimal, labelWord, percent, when } from "./words.js";

/** One reference image. `similarity` is missing where it was compared with none; `weight` is its part of the vote, a search gives none; `degraded` says the database is away. */
export function suspect(neighbour, heaviest = 1, degraded = false) {
  const name = neighbour.label === "fake" ? (neighbour.generator ?? "generator not named") : "real photo";
  return h(
    "li",
    { class: `suspect ${neighbour.label}` },
    portrait(neighbour, degraded),
    h("p", { class: "who" }, icon(neighbour.label), h("span", {}, name)),
    neighbour.similarity === undefined
      ? null
      : h("p", { class: "like" }, h("span", { class: "term" }, "alike "), decimal(neighbour.similarity, 3)),
    neighbour.weight === null || neighbour.weight === undefined
      ? null
      : h(
          "p",
          { class: "weight" },
          bar(neighbour.weight / (heaviest || 1), neighbour.label),
          h("span", {}, h("span", { class: "term" }, "weight "), percent(neighbour.weight)),
        ),
    neighbour.source ? h("p", { class: "source" }, neighbour.source) : null,
  );
}

/** The picture, which opens the details; where it is not here, a link to it with the details below. */
function portrait(neighbour, degraded) {
  const details = {
    type: "button",
    "aria-label": `Reference image ${neighbour.id}: details`,
    onclick: () => showReference(neighbour, degraded),
  };
  const link = neighbour.thumbnail ? null : webLink(neighbour.uri, "Picture on the web");
  if (link) return h("div", { class: "absent" }, link, h("button", details, "Details"));
  const picture = h("img", { alt: `Reference image ${neighbour.id}`, width: 128, height: 128 });
  if (neighbour.thumbnail) showThumbnail(picture, neighbour.thumbnail);
  else picture.classList.add("missing");
  return h("button", { ...details, class: "portrait" }, picture);
}

/** Both rows of the line-up, the nearest first in each. */
export function lineUp(verdict) {
  const heaviest = Math.max(...verdict.neighbours.map((neighbour) => neighbour.weight ?? 0), 0);
  const row = (label, title, none) => {
    const found = verdict.neighbours.filter((neighbour) => neighbour.label === label);
    const weight = found.reduce((sum, neighbour) => sum + (neighbour.weight ?? 0), 0);
    return h(
      "section",
      { class: `row ${label}` },
      h(
        "h4",
        {},
        icon(label),
        ` ${title}`,
        found.length ? h("span", { class: "sum" }, `${percent(weight)} of the weight`) : null,
      ),
      found.length
        ? h(
            "ol",
            { class: "suspects", tabindex: "0", "aria-label": `${title}, nearest first` },
            found.map((neighbour) => suspect(neighbour, heaviest, verdict.degraded)),
          )
        : h("p", { class: "none" }, none),
    );
  };
  const rows = [
    row("fake", "Nearest generated images", "The reference set holds no generated images yet."),
    row("real", "Nearest real photos", "The reference set holds no real photos yet."),
  ];
  return h("div", { class: "line-up" }, verdict.verdict === "real" ? rows.reverse() : rows);
}

/** Everything known of one reference image, in a dialog. */
async function showReference(neighbour, degraded) {
  const dialog = document.getElementById("reference-dialog");
  const picture = neighbour.thumbnail ? h("img", { alt: `Reference image ${neighbour.id}`, class: "large" }) : null;
  if (picture) showThumbnail(picture, neighbour.thumbnail);
  const absence = degraded
    ? "Its picture could not be looked up: the database was away."
    : "Its picture is not here.";
  const rest = h("div", { "aria-live": "polite" }, h("p", {}, "Looking it up…"));
  const buttons = h(
    "div",
    { class: "buttons" },
    h("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "Close"),
  );
  const removal = h("button", { type: "button", onclick: () => remove(neighbour, rest, removal) }, "Remove");
  dialog.replaceChildren(
    h("h2", { id: "reference-title" }, `Reference image ${neighbour.id}`),
    h("div", { class: "reference" }, picture ?? h("p", {}, absence), rest),
    buttons,
  );
  dialog.showModal();
  try {
    rest.replaceChildren(...referenceFacts(await ask(`/v1/references/${neighbour.id}`)));
    const compare = { class: "button", href: `#/references/${neighbour.id}`, onclick: () => dialog.close() };
    buttons.append(h("a", compare, "Relabel or compare"), removal);
  } catch (problem) {
    rest.replaceChildren(
      h("p", {}, `Its record cannot be shown: ${problem.message}`),
      h("p", {}, `It is ${labelWord(neighbour.label)}.`),
    );
  }
}

async function remove({ id }, place, button) {
  const text = "It will vote no more. Past verdicts stay as they are.";
  if (!(await confirmed(`Remove reference image ${id}?`, text, "Remove it"))) return;
  try {
    await ask(`/v1/references/${id}`, { method: "DELETE" });
    button.remove();
    place.replaceChildren(h("p", { class: "done" }, "Removed from the reference set."));
  } catch (problem) {
    place.append(problemBox(problem));
  }
}

/** What is known of a reference image. */
export function referenceFacts(reference) {
  const attributes = Object.entries(reference.attributes ?? {});
  return [
    facts([
      ["Is", labelWord(reference.label)],
      ["Generator", reference.generator],
      ["Source", reference.source],
      [
        "Size",
        `${reference.width} × ${reference.height} ` +
          `${reference.format}${reference.file_bytes ? `, ${bytes(reference.file_bytes)}` : ""}`,
      ],
      ["JPEG quality", reference.jpeg_quality === null ? null : `about ${reference.jpeg_quality}`],
      ["Added", when(reference.added_at)],
      ["Enrolment", reference.enrolment],
      ["File", reference.uri && (webLink(reference.uri, reference.uri) ?? fileName(reference.uri))],
      ["SHA-256", h("code", {}, reference.sha256)],
    ]),
    attributes.length
      ? table(
          "What else is known",
          ["Attribute", "Value"],
          attributes.map(([name, value]) => [name, String(value)]),
        )
      : null,
  ].filter(Boolean);
}

/** Shares of the generators, as bars. */
export function generatorShares(verdict) {
  if (!verdict.generators.length) return h("p", { class: "none" }, "No generator among the neighbours.");
  const weight = verdict.heads.knn
    ? `Generated neighbours hold ${percent(verdict.heads.knn.score)} of the weight. `
    : "";
  return [
    h("p", { class: "lead" }, `${weight}This is how it divides: a hint, not an identification.`),
    h(
      "ul",
      { class: "shares" },
      verdict.generators.map(({ name, share }) =>
        h(
          "li",
          {},
          h("span", { class: "name" }, name),
          bar(share, "fake"),
          h("span", { class: "number" }, percent(share)),
        ),
      ),
    ),
  ];
}

/** How many references there are to compare with. */
export function indexWords(verdict) {
  return `${count(verdict.index.size)} reference images, revision ${verdict.index.revision}`;
}
