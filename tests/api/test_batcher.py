"""Concurrent callers share forward passes, get their own rows back, and wait no longer than promised."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from api.batcher import Batcher, BatcherFull


class Gate:
    """Computes twice each stack, noting the rows of each call; the first call waits until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, stacks: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.sizes.append(sum(map(len, stacks)))
        self.entered.set()
        assert self.opened.wait(10)
        return [stack * 2 for stack in stacks]


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


Rows = Batcher[np.ndarray, np.ndarray]


def submit(batcher: Rows, *values: float) -> Future[np.ndarray]:
    return batcher.submit(np.array(values)[:, None], len(values))  # (n, 1)


def test_a_lone_caller_is_computed_at_once(gate: Gate) -> None:
    gate.opened.set()
    batcher: Rows = Batcher(gate, max_wait=60)
    assert submit(batcher, 1, 2).result(10).tolist() == [[2], [4]]
    assert gate.sizes == [2]
    batcher.close()


def test_what_waits_is_computed_together_and_each_gets_its_own(gate: Gate) -> None:
    seen: list[int] = []
    batcher: Rows = Batcher(gate, max_batch=8, max_wait=0, observe=seen.append)
    first = submit(batcher, 0)
    assert gate.entered.wait(10)
    others = [submit(batcher, i, -i) for i in range(1, 4)]
    assert batcher.waiting == 7
    gate.opened.set()
    assert first.result(10).tolist() == [[0]]
    assert [other.result(10).tolist() for other in others] == [[[2 * i], [-2 * i]] for i in range(1, 4)]
    batcher.close()
    assert gate.sizes == seen == [1, 6]
    assert batcher.waiting == 0


def test_a_batch_does_not_outgrow_its_limit_unless_one_caller_does(gate: Gate) -> None:
    batcher: Rows = Batcher(gate, max_batch=4, max_wait=0)
    first = submit(batcher, 0)
    assert gate.entered.wait(10)
    futures = [submit(batcher, *range(n)) for n in (3, 2, 9, 1)]
    gate.opened.set()
    assert [len(future.result(10)) for future in [first, *futures]] == [1, 3, 2, 9, 1]
    batcher.close()
    assert gate.sizes == [1, 3, 2, 9, 1]


def test_full_and_closed_are_refused(gate: Gate) -> None:
    batcher: Rows = Batcher(gate, capacity=2, max_wait=0)
    waiting = [submit(batcher, 1), submit(batcher, 2)]
    with pytest.raises(BatcherFull, match="2 images wait"):
        submit(batcher, 3)
    gate.opened.set()
    batcher.close()
    assert [future.result(0).tolist() for future in waiting] == [[[2]], [[4]]]
    with pytest.raises(BatcherFull, match="shutting down"):
        submit(batcher, 1)


def test_a_failure_reaches_its_callers_and_the_thread_lives_on() -> None:
    def compute(stacks: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        if max(stack.max() for stack in stacks) > 9:
            raise MemoryError("too much")
        return stacks

    batcher: Rows = Batcher(compute)
    with pytest.raises(MemoryError, match="too much"):
        submit(batcher, 10).result(10)
    assert submit(batcher, 1).result(10).tolist() == [[1]]
    assert batcher.waiting == 0
    batcher.close()


def test_one_bad_item_spoils_no_other_answer(gate: Gate) -> None:
    def compute(stacks: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        if any(stack.max() > 9 for stack in stacks):
            raise MemoryError("too much")
        return gate(stacks)

    batcher: Rows = Batcher(compute, max_wait=0)
    first = submit(batcher, 0)
    assert gate.entered.wait(10)
    others = [submit(batcher, value) for value in (1, 10, 2)]
    gate.opened.set()
    assert first.result(10).tolist() == [[0]]
    assert [other.result(10).tolist() for other in (others[0], others[2])] == [[[2]], [[4]]]
    with pytest.raises(MemoryError, match="too much"):
        others[1].result(10)
    batcher.close()


def test_many_threads_lose_and_mix_nothing() -> None:
    batcher: Rows = Batcher(lambda stacks: [stack + 1 for stack in stacks], max_batch=5)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: submit(batcher, i, 1000 + i).result(10).tolist(), range(200)))
    batcher.close()
    assert answers == [[[i + 1], [1001 + i]] for i in range(200)]
