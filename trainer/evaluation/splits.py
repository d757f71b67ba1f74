"""The splits of a data set in an evaluation: which images each is measured on, and the rows that come of it.

Shared by the trainer's and the indexer's `evaluate`.
"""

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
    """Rows of every split and head for one transform, see `measure`.

    Args:
        images: Of all splits, n of them; those without a split count as of the first.
        scores: By head, each of shape (n,).
        splits: Which to measure.
        transform: The name of what the images went through.
        resamples: As of `measure`.
        seed: As of `measure`.
    """
    rows = []
    for split in splits:
        mask = split_mask(images, split, splits[0])
        part = images.take(mask)
        for head, values in scores.items():
            rows += measure(
                values[mask],
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


def split_mask(images: EmbeddedSet, split: str, default: str) -> np.ndarray:
    """Which images a split is measured on, shape (n,), bool; the unseen split, where there is one, borrows its reals.

    Images that name no split are of the split `default`.
    """
    names = np.array([name or default for name in images.splits])
    mask: np.ndarray = names == split
    if split == UNSEEN and mask.any() and images.labels[mask].all():
        mask |= (images.labels == 0) & (names != UNSEEN)
    return mask


def split_entries(
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
        splits: Which to read.
        tables: Transforms of every image.
        extra: Transforms of the curves.
        leave_out: Says of each image of these splits whether to pass it over.
    """
    lenders = [] if UNSEEN not in splits or "test" in splits else ["test"]  # their reals alone are read
    counts: Counter[tuple[str | None, str | None]] = Counter()
    for entry in read_dataset(data, split=",".join([*splits, *lenders])):
        if (entry.split in lenders and entry.label == 1) or leave_out(entry):
            continue
        variant = entry.attributes.get("variant")
        if variant == "augm":
            yield entry, [Transform("transformed", unchanged)]
            continue
        counts[entry.split, entry.generator] += 1
        transforms = [table for table in tables if variant is None or table.name != "transformed"]
        if counts[entry.split, entry.generator] <= CURVE_IMAGES:
            transforms += extra
        yield entry, transforms
