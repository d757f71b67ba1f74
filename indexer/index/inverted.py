"""Vectors of one label in inverted lists: a search looks into the lists nearest to the query, by measured recall.

What flat search does to every vector, this does to those in `nprobe` lists of a k-means clustering (Jégou et al. 2011,
section V); the codes are the same halves, so that similarities are the same too.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Self

import faiss
import numpy as np

from indexer.index.engine import FP16, selector, use_threads_for

TARGET_RECALL = 0.995
"""Recall@20 that `tune` reaches on stored vectors, so that fresh queries, which lie a little off them, keep 0.99."""
RECALL_AT = 20
"""Recall is measured among so many nearest."""
QUERIES = 256
"""Stored vectors that recall is measured with."""
VECTORS_PER_LIST = 40
"""Vectors per list that the clustering learns from."""
ROUNDS = 8
"""Rounds of the clustering."""


class Inverted:
    """FAISS's inverted file over the same half-precision codes as `Flat`. Made by `trained` or `restored`."""

    kind = "ivf-fp16"
    device = "cpu"

    def __init__(self, centroids: np.ndarray) -> None:
        self.centroids = centroids
        self.recall = 0.0
        self.nprobe = len(centroids)
        self.tuned_at = 0
        self._quantizer = faiss.IndexFlatIP(centroids.shape[1])
        self._quantizer.add(centroids)
        self._faiss = faiss.IndexIVFScalarQuantizer(
            self._quantizer, centroids.shape[1], len(centroids), FP16, faiss.METRIC_INNER_PRODUCT, False
        )
        self._faiss.is_trained = True

    @classmethod
    def trained(cls, n: int, sample: np.ndarray, step: Callable[[], None]) -> Self:
        """Empty lists for about n vectors.

        Args:
            n: How many vectors there will be.
            sample: Some of them, unit length, shape (m, d), float32; `VECTORS_PER_LIST` for each list are enough.
            step: Called before each round of the clustering; what it raises ends that.
        """
        use_threads_for(len(sample) // 1_000)
        centroids: Any = None  # the first are drawn
        for _ in range(ROUNDS):  # one at a time, which gives the same centroids
            step()
            clusters = faiss.Kmeans(sample.shape[1], lists_for(n), niter=1, spherical=True, seed=0)
            clusters.train(sample, init_centroids=centroids)
            centroids = clusters.centroids
        return cls(centroids)

    def __len__(self) -> int:
        return int(self._faiss.ntotal)

    def add(self, vectors: np.ndarray) -> None:
        use_threads_for(len(vectors) // 1_000)
        self._faiss.add(np.asarray(vectors, np.float16).astype(np.float32))  # rounded as in `Flat`

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """The list that each vector (n, d) belongs to, shape (n,), int64."""
        use_threads_for(len(vectors) // 1_000)
        numbers: np.ndarray = self._quantizer.search(vectors.astype(np.float32), 1)[1][:, 0]
        return numbers

    def fill(self, numbers: np.ndarray, take: Callable[[np.ndarray], np.ndarray]) -> None:
        """Fill empty lists, each at once, so that it takes no more memory than it needs.

        Args:
            numbers: List of each row, shape (n,).
            take: Vectors of rows: (m,) to (m, d), float16.
        """
        order, sizes = np.argsort(numbers, kind="stable"), np.bincount(numbers, minlength=len(self.centroids))
        for number, rows in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
            if len(rows):
                self._put(number, rows, take(rows))
        self._faiss.ntotal = len(numbers)

    def keep(self, rows: np.ndarray) -> None:
        self._faiss.remove_ids(selector(~rows))
        moved = np.cumsum(rows) - 1  # (n,): where each row that stays goes to
        for number in range(len(self.centroids)):
            ids = self._ids(number)
            ids[:] = moved[ids]

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        use_threads_for(len(queries))
        most = len(self) if allowed is None else int(np.count_nonzero(allowed))  # a sum takes ten times as long
        # As many allowed vectors as an open search would see; all lists where that is not enough for k.
        nprobe = min(len(self.centroids), -(-self.nprobe * len(self) // max(1, most)))
        similarities, rows = self._search(queries, k, allowed, nprobe)
        short = (rows >= 0).sum(1) < min(k, most)
        if short.any():
            similarities[short], rows[short] = self._search(queries[short], k, allowed, len(self.centroids))
        return similarities, rows

    def tune(self, queries: np.ndarray, size: int, hold: Callable[[], AbstractContextManager[None]]) -> None:
        """Look into as few lists as give `TARGET_RECALL` recall; measured against all lists, which is exact.

        Args:
            queries: Stored vectors, shape (q, d), float32.
            size: Rows that are searched, the first ones.
            hold: Held while a few queries are searched, so that changes get their turn between.
        """
        steps = np.unique(np.geomspace(1, len(self.centroids), 1 + 4 * len(self.centroids).bit_length()).astype(int))
        hits = np.zeros(len(steps))
        for part in np.array_split(queries, -(-len(queries) // 4)):
            with hold():
                hits += self._hits(part, size, steps)
        recall = 1 - (hits[-1] - hits) / max(1, hits[-1])  # the last step is all lists
        least = int(np.argmax(recall >= TARGET_RECALL))
        self.nprobe, self.recall, self.tuned_at = int(steps[least]), float(recall[least]), size

    def _hits(self, queries: np.ndarray, size: int, steps: np.ndarray) -> np.ndarray:
        """How many of the nearest but the query itself are found in so many lists, for each step, shape (s,)."""
        k, allowed = min(RECALL_AT + 1, size), np.ones(size, bool)
        exact = self._search(queries, k, allowed, len(self.centroids))[1]  # (q, k)
        hits = np.full(len(steps), exact.size - len(exact), float)
        for step, nprobe in enumerate(steps[:-1].tolist()):
            nearest = self._search(queries, k, allowed, nprobe)[1]
            hits[step] = sum(len(np.intersect1d(a[1:], b)) for a, b in zip(exact, nearest, strict=True))
            if hits[step] == hits[-1]:
                hits[step:] = hits[-1]
                break
        return hits

    def blocks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in range(len(self.centroids)):
            length = self._faiss.invlists.list_size(number)
            if length:
                codes = faiss.rev_swig_ptr(self._faiss.invlists.get_codes(number), length * self._faiss.code_size)
                yield self._ids(number).copy(), codes.view(np.float16).reshape(length, -1)  # (m,), (m, d)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the rows where this is True, shape (m,), and their vectors, (m, d), float16; list by list."""
        parts = [(ids[rows[ids]], vectors[rows[ids]]) for ids, vectors in self.blocks(0)]
        numbers, vectors = map(np.concatenate, zip(*parts, strict=True))
        return numbers, vectors

    def state(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """What `restored` needs beside the vectors in the order of `blocks`: plain values and arrays."""
        values = {"nprobe": self.nprobe, "recall": self.recall, "tuned_at": self.tuned_at}
        sizes = np.array([self._faiss.invlists.list_size(number) for number in range(len(self.centroids))])
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in self.blocks(0))])
        return values, [self.centroids, sizes, rows]

    @classmethod
    def restored(cls, values: dict[str, Any], arrays: Iterator[np.ndarray]) -> Self:
        """An engine as it was, from the values and arrays of `state` and then the vectors of each list in use."""
        engine = cls(next(arrays))
        sizes, rows = next(arrays), next(arrays)
        for number, part in enumerate(np.split(rows, np.cumsum(sizes)[:-1])):
            if len(part):
                engine._put(number, part, next(arrays))
        engine._faiss.ntotal = len(rows)
        engine.nprobe, engine.recall, engine.tuned_at = (values[key] for key in ("nprobe", "recall", "tuned_at"))
        return engine

    def _put(self, number: int, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Append rows and their vectors, float16, to a list."""
        rows, vectors = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(vectors).view(np.uint8)
        self._faiss.invlists.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(vectors))

    def _ids(self, number: int) -> np.ndarray:
        """Rows in a list: FAISS's own memory, shape (m,), int64."""
        length = self._faiss.invlists.list_size(number)
        if not length:
            return np.empty(0, np.int64)
        ids: np.ndarray = faiss.rev_swig_ptr(self._faiss.invlists.get_ids(number), length)
        return ids

    def _search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None, nprobe: int
    ) -> tuple[np.ndarray, np.ndarray]:
        filters = {} if allowed is None else {"sel": selector(allowed)}
        parameters = faiss.SearchParametersIVF(nprobe=nprobe, **filters)
        similarities, rows = self._faiss.search(queries, k, params=parameters)
        return similarities, rows


def lists_for(n: int) -> int:
    """How many lists suit n vectors: two square roots (four take as long to search and twice as long to fill)."""
    return int(max(1, min(2 * np.sqrt(n), n // VECTORS_PER_LIST)))
