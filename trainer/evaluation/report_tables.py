"""Tables of a report in the poster's form, as Markdown and HTML."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.shards import D3_GENERATORS
from trainer.evaluation.head_evaluation import PROMISED_RATE, EvaluationError
from trainer.evaluation.plots import LEGEND
from trainer.evaluation.published_tables import SEEN_ACCURACIES, SEEN_COLUMNS, UNSEEN_ACCURACIES, UNSEEN_COLUMNS
from trainer.evaluation.splits import UNSEEN

TITLES = {"linear": "Linear", "nn1": "NN", "knn": "k-NN vote", "svm": "SVM", "combined": "linear + SVM, calibrated"}
"""Heads in the poster's order and words; the k-NN vote is Lineup's, on what the heads were fitted on."""
NOT_DIFFUSION = re.compile(
    r"^sim-|gan|dall-?e[ -]?(mini|v?1$)|muse|gpt|4o|parti|cogview|\bvar\b|crn|imle|deepfake", re.I
)
"""Names of generators that are not diffusion models: GANs, autoregressive and masked-token models, simulated ones."""


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a header and rows of text; the first column is the row's name."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table with its title as a third-level heading."""
        lines = [f"### {self.title}", "", *([self.note, ""] if self.note else [])]
        lines += ["| " + " | ".join(self.header) + " |", "|---" + "|---:" * (len(self.header) - 1) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """The table with its title as a heading, escaped."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f"<h3>{html.escape(self.title)}</h3>{note}<table><tr>{head}</tr>{body}</table>"


class Rows:
    """The rows of one evaluation, by what they measure."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = {(r["split"], r["transform"], r["head"], r["generator"]): r for r in rows}

    def get(self, split: str, transform: str, head: str, generator: str) -> Mapping[str, Any] | None:
        """One row, None where that was not measured."""
        return self.rows.get((split, transform, head, generator))

    def heads(self) -> list[str]:
        """Heads that were measured, in the poster's order."""
        heads = {key[2] for key in self.rows}
        return [head for head in TITLES if head in heads]

    def splits(self) -> list[str]:
        """Splits that were measured."""
        return list(dict.fromkeys(key[0] for key in self.rows))

    def generators(self, split: str) -> list[str]:
        """Generators of a split, by name."""
        return sorted({key[3] for key in self.rows if key[0] == split} - {"all", "real"})

    def value(self, measure: str, split: str, transform: str, head: str, generator: str) -> float | None:
        """One number; `generator` may also be "fake": all fakes together (accuracy only)."""
        if generator != "fake":
            row = self.get(split, transform, head, generator)
            return row[measure] if row else None
        rows = [row for name in self.generators(split) if (row := self.get(split, transform, head, name))]
        images = sum(row["images"] for row in rows)
        return sum(row[measure] * row["images"] for row in rows) / images if images else None


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def with_interval(row: Mapping[str, Any] | None, measure: str) -> str:
    """A percentage and its 95 % interval."""
    if row is None or row[measure] is None:
        return "–"
    low, high = row[f"{measure}_low"], row[f"{measure}_high"]
    interval = "" if low is None else f" ({percent(low, 0)}–{percent(high, 0)})"
    return percent(row[measure]) + interval


def report_tables(document: Mapping[str, Any], beside: Sequence[Path], published: bool) -> list[Table]:
    """Every table of a report, the poster's first; none without rows.

    Args:
        document: What report.json holds.
        beside: `report.json` of other checkpoints on the same images, whose rows join the poster's tables.
        published: Print the paper's rows as well: only right on D3's own test set.

    Raises:
        EvaluationError: A file of `beside` is no report.
    """
    rows = Rows(document["rows"])
    models = {document["name"]: rows}
    for path in beside:
        try:
            other = json.loads(path.read_text())
            name = other["name"] if other["name"] not in models else f"{other['name']} {other['checkpoint'][:8]}"
            models[name] = Rows(other["rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} is no report.json of an evaluation ({error}): change --beside") from error
    tables = [seen_table(models, split, published) for split in rows.splits() if split != UNSEEN]
    tables += unseen_tables(models, published) if UNSEEN in rows.splits() else []
    tables += ranking_tables(rows)
    tables += [
        file_fact_table(document["file_facts"]),
        source_table(document["sources"], rows.heads()),
        calibration_table(document["calibration"]),
        enrolment_table(document["enrolment"]),
    ]
    return [table for table in tables if table.rows]


def seen_table(models: Mapping[str, Rows], split: str, published: bool) -> Table:
    """The poster's first table: accuracy plain and transformed, each generator of the transformed images.

    Args:
        models: Rows by model name, ours first.
        split: Of the seen generators.
        published: Print the paper's rows as well: only right on D3's own test set.
    """
    generators = next(iter(models.values())).generators(split)
    cells = [(t, g) for t in ("none", "transformed") for g in ("all", "real", "fake")]
    cells += [("transformed", generator) for generator in generators]
    rows = [
        [f"{name} ({TITLES[head]})", *(percent(rows.value("accuracy", split, t, head, g)) for t, g in cells)]
        for name, rows in models.items()
        for head in rows.heads()
    ]
    if published and sorted(D3_GENERATORS) == generators:
        order = [*range(6), *(6 + D3_GENERATORS.index(name) for name in generators)]
        rows += [
            [f"published: {name}", *(f"{values[i]:.1f}" for i in order)] for name, values in SEEN_ACCURACIES.items()
        ]
    note = f"Split {split}; raw decision of each head; a generator's accuracy is its recall."
    return Table("Seen generators", ["accuracy, %", *SEEN_COLUMNS, *generators], rows, note)


def unseen_tables(models: Mapping[str, Rows], published: bool) -> list[Table]:
    """The poster's second table, diffusion models and others each in a block of their own."""
    generators = next(iter(models.values())).generators(UNSEEN)
    blocks = {
        "Unseen generators: diffusion models": [g for g in generators if not NOT_DIFFUSION.search(g)],
        "Unseen generators: GANs, autoregressive and other models": [g for g in generators if NOT_DIFFUSION.search(g)],
    }
    note = "Mean of the accuracies on the real test images and on the generator's (50 is chance), plain."
    tables = []
    for title, names in blocks.items():
        rows = []
        for model, measures in models.items():
            for head in measures.heads():
                values = [measures.value("balanced", UNSEEN, "none", head, name) for name in names]
                numbers = [value for value in values if value is not None]
                average = sum(numbers) / len(numbers) if numbers else None
                rows.append([f"{model} ({TITLES[head]})", *map(percent, values), percent(average)])
        if names:
            tables.append(Table(title, ["accuracy, %", *names, "average"], rows, note))
    if published and tables:
        rows = [[f"published: {name}", *(f"{v:.1f}" for v in values)] for name, values in UNSEEN_ACCURACIES.items()]
        tables.append(Table("Unseen generators as published", ["accuracy, %", *UNSEEN_COLUMNS], rows))
    return tables


def ranking_tables(rows: Rows) -> list[Table]:
    """AUROC with intervals for each head and generator, one table for each split and transform."""
    titles = {"none": "plain", "transformed": "augmented", "equalised": "both labels recompressed alike"}
    note = "Against the real images of the split. Recall at 1 % and 5 % false alarms is over all fakes."
    tables = []
    for split in rows.splits():
        names = [*rows.generators(split), "all"]
        for transform, title in titles.items():
            if not any(key[:2] == (split, transform) for key in rows.rows):
                continue
            cells = [
                [
                    TITLES[head],
                    *(with_interval(rows.get(split, transform, head, name), "auroc") for name in names),
                    *(
                        percent(rows.value(measure, split, transform, head, "all"))
                        for measure in ("ap", "recall_at_1", "recall_at_5")
                    ),
                ]
                for head in rows.heads()
            ]
            header = ["AUROC, % (95 % interval)", *names, "AP", "recall at 1 %", "recall at 5 %"]
            tables.append(Table(f"AUROC, {split}, {title}", header, cells, note))
    return tables


def file_fact_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How far facts of the files tell the labels, from `file_fact_rows`."""
    return Table(
        "Without looking: file facts alone",
        ["AUROC, % (95 % interval)", "all", "balanced accuracy"],
        [[row["split"], with_interval(row, "auroc"), percent(row["balanced"])] for row in rows],
        "A random forest on format, size and compression of the evaluated files, cross-validated by group. Where "
        "it does well, the labels differ in more than what generators leave.",
    )


def source_table(sources: Mapping[str, Mapping[str, float]], heads: Sequence[str]) -> Table:
    """Accuracy on the real images of each source, from `source_accuracies`."""
    return Table(
        "Real images by source",
        ["accuracy, %", *(TITLES[head] for head in heads), "images"],
        [
            [source, *(percent(accuracies.get(head)) for head in heads), str(int(accuracies["images"]))]
            for source, accuracies in sources.items()
        ],
        "Raw decisions, plain.",
    )


def calibration_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How well probabilities and thresholds keep what they promise, from `calibration_rows`."""
    return Table(
        "Calibration of the checkpoint",
        ["split", "head", "calibration error, %", "promised", "false alarms, %", "misses, %", "uncertain, %"],
        [
            [
                row["split"],
                TITLES[row["head"]],
                with_interval(row, "ece"),
                "–" if row["false_alarms"] is None else percent(PROMISED_RATE, 0),
                *(percent(row[measure]) for measure in ("false_alarms", "misses", "uncertain")),
            ]
            for row in rows
        ],
        "Expected calibration error at prior 0.5 over ten bins; false alarms and misses at the thresholds that "
        "promise them for images like the calibration images. Unseen generators are not like those.",
    )


def enrolment_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What a few enrolled images change, from `enrolment_curve`."""
    return Table(
        "Enrolment of unseen generators",
        ["generator", "head", "enrolled", "tested", "recall, %", "false alarms, %", "AUROC, %", "recall at 5 %"],
        [
            [
                row["generator"],
                LEGEND[row["head"]],
                str(row["enrolled"]),
                str(row["tested"]),
                with_interval(row, "recall"),
                percent(row["false_alarms"]),
                with_interval(row, "auroc"),
                percent(row["recall_at_5"]),
            ]
            for row in rows
        ],
        "References: what the heads were fitted on, and the generator's first images by SHA-256. No training.",
    )
