"""Vectors of one label on a GPU: a buffer of our own, searched by FAISS's brute force without an index object.

FAISS's GPU indexes cannot remove, reallocate on each addition, and end the process on a failed assertion; its classic
build ignores search selectors without a word. None of that concerns a plain buffer.
"""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import faiss
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MAX_K = 2_048
"""The most neighbours that FAISS's GPU kernels select; more ends the process."""


class Gpu:
    """Exact search in half precision; grows by doubling. Filters copy the rows they allow, on the GPU."""

    kind = "flat-fp16"
    device = "cuda"
    recall = 1.0

    def __init__(self, dim: int) -> None:
        import torch

        self._torch = torch
        self._buffer = torch.empty((0, dim), dtype=torch.float16, device="cuda")
        self._rows = 0
        self._resources = faiss.StandardGpuResources()
        self._one = threading.Lock()  # GPU resources are not safe for two threads, even to read

    def __len__(self) -> int:
        return self._rows

    def add(self, vectors: np.ndarray) -> None:
        rows = self._rows + len(vectors)
        if rows > len(self._buffer):
            buffer = self._buffer.new_empty((max(rows, 2 * len(self._buffer)), self._buffer.shape[1]))
            buffer[: self._rows] = self._buffer[: self._rows]
            self._buffer = buffer
        self._buffer[self._rows : rows] = self._torch.from_numpy(np.asarray(vectors, np.float16))
        self._rows = rows

    def keep(self, rows: np.ndarray) -> None:
        vectors = self._allowed(rows)
        self._rows = len(vectors)
        self._buffer[: self._rows] = vectors

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if k > MAX_K:
            raise ValueError(f"a GPU finds at most {MAX_K} neighbours, not {k}: ask for fewer or set LINEUP_DEVICE=cpu")
        similarities = np.zeros((len(queries), k), np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        with self._one:
            vectors = self._buffer[: self._rows] if allowed is None else self._allowed(allowed)
            self._torch.cuda.synchronize()  # FAISS works on a stream of its own
            n = min(k, len(vectors))
            if n and len(queries):
                similarities[:, :n], nearest = self._nearest(queries.astype(np.float16), vectors, n)
                rows[:, :n] = nearest if allowed is None else np.flatnonzero(allowed)[nearest]
        return similarities, rows

    def blocks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, self._rows, size):
            part = self._buffer[first : min(first + size, self._rows)].cpu().numpy()
            yield np.arange(first, first + len(part)), part

    def _allowed(self, rows: np.ndarray) -> "Tensor":
        """A copy of these rows, (m, d)."""
        at = self._torch.from_numpy(np.flatnonzero(rows)).to("cuda")
        return self._buffer[at]

    def _nearest(self, queries: np.ndarray, vectors: "Tensor", k: int) -> tuple[np.ndarray, np.ndarray]:
        """`faiss.knn_gpu`, which takes numpy arrays only, with vectors that are on the GPU already."""
        similarities = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        ask = faiss.GpuDistanceParams()
        ask.metric, ask.k, ask.dims = faiss.METRIC_INNER_PRODUCT, k, queries.shape[1]
        ask.vectors, ask.vectorType = faiss.cast_integer_to_void_ptr(vectors.data_ptr()), faiss.DistanceDataType_F16
        ask.queries, ask.queryType = faiss.swig_ptr(queries), faiss.DistanceDataType_F16
        ask.numVectors, ask.numQueries = len(vectors), len(queries)
        ask.outDistances, ask.outIndices = faiss.swig_ptr(similarities), faiss.swig_ptr(rows)
        ask.outIndicesType = faiss.IndicesDataType_I64
        faiss.bfKnn(self._resources, ask)
        return similarities, rows
