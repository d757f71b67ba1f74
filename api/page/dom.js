/** Elements from values. What comes from an image, a name or the service only ever becomes text or an attribute. */

import { labelWord } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element.
 *
 * Attributes that are functions become listeners (`onclick`), true is an empty attribute, and null, undefined and false
 * are left out. Children may be nodes, strings, numbers, nested arrays, null or false.
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element, from the same kinds of values. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** A field for the name of a generator, which offers those that are known. */
export function generatorInput(attributes = {}) {
  return h("input", {
    type: "text",
    list: "generator-names",
    maxlength: 100,
    required: true,
    autocomplete: "off",
    spellcheck: "false",
    ...attributes,
  });
}

/** A symbol of index.html; words beside it say the same. */
export function icon(name) {
  return s("svg", { class: "icon", "aria-hidden": "true", focusable: "false" }, s("use", { href: `#icon-${name}` }));
}

/** The word and icon of a decision, small. */
export function badge(decision, text = labelWord(decision)) {
  return h("span", { class: `badge ${decision}` }, icon(decision), h("span", {}, text));
}

/** A horizontal bar, 0..1. The number stands beside it as text. */
export function bar(value, kind = "") {
  const fillElement = h("span");
  // The content security policy forbids style attributes, but not this.
  fillElement.style.width = `${100 * Math.min(1, Math.max(0, value))}%`;
  return h("span", { class: `bar ${kind}`, "aria-hidden": "true" }, fillElement);
}

/** A table: column titles, rows of cells, and a caption that names it. Columns of `numeric` are set right. */
export function table(caption, columns, rows, { numeric = [], className = "", hideCaption = false } = {}) {
  const kind = (index) => (numeric.includes(index) ? "number" : null);
  return h(
    "div",
    { class: "table-frame", role: "region", "aria-label": caption, tabindex: "0" },
    h(
      "table",
      { class: className },
      h("caption", { class: hideCaption ? "unseen" : null }, caption),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          columns.map((title, index) => h("th", { scope: "col", class: kind(index) }, title)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((cells) =>
          h(
            "tr",
            {},
            cells.map((cell, index) =>
              index === 0
                ? h("th", { scope: "row" }, cell)
                : h("td", { class: kind(index), "data-label": columns[index] }, cell),
            ),
          ),
        ),
      ),
    ),
  );
}

/** Facts as a list of terms. Those without a value are left out. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h(
    "dl",
    { class: "facts" },
    known.map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value))),
  );
}

const HUB_FILE = /^hf:\/\/(datasets\/[^/@]+\/[^/@]+)@([^/]+)\/([^#]+).*$/;

/** A link to a public address, of the hub to the file's page; it opens beside the page; null where it is none. */
export function webLink(uri, text) {
  const href = (uri ?? "").replace(HUB_FILE, "https://huggingface.co/$1/blob/$2/$3");
  if (!/^https:\/\//.test(href)) return null;
  return h("a", { href, target: "_blank", rel: "noopener noreferrer" }, text);
}

/** A file's name as text: characters that cannot be seen, such as those that turn the direction, become `?`. */
export function fileName(name) {
  return h("bdi", { class: "file" }, String(name).replace(/[\p{C}]/gu, "?"));
}

/** Say something to those who listen to the page, without moving the focus. */
export function announce(text) {
  const place = document.getElementById("announcer");
  place.textContent = "";
  // A live region is read when it changes, so it must be empty for a moment.
  setTimeout(() => (place.textContent = text), 60);
}

/** Ask before something is done that others will notice; `body` is text, or fields to fill. Answers true or false. */
export function confirmed(title, body, action) {
  const dialog = document.getElementById("question-dialog");
  return new Promise((resolve) => {
    const answer = (value) => {
      dialog.close();
      resolve(value);
    };
    const submitted = (event) => {
      event.preventDefault();
      answer(true);
    };
    dialog.replaceChildren(
      h(
        "form",
        { onsubmit: submitted },
        h("h2", { id: "question-title" }, title),
        typeof body === "string" ? h("p", {}, body) : body,
        h(
          "div",
          { class: "buttons" },
          h("button", { type: "submit", class: "primary" }, action),
          h("button", { type: "button", onclick: () => answer(false) }, "Cancel"),
        ),
      ),
    );
    dialog.oncancel = () => resolve(false);
    dialog.showModal();
  });
}

/** Hand a value to the reader as a JSON file. */
export function download(value, name) {
  save(new Blob([JSON.stringify(value, null, 2)], { type: "application/json" }), name);
}

/** Hand a file to the reader. */
export function save(file, name) {
  const url = URL.createObjectURL(file);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
