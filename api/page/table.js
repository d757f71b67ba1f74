/** Verdicts as a table that spreadsheets open, with the columns of `lineup detect --output verdicts.csv`. */

const COLUMNS = [
  ...["file", "verdict", "score", "false_alarm", "basis", "reason", "generator", "generator_share", "unknown_generator"],
  ...["novelty", "known", "nearest", "nearest_label", "nearest_generator", "nearest_similarity", "says_generated"],
  ...["credentials", "width", "height", "format", "sha256", "id", "checkpoint", "revision", "error"],
];
const FORMULA = /^[=+\-@\t\r]/; // what a cell begins with that a spreadsheet takes for one; strangers name files
const QUOTED = /[",\r\n]/;

/** A file in UTF-8, with a row for each verdict or failure. */
export function csv(results) {
  const lines = [COLUMNS, ...results.map(row).map((values) => COLUMNS.map((name) => cell(values[name])))];
  return new Blob(["\ufeff", ...lines.map((cells) => `${cells.join(",")}\r\n`)], { type: "text/csv" });
}

function row(result) {
  if (result.error) return { file: result.file, error: result.error.detail };
  const first = result.verdict === "real" ? null : result.generators[0];
  const [nearest] = [...result.neighbours].sort((a, b) => b.similarity - a.similarity);
  return {
    ...result,
    ...result.image,
    generator: first?.name,
    generator_share: first?.share,
    known: result.known?.id,
    nearest: nearest?.id,
    nearest_label: nearest?.label,
    nearest_generator: nearest?.generator,
    nearest_similarity: nearest?.similarity,
    says_generated: Boolean(result.provenance.says_generated),
    credentials: result.provenance.c2pa?.state,
    id: result.recorded ? result.id : null,
    checkpoint: result.model.checkpoint,
    revision: result.index.revision,
  };
}

function cell(value) {
  const text = typeof value === "string" && FORMULA.test(value) ? `'${value}` : String(value ?? "");
  return QUOTED.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
