"""What detection and calibration need of an index, wherever its vectors lie: the nearest references of each label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The nearest references of q queries, nearest first; short answers are padded at the end.

    Attributes:
        ids: Shape (q, k), int64, -1 where there is none.
        similarities: Cosine, -1..1, shape (q, k), float32, NaN where there is none.
        labels: 0 real, 1 fake, shape (q, k), int8, -1 where there is none.
        generators: Generator ids, shape (q, k), int32, -1 for real images, unnamed generators and padding.
        sources: Source numbers, shape (q, k), int32, -1 where there is none.
    """

    ids: np.ndarray
    similarities: np.ndarray
    labels: np.ndarray
    generators: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def none(cls, q: int, k: int) -> "Neighbours":
        """Nothing but padding for q queries."""
        numbers, labels = np.full((q, k), -1, np.int32), np.full((q, k), -1, np.int8)
        similarities = np.full((q, k), np.nan, np.float32)
        return cls(numbers.astype(np.int64), similarities, labels, numbers, numbers.copy())

    @classmethod
    def joined(cls, parts: "Sequence[Neighbours]", axis: int = 0) -> "Neighbours":
        """At least one part: their queries one after the other, or for axis 1 the neighbours of the same queries."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts], axis) for field in fields(cls)))

    def row(self, number: int) -> "Neighbours":
        """Those of one query."""
        return self._each(lambda column: column[number : number + 1])  # (1, k)

    def where(self, kept: np.ndarray) -> "Neighbours":
        """Padding in place of the neighbours where this is False, shape (q, k), bool."""
        padding = Neighbours.none(*kept.shape)
        pairs = ((getattr(self, field.name), getattr(padding, field.name)) for field in fields(self))
        return Neighbours(*(np.where(kept, column, none) for column, none in pairs))

    def first(self, k: int) -> "Neighbours":
        """The k nearest of the first query."""
        return self._each(lambda column: column[:1, :k])  # (1, k)

    def nearest(self, k: int) -> "Neighbours":
        """The k nearest of neighbours in any order."""
        order = np.argsort(-self.similarities, axis=1, kind="stable")[:, :k]  # (q, k), NaN sorts last
        return self._each(lambda column: np.take_along_axis(column, order, 1))

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> "Neighbours":
        return Neighbours(*(change(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that an index holds, by ascending id.

    Attributes:
        ids: Primary keys, shape (n,), int64.
        vectors: Of unit length, shape (n, d), float16 or float32.
        labels: 0 real, 1 fake, shape (n,).
        generators: Generator ids, shape (n,), -1 for none.
        sources: Names, shape (n,), object.
    """

    ids: np.ndarray
    vectors: np.ndarray
    labels: np.ndarray
    generators: np.ndarray
    sources: np.ndarray


class Index(Protocol):
    """The references of one checkpoint, in this process or in an engine beside it. Safe for many threads.

    Ids are primary keys, labels 0 real and 1 fake. Embeddings may have any length but zero; similarities are cosines.
    """

    @property
    def kind(self) -> str:
        """How vectors are kept and searched, as `lineup index status` names it."""
        ...

    @property
    def device(self) -> str:
        """Where searches run."""
        ...

    @property
    def recall(self) -> float:
        """Share of the exact 20 nearest that a search finds, 0..1, as measured; 1.0 for exact kinds."""
        ...

    def __len__(self) -> int: ...

    def counts(self, exclude_ids: np.ndarray | None = None) -> tuple[int, int]:
        """How many real and fake references there are, without the given ids."""
        ...

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        label: int | None = None,
        generator: int | None = None,
        source: int | None = None,
    ) -> Neighbours:
        """The k nearest overall, or of those that the filters let pass: k of them whenever there are k.

        Args:
            vectors: Raw embeddings, shape (q, dim).
            k: Neighbours per query, at least 1.
            label: Only real (0) or fake (1) references.
            generator: Only references of this generator.
            source: Only references from this source.

        Raises:
            BadVectors: Vectors of another length, not finite, or zero; or k below 1.
        """
        ...

    def search_both(
        self,
        vectors: np.ndarray,
        k: tuple[int, int],
        *,
        exclude_ids: np.ndarray | None = None,
        exclude_each: Sequence[np.ndarray] | None = None,
    ) -> tuple[Neighbours, Neighbours]:
        """The nearest real and the nearest fake references; otherwise like `search`.

        Args:
            vectors: Raw embeddings, shape (q, dim).
            k: How many reals, and how many fakes.
            exclude_ids: Ids that no query must find, shape (m,).
            exclude_each: Ids that one query must not find though others may, q arrays of any length.
        """
        ...
