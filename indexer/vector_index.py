"""The vectors of one checkpoint in memory: exact nearest neighbours of each label, by cosine similarity."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np


class BadVectors(ValueError):
    """Vectors, ids or labels that the index refuses; nothing of the call was done."""


class BadSnapshot(ValueError):
    """A snapshot that is missing, damaged, or of something else."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest references of q queries, nearest first; short answers are padded at the end.

    Attributes:
        ids: Shape (q, k), int64, -1 where there is none.
        similarities: Cosine, -1..1, shape (q, k), float32, NaN where there is none.
        labels: 0 real, 1 fake, shape (q, k), int8, -1 where there is none.
        generators: Generator ids, shape (q, k), int64, -1 for real images, unnamed generators and padding.
        sources: Source numbers, shape (q, k), int64, -1 where there is none.
    """

    ids: np.ndarray
    similarities: np.ndarray
    labels: np.ndarray
    generators: np.ndarray
    sources: np.ndarray


class VectorIndex:
    """References of one checkpoint in half precision, real and fake apart. Safe for many threads.

    Args:
        dim: Length of the vectors.
        device: "cpu", "cuda", or "auto" for a GPU where FAISS sees one.
    """

    def __init__(self, dim: int, device: str = "auto") -> None:
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """How vectors are kept and searched, such as "flat-fp16" or "ivf-fp16"."""
        raise NotImplementedError

    @property
    def device(self) -> str:
        """Where searches run: "cpu" or "cuda"."""
        raise NotImplementedError

    @property
    def recall(self) -> float:
        """Share of the exact 20 nearest that a search finds, 0..1, as measured; 1.0 for exact kinds."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def counts(self) -> tuple[int, int]:
        """How many real and how many fake references."""
        raise NotImplementedError

    def ids(self) -> np.ndarray:
        """All ids, ascending, shape (n,), int64."""
        raise NotImplementedError

    def add(
        self, ids: np.ndarray, vectors: np.ndarray, labels: np.ndarray, generators: np.ndarray, sources: np.ndarray
    ) -> None:
        """Add n references.

        Args:
            ids: Primary keys, shape (n,), each >= 0 and not in the index.
            vectors: Raw embeddings of any length but zero, shape (n, dim).
            labels: 0 real, 1 fake, shape (n,).
            generators: Generator ids, shape (n,), -1 for none.
            sources: Numbers of the caller's choice, shape (n,).

        Raises:
            BadVectors: See above; nothing is added.
        """
        raise NotImplementedError

    def remove(self, ids: np.ndarray) -> int:
        """Remove references; unknown ids are passed over. Each call moves memory: remove many at once.

        Returns:
            How many there were.
        """
        raise NotImplementedError

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        label: int | None = None,
        generator: int | None = None,
        source: int | None = None,
        exclude_ids: np.ndarray | None = None,
    ) -> Neighbours:
        """The k nearest overall, or of those that the filters let pass: k of them whenever there are k.

        Args:
            vectors: Raw embeddings, shape (q, dim).
            k: Neighbours per query, at least 1.
            label: Only real (0) or fake (1) references.
            generator: Only references of this generator.
            source: Only references from this source.
            exclude_ids: Never these, shape (m,).

        Raises:
            BadVectors: Vectors of another length, not finite, or zero; or k below 1.
        """
        raise NotImplementedError

    def search_both(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        generator: int | None = None,
        source: int | None = None,
        exclude_ids: np.ndarray | None = None,
        exclude_each: Sequence[np.ndarray] | None = None,
    ) -> tuple[Neighbours, Neighbours]:
        """The k nearest real and the k nearest fake references; otherwise like `search`.

        Args:
            vectors: See `search`.
            k: See `search`; of each label.
            generator: Only fakes of this generator; real references are not asked for theirs.
            source: See `search`.
            exclude_ids: See `search`.
            exclude_each: Per query, ids that it must not find; q arrays.
        """
        raise NotImplementedError

    def metadata(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels, generators and sources of ids, each of the same shape; -1 for an id that is not in the index."""
        raise NotImplementedError

    def save(self, path: Path, header: dict[str, Any]) -> None:
        """Write a snapshot aside, checksummed, then rename it to `path`; `header` is any JSON."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> tuple[Self, dict[str, Any]]:
        """Read a snapshot and its header.

        Raises:
            BadSnapshot: It is missing or damaged.
        """
        raise NotImplementedError
