/** The view that searches: the reference images most like one image, filtered, page by page. */

import { ask, problemFrom, serviceState } from "./client.js";
import { announce, fileName, h } from "./dom.js";
import { intake } from "./intake.js";
import { suspect } from "./lineup.js";
import { problemBox } from "./problems.js";

const PAGE = 24;
const view = document.getElementById("view-search");

const label = h(
  "select",
  {},
  h("option", { value: "" }, "all"),
  h("option", { value: "real" }, "real photos"),
  h("option", { value: "fake" }, "generated images"),
);
const generator = h("select", {}, h("option", { value: "" }, "all"));
const sources = h("datalist", { id: "sources" });
const source = h("input", {
  type: "text",
  list: "sources",
  placeholder: "all",
  maxlength: 200,
  autocomplete: "off",
  spellcheck: "false",
});
const query = h("div", { class: "query", hidden: true });
const gallery = h("div");
const previous = h("button", { type: "button", onclick: () => search(Math.max(0, offset - PAGE)) }, "← Nearer");
const next = h("button", { type: "button", onclick: () => search(following) }, "Further →");
const place = h("span", { class: "hint" });
const pager = h("nav", { class: "pager", "aria-label": "Pages of the gallery", hidden: true }, previous, place, next);

let image = null;
let address = null;
let offset = 0;
let following = null;
let asked = 0;

const filters = h(
  "form",
  {
    class: "filters",
    "aria-label": "Filters",
    onsubmit: (event) => {
      event.preventDefault();
      search(0);
    },
    onchange: () => search(0),
  },
  h("label", {}, "Kind ", label),
  h("label", {}, "Generator ", generator),
  h("label", {}, "Source ", source),
  sources,
);

/** Build the view. */
export function setUp() {
  const zone = intake({
    view,
    title: "Drop an image here",
    hint: "or paste one. Nothing is judged or recorded: you see what is nearest to it.",
    multiple: false,
    onfiles: ([file]) => {
      zone.classList.add("compact");
      if (address) URL.revokeObjectURL(address);
      image = file;
      address = URL.createObjectURL(file);
      query.replaceChildren(h("img", { src: address, alt: "The image that you search with" }), fileName(file.name));
      query.hidden = false;
      search(0);
    },
  });
  view.append(zone, query, filters, gallery, pager);
}

/** Called each time the view is shown: the filters offer what there is now. */
export async function show() {
  try {
    const state = await serviceState();
    const chosen = generator.value;
    generator.replaceChildren(
      h("option", { value: "" }, "all"),
      ...state.generators.map(({ name, references }) =>
        h("option", { value: name, selected: name === chosen }, `${name} (${references})`),
      ),
    );
    sources.replaceChildren(...(state.sources ?? []).map(({ name }) => h("option", { value: name })));
  } catch {
    // the search itself will say what is wrong
  }
}

async function search(start) {
  if (!image) return;
  const turn = (asked += 1);
  gallery.setAttribute("aria-busy", "true");
  const body = new FormData();
  body.append("image", image, image.name || "pasted.png");
  try {
    const options = {
      label: label.value,
      generator: generator.value,
      source: source.value.trim(),
      limit: PAGE,
      offset: start,
    };
    const {
      results: [found],
    } = await ask("/v1/search", { method: "POST", query: options, body });
    if (turn !== asked) return; // a later question was asked meanwhile
    if (found.error) throw problemFrom(found.error);
    offset = start;
    following = found.next;
    reveal(found.neighbours);
  } catch (problem) {
    if (turn !== asked) return;
    gallery.replaceChildren(problemBox(problem, () => search(start)));
    pager.hidden = true;
  } finally {
    if (turn === asked) gallery.removeAttribute("aria-busy");
  }
}

function reveal(neighbours) {
  const words = neighbours.length
    ? `Nearest ${offset + 1} to ${offset + neighbours.length}`
    : "No reference image fits these filters.";
  gallery.replaceChildren(
    neighbours.length
      ? h(
          "ol",
          { class: "gallery", "aria-label": "Reference images, nearest first" },
          neighbours.map((neighbour) => suspect(neighbour)),
        )
      : h("p", { class: "none" }, words),
  );
  pager.hidden = !neighbours.length && offset === 0;
  previous.disabled = offset === 0;
  next.disabled = following === null;
  place.textContent = words;
  announce(words);
}
