"""What is measured of scores: accuracy, AUROC, average precision, recall at a false-alarm rate, and their intervals.

Numpy only, and shared by the trainer's and the indexer's `evaluate`. Every measure takes weights, so that a bootstrap
is one more call with the resampled counts as weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
"""How many a bootstrap draws."""
LEVEL = 0.95
"""Share of the resamples that a bootstrap interval holds."""
WEIGHTS_BLOCK = 4_000_000
"""Entries of one block of bootstrap weights, which bounds memory."""


def accuracy(correct: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of correct answers, 0..1, shape () or (r,), of `correct` (n,); weights (n,) or (r, n) are 1 by default."""
    weights = np.ones(len(correct)) if weights is None else weights
    return np.asarray((weights @ correct.astype(np.float64)) / weights.sum(-1))


def auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Probability that a fake scores above a real, ties counting half; 0..1, NaN without one of the labels.

    Args:
        scores: Shape (n,), finite.
        labels: 0 real, 1 fake, shape (n,).
        weights: Shape (n,) or (r, n); one by default.

    Returns:
        Shape () or (r,).
    """
    real, fake = _by_score(scores, labels, weights)  # (..., u), ascending score
    below = np.cumsum(real, -1) - 0.5 * real
    pairs = real.sum(-1) * fake.sum(-1)
    return _ratio((fake * below).sum(-1), pairs)


def average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Precision averaged over the recall it is reached at, 0..1; NaN without a fake. Arguments as `auroc`."""
    real, fake = _by_score(scores, labels, weights)
    fakes = np.cumsum(fake[..., ::-1], -1)  # above each threshold, descending
    alarms = fakes + np.cumsum(real[..., ::-1], -1)
    precision = np.divide(fakes, alarms, out=np.zeros_like(alarms), where=alarms > 0)
    return _ratio((fake[..., ::-1] * precision).sum(-1), fake.sum(-1))


def recall_at(
    scores: np.ndarray, labels: np.ndarray, false_alarms: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """Largest share of fakes found by a threshold that at most a share `false_alarms` (0..1) of the reals reaches.

    The other arguments are those of `auroc`.
    """
    real, fake = _by_score(scores, labels, weights)
    reals, fakes = real.sum(-1, keepdims=True), fake.sum(-1, keepdims=True)
    alarms = np.cumsum(real[..., ::-1], -1) / np.maximum(reals, 1e-300)
    recalls = np.cumsum(fake[..., ::-1], -1) / np.maximum(fakes, 1e-300)
    best = np.where(alarms <= false_alarms + 1e-12, recalls, 0.0).max(-1)
    return np.where((reals[..., 0] > 0) & (fakes[..., 0] > 0), best, np.nan)


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False-alarm rates and recalls of every threshold, both ascending from 0 to 1, shape (u + 1,)."""
    real, fake = _by_score(scores, labels, None)
    points = [np.r_[0.0, np.cumsum(side[::-1]) / max(1.0, side.sum())] for side in (real, fake)]
    return points[0], points[1]


def resampled_weights(
    labels: np.ndarray, groups: Sequence[str], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Counts of a bootstrap by whole groups within each label, shape (resamples, n), float64.

    Each resample draws as many groups of a label as there are among labels (n,); images of a group are drawn together.
    """
    weights = np.zeros((resamples, len(labels)))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        names, inverse = np.unique(np.asarray(groups, dtype=str)[rows], return_inverse=True)
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)  # (r, groups)
        weights[:, rows] = counts[:, inverse]
    return weights


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle `LEVEL` of bootstrap values (percentiles); NaN where there are none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, bins: int = 10
) -> np.ndarray:
    """Mean distance between probability and share of fakes over equally filled bins, 0..1, shape () or (r,).

    Args:
        probabilities: Shape (n,), 0..1.
        labels: 0 real, 1 fake, shape (n,).
        weights: Shape (n,) or (r, n); `balanced_weights` for probabilities at prior 0.5.
        bins: How many.
    """
    weights = np.ones(len(labels)) if weights is None else weights
    order = np.argsort(probabilities, kind="stable")
    gaps = np.zeros(weights.shape[:-1])
    for rows in np.array_split(order, bins):
        gaps = gaps + np.abs(weights[..., rows] @ (labels[rows] - probabilities[rows]))
    return np.asarray(gaps / weights.sum(-1))


def measure(
    scores: np.ndarray,
    labels: np.ndarray,
    generators: Sequence[str],
    groups: Sequence[str],
    threshold: float,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    **fields: str,
) -> list[dict[str, Any]]:
    """Rows of the evaluation: one for all images, one for the reals, one for each generator.

    A generator's accuracy is its recall; its AUROC, AP and recall at 1 % and 5 % false alarms are against all reals.
    `balanced` is the mean of the accuracies on reals and on the row's fakes. Each measure has `_low` and `_high`, a
    95 % bootstrap interval by groups. What cannot be measured is None.

    Args:
        scores: Shape (n,), above `threshold` for fake; NaN where the head could not answer: such images are left out.
        labels: 0 real, 1 fake, shape (n,).
        generators: n names, empty for a real image.
        groups: n names.
        threshold: Of the raw decision.
        resamples: How many the bootstrap draws; 0 leaves the intervals out.
        seed: Fixes the bootstrap.
        fields: Put first in every row: split, transform, head.
    """
    answered = ~np.isnan(scores)
    scores, labels = np.asarray(scores)[answered], np.asarray(labels)[answered]
    names, groups = np.asarray(generators, dtype=str)[answered], np.asarray(groups, dtype=str)[answered]
    rows = []
    for name in ["all", "real", *sorted(set(names[labels == 1].tolist()))]:
        # A generator's row needs the reals too, for what ranks it against them.
        mask = np.full(len(labels), name == "all") | (labels == 0) | (names == name)
        images = _Images(scores[mask], labels[mask], threshold, None if name == "all" else int(name != "real"))
        if not images.counted.any():
            continue
        row: dict[str, Any] = {**fields, "generator": name, "images": int(images.counted.sum())}
        point = images.values(np.ones((1, len(images.labels))))
        draws = _bootstrap(images, list(groups[mask]), resamples, seed)
        for key in ("accuracy", "balanced", "auroc", "ap", "recall_at_1", "recall_at_5"):
            row[key] = _plain(point[key][0]) if key in point else None
            low, high = interval(draws[key]) if key in draws else (np.nan, np.nan)
            row[f"{key}_low"], row[f"{key}_high"] = _plain(low), _plain(high)
        rows.append(row)
    return rows


@dataclass(frozen=True, slots=True)
class _Images:
    """The images behind one row; `only` is the label whose accuracy counts, None for both."""

    scores: np.ndarray
    labels: np.ndarray
    threshold: float
    only: int | None

    @property
    def counted(self) -> np.ndarray:
        return np.ones(len(self.labels), dtype=bool) if self.only is None else self.labels == self.only

    def values(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every measure that these images allow, each of shape (r,), for weights (r, n)."""
        correct = (self.scores > self.threshold) == (self.labels == 1)
        values = {"accuracy": accuracy(correct[self.counted], weights[:, self.counted])}
        if self.only == 0 or len(np.unique(self.labels)) < 2:
            return values
        sides = [self.labels == label for label in (0, 1)]
        values["balanced"] = np.mean([accuracy(correct[side], weights[:, side]) for side in sides], axis=0)
        values["auroc"] = auroc(self.scores, self.labels, weights)
        values["ap"] = average_precision(self.scores, self.labels, weights)
        values["recall_at_1"] = recall_at(self.scores, self.labels, 0.01, weights)
        values["recall_at_5"] = recall_at(self.scores, self.labels, 0.05, weights)
        return values


def _bootstrap(images: _Images, groups: Sequence[str], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Every measure of every resample, shape (r,), in blocks that bound memory."""
    rng = np.random.default_rng(seed)
    size = max(1, WEIGHTS_BLOCK // max(1, len(groups)))
    sizes = [min(size, resamples - start) for start in range(0, resamples, size)]
    blocks = [images.values(resampled_weights(images.labels, groups, count, rng)) for count in sizes]
    return {key: np.concatenate([block[key] for block in blocks]) for key in (blocks[0] if blocks else ())}


def _by_score(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight of reals and of fakes at each distinct score, ascending; each (u,) or (r, u)."""
    weights = np.ones(len(labels)) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])[: len(order)]
    is_fake = (np.asarray(labels)[order] == 1).astype(np.float64)
    sorted_weights = weights[..., order]
    real, fake = (np.add.reduceat(sorted_weights * side, starts, axis=-1) for side in (1 - is_fake, is_fake))
    return real, fake


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Part / whole, NaN where there is none of it."""
    return np.asarray(np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0))


def _plain(value: float) -> float | None:
    """A JSON number: six digits, None for NaN."""
    return None if np.isnan(value) else round(float(value), 6)
