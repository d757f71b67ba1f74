"""Exact search: every vector is compared."""

from collections.abc import Iterator

import faiss
import numpy as np

from indexer.index.engine import FP16, selector, use_threads_for


class Flat:
    """Exact search over FAISS's scalar quantizer in half precision."""

    kind = "flat-fp16"
    device = "cpu"
    recall = 1.0

    def __init__(self, dim: int) -> None:
        self._faiss = faiss.IndexScalarQuantizer(dim, FP16, faiss.METRIC_INNER_PRODUCT)

    def __len__(self) -> int:
        return int(self._faiss.ntotal)

    def add(self, vectors: np.ndarray) -> None:
        self.extend(len(vectors))[:] = vectors  # numpy rounds to the nearest half; FAISS's own encoder cuts off

    def extend(self, n: int) -> np.ndarray:
        """Append n rows and return their memory, shape (n, d), float16, to be written at once."""
        first = len(self)
        self._faiss.codes.resize((first + n) * self._faiss.code_size)
        self._faiss.ntotal = first + n
        return self.vectors()[first:]

    def vectors(self) -> np.ndarray:
        """All rows, shape (len, d), float16: FAISS's own memory, good until the next change."""
        if not len(self):
            return np.empty((0, self._faiss.d), np.float16)
        memory = faiss.rev_swig_ptr(self._faiss.codes.data(), self._faiss.codes.size())
        rows: np.ndarray = memory.view(np.float16).reshape(-1, self._faiss.d)  # (n, d)
        return rows

    def keep(self, rows: np.ndarray) -> None:
        self._faiss.remove_ids(selector(~rows))

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        use_threads_for(len(queries))
        parameters = None if allowed is None else faiss.SearchParameters(sel=selector(allowed))
        similarities, rows = self._faiss.search(queries, k, params=parameters)
        return similarities, rows

    def blocks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(self), size):
            part = self.vectors()[first : first + size]
            yield np.arange(first, first + len(part)), part
