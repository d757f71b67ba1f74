"""Moving a label that has grown large from flat search to inverted lists, while searches and additions go on."""

from collections.abc import Callable
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
        if isinstance(engine, Inverted) and len(engine) > GROWTH * engine.tuned_at:
            return _tune(engine, lock, step)
        if isinstance(engine, Flat) and len(engine) >= max(LARGE, GROWTH * label_index.stayed_flat):
            return _invert(label_index, engine, lock, step)
    except _Abandoned:
        pass
    return False


class _Abandoned(Exception):
    """The index is closed, or a removal has moved rows up: what was learnt of them is of others now."""


def _tune(lists: Inverted, lock: ReadWriteLock, step: Callable[[], None]) -> bool:
    def hold() -> AbstractContextManager[None]:
        step()
        return lock.read()

    with lock.read():
        queries = np.concatenate([vectors[:1] for _, vectors in lists.blocks(ROWS_PER_BLOCK)])[:QUERIES].astype(
            np.float32
        )
    lists.tune(queries, hold)
    return True


def _invert(label_index: LabelIndex, flat: Flat, lock: ReadWriteLock, step: Callable[[], None]) -> bool:
    with lock.read():
        n, removals = len(flat), label_index.removals

    def take(rows: np.ndarray | slice) -> np.ndarray:
        step()
        with lock.read():
            if label_index.removals != removals:
                raise _Abandoned
            return flat.vectors()[rows].copy()

    def hold() -> AbstractContextManager[None]:
        step()
        return nullcontext()  # nobody else knows of the lists yet

    some = np.random.default_rng(n).permutation(n)[: max(QUERIES, VECTORS_PER_LIST * lists_for(n))]
    sample = take(some).astype(np.float32)
    lists = Inverted.trained(n, sample, step)
    numbers = [
        lists.assign(take(slice(first, min(first + ROWS_PER_BLOCK, n)))) for first in range(0, n, ROWS_PER_BLOCK)
    ]
    lists.fill(np.concatenate(numbers), take)
    lists.tune(sample[:QUERIES], hold)
    with lock.write():
        if label_index.removals != removals:
            return False
        if 2 * lists.nprobe > len(lists.centroids):
            label_index.stayed_flat = n  # they would win nothing
            return False
        lists.add(flat.vectors()[n:])  # what has come since
        label_index.engine = lists
    return True
