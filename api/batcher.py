"""One thread that computes for many callers, so that concurrent requests share a forward pass."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np


class BatcherFull(RuntimeError):
    """More rows wait than the batcher takes; try again shortly."""


@dataclass(frozen=True, slots=True)
class Job:
    rows: np.ndarray
    future: Future[np.ndarray] = field(default_factory=Future)


class Batcher:
    """Collects stacks of rows from any thread and computes them together.

    An idle batcher computes at once. Only after a batch of several callers, thus under load, does it wait for more,
    and never longer than `max_wait`: a lone request pays nothing, and no request pays more than the bound.

    Args:
        compute: Rows (n, ...) -> results (n, d); each row's result must not depend on the others. Called from one
            thread only.
        max_batch: Rows after which no further caller joins; a larger stack is computed alone, in parts.
        max_wait: Seconds to wait for more callers under load.
        capacity: Once so many rows wait, `submit` refuses.
        observe: Told the number of rows of each batch.
    """

    def __init__(
        self,
        compute: Callable[[np.ndarray], np.ndarray],
        *,
        max_batch: int = 32,
        max_wait: float = 0.004,
        capacity: int = 512,
        observe: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._compute = compute
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._capacity = capacity
        self._observe = observe
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows submitted and not yet answered."""
        return self._waiting

    def submit(self, rows: np.ndarray) -> Future[np.ndarray]:
        """Queue rows (n, ...); the future gives (n, d), or what `compute` raised.

        Raises:
            BatcherFull: Too many rows wait already, or the batcher is closed.
        """
        job = Job(rows)
        with self._lock:
            if self._closed:
                raise BatcherFull("the server is shutting down")
            if self._waiting >= self._capacity:
                raise BatcherFull(f"{self._waiting} images wait for the model already; try again shortly")
            self._waiting += len(rows)
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
        patience, left_over = 0.0, None
        while True:
            first = left_over or self._jobs.get()
            if first is None:
                return
            batch, left_over, last = self._gather(first, patience)
            patience = self._max_wait if len(batch) > 1 else 0.0
            self._answer(batch)
            if last:
                return

    def _gather(self, first: Job, patience: float) -> tuple[list[Job], Job | None, bool]:
        """The jobs of one batch, a job that did not fit any more, and whether the end of the queue was seen."""
        batch, rows, deadline = [first], len(first.rows), time.monotonic() + patience
        while rows < self._max_batch:
            try:
                wait = deadline - time.monotonic()
                job = self._jobs.get(timeout=wait) if wait > 0 else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return batch, None, True
            if rows + len(job.rows) > self._max_batch:
                return batch, job, False
            batch.append(job)
            rows += len(job.rows)
        return batch, None, False

    def _answer(self, batch: list[Job]) -> None:
        rows = sum(len(job.rows) for job in batch)
        try:
            running = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if running:
                self._observe(sum(len(job.rows) for job in running))
                results = self._compute(np.concatenate([job.rows for job in running]))
                ends = np.cumsum([len(job.rows) for job in running])
                for job, result in zip(running, np.split(results, ends[:-1]), strict=True):
                    job.future.set_result(result)
        except Exception as error:  # the callers get it; the thread must live on
            for job in batch:
                if not job.future.done():
                    job.future.set_exception(error)
        finally:
            with self._lock:
                self._waiting -= rows
