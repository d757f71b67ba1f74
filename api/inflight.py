"""The budget of bytes that the bodies of all requests in work share, and what each request has of it."""

import math
import threading
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

from api.schemas.problems import ApiError


class Budget:
    """Bytes of bodies that are held. Threads may share it.

    Args:
        most: LINEUP_MAX_INFLIGHT_BYTES.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held, self.lock = most, 0, threading.Lock()


class Reservation:
    """What one request has of the budget, until it and all work that was handed to threads for it have ended.

    A request that is out of time ends before its threads, which cannot be stopped and go on holding its uploads.

    Args:
        budget: Of all requests.
        deadline: When the request has no time left, by `time.monotonic`.
    """

    def __init__(self, budget: Budget, deadline: float = math.inf) -> None:
        self.size, self.deadline, self._budget, self._holders = 0, deadline, budget, 1

    def grow(self, size: int) -> None:
        """Hold so many bytes in all, or more.

        Raises:
            ApiError: not-ready, where that exceeds the budget.
        """
        budget = self._budget
        with budget.lock:
            needed = max(0, size - self.size)
            if needed and budget.held + needed > budget.most:
                room = f"{budget.most:,} are allowed (LINEUP_MAX_INFLIGHT_BYTES)"
                detail = f"requests in work hold {budget.held:,} bytes, {needed:,} more came, and {room}"
                raise ApiError("not-ready", f"{detail}; try again shortly", retry_after=1)
            budget.held += needed
            self.size += needed

    def hold_until(self, future: Future[Any]) -> None:
        """Count work in a thread as a holder until it has ended or was cancelled before it began."""
        with self._budget.lock:
            self._holders += 1
        future.add_done_callback(lambda _: self.release())

    def release(self) -> None:
        """One holder has ended; the last one gives the bytes back."""
        with self._budget.lock:
            self._holders -= 1
            if not self._holders:
                self._budget.held -= self.size


reservation_in_use: ContextVar[Reservation | None] = ContextVar("reservation_in_use", default=None)
"""Of the request that the current task, or the thread, works for."""


def deadline_in_use() -> float:
    """When the request that is worked for has no time left, by `time.monotonic`; infinite outside of requests."""
    reservation = reservation_in_use.get()
    return math.inf if reservation is None else reservation.deadline
