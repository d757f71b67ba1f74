"""The vectors of one checkpoint in memory: nearest neighbours of each label by cosine similarity, exact by default."""

import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np

from indexer.index.engine import ROWS_PER_BLOCK, Engine
from indexer.index.flat import Flat
from indexer.index.growing import grow
from indexer.index.index import Neighbours
from indexer.index.label_index import LabelIndex
from indexer.index.lock import ReadWriteLock
from indexer.index.snapshot import BadSnapshot, read_snapshot, write_snapshot
from indexer.index.vector_checks import BadVectors, check_rows, unit_vectors

log = logging.getLogger(__name__)

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
        self._labels = (LabelIndex(0, new_engine(dim, device)), LabelIndex(1, new_engine(dim, device)))

    @property
    def kind(self) -> str:
        """How vectors are kept and searched: "flat-fp16", or "ivf-fp16" once a label is too large for that."""
        return max(one.engine.kind for one in self._labels)

    @property
    def device(self) -> str:
        """Where searches run: "cpu" or "cuda"."""
        return self._labels[0].engine.device

    @property
    def recall(self) -> float:
        """Share of the exact 20 nearest that a search finds, 0..1, as measured; 1.0 for exact kinds."""
        return min(one.engine.recall for one in self._labels)

    def __len__(self) -> int:
        return sum(self.counts())

    def counts(self, exclude_ids: np.ndarray | None = None) -> tuple[int, int]:
        """How many real and fake references there are, without the given ids."""
        with self._lock.read():
            reals, fakes = (
                len(one) - (0 if exclude_ids is None else int((one.rows(exclude_ids) >= 0).sum()))
                for one in self._labels
            )
        return reals, fakes

    def ids(self) -> np.ndarray:
        """All ids, ascending, shape (n,), int64."""
        with self._lock.read():
            return np.sort(np.concatenate([one.ids for one in self._labels]))

    def metadata(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels, generators and sources of n ids, each (n,), int64; -1 for an id that is not in the index."""
        labels, generators, sources = (np.full(len(ids), -1) for _ in range(3))
        with self._lock.read():
            for one in self._labels:
                rows = one.rows(ids)
                here = rows >= 0
                labels[here] = one.label
                generators[here], sources[here] = one.generators[rows[here]], one.sources[rows[here]]
        return labels, generators, sources

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """A copy of everything: ids (n,), int64, and unit vectors (n, dim), float16, in the same order."""
        ids, vectors = [np.empty(0, np.int64)], [np.empty((0, self.dim), np.float16)]
        with self._lock.read():
            for one in self._labels:
                for rows, block in one.engine.blocks(ROWS_PER_BLOCK):
                    ids.append(one.ids[rows])
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
            BadVectors: They are not like that; nothing is added.
        """
        unit = unit_vectors(vectors, self.dim)
        ids, labels, generators, sources = (np.asarray(column) for column in (ids, labels, generators, sources))
        check_rows(len(unit), ids, labels, generators, sources)
        with self._lock.write():
            known = np.concatenate([ids[one.rows(ids) >= 0] for one in self._labels])
            if len(known):
                raise BadVectors(f"id {known[0]} is in the index already: remove it first")
            for one in self._labels:
                rows = labels == one.label
                if rows.any():
                    one.engine.add(unit[rows])
                    one.add(ids[rows], generators[rows], sources[rows])
            self._version += 1

    def remove(self, ids: np.ndarray) -> int:
        """Remove references; unknown ids are passed over. Each call moves memory: remove many at once.

        Returns:
            How many there were.
        """
        with self._lock.write():
            removed = sum(one.remove(np.asarray(ids, np.int64)) for one in self._labels)
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
    ) -> Neighbours:
        """See `Index.search`."""
        parts = []
        for _, queries in self._parts_of(vectors, k):
            with self._lock.read():
                nearest = [
                    one.search(queries, k, generator, source) for one in self._labels if label in (None, one.label)
                ]
            parts.append(nearest[0] if len(nearest) == 1 else Neighbours.joined(nearest, axis=1).nearest(k))
        return Neighbours.joined(parts)

    def search_both(
        self,
        vectors: np.ndarray,
        k: tuple[int, int],
        *,
        exclude_ids: np.ndarray | None = None,
        exclude_each: Sequence[np.ndarray] | None = None,
    ) -> tuple[Neighbours, Neighbours]:
        """See `Index.search_both`."""
        if exclude_each is not None and len(exclude_each) != len(vectors):
            raise BadVectors(f"{len(vectors)} queries came with {len(exclude_each)} exclusions")
        nearest: tuple[list[Neighbours], list[Neighbours]] = ([], [])
        for first, queries in self._parts_of(vectors, max(k)):
            each = None if exclude_each is None else exclude_each[first : first + len(queries)]
            with self._lock.read():
                for parts, one, n in zip(nearest, self._labels, k, strict=True):
                    parts.append(one.search_without(queries, n, exclude_ids, each))
        return Neighbours.joined(nearest[0]), Neighbours.joined(nearest[1])

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
            engines = [one.engine for one in self._labels]
            states, columns = zip(*(one.state() for one in self._labels), strict=True)

        def arrays() -> Iterator[np.ndarray]:
            for engine, before_vectors in zip(engines, columns, strict=True):
                yield from before_vectors
                yield from self._blocks(engine, version)

        write_snapshot(path, {"dim": self.dim, "labels": states, "header": header}, arrays())

    def _blocks(self, engine: Engine, version: int) -> Iterator[np.ndarray]:
        """Copies of an engine's vectors, block by block, each made under the lock."""
        blocks = engine.blocks(ROWS_PER_BLOCK)
        while True:
            with self._lock.read():
                if self._version != version:
                    raise IndexChanged("the index changed while its snapshot was written")
                _, vectors = next(blocks, (None, None))
                vectors = None if vectors is None else vectors.copy()
            if vectors is None:
                return
            yield vectors

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> tuple[Self, dict[str, Any]]:
        """Read a snapshot: the index, and the header it was saved with.

        Raises:
            BadSnapshot: It is missing, damaged, or of another version.
        """
        with read_snapshot(path) as (header, arrays):
            if header.keys() != {"dim", "labels", "header"}:
                raise BadSnapshot("it was written by another version")
            index = cls(int(header["dim"]), device)
            for one, state in zip(index._labels, header["labels"], strict=True):
                one.restore(state, arrays)
        return index, header["header"]

    def grow(self, ended: Callable[[], bool] = lambda: False) -> bool:
        """Search labels that have grown large through inverted lists from now on; True where anything changed.

        Minutes for millions, while searches and additions go on; a removal meanwhile ends it, to be tried again.

        Args:
            ended: Whether to leave it; asked again and again.
        """
        return any([grow(one, self._lock, ended) for one in self._labels])  # noqa: C419 - both, not the first

    def _parts_of(self, vectors: np.ndarray, k: int) -> list[tuple[int, np.ndarray]]:
        """Unit vectors in parts of `PART`, each with its first row; one part where there are none."""
        if k < 1:
            raise BadVectors(f"k is {k}, must be at least 1")
        queries = unit_vectors(vectors, self.dim)
        return [(first, queries[first : first + PART]) for first in range(0, max(1, len(queries)), PART)]


def new_engine(dim: int, device: str) -> Engine:
    """An empty exact engine.

    Args:
        dim: Length of the vectors.
        device: "cpu", "cuda", or "auto" for a GPU where FAISS sees one. Without one, "cuda" is "cpu", with a warning:
            embedding may have a GPU that this build of FAISS cannot use.
    """
    if device != "cpu" and has_gpu():
        from indexer.index.gpu import Gpu

        return Gpu(dim)
    if device == "cuda":
        log.warning("searching on the CPU: this build of FAISS, or torch beside it, sees no GPU")
    return Flat(dim)


def has_gpu() -> bool:
    """Whether FAISS sees a GPU and torch is there to hold its memory."""
    if not faiss.get_num_gpus() or not find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()
