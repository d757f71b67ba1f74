/** The image that was judged: its frame of what the model saw, and the regions laid over it. */

import { h, icon, s, table } from "./dom.js";
import { decimal, labelWord, percent, precision } from "./words.js";

/** More regions than this are too small on the screen for a number in each. */
const LABELLED = 30;

/**
 * A figure with the image, the frames of its windows and, where there are regions, a slider that fades them.
 *
 * `address` is a blob of the image, or null where only its record is at hand.
 */
export function picture(verdict, address) {
  const { image, regions } = verdict;
  const marks = s(
    "svg",
    {
      class: "marks",
      viewBox: `0 0 ${image.width} ${image.height}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": marksInWords(verdict),
    },
    regions
      ? s(
          "g",
          { class: "regions" },
          s("g", { class: "boxes" }, regions.map(regionBox)),
          regions.length <= LABELLED ? s("g", { class: "numbers" }, regions.map(regionNumber(regions))) : null,
        )
      : null,
    windowFrames(image),
  );
  const frame = h(
    "div",
    { class: "frame" },
    address ? shown(address, verdict) : h("div", { class: "no-image" }, "The image itself is not kept."),
    marks,
  );
  // The shape is known before the image is: nothing jumps while it loads.
  frame.style.aspectRatio = `${image.width} / ${image.height}`;
  frame.style.setProperty("--shape", image.width / image.height);
  return h(
    "figure",
    { class: "picture" },
    frame,
    caption(image),
    regions ? [fader(marks), regionTable(regions)] : null,
  );
}

function shown(address, verdict) {
  const element = h("img", { src: address, alt: "The image that was judged" });
  element.onerror = () =>
    element.replaceWith(
      h("div", { class: "no-image" }, `Your browser cannot show ${verdict.image.format} files. Lineup can read them.`),
    );
  return element;
}

/** What was judged, as boxes; more than one where the model saw several windows. */
function windowsOf(image) {
  return image.windows ?? [image.crop];
}

/** Boxes that make up what lies in no window: the cells between all their edges that none of them covers. */
function outside(image) {
  const windows = windowsOf(image);
  const edges = (start, length, end) =>
    [...new Set([0, end, ...windows.flatMap((box) => [box[start], box[start] + box[length]])])].sort((a, b) => a - b);
  const [columns, rows] = [edges(0, 2, image.width), edges(1, 3, image.height)];
  return rows.slice(1).flatMap((bottom, row) =>
    columns.slice(1).flatMap((right, column) => {
      const [left, top] = [columns[column], rows[row]];
      const inside = windows.some(([x, y, w, h]) => x <= left && right <= x + w && y <= top && bottom <= y + h);
      return inside ? [] : [[left, top, right - left, bottom - top]];
    }),
  );
}

function windowFrames(image) {
  const edges = (kind) =>
    windowsOf(image).map(([x, y, width, height]) =>
      s("rect", { class: kind, x, y, width, height, "vector-effect": "non-scaling-stroke" }),
    );
  const cells = outside(image).map(([x, y, width, height]) => `M${x} ${y}h${width}v${height}h${-width}Z`);
  return s("g", { class: "crop" }, s("path", { class: "outside", d: cells.join("") }), edges("edge-under"), edges("edge"));
}

function regionBox(region) {
  const [x, y, width, height] = region.box;
  const kind = region.score >= 0.5 ? "fake" : "real";
  const title = s("title", {}, regionInWords(region));
  const box = s("rect", { class: kind, x, y, width, height, "vector-effect": "non-scaling-stroke" }, title);
  box.style.fillOpacity = (0.1 + 0.5 * Math.abs(region.score - 0.5) * 2).toFixed(2);
  return box;
}

/** The score of a region, told from the half at which it changes its side. */
function told(score) {
  return decimal(score, precision([score], [0.5]));
}

/** What writes the score of a region into its middle, so small that those of overlapping ones stay apart. */
function regionNumber(regions) {
  const middles = regions.map(({ box: [x, y, width, height] }) => [x + width / 2, y + height / 2]);
  const apart = middles.flatMap(([x, y], n) => middles.slice(n + 1).map(([a, b]) => Math.max(Math.abs(x - a), Math.abs(y - b))));
  const most = 0.28 * Math.min(...apart);
  return ({ box: [, , width, height], score }, n) => {
    const [x, y] = middles[n];
    return s("text", { x, y, "font-size": Math.min(width / 7, height / 7, most) }, told(score));
  };
}

function regionInWords(region) {
  const likely = region.generator ? `, nearest to ${region.generator}` : "";
  return `Score ${told(region.score)}${region.score >= 0.5 ? likely : ""}`;
}

function marksInWords({ image, regions }) {
  const [x, y, width, height] = image.crop;
  const seen = !outside(image).length
    ? "The whole image was judged."
    : image.windows
      ? `The frames show what was judged: ${windowsInWords(image)}.`
      : `The frame shows what was judged: ${width} × ${height} pixels from ${x}, ${y}.`;
  return regions
    ? `${seen} ${regions.length} regions are marked with their scores; they are listed below the image.`
    : seen;
}

function windowsInWords(image) {
  const [, , width, height] = image.windows[0];
  return `${image.windows.length} windows of ${width} × ${height} pixels`;
}

function caption(image) {
  const [, , width, height] = image.crop;
  const unseen = outside(image).reduce((sum, box) => sum + box[2] * box[3], 0);
  const share = percent(1 - unseen / (image.width * image.height));
  const seen = image.windows ? `frames, ${windowsInWords(image)}` : `frame, ${width} × ${height} pixels`;
  return h(
    "figcaption",
    {},
    unseen ? `Judged: what is inside the ${seen}, ${share} of the image.` : "The whole image was judged.",
  );
}

let faders = 0;

function fader(marks) {
  const id = `fader-${(faders += 1)}`;
  const output = h("output", { for: id }, percent(0.4));
  const layer = marks.querySelector(".regions");
  const slide = (value) => {
    layer.style.setProperty("--fade", value / 100);
    output.textContent = percent(value / 100);
  };
  slide(40);
  return h(
    "div",
    { class: "fader" },
    h("label", { for: id }, "Regions"),
    h("input", {
      id,
      type: "range",
      min: 0,
      max: 100,
      step: 5,
      value: 40,
      oninput: (event) => slide(Number(event.target.value)),
    }),
    output,
    h("p", { class: "key" }, icon("fake"), " like generated ", icon("real"), " like real; paler is less sure. A region is less to judge by: no verdict."),
  );
}

function regionTable(regions) {
  const rows = regions.map((region, index) => {
    const [x, y, width, height] = region.box;
    return [
      index + 1,
      `${width} × ${height} at ${x}, ${y}`,
      told(region.score),
      labelWord(region.score >= 0.5 ? "fake" : "real"),
      region.score >= 0.5 ? (region.generator ?? "–") : "–",
    ];
  });
  return h(
    "details",
    { class: "region-list" },
    h("summary", {}, "Regions as a table"),
    table("Score of each region", ["Region", "Pixels", "Score", "Leans to", "Nearest generator"], rows, { numeric: [2] }),
  );
}
