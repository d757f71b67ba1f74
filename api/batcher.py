"""One thread that works for many callers, so that concurrent requests share a forward pass, a search, a transaction."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class BatcherFull(RuntimeError):
    """More waits than the batcher takes; try again shortly."""


@dataclass(frozen=True, slots=True)
class Job(Generic[Item, Result]):
    item: Item
    weight: int
    future: Future[Result] = field(default_factory=Future)


class Batcher(Generic[Item, Result]):
    """Collects items from any thread and works on them together.

    An idle batcher computes at once. Only after a batch of several callers, thus under load, does it wait for more,
    and never longer than `max_wait`: a lone request pays nothing, and no request pays more than the bound.

    Args:
        work: Items to their results, in the same order; no result may depend on the other items. Called from one
            thread only.
        max_batch: Weight from which on no further item joins; a heavier item is worked on alone.
        max_wait: Seconds to wait for more callers under load.
        capacity: Once so much weight waits, `submit` refuses.
        observe: Told the weight of each batch.
        name: Of the thread.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int = 32,
        max_wait: float = 0.004,
        capacity: int = 512,
        observe: Callable[[int], None] = lambda weight: None,
        name: str = "batcher",
    ) -> None:
        self._work, self._observe = work, observe
        self._max_batch, self._max_wait, self._capacity = max_batch, max_wait, capacity
        self._jobs: queue.SimpleQueue[Job[Item, Result] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting, self._closed = 0, False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Weight submitted and not yet answered."""
        return self._waiting

    def submit(self, item: Item, weight: int = 1) -> Future[Result]:
        """Queue an item; the future gives its result, or what `work` raised.

        Args:
            item: What `work` gets.
            weight: What of it is worked on: windows to embed, embeddings to judge.

        Raises:
            BatcherFull: Too much waits already, or the batcher is closed.
        """
        job: Job[Item, Result] = Job(item, weight)
        with self._lock:
            if self._closed:
                raise BatcherFull("the server is shutting down")
            if self._waiting >= self._capacity:
                raise BatcherFull(f"{self._waiting} images wait already; try again shortly")
            self._waiting += weight
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Finish what was submitted, then end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        max_wait, left_over = 0.0, None
        while True:
            first = left_over or self._jobs.get()
            if first is None:
                return
            batch, left_over, last = self._gather(first, max_wait)
            max_wait = self._max_wait if len(batch) > 1 else 0.0
            self._answer(batch)
            if last:
                return

    def _gather(
        self, first: Job[Item, Result], max_wait: float
    ) -> tuple[list[Job[Item, Result]], Job[Item, Result] | None, bool]:
        """The jobs of one batch, a job that did not fit any more, and whether the end of the queue was seen."""
        batch, weight, deadline = [first], first.weight, time.monotonic() + max_wait
        while weight < self._max_batch:
            try:
                wait = deadline - time.monotonic()
                job = self._jobs.get(timeout=wait) if wait > 0 else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return batch, None, True
            if weight + job.weight > self._max_batch:
                return batch, job, False
            batch.append(job)
            weight += job.weight
        return batch, None, False

    def _answer(self, batch: list[Job[Item, Result]]) -> None:
        try:
            running = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if running:
                self._observe(sum(job.weight for job in running))
                self._work_on(running)
        finally:
            with self._lock:
                self._waiting -= sum(job.weight for job in batch)

    def _work_on(self, jobs: list[Job[Item, Result]]) -> None:
        """Set each job's result. What fails together is tried one by one: no item may spoil another's answer."""
        try:
            results = list(zip(jobs, self._work([job.item for job in jobs]), strict=True))
        except Exception as error:  # the caller gets it; the thread must live on
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:
                for job in jobs:
                    self._work_on([job])
            return
        for job, result in results:
            job.future.set_result(result)
