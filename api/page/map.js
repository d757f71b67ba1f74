/** The view that draws the references on a plane: a point each, coloured by generator, to be selected with a lasso. */

import { ask, patiently, showThumbnail } from "./client.js";
import { announce, h } from "./dom.js";
import { editing } from "./editing.js";
import { problemBox } from "./problems.js";
import { count, percent, plural } from "./words.js";

const MOST = 50_000; // points that the service draws; fewer than references only because it is drawing them anew
const FEW = 1_000; // points, fewer of which are drawn large
const SHOWN = 24; // pictures of what is selected
const TRIES = 10; // while the service draws its map for the first time
const STEP = 24; // pixels that an arrow key moves the ring
const NEAR = 12; // pixels within which a click means a point
const READ = { willReadFrequently: true }; // pixels in memory, not on a graphics card
const view = document.getElementById("view-map");
const dark = matchMedia("(prefers-color-scheme: dark)");

const canvas = h("canvas", {
  tabindex: "0",
  role: "application",
  "aria-label": "Map of the references",
  "aria-describedby": "map-keys",
  onpointerdown: press,
  onpointermove: drag,
  onpointerup: release,
  onpointercancel: release,
  onkeydown: typed,
  onblur: () => ((ring.shown = false), paint()),
});
const base = document.createElement("canvas"); // all points, so that a lasso over them costs nothing
const told = h("p", { class: "hint" });
const legend = h("ul", { class: "legend", "aria-label": "Kinds of references" });
const button = (text, label, onclick) => h("button", { type: "button", "aria-label": label, onclick }, text);
const shown = h(
  "div",
  { class: "buttons", role: "group", "aria-label": "Kinds that are shown" },
  button("Show all", "Show all kinds", () => showKinds([])),
  button("Show none", "Show none of the kinds", () => showKinds(kinds.map(nameOf))),
);
const adding = h("input", { type: "checkbox" }); // for who has no Shift key
const zooms = h(
  "div",
  { class: "buttons", role: "group", "aria-label": "Size of the map" },
  button("+", "Larger", () => zoom(1.5)),
  button("−", "Smaller", () => zoom(1 / 1.5)),
  button("Whole", "Whole map", () => (Object.assign(place, { scale: 1, x: 0, y: 0 }), draw())),
  h("label", {}, adding, " Add to the selection"),
);
const outcome = h("div", { "aria-live": "polite" });
const chosenCount = h("span", { class: "counter" });
const actions = [
  h("button", { type: "button", onclick: () => relabel(selected()) }, "Relabel…"),
  h("button", { type: "button", onclick: () => remove(selected()) }, "Remove…"),
  h("button", { type: "button", onclick: () => choose(new Set()) }, "Clear"),
];
const selection = h("div", { class: "selection", role: "group", "aria-label": "Selection" }, chosenCount, actions);
const { relabel, remove } = editing(outcome, settled, [selection]);
const pictures = h("ul", { class: "chosen-points", "aria-label": "Selected references" });
const board = h("div", { hidden: true }, told, shown, legend, canvas, zooms, selection, outcome, pictures);
const trouble = h("div", { "aria-live": "polite" });

/** {id, kind, x, y} of each point, and {label, generator} of each kind. */
let points = [];
let kinds = [];
/** The largest places along both axes; the smallest are 0. */
const extent = { x: 1, y: 1 };
let palette = new Uint32Array(1);
let chosen = new Set();
const hidden = new Set();
/** How the map lies on the canvas: `scale` times as large as fits, moved by pixels. */
const place = { scale: 1, x: 0, y: 0 };
const ring = { x: 0, y: 0, radius: 40, shown: false };
const fingers = new Map();
let lasso = null;
let frame = 0;
let latest = 0;

/** Build the view. */
export function setUp() {
  view.append(
    h("p", {}, h("a", { href: "#/references" }, "← The references as pictures")),
    h(
      "p",
      { class: "lead" },
      "Each point is a reference image. Draw around points to select them: a lone one among those of another generator " +
        "may have a wrong label.",
    ),
    trouble,
    board,
    h(
      "p",
      { class: "hint", id: "map-keys" },
      "A click selects one point; Shift, or the box above, adds to the selection. With two fingers, or the wheel and Ctrl, the map is moved " +
        "and resized. Keys: the arrows move a ring, Page Up and Page Down resize it, Space adds the points in it, plus and " +
        "minus resize the map, Escape clears the selection.",
    ),
  );
  canvas.addEventListener("wheel", rolled, { passive: false });
  dark.addEventListener("change", () => (tellKinds(), draw()));
  new ResizeObserver(draw).observe(canvas);
}

/** Called each time the view is shown; the answer to an earlier call is dropped. */
export async function show() {
  const call = (latest += 1);
  if (board.hidden) trouble.replaceChildren(h("p", { class: "hint" }, "Drawing the map…"));
  try {
    const map = await patiently(() => ask("/v1/map"), TRIES);
    if (call !== latest) return;
    kinds = map.kinds;
    points = map.id.map((id, n) => ({ id, kind: map.kind[n], x: map.x[n], y: map.y[n] }));
    points.sort((one, other) => one.kind - other.kind);
    for (const axis of ["x", "y"]) extent[axis] = map[axis].reduce((most, value) => Math.max(most, value), 1);
    const most = points.length >= MOST && map.references > points.length ? ` of ${count(map.references)}, drawn by lot` : "";
    const [across, down] = map.explained;
    told.textContent =
      `${plural(points.length, "reference")}${most}. The axes are the two principal components of the embeddings, and hold ` +
      `${percent(across)} and ${percent(down)} of the variance: what is far apart here is so, what is near may not be.`;
    trouble.replaceChildren();
    outcome.replaceChildren();
    board.hidden = false;
    tellKinds();
    choose(new Set());
  } catch (problem) {
    if (call !== latest) return;
    board.hidden = true;
    trouble.replaceChildren(problemBox(problem, show));
  }
}

const nameOf = ({ label, generator }) => (label === "real" ? "real photos" : (generator ?? "generator not named"));

/** Real photos have their own colour; generators are a golden section apart among the hues that are not near it. */
function colour(kind) {
  if (kinds[kind].label === "real") return getComputedStyle(canvas).getPropertyValue("--real");
  return `hsl(${220 + 300 * ((0.618 * kind) % 1)} 70% ${dark.matches ? 68 : 42}%)`;
}

/** The colours of the kinds and that of the frames, as an image in memory holds them. */
function inMemory(names) {
  const pen = new OffscreenCanvas(names.length, 1).getContext("2d", READ);
  for (const [number, name] of names.entries()) {
    pen.fillStyle = name;
    pen.fillRect(number, 0, 1, 1);
  }
  return new Uint32Array(pen.getImageData(0, 0, names.length, 1).data.buffer);
}

function tellKinds() {
  palette = inMemory([...kinds.map((_, kind) => colour(kind)), getComputedStyle(canvas).color]);
  const sizes = kinds.map(() => 0);
  for (const { kind } of points) sizes[kind] += 1;
  const rows = kinds.map((_, kind) => kind).filter((kind) => sizes[kind]);
  rows.sort((one, other) => sizes[other] - sizes[one]);
  legend.replaceChildren(
    ...rows.map((kind) => {
      const swatch = h("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = colour(kind);
      const box = h("input", {
        type: "checkbox",
        checked: !hidden.has(nameOf(kinds[kind])),
        onchange: () => {
          hidden[box.checked ? "delete" : "add"](nameOf(kinds[kind]));
          choose(new Set([...chosen].filter(visible)));
        },
      });
      return h("li", {}, h("label", {}, box, swatch, ` ${nameOf(kinds[kind])} `, h("span", { class: "hint" }, count(sizes[kind]))));
    }),
  );
}

/** Show all kinds but those of these names. */
function showKinds(others) {
  hidden.clear();
  for (const name of others) hidden.add(name);
  tellKinds();
  choose(new Set([...chosen].filter(visible)));
}

const visible = (number) => !hidden.size || !hidden.has(nameOf(kinds[points[number].kind]));

/** What tells how far to the right and how far down a point lies, in pixels of the canvas as laid out now. */
function pixels() {
  const { clientWidth: width, clientHeight: height } = canvas;
  const unit = place.scale * Math.min((width - 24) / extent.x, (height - 24) / extent.y);
  const [x, y] = [width / 2 + place.x, height / 2 + place.y];
  return [(point) => x + (point.x - extent.x / 2) * unit, (point) => y - (point.y - extent.y / 2) * unit];
}

/** All points, on the canvas beneath; those that are selected on top of the others, framed. */
function draw() {
  const ratio = devicePixelRatio;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((side) => Math.round(side * ratio));
  if (!width) return;
  if (base.width !== width || base.height !== height) for (const one of [canvas, base]) Object.assign(one, { width, height });
  const pen = base.getContext("2d");
  const size = Math.round(ratio * (points.length < FEW ? 6 : Math.min(6, 2.5 + Math.log2(place.scale))));
  const border = Math.ceil(ratio);
  const margin = size + 2 * border; // around the image, for what lies on its edge
  const [columns, rows] = [width + 2 * margin, height + 2 * margin];
  // Writing pixels takes less time than as many rectangles, without a graphics card.
  const image = pen.createImageData(columns, rows);
  const colours = new Uint32Array(image.data.buffer);
  const [x, y] = pixels();
  const fill = (number, side, colour) => {
    const left = margin + Math.round(x(points[number]) * ratio - side / 2);
    const top = margin + Math.round(y(points[number]) * ratio - side / 2);
    if (left < 0 || top < 0 || left + side > columns || top + side > rows) return;
    for (let row = top * columns + left; row < (top + side) * columns; row += columns)
      for (let one = row; one < row + side; one += 1) colours[one] = colour;
  };
  for (let number = 0; number < points.length; number += 1) {
    if (visible(number) && !chosen.has(number)) fill(number, size, palette[points[number].kind]);
  }
  for (const number of chosen) fill(number, size + 2 * border, palette[kinds.length]);
  for (const number of chosen) fill(number, size, palette[points[number].kind]);
  pen.putImageData(image, -margin, -margin);
  paint();
}

/** The points, and the lasso or the ring over them. */
function paint() {
  const pen = canvas.getContext("2d");
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (!base.width) return;
  pen.drawImage(base, 0, 0);
  pen.scale(devicePixelRatio, devicePixelRatio);
  pen.strokeStyle = getComputedStyle(canvas).color;
  pen.lineWidth = 1.5;
  pen.setLineDash([5, 4]);
  pen.beginPath();
  if (lasso) for (const [x, y] of lasso) pen.lineTo(x, y);
  if (ring.shown) pen.ellipse(ring.x, ring.y, ring.radius, ring.radius, 0, 0, 2 * Math.PI);
  pen.stroke();
}

/** Select these points, by number. */
function choose(numbers) {
  chosen = numbers;
  chosenCount.textContent = `${count(chosen.size)} selected`;
  for (const one of actions) one.disabled = chosen.size === 0;
  pictures.replaceChildren(...selected(SHOWN).map(picture));
  if (chosen.size > SHOWN) pictures.append(h("li", { class: "hint" }, `and ${count(chosen.size - SHOWN)} more`));
  draw();
  announce(chosenCount.textContent);
}

const selected = (most = Infinity) =>
  [...chosen].slice(0, most).map((number) => ({ id: points[number].id, ...kinds[points[number].kind] }));

function picture({ id, ...kind }) {
  const image = h("img", { alt: `Reference image ${id}, ${nameOf(kind)}`, width: 96, height: 96 });
  const link = h("a", { href: `#/references/${id}` }, image);
  showThumbnail(image, `/v1/references/${id}/thumbnail`).then(() => {
    if (!image.src) link.replaceChildren(`${id}, ${nameOf(kind)}`); // its picture is not here
  });
  return h("li", {}, link);
}

/** Let changed references be what they are now, without waiting until the service has drawn its map anew. */
async function settled(gone) {
  const numberOf = ({ label, generator = null }) => {
    const known = kinds.findIndex((one) => one.label === label && (one.generator ?? null) === generator);
    return known >= 0 ? known : kinds.push({ label, generator }) - 1;
  };
  const still = new Set(selected().map(({ id }) => gone.get(id)?.id ?? id));
  points = points
    .filter(({ id }) => gone.get(id) !== null)
    .map((point) => (gone.has(point.id) ? { ...point, id: gone.get(point.id).id, kind: numberOf(gone.get(point.id)) } : point));
  tellKinds();
  choose(new Set([...points.keys()].filter((number) => still.has(points[number].id))));
}

/** Select the points whose pixel fulfils a test, beside those that are selected already where something is to be added. */
function chooseWhere(test, adding) {
  const [x, y] = pixels();
  const numbers = [...points.keys()].filter((number) => visible(number) && test(x(points[number]), y(points[number])));
  choose(new Set(adding ? [...chosen, ...numbers] : numbers));
}

const at = ({ offsetX, offsetY }) => [offsetX, offsetY];

function press(event) {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, at(event));
  lasso = fingers.size === 1 ? [at(event)] : null;
}

function drag(event) {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const now = at(event);
  fingers.set(event.pointerId, now);
  if (lasso) {
    lasso.push(now);
    requestAnimationFrame(paint);
  } else if (fingers.size === 2) {
    const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
    const apart = ([x, y]) => Math.max(1, Math.hypot(x - other[0], y - other[1]));
    place.x += (now[0] - before[0]) / 2;
    place.y += (now[1] - before[1]) / 2;
    zoom(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  }
}

function release(event) {
  fingers.delete(event.pointerId);
  const [path, more] = [lasso, event.shiftKey || adding.checked];
  lasso = null;
  if (!path || event.type === "pointercancel") return paint();
  const [[x, y]] = path;
  const far = path.some(([a, b]) => Math.hypot(a - x, b - y) > 4);
  if (far) chooseWhere(within(path), more);
  else {
    const [right, down] = pixels();
    let [nearest, least] = [[], NEAR];
    for (const number of points.keys()) {
      const distance = Math.hypot(right(points[number]) - x, down(points[number]) - y);
      if (distance < least && visible(number)) [nearest, least] = [[number], distance];
    }
    choose(new Set([...(more ? chosen : []), ...nearest]));
  }
}

/** What tells whether a closed path goes around a place: the path is filled once, and its pixels are looked up. */
function within(path) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const pen = new OffscreenCanvas(width, height).getContext("2d", READ);
  for (const [x, y] of path) pen.lineTo(x, y);
  pen.fill("evenodd");
  const { data } = pen.getImageData(0, 0, width, height);
  return (x, y) => x >= 0 && y >= 0 && x < width && y < height && data[4 * (Math.floor(y) * width + Math.floor(x)) + 3] > 127;
}

/** Resize the map; the place that is given in pixels, else the middle, stays where it is. */
function zoom(times, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const scale = Math.min(64, Math.max(1, place.scale * times));
  const [left, top] = [x - canvas.clientWidth / 2, y - canvas.clientHeight / 2];
  place.x = left + ((place.x - left) * scale) / place.scale;
  place.y = top + ((place.y - top) * scale) / place.scale;
  place.scale = scale;
  cancelAnimationFrame(frame); // two fingers move between two frames
  frame = requestAnimationFrame(draw);
}

function rolled(event) {
  if (!event.ctrlKey && !event.metaKey) return; // the page is scrolled
  event.preventDefault();
  zoom(2 ** (-event.deltaY / 200), ...at(event));
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function typed(event) {
  const { key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (!ring.shown && (key in MOVES || key === " " || key.startsWith("Page"))) {
    Object.assign(ring, { shown: true, x: canvas.clientWidth / 2, y: canvas.clientHeight / 2 });
  }
  if (key in MOVES) {
    ring.x = Math.min(canvas.clientWidth, Math.max(0, ring.x + STEP * MOVES[key][0]));
    ring.y = Math.min(canvas.clientHeight, Math.max(0, ring.y + STEP * MOVES[key][1]));
    paint();
  } else if (key === "PageUp" || key === "PageDown") {
    ring.radius = Math.min(400, Math.max(8, ring.radius * (key === "PageUp" ? 1.25 : 0.8)));
    paint();
  } else if (key === " ") chooseWhere((x, y) => Math.hypot(x - ring.x, y - ring.y) <= ring.radius, true);
  else if (key === "+" || key === "-") zoom(key === "+" ? 1.5 : 1 / 1.5, ...(ring.shown ? [ring.x, ring.y] : []));
  else if (key === "Escape") choose(new Set());
  else return;
  event.preventDefault();
}
