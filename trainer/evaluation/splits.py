"""The splits of a data set in an evaluation: which images each is measured on, and the rows that come of it.

Shared by the trainer's and the indexer's `evaluate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry
from trainer.evaluation.embedded_set import EmbeddedSet
from trainer.evaluation.metrics import RESAMPLES, measure
from trainer.evaluation.transforms import Transform, unchanged

UNSEEN = "unseen"
"""The split of generators that trained nothing; its fakes are paired with the real images of the split `test`."""
THRESHOLDS = {"knn": 0.0, "nn1": 0.0, "linear": 0.0, "svm": 0.0, "combined": 0.5}
"""Of the raw decision by head: margins and logits, and the combined probability."""
CURVE_IMAGES = 200
"""Images of each split and generator (or of the reals) that a robustness curve is measured on, at most."""


def measure_splits(
    images: EmbeddedSet,
    scores: dict[str, np.ndarray],
    splits: Sequence[str],
    transform: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of every split and head for one transform.

    Args:
        images: Of all splits, n of them.
        scores: By head, each of shape (n,).
        splits: Their names; images without a split count as the first.
        transform: Its name.
        resamples: Of the bootstraps.
        seed: Of the bootstraps.
    """
    rows = []
    for split in splits:
        chosen = np.flatnonzero(rows_of(images, split, splits[0]))
        part = images.take(chosen)
        for head, values in scores.items():
            rows += measure(
                values[chosen],
                part.labels,
                part.generators,
                part.groups,
                THRESHOLDS[head],
                resamples=resamples,
                seed=seed,
                split=split,
                transform=transform,
                head=head,
            )
    return rows


def rows_of(images: EmbeddedSet, split: str, default: str) -> np.ndarray:
    """Which images a split is measured on, shape (n,), bool; the unseen split, where there is one, borrows its reals.

    Args:
        images: n of them.
        split: Its name.
        default: The split of images that name none.
    """
    names = np.array([name or default for name in images.splits])
    rows: np.ndarray = names == split
    if split == UNSEEN and rows.any() and not (rows & (images.labels == 0)).any():
        rows |= (images.labels == 0) & (names != UNSEEN)
    return rows


def entries_of(
    data: Path,
    splits: Sequence[str],
    tables: Sequence[Transform],
    extra: Sequence[Transform],
    leave_out: Callable[[Entry], bool],
) -> Iterator[tuple[Entry, Sequence[Transform]]]:
    """Entries with their transforms: those of the tables, and of the curves for the first of each kind.

    D3's test archive brings its own transformed images (variant `augm`): they stand for our random transforms.

    Args:
        data: A data set of any layout.
        splits: Their names.
        tables: Transforms of every image.
        extra: Transforms of the curves.
        leave_out: Asked about each image of these splits.
    """
    borrowed = [] if UNSEEN not in splits or "test" in splits else ["test"]
    seen: Counter[tuple[str | None, str | None]] = Counter()
    for entry in read_dataset(data, split=",".join([*splits, *borrowed])):
        if entry.split in borrowed and entry.label == 1:
            continue
        if leave_out(entry):
            continue
        if entry.attributes.get("variant") == "augm":
            yield entry, [Transform("transformed", unchanged)]
            continue
        seen[entry.split, entry.generator] += 1
        own = [table for table in tables if entry.attributes.get("variant") is None or table.name != "transformed"]
        yield entry, [*own, *extra] if seen[entry.split, entry.generator] <= CURVE_IMAGES else own
