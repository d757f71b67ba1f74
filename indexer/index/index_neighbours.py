"""What a search of the index finds, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

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
    def joined(cls, parts: "Sequence[Neighbours]") -> "Neighbours":
        """The queries of all parts, at least one, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def first(self, k: int) -> "Neighbours":
        """The k nearest of the first query."""
        return type(self)(*(getattr(self, field.name)[:1, :k] for field in fields(self)))  # (1, k)

    def merge(self, other: "Neighbours", k: int) -> "Neighbours":
        """The k nearest of both."""
        similarities = np.concatenate((self.similarities, other.similarities), axis=1)
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]  # (q, k), NaN sorts last
        query = np.arange(len(order))[:, None]
        return Neighbours(
            np.concatenate((self.ids, other.ids), axis=1)[query, order],
            similarities[query, order],
            np.concatenate((self.labels, other.labels), axis=1)[query, order],
            np.concatenate((self.generators, other.generators), axis=1)[query, order],
            np.concatenate((self.sources, other.sources), axis=1)[query, order],
        )
