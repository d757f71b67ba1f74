"""The references of one label: an engine's rows, what the index knows of each, and what a search of them gives."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from indexer.index.engine import ROWS_PER_BLOCK, Engine
from indexer.index.flat import Flat
from indexer.index.index import Neighbours
from indexer.index.inverted import Inverted
from indexer.index.snapshot import BadSnapshot

FETCH = 1_000
"""A query that excludes more references of its own than this is searched alone; fewer are fetched and dropped."""
RARE = 16
"""A filter that lets at most one of so many rows pass has their vectors copied out of inverted lists, where they lie
far apart: up to here comparing all of them takes less time than looking through lists for them."""
COPIES = 4
"""At most one of so many rows has such a copy, counted for each filter."""


class LabelIndex:
    """Columns beside an engine, one entry per row: 16 bytes each while ids come in ascending order, else 24.

    The arrays are replaced, never written to, so that one taken under the lock stays good after it.

    Attributes:
        label: 0 real, 1 fake.
        engine: The vectors.
        ids: Primary keys, shape (n,), int64.
        generators: Shape (n,), int32, -1 for none.
        sources: Shape (n,), int32.
        removals: How often rows have moved up.
        stayed_flat: Size at which inverted lists were tried and won nothing; 0 for never.
    """

    def __init__(self, label: int, engine: Engine) -> None:
        self.label = label
        self.engine = engine
        self.ids = np.empty(0, np.int64)
        self.generators = np.empty(0, np.int32)
        self.sources = np.empty(0, np.int32)
        self.removals = 0
        self.stayed_flat = 0
        self._order: np.ndarray | None = None  # rows by ascending id; None while the ids themselves ascend
        self._rare: dict[tuple[int | None, int | None], tuple[np.ndarray, Flat]] = {}  # rows, vectors of filters

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: np.ndarray, generators: np.ndarray, sources: np.ndarray) -> None:
        """Append the columns of rows that the engine has got."""
        self._set(
            np.concatenate([self.ids, ids.astype(np.int64)]),
            np.concatenate([self.generators, generators.astype(np.int32)]),
            np.concatenate([self.sources, sources.astype(np.int32)]),
        )

    def remove(self, ids: np.ndarray) -> int:
        """Drop these references, here and in the engine; returns how many of them there were."""
        rows = np.unique(self.rows(ids))
        rows = rows[rows >= 0]
        if len(rows):
            others = self._without(rows)
            self.engine.keep(others)
            self.removals += 1
            self._set(self.ids[others], self.generators[others], self.sources[others])
        return len(rows)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Row of each id, shape (n,), int64, -1 where it is not here."""
        if not len(self):
            return np.full(len(ids), -1, np.int64)
        at = np.searchsorted(self.ids, ids, sorter=self._order).clip(max=len(self) - 1)
        rows = at if self._order is None else self._order[at]
        return np.where(self.ids[rows] == ids, rows, -1)

    def search(self, queries: np.ndarray, k: int, generator: int | None, source: int | None) -> Neighbours:
        """The k nearest of unit vectors (q, d) among those that the filters let pass; None lets all pass."""
        rare = self._rare.get((generator, source))
        if rare is None:
            allowed: np.ndarray | None = None
            for column, value in ((self.generators, generator), (self.sources, source)):
                if value is not None:
                    allowed = column == value if allowed is None else allowed & (column == value)
            rare = None if allowed is None else self._copy_rare((generator, source), allowed)
        if rare is None:
            return self._neighbours(*self._search(queries, k, allowed))
        rows, vectors = rare
        similarities, nearest = vectors.search(queries, k, None)
        return self._neighbours(similarities, np.where(nearest < 0, -1, rows[nearest]))

    def search_without(
        self, queries: np.ndarray, k: int, exclude_ids: np.ndarray | None, exclude_each: Sequence[np.ndarray] | None
    ) -> Neighbours:
        """The k nearest of unit vectors (q, d) but for the given ids, see `Index.search_both`."""
        allowed: np.ndarray | None = None
        if exclude_ids is not None:
            rows = self.rows(exclude_ids)
            allowed = self._without(rows[rows >= 0]) if (rows >= 0).any() else None
        if exclude_each is None:
            return self._neighbours(*self._search(queries, k, allowed))
        rows = self.rows(np.concatenate([np.empty(0, np.int64), *exclude_each]))
        excluded = [part[part >= 0] for part in np.split(rows, np.cumsum([len(ids) for ids in exclude_each])[:-1])]
        similarities = np.full((len(queries), k), np.nan, np.float32)
        nearest = np.full((len(queries), k), -1, np.int64)
        few = [i for i, part in enumerate(excluded) if len(part) <= FETCH]
        if few:
            parts = [excluded[i] for i in few]
            similarities[few], nearest[few] = self._fetch_and_drop(queries[few], k, allowed, parts)
        for i, part in enumerate(excluded):
            if len(part) > FETCH:
                others = self._without(part, allowed)
                similarities[i], nearest[i] = self._search(queries[i : i + 1], k, others)
        return self._neighbours(similarities, nearest)

    def state(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """What `restore` needs beside the vectors in the order of the engine's blocks: plain values and arrays."""
        lists, arrays = self.engine.state() if isinstance(self.engine, Inverted) else (None, [])
        return {"count": len(self), "lists": lists}, [self.ids, self.generators, self.sources, *arrays]

    def restore(self, values: dict[str, Any], arrays: Iterator[np.ndarray]) -> None:
        """Fill an empty label from `state` and then the blocks of vectors.

        Raises:
            BadSnapshot: It was written for a CPU, and this is a GPU.
        """
        self.add(next(arrays), next(arrays), next(arrays))
        if values["lists"] is not None:
            if self.engine.device != "cpu":
                raise BadSnapshot("it was written for a CPU")
            self.engine = Inverted.restored(values["lists"], arrays)
        elif isinstance(self.engine, Flat):
            vectors = self.engine.extend(values["count"])  # at once, so that it takes no more memory than it needs
            for first in range(0, len(vectors), ROWS_PER_BLOCK):
                vectors[first : first + ROWS_PER_BLOCK] = next(arrays)
        else:
            while len(self.engine) < values["count"]:
                self.engine.add(next(arrays))

    def _copy_rare(self, filters: tuple[int | None, int | None], allowed: np.ndarray) -> tuple[np.ndarray, Flat] | None:
        """The rows that filters let pass, with their vectors, until the next change; None where lists do as well."""
        if not isinstance(self.engine, Inverted):
            return None
        n, copied = np.count_nonzero(allowed), sum(len(rows) for rows, _ in list(self._rare.values()))
        if not 0 < n <= len(self) // RARE or n + copied > len(self) // COPIES:
            return None
        rows, vectors = self.engine.take(allowed)
        flat = Flat(vectors.shape[1])
        flat.add(vectors)
        self._rare[filters] = rows, flat
        return rows, flat

    def _without(self, rows: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
        """Which rows are left of those that are allowed (all by default) without these, shape (n,), bool."""
        others = np.ones(len(self), bool) if allowed is None else allowed.copy()
        others[rows] = False
        return others

    def _fetch_and_drop(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None, excluded: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows of each query but its own `excluded` ones: as many more are fetched, then dropped."""
        similarities, rows = self._search(queries, k + max(map(len, excluded)), allowed)
        # A pair (query, row) as one number: what one query excludes another may find.
        pairs = np.concatenate([i * len(self) + part for i, part in enumerate(excluded)])
        dropped = (rows < 0) | np.isin(rows + np.arange(len(rows))[:, None] * len(self), pairs)
        order = np.argsort(dropped, axis=1, kind="stable")[:, :k]  # (q, k)
        rows = np.take_along_axis(np.where(dropped, -1, rows), order, 1)
        return np.take_along_axis(similarities, order, 1), rows

    def _search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and rows, both (q, k), row -1 where there is none."""
        if not len(self) or (allowed is not None and not allowed.any()):
            return np.empty((len(queries), k), np.float32), np.full((len(queries), k), -1)
        return self.engine.search(queries, k, allowed)

    def _neighbours(self, similarities: np.ndarray, rows: np.ndarray) -> Neighbours:
        """What is known of rows; similarities are brought into -1..1, since halves round beyond."""
        np.clip(similarities, -1, 1, out=similarities)
        labels = np.full(rows.shape, self.label, np.int8)
        none = rows < 0
        if not none.any():
            return Neighbours(self.ids[rows], similarities, labels, self.generators[rows], self.sources[rows])
        columns = (self.ids, self.generators, self.sources) if len(self) else (np.array([-1]),) * 3
        ids, generators, sources = (np.where(none, column.dtype.type(-1), column[rows]) for column in columns)
        similarities, labels = np.where(none, np.float32(np.nan), similarities), np.where(none, np.int8(-1), labels)
        return Neighbours(ids, similarities, labels, generators, sources)

    def _set(self, ids: np.ndarray, generators: np.ndarray, sources: np.ndarray) -> None:
        self.ids, self.generators, self.sources = ids, generators, sources
        self._rare = {}
        self._order = None if (ids[1:] > ids[:-1]).all() else np.argsort(ids, kind="stable")
