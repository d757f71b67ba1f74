"""Prepare the enrolment experiment: half of each unseen generator is to be enrolled, the rest stays unseen.

Writes OUT with a copy of the unseen and the test images of a data set and a manifest in which the first half of each
unseen generator by SHA-256, at most 30 images, has the split `enrol`. Then::

    lineup index add OUT --split enrol
    lineup index evaluate --data OUT --split test,unseen
"""

import csv
import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry

MOST = 30
FIELDS = ("path", "label", "generator", "source", "group", "split")


def main(
    data: Annotated[Path, typer.Argument(help="A data set with the splits test and unseen.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
) -> None:
    """Write OUT, in which half of each unseen generator has the split `enrol`."""
    images = sorted(
        ((hashlib.sha256(content).hexdigest(), entry, content) for entry, content in contents(data)),
        key=lambda image: image[0],
    )
    unseen: dict[str | None, list[str]] = defaultdict(list)
    for sha256, entry, _ in images:
        if entry.split == "unseen":
            unseen[entry.generator].append(sha256)
    enrol = {sha256 for hashes in unseen.values() for sha256 in hashes[: min(MOST, len(hashes) // 2)]}
    out.mkdir(parents=True)
    with (out / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(FIELDS)
        for sha256, entry, content in images:
            path = sha256 + Path(entry.key).suffix
            (out / path).write_bytes(content)
            label = "fake" if entry.label else "real"
            split = "enrol" if sha256 in enrol else entry.split
            table.writerow([path, label, entry.generator or "", entry.source, entry.group, split])
    for generator, hashes in sorted(unseen.items(), key=str):
        chosen = sum(sha256 in enrol for sha256 in hashes)
        typer.echo(f"{generator}: {chosen} to enrol, {len(hashes) - chosen} left unseen")


def contents(data: Path) -> list[tuple[Entry, bytes]]:
    """The test and unseen images with their bytes."""
    return [(entry, entry.read()) for entry in read_dataset(data, split="test,unseen")]


if __name__ == "__main__":
    typer.run(main)
