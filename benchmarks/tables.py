"""Print the rows of `lineup index evaluate --json` or `lineup train evaluate --json` as tables of BENCHMARKS.md."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

TITLES = {"none": "plain", "equalised": "both labels recompressed alike", "transformed": "augmented"}


def main(
    rows: Annotated[Path, typer.Argument(help="A file that holds the JSON document.")],
    split: Annotated[str, typer.Option(help="Only these splits, a comma list.")] = "test,unseen",
    transform: Annotated[str, typer.Option(help="Only these, a comma list.")] = "none,equalised",
) -> None:
    """Print a table per split and transform: accuracy (AUROC) in percent, by head and generator."""
    table = json.loads(rows.read_text())["rows"]
    for part in split.split(","):
        for kind in transform.split(","):
            chosen = [row for row in table if row["split"] == part and row["transform"] == kind]
            if chosen:
                print(f"\n**{part}, {TITLES[kind]}**\n")
                print_table(chosen)


def print_table(rows: list[dict[str, Any]]) -> None:
    """One Markdown table: a line per generator, a column per head."""
    heads = list(dict.fromkeys(row["head"] for row in rows))
    print(f"| | images | {' | '.join(heads)} |\n|---|---:|{'---:|' * len(heads)}")
    for generator in dict.fromkeys(row["generator"] for row in rows):
        cells = {row["head"]: row for row in rows if row["generator"] == generator}
        images = next(iter(cells.values()))["images"]
        print(f"| {generator} | {images} | {' | '.join(cell(cells[head]) for head in heads)} |")


def cell(row: dict[str, Any]) -> str:
    """Accuracy, and where there are two labels the AUROC with its 95 % bootstrap interval, in percent."""
    if row["auroc"] is None:
        return f"{100 * row['accuracy']:.1f}"
    low, high = 100 * row["auroc_low"], 100 * row["auroc_high"]
    return f"{100 * row['accuracy']:.1f} ({100 * row['auroc']:.1f}; {low:.0f}-{high:.0f})"


if __name__ == "__main__":
    typer.run(main)
