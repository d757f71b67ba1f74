"""AUROC of each unseen generator by checkpoint, with both labels recompressed alike: the same recipe over its seeds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.evaluation.head_evaluation import evaluate
from trainer.model.checkpoint import read_config

HEADS = ("linear", "nn1", "knn", "svm", "combined")


def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoint folders, alike but for their seed.")],
    data: Annotated[Path, typer.Option(help="Data set with the splits test (real images) and unseen.")],
    transform: Annotated[str, typer.Option(help="none, transformed or equalised.")] = "equalised",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Print a Markdown table: AUROC and lower end of the 95 % bootstrap interval, in percent, by generator and seed."""
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for checkpoint in checkpoints:
        seed = str(read_config(checkpoint).training.get("seed", checkpoint.name))
        if any(seed == other for _, other in cells):
            raise typer.BadParameter(f"{checkpoint} has the seed {seed}, as one before it")
        for row in evaluate(checkpoint, data, split="unseen", device=device).rows:
            if row["transform"] == transform and row["generator"] != "real":
                cells.setdefault((row["generator"], seed), {})[row["head"]] = row
    print(f"| generator | images | seed | {' | '.join(HEADS)} |\n|---|---:|---:|{'---:|' * len(HEADS)}")
    for (generator, seed), rows in sorted(cells.items()):
        images = next(iter(rows.values()))["images"]
        print(f"| {generator} | {images} | {seed} | {' | '.join(cell(rows.get(head)) for head in HEADS)} |")
    print()
    for head in HEADS:
        chance = [f"{name} (seed {seed})" for (name, seed), rows in sorted(cells.items()) if not sure(rows.get(head))]
        print(f"- {head}: lower bound above 50 % for {'all' if not chance else 'all but ' + ', '.join(chance)}")


def cell(row: dict[str, Any] | None) -> str:
    """AUROC and its lower bound in percent."""
    return "–" if row is None else f"{100 * row['auroc']:.1f} (> {100 * row['auroc_low']:.1f})"


def sure(row: dict[str, Any] | None) -> bool:
    """Whether the lower bound is above chance."""
    return row is not None and row["auroc_low"] > 0.5


if __name__ == "__main__":
    typer.run(main)
