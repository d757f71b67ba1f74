"""What `lineup index evaluate` and `lineup index audit` show to people, as tables on stdout."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from indexer.measure.audit import RINGS
from indexer.measure.index_evaluation import Evaluation
from indexer.terminal import results

HEADS = ("knn", "nn1", "linear", "svm", "combined")
TRANSFORMS = {"none": "plain", "transformed": "transformed", "equalised": "both labels recompressed alike"}


def tell_evaluation(evaluation: Evaluation) -> None:
    """A table per split and transform: accuracy and AUROC of each head by generator, and the verdicts."""
    console = results()
    cells = {(row["split"], row["transform"], row["generator"], row["head"]): row for row in evaluation.rows}
    verdicts = {(row["split"], row["transform"], row["generator"]): row for row in evaluation.verdicts}
    for split, transform in dict.fromkeys((split, transform) for split, transform, _, _ in cells):
        names = [name for at, how, name, _ in cells if (at, how) == (split, transform)]
        heads = [head for head in HEADS if any((split, transform, name, head) in cells for name in names)]
        table = Table(
            *("generator", "images", *heads, "called fake", "called real", "uncertain"),
            title=f"{split}, {TRANSFORMS.get(transform, transform)}: accuracy (AUROC), %",
            title_justify="left",
            box=SIMPLE,
        )
        for name in dict.fromkeys(names):
            rows = [cells.get((split, transform, name, head)) for head in heads]
            images = max(row["images"] for row in rows if row)
            verdict = verdicts.get((split, transform, name))
            shares = [_percent(verdict[key] if verdict else None) for key in ("fake", "real", "uncertain")]
            table.add_row(name, str(images), *map(_cell, rows), *shares)
        console.print(table)
    if str(evaluation.left_out):
        console.print(str(evaluation.left_out), soft_wrap=True)
    thresholds = ", ".join(
        f"{name} {'cannot be promised' if value is None else f'{value:.3f}'}"
        for name, value in evaluation.thresholds.items()
    )
    console.print(f"index at revision {evaluation.revision}; thresholds of the combined score: {thresholds}")


def tell_audit(found: Mapping[str, Any]) -> None:
    """AUROC of all facts together and of each, by generator; then warnings and near duplicates."""
    console = results()
    facts = list(found["facts"])
    table = Table(
        *("fakes", "images", "all facts", *facts),
        title=f"how well files alone tell real from fake: AUROC, above {RINGS} rings",
        title_justify="left",
        box=SIMPLE,
    )
    everything = {"name": "all", "images": sum(row["images"] for row in found["generators"])} | {
        key: found[key] for key in ("auroc", "facts")
    }
    for row in (everything, *found["generators"]):
        areas = [row["auroc"], *(row["facts"].get(fact) for fact in facts)]
        table.add_row(row["name"] or "(unnamed)", str(row["images"]), *map(_area, areas))
    console.print(table)
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    duplicates = found["near_duplicates"]
    print(f"{duplicates['count']} near duplicates across labels")
    for pair in duplicates["listed"]:
        line = f"  {_name(pair['real'])} and {_name(pair['fake'])}: {pair['bits']} bits apart"
        console.print(line, markup=False, soft_wrap=True)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return _percent(row["accuracy"]) + ("" if row["auroc"] is None else f" ({_percent(row['auroc'])})")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _area(area: float | None) -> str:
    if area is None:
        return "-"
    return f"[bold]{area:.2f}[/bold]" if area > RINGS else f"{area:.2f}"


def _name(reference: Mapping[str, Any]) -> str:
    kind = "real" if reference["generator"] is None else reference["generator"]
    return f"{kind} {reference['id']}" + (f" {reference['uri']}" if reference["uri"] else "")
