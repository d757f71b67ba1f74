"""Tables of a report in the poster's form, as Markdown and HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation import paper

HEADS = {"linear": "Linear", "nn1": "NN", "knn": "k-NN vote", "svm": "SVM", "combined": "linear + SVM, calibrated"}
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
        found = {key[2] for key in self.rows}
        return [head for head in HEADS if head in found]

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
        found = [row for name in self.generators(split) if (row := self.get(split, transform, head, name))]
        images = sum(row["images"] for row in found)
        return sum(row[measure] * row["images"] for row in found) / images if images else None


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


def seen_table(models: Mapping[str, Rows], split: str, published: bool) -> Table:
    """The poster's first table: accuracy plain and transformed, each generator of the transformed images.

    Args:
        models: Rows by model name, ours first.
        split: Of the seen generators.
        published: Print the paper's rows as well: only right on D3's own test set.
    """
    generators = next(iter(models.values())).generators(split)
    header = ["accuracy, %", *paper.SEEN_COLUMNS[:6], *generators]
    cells = [(t, g) for t in ("none", "transformed") for g in ("all", "real", "fake")]
    cells += [("transformed", generator) for generator in generators]
    rows = [
        [f"{name} ({HEADS[head]})", *(percent(rows.value("accuracy", split, t, head, g)) for t, g in cells)]
        for name, rows in models.items()
        for head in rows.heads()
    ]
    note = f"Split {split}; raw decision of each head; a generator's accuracy is its recall."
    if published and sorted(paper.D3_GENERATORS) == generators:
        order = [*range(6), *(6 + paper.D3_GENERATORS.index(name) for name in generators)]
        published_rows = {**paper.SEEN, **paper.ABLATION}
        rows += [
            [f"published: {name}", *(f"{values[i]:.1f}" for i in order)] for name, values in published_rows.items()
        ]
    return Table("Seen generators", header, rows, note)


def unseen_tables(models: Mapping[str, Rows], published: bool) -> list[Table]:
    """The poster's second table, diffusion models and others each in a block of their own."""
    generators = next(iter(models.values())).generators("unseen")
    blocks = {
        "Unseen generators: diffusion models": [g for g in generators if not NOT_DIFFUSION.search(g)],
        "Unseen generators: GANs, autoregressive and other models": [g for g in generators if NOT_DIFFUSION.search(g)],
    }
    tables = []
    for title, names in blocks.items():
        if not names:
            continue
        rows = []
        for model, measured in models.items():
            for head in measured.heads():
                values = [measured.value("balanced", "unseen", "none", head, name) for name in names]
                known = [value for value in values if value is not None]
                average = sum(known) / len(known) if known else None
                rows.append([f"{model} ({HEADS[head]})", *map(percent, values), percent(average)])
        note = "Mean of the accuracies on the real test images and on the generator's (50 is chance), plain."
        tables.append(Table(title, ["accuracy, %", *names, "average"], rows, note))
    if published and tables:
        rows = [[f"published: {name}", *(f"{value:.1f}" for value in values)] for name, values in paper.UNSEEN.items()]
        tables.append(Table("Unseen generators as published", ["accuracy, %", *paper.UNSEEN_COLUMNS], rows))
    return tables


def ranking_tables(rows: Rows) -> list[Table]:
    """AUROC with intervals for each head and generator, one table for each split and transform."""
    titles = {"none": "plain", "transformed": "augmented", "equalised": "both labels recompressed alike"}
    return [
        Table(
            f"AUROC, {split}, {titles[transform]}",
            ["AUROC, % (95 % interval)", *rows.generators(split), "all", "AP", "recall at 1 %", "recall at 5 %"],
            [
                [
                    HEADS[head],
                    *(
                        with_interval(rows.get(split, transform, head, name), "auroc")
                        for name in [*rows.generators(split), "all"]
                    ),
                    *(
                        percent(rows.value(key, split, transform, head, "all"))
                        for key in ("ap", "recall_at_1", "recall_at_5")
                    ),
                ]
                for head in rows.heads()
            ],
            "Against the real images of the split. Recall at 1 % and 5 % false alarms is over all fakes.",
        )
        for split in rows.splits()
        for transform in titles
        if any(key[:2] == (split, transform) for key in rows.rows)
    ]
