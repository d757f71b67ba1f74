"""Keep a VectorIndex equal to the rows in Postgres, whoever writes them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from indexer.settings import Settings
from indexer.store import Store
from indexer.vector_index import Neighbours, VectorIndex


class Neighbour(NamedTuple):
    """A reference near a query: `label` 0 real or 1 fake, `similarity` cosine, -1..1."""

    id: int
    label: int
    generator: str | None
    source: str
    similarity: float


class Follower:
    """The index of one checkpoint, loaded from its snapshot and Postgres, then kept up to date. Thread safe.

    Attributes:
        index: The index; a reload replaces it, so ask for it anew each time.
        revision: Of the store, up to which the index is complete.
        degraded: Whether the database could not be reached last time; searches go on from memory.
        generator_names: Names by id.
        source_names: Names by the source numbers of the index.

    Args:
        settings: For the home folder (snapshots) and the device.
        store: The rows.
        checkpoint_id: Whose embeddings.
        dim: Their length.
        on_change: Called after the index has changed, from the thread that changed it; must return at once.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        checkpoint_id: str,
        dim: int,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.index: VectorIndex
        self.revision: int
        self.degraded: bool
        self.generator_names: dict[int, str]
        self.source_names: dict[int, str]
        raise NotImplementedError

    @property
    def lag(self) -> float:
        """Seconds since the index was last known to be complete."""
        raise NotImplementedError

    def load(self) -> int:
        """Read the snapshot where it is good, then the rest from Postgres; returns the revision reached.

        Raises:
            sqlalchemy.exc.DBAPIError: The database cannot be reached.
        """
        raise NotImplementedError

    def catch_up(self) -> int:
        """Apply what was written since; returns the revision reached.

        Raises:
            sqlalchemy.exc.DBAPIError: The database cannot be reached; the index is as it was.
        """
        raise NotImplementedError

    def save(self) -> None:
        """Write the snapshot now; commands that change references end with it."""
        raise NotImplementedError

    def start(self) -> None:
        """Follow in the background: on notification, and each second anyway. Call `load` before."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the background threads; the snapshot is written when it is out of date."""
        raise NotImplementedError

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        label: int | None = None,
        generator: str | None = None,
        source: str | None = None,
        exclude_ids: np.ndarray | None = None,
    ) -> list[list[Neighbour]]:
        """The k nearest of each of q raw vectors (q, dim); filters by name, see `VectorIndex.search`."""
        raise NotImplementedError

    def search_both(
        self, vectors: np.ndarray, k: int, *, exclude_ids: np.ndarray | None = None
    ) -> tuple[Neighbours, Neighbours]:
        """The k nearest real and the k nearest fake references as arrays, for the vote."""
        raise NotImplementedError

    def neighbours(self, found: Neighbours) -> list[list[Neighbour]]:
        """What arrays from the index say, with names; padding is left out."""
        raise NotImplementedError
