"""Where the vectors of one label lie and how they are compared: half precision, inner product, rows numbered from 0.

Engines know rows only. Ids, labels, filters and guards are the index's (`indexer.index.vector_index`), which also keeps
writers and readers apart: no engine is changed while another thread is in it.
"""

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol

import faiss
import numpy as np

from trainer.cores import usable_cores

log = logging.getLogger(__name__)

FP16 = faiss.ScalarQuantizer.QT_fp16
ROWS_PER_BLOCK = 65_536
"""Rows that are copied at a time, under one hold of a lock."""
MAX_THREADS: int = min(faiss.omp_get_max_threads(), usable_cores())
QUERIES_PER_THREAD = 4
"""FAISS splits queries, not rows, among OpenMP threads; waking them costs a single query more than it brings."""


class Engine(Protocol):
    """Vectors with an order, the k nearest of which can be asked for.

    Attributes:
        kind: As `lineup index status` names it.
        device: "cpu" or "cuda".
        recall: Share of the exact 20 nearest that a search finds, as measured.
    """

    kind: str
    device: str
    recall: float

    def __len__(self) -> int: ...

    def add(self, vectors: np.ndarray) -> None:
        """Append rows: unit length, shape (n, d), float32 or float16."""
        ...

    def keep(self, rows: np.ndarray) -> None:
        """Drop the rows where this is False, shape (len,), bool; the others close up in their order."""
        ...

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest rows, nearest first; padded with row -1.

        Args:
            queries: Unit length, shape (q, d), float32.
            k: At least 1.
            allowed: Rows that may be found, shape (len,), bool; None for all.

        Returns:
            Inner products (q, k), float32, and rows (q, k), int64.
        """
        ...

    def blocks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows in parts of about `size`: row numbers (m,) and vectors (m, d), float16.

        Vectors may be the engine's own memory, good until it is changed.
        """
        ...


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


def selector(rows: np.ndarray) -> faiss.IDSelectorBitmap:
    """FAISS's selector of the rows where this is True, one bit each."""
    return faiss.IDSelectorBitmap(np.packbits(rows, bitorder="little"))


def use_threads_for(queries: int) -> None:
    """Set the calling thread's OpenMP threads (FAISS keeps their number per thread) for so many queries."""
    faiss.omp_set_num_threads(max(1, min(MAX_THREADS, queries // QUERIES_PER_THREAD)))


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
