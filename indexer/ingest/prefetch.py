"""Stages that run side by side: each produces in a thread of its own, a bounded number of items ahead of the next."""

import queue
import threading
from collections.abc import Generator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _End:
    """No more items; `error` says why when something failed."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Producer(Generic[Item]):
    def __init__(self, items: Generator[Item, None, None], depth: int) -> None:
        self._items = items
        self._stop = threading.Event()
        self.queue: queue.Queue[Item | _End] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        end = _End()
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:
            end = _End(error)
        finally:
            self._items.close()
            self._put(end)

    def _put(self, item: Item | _End) -> bool:
        while not self._stop.is_set():
            try:
                self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def ahead(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """The same items in the same order, produced in another thread, at most `depth` of them waiting.

    What the producer raises is raised here, after the items before it. Closing this generator ends the thread and
    closes `items`.
    """
    producer = _Producer(items, depth)
    try:
        while not isinstance(item := producer.queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        producer.close()
