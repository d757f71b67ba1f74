"""Refuses work at once whose turn would come too late, instead of letting it wait for that."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from api.schemas.problems import ApiError

NEWEST = 0.2
"""Share of the newest work in the mean by which the next is judged."""
LEAST, LARGEST = 0.2, 10.0
"""Bounds of what one work counts there, so that files which are made to be refused at once, or never to end, say little
about the others."""


class Admission:
    """What is in work or waits for it, and how long that will take. Threads may share it.

    Args:
        places: How many are worked on at once.
        most: How many may be in work or wait.
        things: What they are.
    """

    def __init__(self, places: int, most: int, things: str) -> None:
        self.places, self.most, self.things = places, most, things
        self.inside, self.expected, self.slowness = 0, 0.0, 1.0
        self._lock = threading.Lock()

    @property
    def wait(self) -> float:
        """Seconds after which one that comes now would have its turn."""
        return self.slowness * self.expected / self.places if self.inside >= self.places else 0.0

    @property
    def full(self) -> bool:
        """Whether no more are let in, however much time they have."""
        return self.inside >= self.most

    @contextmanager
    def admitted(self, seconds: float, deadline: float) -> Iterator[None]:
        """Be in work, or wait for it.

        Args:
            seconds: How long the work takes by experience; how much longer it takes here is learnt.
            deadline: When it must have ended, by `time.monotonic`.

        Raises:
            ApiError: not-ready, where so many wait that half of the time would pass before its turn, or too many.
        """
        with self._lock:
            start, wait = time.monotonic(), self.wait
            if self.full or wait > (deadline - start) / 2:
                detail = f"{self.inside} {self.things} are in work or wait, which takes about {wait:.0f} s"
                raise ApiError("not-ready", f"{detail}; try again then", retry_after=wait)
            usual = wait / self.slowness + seconds  # by now's slowness: others change it before this one ends
            self.inside += 1
            self.expected += seconds
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1
                self.expected -= seconds
                slowness = min(max((time.monotonic() - start) / usual, LEAST), LARGEST)
                self.slowness += NEWEST * (slowness - self.slowness)
