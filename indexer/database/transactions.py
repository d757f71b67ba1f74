"""What every part of the store builds on: short transactions that are tried again when Postgres says so."""

from collections.abc import Callable
from typing import TypeVar

import psycopg
from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import DBAPIError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

Result = TypeVar("Result")

# Notifications say "<checkpoint id> <revision>"; whoever follows an index listens here.
CHANNEL = "lineup"


class PassingConflict(RuntimeError):
    """Someone else's change came between two steps of a transaction; it has to start again."""


def is_passing(error: BaseException) -> bool:
    """Whether a transaction failed only because of what others did at that moment."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(cause, PassingConflict | psycopg.errors.DeadlockDetected | psycopg.errors.SerializationFailure)


class Rows:
    """Rows of one database, reached through one engine (which holds the pool of connections)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def transaction(self, work: Callable[[Connection], Result]) -> Result:
        """Run `work` in one transaction and commit; again, from the start, after a deadlock or a serialisation failure.

        Raises:
            sqlalchemy.exc.DBAPIError: Any other failure, or the eighth of these.
        """
        attempts = Retrying(
            retry=retry_if_exception(is_passing),
            stop=stop_after_attempt(8),
            wait=wait_random_exponential(multiplier=0.02, max=1),
            reraise=True,
        )
        result: Result = attempts(self._once, work)
        return result

    def _once(self, work: Callable[[Connection], Result]) -> Result:
        with self.engine.begin() as connection:
            return work(connection)


def notify(connection: Connection, message: str) -> None:
    """Tell whoever listens, when this transaction commits."""
    connection.execute(select(func.pg_notify(CHANNEL, message)))
