"""The splits of a data set in an evaluation: which images each is measured on, and the rows that come of it.

Shared by the trainer's and the indexer's `evaluate`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry
from trainer.evaluation.embedded_set import DECODING_THREADS, EmbeddedSet, Rejected, embed_entries
from trainer.evaluation.metrics import RESAMPLES, measure
from trainer.evaluation.transforms import Transform, unchanged
from trainer.images import FileFacts, UnreadableImage
from trainer.model.embedder import Embedder
from trainer.model.seen_images import LeftOut, SeenImages

UNSEEN = "unseen"
"""The split of generators that trained nothing; its fakes are paired with the real images of the split `test`."""
LEAVING_OUT = 2
"""Changes whenever the choice of what to leave out does: what was measured otherwise is not used again."""
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


def embed_splits(
    embedder: Embedder,
    data: Path,
    splits: Sequence[str],
    tables: Sequence[Transform],
    extra: Sequence[Transform] = (),
    *,
    seed: int,
    on_image: Callable[[], None] = lambda: None,
) -> tuple[dict[str, EmbeddedSet], list[Rejected], LeftOut]:
    """Embed the splits of a data set, without what the checkpoint saw; see `split_entries` and `embed_entries`."""
    seen = SeenImages.load(embedder.folder)
    left_out, groups = LeftOut(complete=seen.complete), seen_groups(data, splits, seen)

    def counted(is_seen: bool) -> bool:
        left_out.images += is_seen
        return is_seen

    def seen_group(entry: Entry) -> bool:
        return counted(entry.group in groups)

    def seen_bytes(facts: FileFacts) -> bool:
        return counted(seen.holds(facts.sha256))

    work = split_entries(data, splits, tables, extra, seen_group)
    sets, rejected = embed_entries(embedder, work, seed=seed, leave_out=seen_bytes, on_image=on_image)
    return sets, rejected, left_out


def seen_groups(data: Path, splits: Sequence[str], seen: SeenImages) -> set[str]:
    """The groups in some splits of which the data set, in whatever split, has an image that the checkpoint saw.

    A name alone is no proof: the records of many a data set are numbered from 0. Where no name is known, which is
    usual, nothing is read.
    """
    named = {entry.group for entry in read_dataset(data, split=_split_list(splits)) if seen.names(entry.group)}
    found: set[str] = set()
    if not named:
        return found

    def is_seen(entry: Entry) -> bool:
        try:
            return seen.holds(hashlib.sha256(entry.read()).hexdigest())
        except (UnreadableImage, OSError):
            return False

    entries = (entry for entry in read_dataset(data) if entry.group in named and entry.group not in found)
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        while batch := list(islice(entries, 8 * DECODING_THREADS)):
            found |= {entry.group for entry, known in zip(batch, pool.map(is_seen, batch), strict=True) if known}
    return found


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
    lenders = _lenders(splits)
    counts: Counter[tuple[str | None, str | None]] = Counter()
    for entry in read_dataset(data, split=_split_list(splits)):
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


def _lenders(splits: Sequence[str]) -> list[str]:
    """Splits whose real images alone are read, for the unseen split."""
    return [] if UNSEEN not in splits or "test" in splits else ["test"]


def _split_list(splits: Sequence[str]) -> str:
    return ",".join([*splits, *_lenders(splits)])
