"""A circuit breaker around the database: wait for it only so long, for a server that hangs is as good as away."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import psycopg
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from indexer.database.connection import DatabaseUnreachable

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

PROBE_SECONDS = 0.5
"""To wait for the answer to a probe."""


class DatabaseSlow(RuntimeError):
    """The database did not answer in time, or failed to a moment ago."""


DATABASE_AWAY = (
    *(DatabaseSlow, DatabaseUnreachable, OperationalError, InterfaceError, PoolTimeout),
    *(psycopg.OperationalError, psycopg.InterfaceError),
)
"""What asking the store raises while Postgres does not answer."""


def is_full(error: BaseException) -> bool:
    """Whether the database answers, and has no room left to write."""
    return isinstance(getattr(error, "orig", error), psycopg.errors.DiskFull)


def public_detail(error: BaseException) -> str:
    """What a caller who may be anybody is told of a failure: one line, and no SQL."""
    if is_full(error):
        return "the disk of the database is full"
    if isinstance(error, SQLAlchemyError | psycopg.Error | DatabaseSlow):
        away = isinstance(error, DATABASE_AWAY)
        return "the database does not answer" if away else "the database refused a request; the log says which"
    return " ".join(str(error).split())


class Breaker:
    """Runs calls to the store in threads of its own and gives up on them after a while.

    After a failure the database is not asked again for `pause` seconds, so that requests do not each wait in vain, and
    hanging calls stay fewer than `threads`. A call that takes too long is a failure of the database only where the
    probe is not answered either; else it concerns nobody but who asked.

    Args:
        probe: Asks the database something trivial; without one, every call that takes too long is a failure.
        seconds: To wait for one answer.
        pause: Seconds without asking after a failure.
        threads: Calls at the same time.
    """

    def __init__(
        self, probe: Callable[[], object] | None = None, *, seconds: float = 2.0, pause: float = 2.0, threads: int = 16
    ) -> None:
        self.seconds, self.pause = seconds, pause
        self._probe = probe
        self._prober = ThreadPoolExecutor(1, "probe")  # of its own: slow calls may hold all the other threads
        self._pool = ThreadPoolExecutor(threads, "database")
        self._free = threading.BoundedSemaphore(threads)
        self._resume = 0.0

    def ask(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns.

        Raises:
            DatabaseSlow: No answer in time, or none is awaited at the moment.
        """
        if time.monotonic() < self._resume:
            raise DatabaseSlow("the database failed a moment ago")
        if not self._free.acquire(timeout=self.seconds):
            raise self._slow()
        future = self._pool.submit(work, *args, **kwargs)
        future.add_done_callback(lambda _: self._free.release())
        try:
            return future.result(self.seconds)
        except TimeoutError:
            future.cancel()
            raise self._slow() from None
        except DATABASE_AWAY as error:
            if not is_full(error):  # it goes on answering what needs no room
                self._resume = time.monotonic() + self.pause
            raise

    def close(self) -> None:
        """Wait for no one: calls that hang end with the process or with the database's answer."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._prober.shutdown(wait=False, cancel_futures=True)

    def _slow(self) -> DatabaseSlow:
        if self._answers():
            log.warning("a call to the database is slow", extra={"waited": self.seconds})
        else:
            log.warning("the database is slow", extra={"waited": self.seconds, "asked_again_in": self.pause})
            self._resume = time.monotonic() + self.pause
        return DatabaseSlow(f"the database did not answer within {self.seconds:g} seconds")

    def _answers(self) -> bool:
        """Whether the probe is answered at once."""
        if self._probe is None:
            return False
        future = self._prober.submit(self._probe)
        try:
            future.result(PROBE_SECONDS)
        except Exception:  # late, or whatever the database says instead
            future.cancel()
            return False
        return True
