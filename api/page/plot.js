/** Charts in plain SVG: how the calibration images score, and whether a score means what it says. */

import { h, s, table } from "./dom.js";
import { count, decimal, percent } from "./words.js";

const WIDTH = 560;
const LEFT = 80;
const RIGHT = 14;
const x = (share) => LEFT + share * (WIDTH - LEFT - RIGHT);

/** Scores of real and generated calibration images, back to back, with the cuts. Both labels are drawn as shares. */
export function scorePlot({ histogram, thresholds }) {
  const height = 250;
  const middle = 118;
  const room = 96;
  const share = (counts) => counts.map((value) => value / (counts.reduce((sum, one) => sum + one, 0) || 1));
  const [real, fake] = [share(histogram.real), share(histogram.fake)];
  const most = Math.max(...real, ...fake) || 1;
  const width = 1 / real.length;
  const bars = (values, kind, up) =>
    values.map(
      (value, bin) =>
        value > 0 &&
        s("rect", {
          class: kind,
          x: x(bin * width) + 1,
          width: x(width) - x(0) - 2,
          height: (value / most) * room,
          y: up ? middle - 1 - (value / most) * room : middle + 1,
        }),
    );
  const cut = (value, text, side) =>
    value !== null &&
    value <= 1.0001 &&
    s(
      "g",
      { class: "cut" },
      s("line", { x1: x(value), x2: x(value), y1: 10, y2: 226 }),
      s("text", { x: x(value) + (side === "end" ? -5 : 5), y: 18, "text-anchor": side }, `${text} ${decimal(value)}`),
    );
  const close =
    thresholds.fake !== null && thresholds.real !== null && Math.min(thresholds.fake, thresholds.real) < 0.25;
  const drawing = s(
    "svg",
    {
      class: "plot",
      viewBox: `0 0 ${WIDTH} ${height}`,
      role: "img",
      "aria-label": "Scores of the calibration images; the table below holds the numbers",
    },
    s("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: middle, y2: middle }),
    bars(fake, "fake", true),
    bars(real, "real", false),
    s("text", { x: LEFT - 8, y: middle - room / 2, "text-anchor": "end", class: "side" }, "generated"),
    s("text", { x: LEFT - 8, y: middle + room / 2, "text-anchor": "end", class: "side" }, "real"),
    cut(thresholds.real, "real below", close ? "start" : "end"),
    cut(thresholds.fake, "generated from", thresholds.fake > 0.7 ? "end" : "start"),
    ticks(240),
  );
  const rows = histogram.real.map((value, bin) => [
    `${decimal(bin * width)} to ${decimal((bin + 1) * width)}`,
    count(value),
    count(histogram.fake[bin]),
  ]);
  return h(
    "figure",
    {},
    drawing,
    h(
      "figcaption",
      {},
      "Generated calibration images above the line, real photos below it. The further apart, the more often " +
        "Lineup can tell.",
    ),
    h(
      "details",
      {},
      h("summary", {}, "As a table"),
      table("Scores of the calibration images", ["Score", "Real", "Generated"], rows, { numeric: [1, 2] }),
    ),
  );
}

/** Reliability: of images with a score near s, which share was generated, were both labels equally frequent. */
export function reliabilityPlot({ histogram }, bins = 5) {
  const height = 250;
  const y = (share) => 226 - share * 210;
  const sum = (counts) => counts.reduce((total, one) => total + one, 0) || 1;
  const [reals, fakes] = [sum(histogram.real), sum(histogram.fake)];
  const size = histogram.real.length / bins;
  const points = Array.from({ length: bins }, (_, bin) => {
    const part = (counts) => counts.slice(bin * size, (bin + 1) * size).reduce((total, one) => total + one, 0);
    const [real, fake] = [part(histogram.real), part(histogram.fake)];
    return {
      from: bin / bins,
      to: (bin + 1) / bins,
      images: real + fake,
      share: real + fake ? fake / fakes / (fake / fakes + real / reals) : null,
    };
  });
  const drawn = points.filter((point) => point.share !== null);
  const drawing = s(
    "svg",
    {
      class: "plot",
      viewBox: `0 0 ${WIDTH} ${height}`,
      role: "img",
      "aria-label": "Share of generated images by score; the table below holds the numbers",
    },
    [0, 0.5, 1].map((share) =>
      s(
        "g",
        {},
        s("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(share), y2: y(share) }),
        s("text", { x: LEFT - 8, y: y(share) + 4, "text-anchor": "end" }, percent(share)),
      ),
    ),
    s("line", { class: "ideal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }),
    drawn.map((point) =>
      s("circle", {
        class: "dot",
        cx: x((point.from + point.to) / 2),
        cy: y(point.share),
        r: 4 + 6 * Math.sqrt(point.images / (reals + fakes)),
      }),
    ),
    ticks(240),
  );
  const rows = points.map((point) => [
    `${decimal(point.from)} to ${decimal(point.to)}`,
    count(point.images),
    percent(point.share),
  ]);
  return h(
    "figure",
    {},
    drawing,
    h(
      "figcaption",
      {},
      "Share that was generated among images with this score, if generated and real ones were equally frequent. " +
        "On the line the score is a probability. Larger dots rest on more images.",
    ),
    h(
      "details",
      {},
      h("summary", {}, "As a table"),
      table("Share of generated images by score", ["Score", "Images", "Generated"], rows, { numeric: [1, 2] }),
    ),
  );
}

function ticks(y) {
  return [0, 0.25, 0.5, 0.75, 1].map((share) =>
    s("text", { x: x(share), y, "text-anchor": "middle" }, decimal(share, share % 0.5 ? 2 : share === 0.5 ? 1 : 0)),
  );
}
