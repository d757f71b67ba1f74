"""The vectors of one checkpoint in memory: nearest neighbours of each label by cosine similarity, exact by default."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from indexer.index.flat import Engine, Flat, new_engine
from indexer.index.growing import BLOCK, outgrow
from indexer.index.index_neighbours import Neighbours
from indexer.index.inverted import Inverted
from indexer.index.label_index import Shelf
from indexer.index.lock import ReadWriteLock
from indexer.index.snapshot import BadSnapshot, read_snapshot, write_snapshot
from indexer.index.vectors import BadVectors, check_rows, unit_vectors

__all__ = ["BadSnapshot", "BadVectors", "IndexChanged", "Neighbours", "VectorIndex"]

PART = 32
"""Queries that are searched under one hold of the lock: changes, and searches that wait behind them, get their turn."""


class IndexChanged(RuntimeError):
    """The index changed while its snapshot was written; the old snapshot stays, try again later."""


class VectorIndex:
    """References of one checkpoint in half precision, real and fake apart. Safe for many threads.

    Args:
        dim: Length of the vectors.
        device: "cpu", "cuda", or "auto" for a GPU where FAISS sees one.
    """

    def __init__(self, dim: int, device: str = "auto") -> None:
        self.dim = dim
        self._lock = ReadWriteLock()
        self._version = 0
        self._shelves = (Shelf(0, new_engine(dim, device)), Shelf(1, new_engine(dim, device)))

    @property
    def kind(self) -> str:
        """How vectors are kept and searched: "flat-fp16", or "ivf-fp16" once a label has outgrown that."""
        return max(shelf.engine.kind for shelf in self._shelves)

    @property
    def device(self) -> str:
        """Where searches run: "cpu" or "cuda"."""
        return self._shelves[0].engine.device

    @property
    def recall(self) -> float:
        """Share of the exact 20 nearest that a search finds, 0..1, as measured; 1.0 for exact kinds."""
        return min(shelf.engine.recall for shelf in self._shelves)

    def __len__(self) -> int:
        return sum(self.counts())

    def counts(self, exclude_ids: np.ndarray | None = None) -> tuple[int, int]:
        """How many real and fake references there are, without the given ids."""
        with self._lock.read():
            reals, fakes = (
                len(shelf) - (0 if exclude_ids is None else int((shelf.rows(np.asarray(exclude_ids)) >= 0).sum()))
                for shelf in self._shelves
            )
        return reals, fakes

    def ids(self) -> np.ndarray:
        """All ids, ascending, shape (n,), int64."""
        with self._lock.read():
            return np.sort(np.concatenate([shelf.ids for shelf in self._shelves]))

    def metadata(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels, generators and sources of n ids, each (n,), int64; -1 for an id that is not in the index."""
        labels, generators, sources = (np.full(len(ids), -1) for _ in range(3))
        with self._lock.read():
            for shelf in self._shelves:
                rows = shelf.rows(np.asarray(ids))
                here = rows >= 0
                labels[here] = shelf.label
                generators[here], sources[here] = shelf.generators[rows[here]], shelf.sources[rows[here]]
        return labels, generators, sources

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """A copy of everything: ids (n,), int64, and unit vectors (n, dim), float16, in the same order."""
        ids, vectors = [np.empty(0, np.int64)], [np.empty((0, self.dim), np.float16)]
        with self._lock.read():
            for shelf in self._shelves:
                for rows, block in shelf.engine.blocks(BLOCK):
                    ids.append(shelf.ids[rows])
                    vectors.append(block.copy())
        return np.concatenate(ids), np.concatenate(vectors)

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
        unit = unit_vectors(vectors, self.dim)
        ids, labels, generators, sources = (np.asarray(column) for column in (ids, labels, generators, sources))
        check_rows(len(unit), ids, labels, generators, sources)
        with self._lock.write():
            known = [ids[shelf.rows(ids) >= 0] for shelf in self._shelves]
            if any(map(len, known)):
                raise BadVectors(f"id {np.concatenate(known)[0]} is in the index already: remove it first")
            for shelf in self._shelves:
                chosen = labels == shelf.label
                if chosen.any():
                    shelf.engine.add(unit[chosen])
                    shelf.add(ids[chosen], generators[chosen], sources[chosen])
            self._version += 1

    def remove(self, ids: np.ndarray) -> int:
        """Remove references; unknown ids are passed over. Each call moves memory: remove many at once.

        Returns:
            How many there were.
        """
        removed = 0
        with self._lock.write():
            for shelf in self._shelves:
                rows = np.unique(shelf.rows(np.asarray(ids, np.int64)))
                rows = rows[rows >= 0]
                if len(rows):
                    shelf.remove(rows)
                    removed += len(rows)
            self._version += removed > 0
        return removed

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
        parts = []
        for _, queries in self._parts_of(vectors, k):
            with self._lock.read():
                found = [
                    shelf.nearest(queries, k, generator=generator, source=source, exclude_ids=exclude_ids)
                    for shelf in self._shelves
                    if label is None or label == shelf.label
                ]
            parts.append(found[0] if len(found) == 1 else found[0].merge(found[1], k))
        return Neighbours.joined(parts)

    def search_both(
        self,
        vectors: np.ndarray,
        k: tuple[int, int],
        *,
        source: int | None = None,
        exclude_ids: np.ndarray | None = None,
        exclude_each: Sequence[np.ndarray] | None = None,
    ) -> tuple[Neighbours, Neighbours]:
        """The nearest real and the nearest fake references; otherwise like `search`.

        Args:
            vectors: See `search`.
            k: How many reals, and how many fakes.
            source: See `search`.
            exclude_ids: See `search`.
            exclude_each: Ids that one query must not find though others may, q arrays of any length.
        """
        if exclude_each is not None and len(exclude_each) != len(vectors):
            raise BadVectors(f"{len(vectors)} queries came with {len(exclude_each)} exclusions")
        found: tuple[list[Neighbours], list[Neighbours]] = ([], [])
        for first, queries in self._parts_of(vectors, max(k)):
            with self._lock.read():
                for parts, shelf, wanted in zip(found, self._shelves, k, strict=True):
                    each = None if exclude_each is None else exclude_each[first : first + len(queries)]
                    answer = shelf.nearest(queries, wanted, source=source, exclude_ids=exclude_ids, exclude_each=each)
                    parts.append(answer)
        return Neighbours.joined(found[0]), Neighbours.joined(found[1])

    def save(self, path: Path, header: dict[str, Any]) -> None:
        """Write a snapshot aside, checksummed, then rename it to `path`; searches and changes go on meanwhile.

        Args:
            path: The file.
            header: Any JSON, for `load` to give back.

        Raises:
            IndexChanged: Something was added or removed meanwhile.
        """
        with self._lock.read():
            version = self._version
            engines = [shelf.engine for shelf in self._shelves]
            labels, columns = zip(*(_described(shelf) for shelf in self._shelves), strict=True)
        parts = self._parts(zip(columns, engines, strict=True), version)
        write_snapshot(path, {"dim": self.dim, "labels": labels, "header": header}, parts)

    def _parts(self, labels: Iterable[tuple[Iterable[np.ndarray], Engine]], version: int) -> Iterator[np.ndarray]:
        for columns, engine in labels:
            yield from columns
            blocks = engine.blocks(BLOCK)
            while True:
                with self._lock.read():
                    if self._version != version:
                        raise IndexChanged("the index changed while its snapshot was written")
                    block = next(blocks, None)
                    part = None if block is None else block[1].copy()
                if part is None:
                    break
                yield part

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> tuple[Self, dict[str, Any]]:
        """Read a snapshot: the index, and the header it was saved with.

        Raises:
            BadSnapshot: It is missing, damaged, or of another version.
        """
        with read_snapshot(path) as (header, fill):
            if header.keys() != {"dim", "labels", "header"}:
                raise BadSnapshot("it was written by another version")
            index = cls(int(header["dim"]), device)
            for shelf, label in zip(index._shelves, header["labels"], strict=True):
                n, flat = label["count"], shelf.engine
                shelf.add(*(fill(np.empty(n, dtype)) for dtype in (np.int64, np.int32, np.int32)))
                if label["lists"] is not None:
                    if flat.device != "cpu":
                        raise BadSnapshot("it was written for a CPU")
                    shelf.engine = Inverted.restored(label["lists"], n, index.dim, fill)
                elif isinstance(flat, Flat):
                    fill(flat.extend(n))
                else:
                    for first in range(0, n, BLOCK):
                        flat.add(fill(np.empty((min(BLOCK, n - first), index.dim), np.float16)))
        return index, header["header"]

    def outgrow(self, ended: Callable[[], bool] = lambda: False) -> bool:
        """Search labels that have outgrown flat search through inverted lists; True where anything changed.

        Minutes for millions, while searches and additions go on; a removal meanwhile ends it, to be tried again.

        Args:
            ended: Whether to leave it; asked again and again.
        """
        return any([outgrow(shelf, self._lock, ended) for shelf in self._shelves])  # noqa: C419 - both, not the first

    def _parts_of(self, vectors: np.ndarray, k: int) -> list[tuple[int, np.ndarray]]:
        """Unit vectors in parts of `PART`, each with its first row; one part where there are none."""
        if k < 1:
            raise BadVectors(f"k is {k}, must be at least 1")
        queries = unit_vectors(vectors, self.dim)
        return [(first, queries[first : first + PART]) for first in range(0, max(1, len(queries)), PART)]


def _described(shelf: Shelf) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What a snapshot says of a label, and the arrays that come before its vectors."""
    lists, arrays = shelf.engine.state() if isinstance(shelf.engine, Inverted) else (None, [])
    return {"count": len(shelf), "lists": lists}, [shelf.ids, shelf.generators, shelf.sources, *arrays]
