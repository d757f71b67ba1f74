"""Where the vectors of one label lie and how they are compared: half precision, inner product, rows numbered from 0.

Engines know rows only. Ids, labels, filters and guards are the index's (`indexer.index.vector_index`), which also keeps
writers and readers apart: no engine is changed while another thread is in it.
"""

from collections.abc import Iterator
from typing import Protocol

import faiss
import numpy as np

from trainer.cores import usable_cores

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


def selector(rows: np.ndarray) -> faiss.IDSelectorBitmap:
    """FAISS's selector of the rows where this is True, one bit each."""
    return faiss.IDSelectorBitmap(np.packbits(rows, bitorder="little"))


def use_threads_for(queries: int) -> None:
    """Set the calling thread's OpenMP threads (FAISS keeps their number per thread) for so many queries."""
    faiss.omp_set_num_threads(max(1, min(MAX_THREADS, queries // QUERIES_PER_THREAD)))
