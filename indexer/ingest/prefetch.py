"""Stages that run side by side: each produces in a thread of its own, a bounded number of items ahead of the next."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from enum import Enum
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Mark(Enum):
    END = "no more items"


def prefetch(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """The same items in the same order, produced in another thread, at most `depth` of them waiting.

    What the producer raises is raised here, after the items before it. Closing this generator ends the thread and
    closes `items`.
    """
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        futures = deque(thread.submit(next, items, _Mark.END) for _ in range(depth))
        try:
            while (item := futures.popleft().result()) is not _Mark.END:
                futures.append(thread.submit(next, items, _Mark.END))
                yield item
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


def map_batches(
    work: Callable[[Sequence[Item]], Result], items: Generator[Item, None, None], size: int
) -> Generator[Result, None, None]:
    """What `work` makes of each `size` items, in order, with two batches at a time.

    An engine on all cores has the next batch at hand then: it would wait while one is put together or handed on.
    What `work` raises is raised here, after the results before it; what `items` raises at once. Closing this generator
    ends the threads, and closes `items`.
    """
    with closing(items), ThreadPoolExecutor(2, thread_name_prefix="batches") as threads:
        futures: deque[Future[Result]] = deque()
        while batch := list(islice(items, size)):
            futures.append(threads.submit(work, batch))
            if len(futures) == 2:
                yield futures.popleft().result()
        for future in futures:
            yield future.result()
