"""From raw head scores to probabilities, thresholds with promised error rates, and p-values for novelty.

Everything is fitted from images that trained neither backbone nor heads (the role "calibration"). The maps are
logistic (Platt 1999); thresholds and p-values are conformal (Vovk et al. 2005). Numpy only: serving refits after index
changes.

p-values hold for fresh images that are exchangeable with the calibration images, whatever the distribution. Thresholds
would as well if the scores they are set from came from the map that serves. They come from maps fitted without the
image's group, uploads are scored by the map fitted on all: the rates are met closely, not exactly.

False alarms are bounded twice, and the stricter bound makes the threshold. Image by image, for real images that are
exchangeable with the calibration images: images of known sources. Those of a group resemble each other all the same: g
groups of images all alike hold no rate below 1 / (g + 1). And source by source (Dunn, Wasserman, Ramdas 2022,
"Distribution-free prediction sets for two-layer hierarchical models": sources are exchangeable, not images), for nine
of ten new sources. That bound is lost as far as the embedding knows the calibration images' sources better than a new
one, because it was trained on other images of them; what is left of it is measured in BENCHMARKS.md, new sources. The
neighbours and the linear head know them no better: without the images' sources both say the same.

Misses are bounded twice in the same way, image by image and generator by generator: of nine of ten new generators no
more than the promised rate would be called real, were they no harder than those that the checkpoint was trained on.
"""

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import combinations
from typing import Any, Self

import numpy as np

from trainer.heads.logistic import LogisticMap, fit_logistic, sigmoid

HEADS = ("knn", "linear", "svm")
"""Whose raw scores are combined: the vote's logit, the linear logit, the one-class score."""
CALIBRATION_FOLDS = 5
"""Thresholds come from scores of maps that have not seen the image's group."""
METHOD = 5
"""Changes whenever scores or their fit do, here or in the vote: what was fitted otherwise is not used again."""
MINIMUM = 10
"""Fewer calibration images of either label than this calibrate nothing."""
MINIMUM_NOVELTY = 50
"""Fewer calibration images than this give no p-value for novelty."""
NEW_SOURCES = 0.9
"""Share of new sources of real images of whose images no more than the promised rate are called fake; of new generators
likewise."""
MINIMUM_SOURCES = 9
"""Fewer sources of real calibration images, `NEW_SOURCES` / (1 - `NEW_SOURCES`), promise nothing of new ones; fewer
generators likewise."""


def enough(labels: np.ndarray) -> bool:
    """Whether calibration images of these labels, 0 real and 1 fake, are `MINIMUM` of either."""
    return bool(MINIMUM <= labels.sum() <= len(labels) - MINIMUM)


def subset(heads: Iterable[str]) -> str:
    """The name of a set of heads, such as "knn+linear", whatever the order given."""
    return "+".join(sorted(set(heads), key=HEADS.index))


def shift_prior(score: float, prior: float) -> float:
    """A probability at prior 0.5 as it is when a share `prior` (between 0 and 1, `LINEUP_PRIOR`) of all images is fake.

    Thresholds are not shifted.
    """
    odds = score * prior
    return odds / (odds + (1 - score) * (1 - prior))


def decisions(scores: np.ndarray, t_fake: float | None, t_real: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Which images are called fake, and which real, bool, each of the scores' shape; the others are uncertain.

    Args:
        scores: Of the images, shape (n,), NaN where there is none.
        t_fake: `fake` from here up; None for never.
        t_real: `real` below, where it is not fake; None for never.
    """
    fake = scores >= (np.inf if t_fake is None else t_fake)
    return fake, ~fake & (scores < (-np.inf if t_real is None else t_real))


@dataclass(frozen=True, slots=True)
class Probabilities:
    """Probabilities of fake of a label's calibration images, float64, as thresholds are read from them at any rate."""

    ascending: np.ndarray
    """Shape (n,)."""
    by_origin: np.ndarray
    """The same, origin by origin (source or generator) and ascending within each, shape (n,)."""
    counts: np.ndarray
    """How many images each origin has, shape (k,)."""

    @classmethod
    def of(cls, logits: np.ndarray, origins: np.ndarray) -> Self:
        """From calibrated logits, ascending, and the numbers of their origins."""
        probabilities = sigmoid(logits)  # (n,)
        by_origin = probabilities[np.argsort(origins, kind="stable")]  # (n,)
        return cls(probabilities, by_origin, np.unique(origins, return_counts=True)[1])

    def highest(self, rate: float) -> float:
        """The score above which a threshold keeps the rate in `NEW_SOURCES` of new origins; of too few, -inf.

        Of each origin it is the highest score but for that share of its images; of k origins, the
        ceil(`NEW_SOURCES` (k + 1))-th of these in ascending order.

        Args:
            rate: Share of an origin's images that may score higher, 0..1.
        """
        ends, allowed = np.cumsum(self.counts), self.allowed(rate)  # (k,)
        scores = np.where(allowed < self.counts, self.by_origin[ends - 1 - allowed], -np.inf)  # (k,)
        return float(np.sort(scores)[self.rank - 1]) if self.rank else -np.inf

    def lowest(self, rate: float) -> float:
        """The score up to which a threshold keeps the rate in `NEW_SOURCES` of new origins: `highest` upside down."""
        starts, allowed = np.cumsum(self.counts) - self.counts, self.allowed(rate)  # (k,)
        last = len(self.by_origin) - 1
        scores = np.where(allowed < self.counts, self.by_origin[np.minimum(starts + allowed, last)], np.inf)  # (k,)
        return float(np.sort(scores)[-self.rank]) if self.rank else np.inf

    def allowed(self, rate: float) -> np.ndarray:
        """How many images of each origin are at most that share of it, shape (k,)."""
        return np.floor(rate * self.counts + 1e-9).astype(np.int64)

    @property
    def rank(self) -> int:
        """Which origin decides, from 1 to k; 0 where they are fewer than `MINIMUM_SOURCES`."""
        k = len(self.counts)
        return int(np.ceil(NEW_SOURCES * (k + 1) - 1e-9)) if k >= MINIMUM_SOURCES else 0


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted maps and the calibration images' own scores, for every subset of heads that can answer.

    Methods that take `heads` use the subset's own table; None is the largest subset there is. Nothing was calibrated
    where `maps` is empty.
    """

    maps: dict[str, LogisticMap]
    """By `subset` name; a single head's map is its own calibration."""
    real: dict[str, np.ndarray]
    """Calibrated logits of the real calibration images by maps fitted without their group, ascending, float32."""
    fake: dict[str, np.ndarray]
    """The same of the fake calibration images."""
    sources: dict[str, np.ndarray]
    """Number of the source of each entry of `real`, int32."""
    generators: dict[str, np.ndarray]
    """Number of the generator of each entry of `fake`, int32."""
    nearest_fake: dict[str, np.ndarray]
    """Similarity of each entry of `fake` to its nearest fake reference, float32, NaN where there is none."""
    nearest: np.ndarray
    """Similarity of each calibration image to its nearest reference, ascending, float32."""
    n_real: int
    n_fake: int
    nearest_labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))
    """0 real, 1 fake, of each entry of `nearest`, int8; empty where an earlier version fitted it."""
    probabilities: dict[str, tuple[Probabilities, Probabilities]] = field(init=False, repr=False)
    """Of `real` and of `fake`: every verdict reads them, and they are computed once."""

    def __post_init__(self) -> None:
        tables = {
            name: (
                Probabilities.of(self.real[name], self.sources[name]),
                Probabilities.of(self.fake[name], self.generators[name]),
            )
            for name in self.maps
        }
        object.__setattr__(self, "probabilities", tables)

    def largest(self, heads: Collection[str] | None = None) -> str | None:
        """The calibrated subset of most heads among those given (all when None); None when there is none."""
        names = [name for name in self.maps if heads is None or set(name.split("+")) <= set(heads)]
        return max(names, key=lambda name: name.count("+"), default=None)

    def probability(self, head: str, logits: np.ndarray | float) -> np.ndarray:
        """Calibrated probabilities of one head's raw logits or scores at prior 0.5, same shape, NaN without a map."""
        x = np.asarray(logits, np.float64)
        if head not in self.maps:
            return np.full(x.shape, np.nan)
        return sigmoid(self.maps[head](x.reshape(-1, 1))).reshape(x.shape)

    def combine_many(self, logits: Mapping[str, np.ndarray]) -> np.ndarray:
        """Combined probabilities of fake at prior 0.5, shape (n,), NaN where no head that answered is calibrated.

        `logits` are raw logits or scores by head, each of shape (n,), NaN where a head cannot answer.
        """
        heads = [head for head in HEADS if head in logits]
        table = np.column_stack([np.asarray(logits[head], np.float64) for head in heads])  # (n, h)
        scores = np.full(len(table), np.nan)
        for pattern in np.unique(~np.isnan(table), axis=0):
            rows = (~np.isnan(table) == pattern).all(1)
            name = self.largest([head for head, there in zip(heads, pattern, strict=True) if there])
            if name is not None:
                columns = [heads.index(head) for head in self.maps[name].heads]
                scores[rows] = sigmoid(self.maps[name](table[np.ix_(rows, columns)]))
        return scores

    def terms(self, logits: Mapping[str, float]) -> dict[str, float]:
        """What the combined logit is the sum of: each head's raw answer times its weight, and `bias`.

        Empty when no head that answered, i.e. is not NaN, is calibrated. Beyond +-30 the sum is more than
        `combine_many` makes use of.
        """
        name = self.largest([head for head, value in logits.items() if not np.isnan(value)])
        if name is None:
            return {}
        combined = self.maps[name]
        weights = zip(combined.heads, combined.weights, strict=True)
        return {head: float(weight * logits[head]) for head, weight in weights} | {"bias": combined.intercept}

    def thresholds(
        self, max_false_alarm: float, max_miss: float, heads: Collection[str] | None = None
    ) -> tuple[float | None, float | None]:
        """(t_fake, t_real): `fake` if score >= t_fake, else `real` if score < t_real, else uncertain.

        t_fake is the smallest t with (1 + real calibration images scoring >= t) / (n_real + 1) <= max_false_alarm and,
        where there are `MINIMUM_SOURCES` of them, with (1 + sources more than that share of whose images score >= t) /
        (sources + 1) <= 1 - `NEW_SOURCES`. t_real is the largest t with (1 + fakes scoring < t) / (n_fake + 1) <=
        max_miss and, likewise, (1 + generators more than that share of whose images score < t) / (generators + 1) <=
        1 - `NEW_SOURCES`. None where that few images cannot promise the rate (see `more_images`) or nothing is
        calibrated.
        """
        name = self.largest(heads)
        if name is None:
            return None, None
        reals, fakes = self.probabilities[name]
        real, fake = reals.ascending, fakes.ascending
        above, below = _allowed(max_false_alarm, len(real)), _allowed(max_miss, len(fake))
        t_fake = t_real = None
        if above >= 0:  # just above the first real that must stay below
            highest = real[len(real) - above - 1] if above < len(real) else -np.inf
            t_fake = max(0.0, float(np.nextafter(max(highest, reals.highest(max_false_alarm)), 2.0)))
        if below >= 0:
            lowest = float(fake[below]) if below < len(fake) else 1.0
            t_real = min(lowest, fakes.lowest(max_miss))
        return t_fake, t_real

    def more_images(
        self, max_false_alarm: float, max_miss: float, heads: Collection[str] | None = None
    ) -> tuple[int, int]:
        """How many more real and fake calibration images the two rates would need before they can be promised."""
        name = self.largest(heads)
        real, fake = (0, 0) if name is None else (len(self.real[name]), len(self.fake[name]))
        return _missing(max_false_alarm, real), _missing(max_miss, fake)

    def false_alarm(self, score: float, heads: Collection[str] | None = None) -> float | None:
        """Share of real calibration images that score at least this, 0..1; None when nothing is calibrated."""
        name = self.largest(heads)
        if name is None:
            return None
        real = self.probabilities[name][0].ascending
        return float(len(real) - np.searchsorted(real, score, side="left")) / len(real)

    def new_sources(self, heads: Collection[str] | None = None) -> int:
        """How many sources the promise to new ones rests on; 0 where there is none: they are too few, or one rate."""
        name = self.largest(heads)
        count = 0 if name is None else len(self.probabilities[name][0].counts)
        return count if count >= MINIMUM_SOURCES else 0

    def novelty(self, similarity: float) -> float | None:
        """p-value of being as far from every reference as this, 0..1; None below 50 calibration images.

        (1 + calibration images whose nearest similarity <= this) / (n + 1).
        """
        if len(self.nearest) < MINIMUM_NOVELTY or np.isnan(similarity):
            return None
        return _p_value(self.nearest, similarity)

    def fake_novelty(self, similarity: float, t_fake: float, heads: Collection[str] | None = None) -> float | None:
        """p-value of a fake that is as far from every fake reference as this, 0..1: a small one, an unknown generator.

        It is taken over the fake calibration images that are called fake as well: what is far from every fake rarely
        is, so that over all of them no image called fake would look new. None where no image was.

        Args:
            similarity: To the nearest fake reference, -1..1.
            t_fake: The threshold from which on images are called fake.
            heads: Those that answered; all when None.
        """
        name = self.largest(heads)
        if name is None or np.isnan(similarity):
            return None
        first = int(np.searchsorted(self.probabilities[name][1].ascending, t_fake, side="left"))
        nearest = self.nearest_fake[name][first:]
        nearest = nearest[~np.isnan(nearest)]
        return _p_value(nearest, similarity) if len(nearest) else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; arrays as base64 of little-endian float32."""
        return {
            "maps": {name: logistic.to_json() for name, logistic in self.maps.items()},
            "real": {name: _pack(scores) for name, scores in self.real.items()},
            "fake": {name: _pack(scores) for name, scores in self.fake.items()},
            "sources": {name: numbers.tolist() for name, numbers in self.sources.items()},
            "generators": {name: numbers.tolist() for name, numbers in self.generators.items()},
            "nearest_fake": {name: _pack(similarities) for name, similarities in self.nearest_fake.items()},
            "nearest": _pack(self.nearest),
            "nearest_labels": self.nearest_labels.tolist(),
            "n_real": self.n_real,
            "n_fake": self.n_fake,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_json` back."""
        return cls(
            maps={name: LogisticMap.from_json(item) for name, item in values["maps"].items()},
            real={name: _unpack(text) for name, text in values["real"].items()},
            fake={name: _unpack(text) for name, text in values["fake"].items()},
            sources={name: np.array(numbers, np.int32) for name, numbers in values["sources"].items()},
            generators={name: np.array(numbers, np.int32) for name, numbers in values["generators"].items()},
            nearest_fake={name: _unpack(text) for name, text in values["nearest_fake"].items()},
            nearest=_unpack(values["nearest"]),
            n_real=int(values["n_real"]),
            n_fake=int(values["n_fake"]),
            nearest_labels=np.array(values.get("nearest_labels", ()), np.int8),
        )


def fit_calibration(
    logits: Mapping[str, np.ndarray],
    nearest: np.ndarray,
    nearest_fake: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    origins: Sequence[str],
    enrolled: np.ndarray | None = None,
) -> Calibration:
    """Fit maps, thresholds' tables and novelty tables from n calibration images: the one place where that is done.

    Args:
        logits: Raw logit or score by head (knn, linear, svm), each of shape (n,); NaN where a head could not answer.
        nearest: Similarity to the nearest reference of any label, shape (n,); NaN where there is none.
        nearest_fake: Similarity to the nearest fake reference, shape (n,); only those of fakes are used.
        labels: 0 real, 1 fake, shape (n,).
        groups: The images' groups, n of them; references of the same group must not have been asked.
        origins: The source of each real image and the generator of each fake, n names.
        enrolled: Whether an image is a reference of a generator that the checkpoint does not know, shape (n,), bool;
            such count for what depends on the index, not for maps of the checkpoint's own heads. None: no image is.
    """
    labels = np.asarray(labels)
    of_checkpoint = np.ones(len(labels), bool) if enrolled is None else ~enrolled
    columns = {head: np.asarray(logits[head], np.float64) for head in HEADS if head in logits}
    nearest_fake = np.asarray(nearest_fake, np.float32)
    numbers = np.unique(np.asarray(origins, str), return_inverse=True)[1].astype(np.int32)  # (n,)
    folds = group_folds(groups, labels)
    maps, real, fake, source, generator, similarity = {}, {}, {}, {}, {}, {}
    for size in range(1, len(columns) + 1):
        for heads in combinations(columns, size):
            table = np.column_stack([columns[head] for head in heads])  # (n, h)
            rows = np.isfinite(table).all(1) & (of_checkpoint | ("knn" in heads))
            if not enough(labels[rows]):
                continue
            name = subset(heads)
            maps[name] = fit_logistic(heads, table[rows], labels[rows])
            scores = _cross_fitted(heads, table[rows], labels[rows], folds[rows])
            ascending = np.argsort(scores, kind="stable")
            reals, fakes = (ascending[labels[rows][ascending] == label] for label in (0, 1))
            real[name], source[name] = scores[reals], numbers[rows][reals]
            fake[name], generator[name] = scores[fakes], numbers[rows][fakes]
            similarity[name] = nearest_fake[rows][fakes]
    near = np.argsort(nearest, kind="stable")[: len(nearest) - np.isnan(nearest).sum()]  # NaN is last
    return Calibration(
        maps=maps,
        real=real,
        fake=fake,
        sources=source,
        generators=generator,
        nearest_fake=similarity,
        nearest=nearest[near].astype(np.float32),
        nearest_labels=labels[near].astype(np.int8),
        n_real=int((labels == 0).sum()),
        n_fake=int((labels == 1).sum()),
    )


def _cross_fitted(heads: tuple[str, ...], table: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Calibrated logits, shape (n,), float32, each by a map fitted on the other folds."""
    scores = np.empty(len(table), np.float32)
    for fold in range(CALIBRATION_FOLDS):
        inside = folds == fold
        # A fold whose complement lacks a label (few, large groups) is scored by all: better than no threshold.
        others = ~inside if 0 < labels[~inside].sum() < (~inside).sum() else np.ones_like(inside)
        scores[inside] = fit_logistic(heads, table[others], labels[others])(table[inside])
    return scores


def group_folds(groups: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Fold of each image, shape (n,): groups stay whole, and are dealt out in hash order for each mix of labels."""
    mixes: dict[str, set[int]] = {}
    for group, label in zip(groups, labels, strict=True):
        mixes.setdefault(group, set()).add(int(label))
    order = sorted(mixes, key=lambda group: (sorted(mixes[group]), blake2b(group.encode()).digest()))
    fold = {group: number % CALIBRATION_FOLDS for number, group in enumerate(order)}
    return np.array([fold[group] for group in groups], dtype=np.int64)


def _allowed(rate: float, n: int) -> int:
    """The most calibration images that may lie on the wrong side, so that (1 + they) / (n + 1) <= rate; -1 for none."""
    return int(np.floor(rate * (n + 1) + 1e-9)) - 1


def _missing(rate: float, n: int) -> int:
    """How many images more than n the rate needs."""
    return max(0, int(np.ceil(1 / rate - 1e-9)) - 1 - n) if rate > 0 else 0


def _p_value(table: np.ndarray, similarity: float) -> float:
    """(1 + entries <= similarity) / (n + 1)."""
    return float(1 + (table <= np.float32(similarity)).sum()) / (len(table) + 1)


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
