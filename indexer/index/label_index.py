"""The references of one label: an engine's rows, and what the index knows of each."""

from collections.abc import Sequence

import numpy as np

from indexer.index.flat import Engine
from indexer.index.index_neighbours import Neighbours

FEW = 100
"""So few ids that nobody may find are dropped likewise: a selector of all the others takes twice as long."""
FETCH = 1_000
"""A query that excludes more references of its own than this is searched alone; fewer are fetched and dropped."""


class Shelf:
    """Columns beside an engine, one entry per row: 16 bytes each while ids come in ascending order, else 24.

    The arrays are replaced, never written to, so that one taken under the lock stays good after it.

    Attributes:
        label: 0 real, 1 fake.
        engine: The vectors.
        ids: Primary keys, shape (n,), int64.
        generators: Shape (n,), int32, -1 for none.
        sources: Shape (n,), int32.
        removals: How often rows have moved up.
        kept_flat: Size at which inverted lists were tried and won nothing; 0 for never.
    """

    def __init__(self, label: int, engine: Engine) -> None:
        self.label = label
        self.engine = engine
        self.ids = np.empty(0, np.int64)
        self.generators = np.empty(0, np.int32)
        self.sources = np.empty(0, np.int32)
        self.removals = 0
        self.kept_flat = 0
        self._order: np.ndarray | None = None  # rows by ascending id; None while the ids themselves ascend

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: np.ndarray, generators: np.ndarray, sources: np.ndarray) -> None:
        """Append the columns of rows that the engine has got."""
        self._set(
            np.concatenate([self.ids, ids.astype(np.int64)]),
            np.concatenate([self.generators, generators.astype(np.int32)]),
            np.concatenate([self.sources, sources.astype(np.int32)]),
        )

    def remove(self, rows: np.ndarray) -> None:
        """Drop these rows, shape (m,), here and in the engine."""
        keep = np.ones(len(self), bool)
        keep[rows] = False
        self.engine.keep(keep)
        self.removals += 1
        self._set(self.ids[keep], self.generators[keep], self.sources[keep])

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Row of each id, shape (n,), int64, -1 where it is not here."""
        if not len(self):
            return np.full(len(ids), -1, np.int64)
        at = np.searchsorted(self.ids, ids, sorter=self._order).clip(max=len(self) - 1)
        rows = at if self._order is None else self._order[at]
        return np.where(self.ids[rows] == ids, rows, -1)

    def allowed(self, generator: int | None, source: int | None, exclude_ids: np.ndarray | None) -> np.ndarray | None:
        """Rows that pass the filters, shape (n,), bool; None when all do."""
        allowed: np.ndarray | None = None
        if generator is not None:
            allowed = self.generators == generator
        if source is not None:
            allowed = self.sources == source if allowed is None else allowed & (self.sources == source)
        if exclude_ids is not None:
            rows = self.rows(np.asarray(exclude_ids))
            if (rows >= 0).any():
                allowed = np.ones(len(self), bool) if allowed is None else allowed
                allowed[rows[rows >= 0]] = False
        return allowed

    def nearest(
        self,
        queries: np.ndarray,
        k: int,
        *,
        generator: int | None = None,
        source: int | None = None,
        exclude_ids: np.ndarray | None = None,
        exclude_each: Sequence[np.ndarray] | None = None,
    ) -> Neighbours:
        """The k nearest of unit vectors (q, d); see `VectorIndex.search_both`."""
        if exclude_each is None and exclude_ids is not None and len(exclude_ids) <= FEW:
            exclude_each, exclude_ids = [np.asarray(exclude_ids)] * len(queries), None
        allowed = self.allowed(generator, source, exclude_ids)
        if exclude_each is not None:
            return self._nearest_without(queries, k, allowed, exclude_each)
        return self._neighbours(*self._search(queries, k, allowed))

    def _nearest_without(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None, exclude_each: Sequence[np.ndarray]
    ) -> Neighbours:
        """Query i does not find the ids `exclude_each[i]`."""
        counts = [len(ids) for ids in exclude_each]
        rows = self.rows(np.concatenate([np.empty(0, np.int64), *exclude_each]))
        excluded = [part[part >= 0] for part in np.split(rows, np.cumsum(counts)[:-1])]
        similarities = np.full((len(queries), k), np.nan, np.float32)
        found = np.full((len(queries), k), -1, np.int64)
        few = [i for i, part in enumerate(excluded) if len(part) <= FETCH]
        if few:
            parts = [excluded[i] for i in few]
            similarities[few], found[few] = self._fetch_and_drop(queries[few], k, allowed, parts)
        for i, part in enumerate(excluded):
            if len(part) > FETCH:
                others = np.ones(len(self), bool) if allowed is None else allowed.copy()
                others[part] = False
                similarities[i], found[i] = self._search(queries[i : i + 1], k, others)
        return self._neighbours(similarities, found)

    def _fetch_and_drop(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None, excluded: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query but its own `excluded` ones: as many more are fetched, then dropped."""
        similarities, found = self._search(queries, k + max(map(len, excluded)), allowed)
        # A pair (query, row) as one number: what one query excludes another may find.
        pairs = np.concatenate([i * len(self) + rows for i, rows in enumerate(excluded)])
        dropped = (found < 0) | np.isin(found + np.arange(len(found))[:, None] * len(self), pairs)
        order = np.argsort(dropped, axis=1, kind="stable")[:, :k]  # (q, k)
        rows = np.where(np.take_along_axis(dropped, order, 1), -1, np.take_along_axis(found, order, 1))
        return np.take_along_axis(similarities, order, 1), rows

    def _search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and rows, both (q, k), row -1 where there is none."""
        if not len(self):
            return np.empty((len(queries), k), np.float32), np.full((len(queries), k), -1)
        return self.engine.search(queries, k, allowed)

    def _neighbours(self, similarities: np.ndarray, rows: np.ndarray) -> Neighbours:
        """What is known of rows; similarities are brought into -1..1, since halves round beyond."""
        np.clip(similarities, -1, 1, out=similarities)
        none = rows < 0
        if not none.any():
            labels = np.full(rows.shape, self.label, np.int8)
            return Neighbours(self.ids[rows], similarities, labels, self.generators[rows], self.sources[rows])
        columns = (self.ids, self.generators, self.sources) if len(self) else (np.array([-1]),) * 3
        ids, generators, sources = (np.where(none, column.dtype.type(-1), column[rows]) for column in columns)
        labels = np.where(none, np.int8(-1), np.int8(self.label))
        return Neighbours(ids, np.where(none, np.float32(np.nan), similarities), labels, generators, sources)

    def _set(self, ids: np.ndarray, generators: np.ndarray, sources: np.ndarray) -> None:
        self.ids, self.generators, self.sources = ids, generators, sources
        self._order = None if (ids[1:] > ids[:-1]).all() else np.argsort(ids, kind="stable")
