/** Numbers in words that a reader can act on. No elements here. */

/** 1234567 as 1,234,567. */
export function count(number) {
  return number === null || number === undefined ? "–" : Number(number).toLocaleString("en-GB");
}

/** "1 image", "3 images". */
export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

/** A score or similarity with two digits; one that is not quite 1 or 0 is not rounded to it. */
export function decimal(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  const last = 10 ** -digits;
  if (value < 1 && value > 1 - last / 2) return (1 - last).toFixed(digits);
  if (value > 0 && value < last / 2) return `<\u00a0${last.toFixed(digits)}`;
  return value.toFixed(digits).replace("-", "−");
}

/** A p-value, such as "p = 0.04" and "p < 0.01". */
export function pValue(value) {
  const figure = decimal(value);
  return figure.startsWith("<") ? `p ${figure}` : `p = ${figure}`;
}

/** How many digits, up to 6, tell these scores from other figures that they do not equal. Null ones are no figures. */
export function precision(scores, others, least = 2) {
  const known = (values) => values.filter((value) => value !== null && value !== undefined);
  const apart = (digits) =>
    known(scores).every((one) =>
      known(others).every((other) => one === other || decimal(one, digits) !== decimal(other, digits)),
    );
  let digits = least;
  while (digits < 6 && !apart(digits)) digits += 1;
  return digits;
}

/** The score of a verdict, or of its summary, told from the cuts. */
export function figure({ score, thresholds }) {
  return decimal(score, precision([score], [thresholds?.fake, thresholds?.real]));
}

/** A share as per cent, in one piece. */
export function percent(share) {
  if (share === null || share === undefined) return "–";
  if (share > 0 && share < 0.005) return "<\u00a01\u00a0%";
  if (share < 1 && share > 0.995) return ">\u00a099\u00a0%";
  return `${Math.round(100 * share)}\u00a0%`;
}

/** A share as "1 in 20": to two significant digits. */
export function oneIn(share) {
  const times = 1 / share;
  const unit = times < 10 ? 1 : 10 ** (Math.floor(Math.log10(times)) - 1);
  return `1 in ${count(Math.max(1, Math.round(times / unit) * unit))}`;
}

export function when(time) {
  return new Date(time).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

export function day(time) {
  return new Date(time).toLocaleDateString("en-GB", { dateStyle: "medium" });
}

export function bytes(number) {
  const mega = number / 2 ** 20;
  return mega >= 1 ? `${mega.toFixed(1)} MiB` : `${Math.max(1, Math.round(number / 1024))} KiB`;
}

/** A sentence from the service's words. */
export function sentence(text) {
  const trimmed = text.trim();
  return trimmed && `${trimmed[0].toUpperCase()}${trimmed.slice(1)}${/[.!?…]$/.test(trimmed) ? "" : "."}`;
}

/** The same with its stop, but as it begins: perhaps with the name of a file. */
export function ended(text) {
  return /[.!?…]$/.test(text.trim()) ? text : `${text.trim()}.`;
}

/** What is out of order with the service, or nothing. */
export function stateWords({ degraded, inactive }) {
  const away = "The database is away or slow. Lineup judges from memory, and records nothing.";
  return [degraded ? away : "", inactive ? ended(inactive) : ""].filter(Boolean).join(" ");
}

/** Headings of the verdicts. */
export function headline(verdict) {
  if (verdict.basis === "known") return verdict.known?.label === "fake" ? "Known generated image" : "Known real image";
  return { fake: "Probably generated", real: "Probably a real photograph", uncertain: "Cannot tell" }[verdict.verdict];
}

/** The short word for a label or a decision. */
export function labelWord(label) {
  return { fake: "generated", real: "real", uncertain: "cannot tell" }[label] ?? "no answer";
}

/** What the score means: how often real photographs score like that. */
export function rarity(verdict) {
  const share = verdict.false_alarm;
  const images = verdict.calibration?.real;
  if (verdict.score === null || share === null || share === undefined) return null;
  if (!images) return `${percent(share)} of real photos score this high or higher.`;
  const alike = Math.round(share * images);
  const number = alike ? `${count(alike)} (${percent(share)})` : "none";
  const score = alike > 1 ? "score" : "scores";
  return `Of the ${count(images)} real photos that Lineup was calibrated with, ${number} ${score} this high or higher.`;
}

/** What decided, in a sentence or two after the numbers: the cuts, the known file, or why there is no answer. */
export function meaning(verdict) {
  const { score, thresholds, reason, image } = verdict;
  if (verdict.basis === "known") {
    const origin = verdict.known.label === "fake" ? "a generated image" : "a real image";
    const by = verdict.known.generator ? ` by ${verdict.known.generator}` : "";
    const alone = score === null ? "" : ` On its score alone Lineup would say “${scoreWord(score, thresholds)}”.`;
    return `This very file is in the reference set as ${origin}${by}. It did not vote for itself.${alone}`;
  }
  if (image.shortfall) return `${sentence(image.shortfall)} Lineup says nothing rather than guess.`;
  if (score === null) return reason ? `No score: ${reason}.` : "No head could give a calibrated score.";
  const digits = precision([score], [thresholds.fake, thresholds.real]);
  const [fake, real] = [decimal(thresholds.fake, digits), decimal(thresholds.real, digits)];
  if (verdict.verdict === "fake") return `Lineup says “generated” from ${fake} on.`;
  if (verdict.verdict === "real") return `Lineup says “real” below ${real}.`;
  if (thresholds.fake !== null && thresholds.real !== null && reason?.includes("between the thresholds")) {
    return (
      `Lineup says “real” below ${real} and “generated” from ${fake} on. ` +
      "This lies between: it says nothing rather than guess."
    );
  }
  return `${reason ? sentence(reason) : ""} Lineup says nothing rather than guess.`.trim();
}

/** What the cut that decided promises, from the rates that were asked for. */
export function promise({ verdict, basis }, rates) {
  if (basis === "known" || verdict === "uncertain") return "";
  return verdict === "fake"
    ? `That cut is set so that ${rate(rates?.false_alarm, "real photos")} is wrongly called generated.`
    : `That cut is set so that ${rate(rates?.miss, "generated images of the kinds it knows")} slips through.`;
}

/** What the score alone decides. */
function scoreWord(score, { fake, real }) {
  if (fake !== null && score >= fake) return labelWord("fake");
  return labelWord(real !== null && score < real ? "real" : "uncertain");
}

function rate(share, of) {
  return share ? `at most ${oneIn(share)} ${of}` : `only a small share of ${of}`;
}

const VARIANTS = {
  jpeg: (value) => `JPEG, quality ${value}`,
  webp: (value) => `WebP, quality ${value}`,
  scale: (value) => `Scaled to ${percent(Number(value))}`,
};

/** The name of a re-encoding: "jpeg-70" is "JPEG, quality 70". */
export function variantName(name) {
  const [kind, value] = name.split("-");
  return VARIANTS[kind] && value ? VARIANTS[kind](value) : name;
}

/** Whether the verdict survives re-encoding, as far as the copies have scores. */
export function stabilityWords({ score, stability, basis }) {
  if (score === null) return "There is no score that could change.";
  const scores = Object.values(stability.scores);
  const judged = scores.filter((value) => value !== null).length;
  if (!judged) return "No re-encoded copy holds enough to be judged.";
  const less = scores.length - judged;
  const rest = less ? ` ${plural(less, "more holds", "more hold")} too little to be judged.` : "";
  const spread =
    stability.spread < 0.005
      ? ` The scores hardly differ.${rest}`
      : ` The scores differ by ${decimal(stability.spread)} at most.${rest}`;
  if (basis === "known") return `A re-encoded copy is no longer the known file: its score decides.${spread}`;
  return stability.flips
    ? `The verdict changes under at least one of ${judged} re-encodings: treat it with care.${spread}`
    : `The verdict stays the same under all ${judged} re-encodings.${spread}`;
}

/** What each state of Content Credentials means. */
export const CREDENTIALS = {
  trusted: "Signed, unchanged since, and the signer is on a trust list.",
  intact: "Signed and unchanged since, but nobody vouches for the signer.",
  invalid: "The signature does not fit the file: it was changed afterwards, or the statement was forged.",
  remote: "The file only links to a statement elsewhere. Lineup follows no links.",
  unreadable: "There is a statement, but it cannot be read.",
};

/** A share of a vote: one that rounds to half says on which side it lies. */
function part(share) {
  if (share === 0.5 || Math.round(100 * share) !== 50) return percent(share);
  return share < 0.5 ? "just under half" : "just over half";
}

/** The nearest counted without kind, and what they weigh: a single one may outweigh the rest. */
function counted({ score, votes: { fake, real } }, neighbours) {
  const weights = ["fake", "real"].map((label) =>
    neighbours
      .slice(0, fake + real)
      .filter((near) => near.label === label)
      .reduce((sum, near) => sum + (near.weight ?? 0), 0),
  );
  const [nearest, all] = [weights, [score, 1 - score]].map((pair) => pair.map(percent).join(" and "));
  const further = nearest === all ? "" : `; with those further down ${all}`;
  return `Of the ${fake + real} nearest of either kind, ${fake} generated and ${real} real weigh ${nearest}${further}`;
}

/** A number with its sign. */
export function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
}

/** How a head decides, and what it said of this image. Null where it cannot answer. */
export const HEADS = [
  {
    name: "Vote of the neighbours",
    field: "knn",
    how: "The nearest of each kind vote, the same share of both kinds, the more alike the more weight. More than half decides.",
    said: (head, { neighbours }) =>
      `generated images hold ${part(head.score)} of the weight. ${counted(head, neighbours)}`,
    missing: "needs real and generated reference images",
  },
  {
    name: "Nearest neighbour",
    field: "nn1",
    how: "The single most similar reference image decides alone.",
    said: (head) => `alike ${decimal(head.similarity, 3)}`,
    missing: "there is no reference image yet",
  },
  {
    name: "Linear classifier",
    field: "linear",
    how: "Learned to separate real from generated images; does not look at the references.",
    said: (head) => `score ${decimal(head.score, precision([head.score], [0.5]))} of 1`,
    missing: "the checkpoint has none",
  },
  {
    name: "Outlier test",
    field: "svm",
    how: "Knows real photos only and asks whether this could be one; above 0 is unlike them.",
    said: (head) => `score ${decimal(head.score, precision([head.score], [0]))}`,
    missing: "the checkpoint has none",
  },
];
