"""Moving a label that has grown large from flat search to inverted lists, while searches and additions go on.

Several processes that follow the same references do so each at a moment of its own. What they learn is of the first
`milestone` rows, which are the same in all, so that they answer alike: as long as none of those rows is removed, and
while they turned to lists at the same milestone. One that was started at a later one has other lists, of like recall.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from indexer.index.engine import ROWS_PER_BLOCK
from indexer.index.flat import Flat
from indexer.index.inverted import QUERIES, VECTORS_PER_LIST, Inverted, lists_for
from indexer.index.label_index import LabelIndex
from indexer.index.lock import ReadWriteLock

LARGE = 200_000
"""References of one label from which flat search, 3 ms here, is felt beside embedding an image, 6 ms. Lists take 0.1 ms
at recall 0.995; they are faster from 20,000 on, but up to here being exact costs next to nothing."""
GROWTH = 1.5
"""A label that has grown by this factor since lists were last tried or tuned is looked at again."""


def grow(label_index: LabelIndex, lock: ReadWriteLock, ended: Callable[[], bool]) -> bool:
    """Give a label inverted lists once it is large, and tune them again as it grows; True where anything changed.

    Takes minutes for millions. A removal meanwhile ends it, to be tried again later.

    Args:
        label_index: The label.
        lock: The lock of its index.
        ended: Asked at each step; once it says so, nothing is changed.
    """

    def step() -> None:
        if ended():
            raise _Abandoned

    engine = label_index.engine
    try:
        if isinstance(engine, Inverted) and milestone(len(engine)) > engine.tuned_at:
            return _tune(engine, lock, step)
        if isinstance(engine, Flat) and milestone(len(engine)) > label_index.stayed_flat:
            return _invert(label_index, engine, lock, step)
    except _Abandoned:
        pass
    return False


def milestone(n: int) -> int:
    """The last of `LARGE`, and each time `GROWTH` times as many, that n references have reached; 0 before the first."""
    size = LARGE
    while GROWTH * size <= n:
        size = int(GROWTH * size)
    return size if n >= size else 0


class _Abandoned(Exception):
    """The index is closed, or a removal has moved rows up: what was learnt of them is of others now."""


def _tune(lists: Inverted, lock: ReadWriteLock, step: Callable[[], None]) -> bool:
    def hold() -> AbstractContextManager[None]:
        step()
        return lock.read()

    with lock.read():
        size = milestone(len(lists))
        first = [vectors[:1] for rows, vectors in lists.blocks(ROWS_PER_BLOCK) if rows[0] < size]
        queries = np.concatenate(first)[:QUERIES].astype(np.float32)
    lists.tune(queries, size, hold)
    return True


def _invert(label_index: LabelIndex, flat: Flat, lock: ReadWriteLock, step: Callable[[], None]) -> bool:
    with lock.read():
        n, removals = len(flat), label_index.removals
    size = milestone(n)

    def take(rows: np.ndarray | slice) -> np.ndarray:
        step()
        with lock.read():
            if label_index.removals != removals:
                raise _Abandoned
            return flat.vectors()[rows].copy()

    def hold() -> AbstractContextManager[None]:
        step()
        return nullcontext()  # nobody else knows of the lists yet

    def blocks(begin: int, end: int) -> Iterator[np.ndarray]:
        for first in range(begin, end, ROWS_PER_BLOCK):
            yield take(slice(first, min(first + ROWS_PER_BLOCK, end)))

    some = np.random.default_rng(size).permutation(size)[: max(QUERIES, VECTORS_PER_LIST * lists_for(size))]
    sample = take(some).astype(np.float32)
    lists = Inverted.trained(size, sample, step)
    lists.fill(np.concatenate([lists.assign(block) for block in blocks(0, size)]), take)
    lists.tune(sample[:QUERIES], size, hold)
    for block in blocks(size, n):
        lists.add(block)
    with lock.write():
        if label_index.removals != removals:
            return False
        if 2 * lists.nprobe > len(lists.centroids):
            label_index.stayed_flat = size  # they would win nothing
            return False
        lists.add(flat.vectors()[n:])  # what has come since
        label_index.engine = lists
    return True
