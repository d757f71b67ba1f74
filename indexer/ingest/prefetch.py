"""Stages that run side by side: each produces in a thread of its own, a bounded number of items ahead of the next."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from enum import Enum
from typing import TypeVar

Item = TypeVar("Item")


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
