"""The report of an evaluation: Markdown, CSV, JSON, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.evaluation import plots
from trainer.evaluation.enrolment_curve import enrolment_curve
from trainer.evaluation.head_evaluation import (
    Evaluation,
    calibration_rows,
    file_fact_rows,
    head_probabilities,
    source_accuracies,
)
from trainer.evaluation.report_tables import Rows, Table, percent, report_tables
from trainer.evaluation.splits import UNSEEN
from trainer.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

SIMULATED = (
    "These images are SIMULATED: synthetic photographs and imitations of generators' fingerprints made by "
    "`lineup train simulate`. The figures say that the program works, and nothing about real generated images."
)


def write_report(
    evaluation: Evaluation, folder: Path, *, beside: Sequence[Path] = (), published: bool = False
) -> dict[str, Any]:
    """Measure what the tables do not hold yet, and write everything into a folder.

    Args:
        evaluation: With curves where they are wanted.
        folder: Gets report.md, report.html, report.json, rows.csv, curves.csv, enrolment.csv and plots/.
        beside: `report.json` of other checkpoints on the same images, whose rows join the tables.
        published: Print the paper's figures too: only right on D3's own test set.

    Returns:
        What report.json holds.

    Raises:
        EvaluationError: A file of `beside` is no report.
    """
    nearest = evaluation.scorer.heads.nearest
    enrolment = nearest and UNSEEN in evaluation.splits and enrolment_curve(nearest, evaluation.part(UNSEEN))
    document: dict[str, Any] = {
        "checkpoint": evaluation.checkpoint,
        "name": evaluation.name,
        "heads": evaluation.scorer.heads.id,
        "simulated": evaluation.simulated,
        "rows": evaluation.rows,
        "left_out": asdict(evaluation.left_out),
        "curves": evaluation.curves,
        "enrolment": enrolment or [],
        "calibration": calibration_rows(evaluation),
        "file_facts": file_fact_rows(evaluation),
        "sources": source_accuracies(evaluation),
        "rejected": [asdict(rejected) for rejected in evaluation.rejected],
    }
    tables = report_tables(document, beside, published)
    figures = report_figures(evaluation, document["enrolment"])
    title = f"Evaluation of {evaluation.name}"
    facts = [
        f"Checkpoint {evaluation.checkpoint}, heads {evaluation.scorer.heads.id}, "
        f"{len(evaluation.sets['none'])} images read, {len(evaluation.rejected)} rejected.",
        *([f"{str(evaluation.left_out).capitalize()}."] if str(evaluation.left_out) else []),
        *([SIMULATED] if evaluation.simulated else []),
    ]
    pictures = {name: _png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        write_atomically(folder / "plots" / f"{name}.png", picture)
    for name in ("rows", "curves", "enrolment"):
        write_atomically(folder / f"{name}.csv", _csv(document[name]))
    write_atomically(folder / "report.json", json.dumps(document, indent=1).encode())
    write_atomically(folder / "report.md", _markdown(title, facts, tables, pictures).encode())
    write_atomically(folder / "report.html", _html(title, facts, tables, pictures).encode())
    return document


def print_summary(evaluation: Evaluation, console: Console) -> None:
    """Print accuracy and AUROC of every head and generator to a terminal."""
    from rich import table

    rows = Rows(evaluation.rows)
    if evaluation.simulated:
        console.print(SIMULATED, style="bold")
    for split in rows.splits():
        for transform in ("none", "transformed", "equalised"):
            screen = table.Table(title=f"{split}, {transform}: accuracy % / AUROC %")
            for column in ("", *rows.heads()):
                screen.add_column(column, justify="right" if column else "left", no_wrap=not column)
            for name in ("all", "real", *rows.generators(split)):
                of_heads = [rows.get(split, transform, head, name) for head in rows.heads()]
                cells = ["–" if r is None else f"{percent(r['accuracy'])} / {percent(r['auroc'])}" for r in of_heads]
                screen.add_row(name, *cells)
            console.print(screen)
    if str(evaluation.left_out):
        console.print(str(evaluation.left_out), soft_wrap=True, highlight=False)


def report_figures(evaluation: Evaluation, enrolment: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Every picture of a report by file name; `enrolment` as `enrolment_curve` gives it."""
    images, splits = evaluation.sets["none"], evaluation.splits
    panels = {}
    for split in splits:
        for transform, title in (("none", "plain"), ("equalised", "equalised")):
            mask = evaluation.mask(split, transform)
            labels = evaluation.sets[transform].labels[mask]
            if len(np.unique(labels)) == 2:
                scores = {head: values[mask] for head, values in evaluation.scores[transform].items()}
                panels[f"{split}, {title}"] = (labels, scores)
    unseen = frozenset(evaluation.part(UNSEEN).generators if UNSEEN in splits else ())
    figures = {
        "roc": plots.roc(panels),
        "map": plots.embedding_map(images, unseen),
        "generators": plots.generator_confusion(images),
    }
    if evaluation.curves:
        figures["robustness"] = plots.robustness(evaluation.curves, evaluation.rows)
    if enrolment:
        figures["enrolment"] = plots.enrolment(enrolment)
    probabilities = {
        title: (labels, by_head)
        for title, (labels, scores) in panels.items()
        if (by_head := head_probabilities(evaluation.scorer, scores))
    }
    if probabilities:
        figures["reliability"] = plots.reliability(probabilities)
    return figures


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _markdown(title: str, facts: Sequence[str], tables: Sequence[Table], pictures: Mapping[str, bytes]) -> str:
    parts = [f"# {title}", *facts, *(table.markdown() for table in tables)]
    parts += [f"![{name}](plots/{name}.png)\n\n{plots.CAPTIONS[name]}" for name in pictures]
    return "\n\n".join(parts) + "\n"


def _html(title: str, facts: Sequence[str], tables: Sequence[Table], pictures: Mapping[str, bytes]) -> str:
    images = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{html.escape(plots.CAPTIONS[name])}</figcaption></figure>"
        for name, data in pictures.items()
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}"
        "td,th{padding:.25em .6em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%;display:block}"
        "figure{margin:2em 0}figcaption{color:#555;max-width:46em}"
    )
    text = "".join(f"<p>{html.escape(fact)}</p>" for fact in facts) + images
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><h1>{html.escape(title)}</h1>{text}{''.join(table.html() for table in tables)}</html>\n"
    )
