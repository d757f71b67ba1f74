"""What the index and the heads say of embeddings: neighbours of each label, their vote, and the combined score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np

from indexer.follower import Follower
from indexer.index.label_index import Neighbours
from trainer.heads.calibration import Calibration
from trainer.heads.heads import Heads
from trainer.heads.vote import Votes, vote

Arrays = TypeVar("Arrays", Neighbours, Votes)
SAME = 0.9995
"""Similarity from which on two images may be the same bytes: half precision and engines cost under 0.0001."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Neighbours, raw scores and combined scores of q embeddings at one revision and calibration."""

    k: int
    """How many neighbours vote."""
    real: Neighbours
    """The nearest reals, k or more: ids (q, kr), -1 for missing, and similarities, NaN for missing."""
    fake: Neighbours
    """Likewise the nearest fakes."""
    votes: Votes
    logits: dict[str, np.ndarray]
    """Raw logit or score by head, each (q,); NaN where the head cannot answer."""
    scores: np.ndarray
    """Calibrated combination, shape (q,), 0..1; NaN where nothing is calibrated."""
    search_ms: float
    heads_ms: float

    @property
    def answering(self) -> list[str]:
        """Heads that answered for the first embedding."""
        return [head for head, values in self.logits.items() if not np.isnan(values[0])]

    def terms(self, calibration: Calibration | None) -> dict[str, float]:
        """What the logit of the first embedding's score is the sum of, see `Calibration.terms`."""
        return (
            calibration.terms({head: float(values[0]) for head, values in self.logits.items()}) if calibration else {}
        )

    @property
    def twins(self) -> list[int]:
        """References that cannot be told from the first image by their embeddings."""
        both = (self.real, self.fake)
        return [int(id) for near in both for id in near.ids[0, near.similarities[0] >= SAME]]

    def split(self, lengths: Sequence[int]) -> list[Evidence]:
        """The evidence of the first so many embeddings, of the next, and so on, each with its share of the time."""
        return [
            replace(
                self,
                real=_rows(self.real, slice(end - length, end)),
                fake=_rows(self.fake, slice(end - length, end)),
                votes=_rows(self.votes, slice(end - length, end)),
                logits={head: values[end - length : end] for head, values in self.logits.items()},
                scores=self.scores[end - length : end],
                search_ms=self.search_ms * length / len(self.scores),
                heads_ms=self.heads_ms * length / len(self.scores),
            )
            for end, length in zip(accumulate(lengths), lengths, strict=True)
        ]


def _rows(arrays: Arrays, rows: slice) -> Arrays:
    """Those rows of every array of a dataclass of arrays."""
    return type(arrays)(*(getattr(arrays, column.name)[rows] for column in fields(arrays)))


def gather(
    embeddings: np.ndarray,
    k: int,
    follower: Follower,
    heads: Heads | None,
    calibration: Calibration | None,
    exclude_each: Sequence[np.ndarray] | None = None,
) -> Evidence:
    """Ask the index and the heads about q embeddings.

    Args:
        embeddings: Raw, shape (q, d), float32.
        k: Neighbours of each label, more of the one that has more references.
        follower: Where the references are.
        heads: Linear and SVM, where the checkpoint has them.
        calibration: Maps logits to the combined score.
        exclude_each: References that may not vote on one embedding, q arrays of ids: the image itself.
    """
    start = time.perf_counter()
    real, fake = follower.voters(embeddings, k, exclude_each=exclude_each)  # (q, kr) and (q, kf), both at least k
    votes = vote(real.similarities, fake.similarities, fake.generators, k)
    searched = time.perf_counter()
    logits = {"knn": votes.logit} | (heads.logits(embeddings) if heads else {})
    scores = calibration.combine_many(logits) if calibration else np.full(len(embeddings), np.nan)
    done = time.perf_counter()
    return Evidence(k, real, fake, votes, logits, scores, 1000 * (searched - start), 1000 * (done - searched))
