"""Reach the database: the server of `LINEUP_DATABASE_URL`, or an embedded one under `LINEUP_HOME`."""

from sqlalchemy import Engine

from indexer.settings import Settings


class DatabaseUnreachable(RuntimeError):
    """No connection; the message is one line and names the setting to look at."""


class DatabaseBehind(RuntimeError):
    """The database has another schema revision than this code; the message names the command."""


def connect(settings: Settings, *, check: bool = True) -> Engine:
    """An engine on a database that answers; without `database_url` the embedded server is started and migrated.

    Args:
        settings: Where the database is.
        check: Refuse a database whose schema is not this code's (`indexer migrate` itself does not).

    Raises:
        DatabaseUnreachable: Nothing answers there.
        DatabaseBehind: Its schema is another one.
    """
    raise NotImplementedError


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to `revision`, up or down; several processes may try at once."""
    raise NotImplementedError


def stop(settings: Settings) -> bool:
    """Stop the embedded server of this home, whoever uses it; False where none runs."""
    raise NotImplementedError
