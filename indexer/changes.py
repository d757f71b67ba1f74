"""What followers of an index read: additions, then removals, between two revisions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from indexer.rows import Rows


@dataclass(frozen=True, slots=True)
class Additions:
    """One page of embeddings.

    Attributes:
        ids: Shape (n,), int64.
        vectors: As stored, shape (n, d), float32, any norm; read-only.
        labels: Shape (n,), int8, 0 real and 1 fake.
        generators: Generator ids, shape (n,), int64, -1 for none.
        sources: Names, n of them.
    """

    ids: np.ndarray
    vectors: np.ndarray
    labels: np.ndarray
    generators: np.ndarray
    sources: list[str]


@dataclass(frozen=True, slots=True)
class Removals:
    """Images that are gone: ids, shape (n,), int64. Some may never have been seen."""

    ids: np.ndarray


class Changes(Rows):
    """The reading side of the revision rules."""

    def changes(
        self, checkpoint_id: str, seen: int, target: int, *, page: int = 20_000
    ) -> Iterator[Additions | Removals]:
        """Everything with seen < revision <= target: pages of additions first, then one of removals.

        Take `target` from `revision(checkpoint_id)` before calling; then this is complete whatever others write
        meanwhile, and applying all of it makes `target` the new `seen`. `changes(checkpoint_id, 0, target)` is a
        full load (its removals are of ids that never come, and may be skipped).
        """
        raise NotImplementedError

    def embedded_ids(self, checkpoint_id: str) -> np.ndarray:
        """Ids that have an embedding now, shape (n,), int64, ascending."""
        raise NotImplementedError
