"""What every part of the store builds on: single reads, and short transactions that are repeated where others clash."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import psycopg
from sqlalchemy import Connection, Engine, Executable, RowMapping, Select, func, select
from sqlalchemy.exc import DBAPIError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

Result = TypeVar("Result")
Value = TypeVar("Value")

TRANSACTION_IMAGES = 1000
"""Images that one transaction adds or removes at most: it holds a lock that others wait for."""
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

    def read(self, query: Executable, values: Mapping[str, object] | None = None) -> Sequence[RowMapping]:
        """All rows of one statement, outside any transaction: its beginning and end would be two more round trips."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            return connection.execute(query, values).mappings().all()

    def read_one(self, query: Executable, values: Mapping[str, object] | None = None) -> RowMapping | None:
        """The first row of one statement; None where it has none."""
        return next(iter(self.read(query, values)), None)

    def read_value(self, query: Select[Value]) -> Value | None:
        """The one column of the first row; None where there is none."""
        row = self.read_one(query)
        return None if row is None else next(iter(row.values()))

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
