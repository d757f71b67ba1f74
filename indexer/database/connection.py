"""Reach the database: the server of `LINEUP_DATABASE_URL`, or an embedded one under `LINEUP_HOME`."""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg.abc import PQGen
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError

import migrations
from indexer.database.embedded import EmbeddedFailure, EmbeddedServer
from indexer.settings import Settings, SettingsError

OLDEST_SERVER = 14
# Any constant; whoever holds this advisory lock may change the schema.
MIGRATION_LOCK = 0x11_E0_B0
LOCK_SECONDS = 30
"""Longest wait for a lock. Ours are held for a tenth of a second: what holds one longer is a transaction left open."""
KEPT_CONNECTIONS = 4
"""Connections that stay open while nobody uses them."""
POOL_SECONDS = 10
"""Longest wait for one of the pool's connections."""
CONNECTION = {
    "application_name": "lineup",
    "client_encoding": "utf8",
    "connect_timeout": "10",
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""libpq's parameters, where the URL has no others: a server that vanishes without a word is given up in 30 seconds."""
PROMPT_SECONDS = 10.0
"""Longest wait for the answer to what costs the server nothing: what a connection begins with, and the pool's ping."""
ANSWER_SECONDS = 5.0
"""Longest wait for an answer beyond the time after which the server ends the statement by itself."""
Result = TypeVar("Result")


class DatabaseUnreachable(RuntimeError):
    """No connection; the message is one line and names the setting to look at."""


class DatabaseBehind(RuntimeError):
    """The database has another schema revision than this code; the message names the command."""


class AnsweringConnection(psycopg.Connection[Any]):
    """Gives up where no answer comes: no keepalive notices a proxy that holds a connection and no longer forwards it.

    Attributes:
        patience: Longest wait for one answer, seconds; None waits for ever.
    """

    patience: float | None = PROMPT_SECONDS

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        """The outcome of one exchange with the server, as libpq's generators drive it.

        Raises:
            psycopg.OperationalError: It took too long, and the connection is closed; or it failed.
        """
        patience, start = self.patience if timeout is None else None, time.monotonic()
        try:
            return super().wait(gen, interval, timeout if patience is None else patience)
        except SystemExit:  # of SIGTERM: amid an answer no other call is taken, whose error would hide this one
            self.close()
            raise
        except psycopg.OperationalError as error:
            if patience is None or time.monotonic() - start < patience:
                raise
            self.close()
            raise psycopg.OperationalError(f"no answer for {patience:g} seconds") from error


def dedicated(engine: Engine, purpose: str) -> AnsweringConnection:
    """A connection beside the pool, for listening and locks: one from the pool would be handed on. It commits at once.

    Args:
        engine: Where to.
        purpose: What `pg_stat_activity` calls it.

    Raises:
        psycopg.OperationalError: The database cannot be reached.
    """
    arguments, options = engine.dialect.create_connect_args(engine.url)
    options.update(autocommit=True, application_name=f"{options['application_name']} {purpose}")
    return AnsweringConnection.connect(*arguments, **options)


def connect(settings: Settings, *, check: bool = True, statement_seconds: int = 0) -> Engine:
    """An engine on a database that answers; without `database_url` the embedded server is started and migrated.

    Args:
        settings: Where the database is.
        check: Refuse a database whose schema is not this code's (`lineup index migrate` itself does not).
        statement_seconds: After which the server ends a statement, and a connection without an answer is given up
            soon; 0 leaves that to the server.

    Raises:
        SettingsError: `database_url` cannot be read.
        DatabaseUnreachable: Nothing usable answers there.
        DatabaseBehind: Its schema is another one.
    """
    if settings.database_url is None:
        try:
            url = EmbeddedServer(settings.home).start()
        except EmbeddedFailure as error:
            raise DatabaseUnreachable(str(error)) from error
    else:
        url = read_url(settings.database_url)
    engine = create_engine(
        url.set(query={**CONNECTION, **url.query}),
        pool_pre_ping=True,
        pool_size=KEPT_CONNECTIONS,
        max_overflow=settings.database_connections - KEPT_CONNECTIONS,
        pool_timeout=POOL_SECONDS,
    )
    # Whoever used a connection that broke off says so; the pool would add a traceback as it takes it back.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    event.listen(engine, "do_connect", _open)
    event.listen(engine, "connect", partial(_limit_waiting, statement_seconds))
    try:
        _make_ready(engine, settings.database_url is None, check)  # first: no limit for migrating
    except DBAPIError as error:
        engine.dispose()
        reason = " ".join(str(error.orig).split())
        raise DatabaseUnreachable(f"no database at {address(url)} ({reason}): look at LINEUP_DATABASE_URL") from error
    except (DatabaseUnreachable, DatabaseBehind):
        engine.dispose()
        raise
    patience = statement_seconds + ANSWER_SECONDS if statement_seconds else None
    event.listen(engine, "checkout", lambda connection, *_: setattr(connection, "patience", patience))
    event.listen(engine, "checkin", _ping_promptly)
    return engine


def read_url(text: str) -> URL:
    """A `database_url`, for this driver.

    Raises:
        SettingsError: It cannot be read. The message shows nothing of it, for any part may hold the password.
    """
    try:
        url = make_url(text).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError):  # no URL, or a port that is no number
        url = None
    if url is None or "@" in (url.host or ""):
        form = "postgresql://user:password@host:5432/name, where a password has %40 for @"
        raise SettingsError(f"LINEUP_DATABASE_URL is wrong: not a URL like {form}")
    return url


def address(url: URL) -> str:
    """A URL that may be shown: no password, and of the parameters, some of which are passwords too, only the place."""
    place = {name: value for name, value in url.query.items() if name in ("host", "port")}
    return url.set(query=place).render_as_string(hide_password=True)


def _open(_: object, __: object, arguments: list[Any], options: dict[str, Any]) -> AnsweringConnection:
    return AnsweringConnection.connect(*arguments, **options)


def _ping_promptly(connection: AnsweringConnection | None, _: object) -> None:
    if connection is not None:
        connection.patience = AnsweringConnection.patience


def _limit_waiting(statement_seconds: int, connection: AnsweringConnection, _: object) -> None:
    connection.execute(f"set lock_timeout = '{LOCK_SECONDS}s'")
    if statement_seconds:
        connection.execute(f"set statement_timeout = '{statement_seconds}s'")
    connection.commit()
    connection.patience = None


def _make_ready(engine: Engine, embedded: bool, check: bool) -> None:
    with engine.connect() as connection:
        version = int(connection.scalar(text("show server_version_num")) or 0) // 10_000
        encoding = connection.scalar(text("show server_encoding"))
        current = schema_revision(connection)
    if version < OLDEST_SERVER:
        raise DatabaseUnreachable(f"LINEUP_DATABASE_URL is PostgreSQL {version}; {OLDEST_SERVER} or newer is needed")
    if encoding != "UTF8":
        raise DatabaseUnreachable(
            f"the database of LINEUP_DATABASE_URL has the encoding {encoding}, where names need UTF8: "
            "make one by createdb --encoding=UTF8 --template=template0 NAME"
        )
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    if current == head:
        return
    older = current is None or current in _lineage("heads")
    if embedded and older:
        migrate(engine)
    elif check and older:
        raise DatabaseBehind(
            f"the database is at schema {current or 'none'}, this version needs {head}: run lineup index migrate"
        )
    elif check:
        raise DatabaseBehind(f"the database is at schema {current}, which this version does not know: update Lineup")


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to `revision`, up or down, in one transaction; several processes may try at once."""
    config = alembic_config()
    with engine.begin() as connection:
        connection.execute(text("set local statement_timeout = 0"))
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        config.attributes["connection"] = connection
        current = schema_revision(connection)
        downward = revision == "base" or (current is not None and revision in _lineage(current))
        (command.downgrade if downward else command.upgrade)(config, revision)


def stop(settings: Settings) -> bool:
    """Stop the embedded server of this home, whoever uses it; False where none runs."""
    return EmbeddedServer(settings.home).stop()


def schema_revision(connection: Connection) -> str | None:
    """The schema revision of this database; None where Lineup has no tables yet."""
    return MigrationContext.configure(connection).get_current_revision()


def alembic_config() -> Config:
    """Where the migrations are; `attributes["connection"]` is what they run on."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    return config


def _lineage(revision: str) -> set[str]:
    """A revision and all that it builds on."""
    scripts = ScriptDirectory.from_config(alembic_config())
    return {script.revision for script in scripts.iterate_revisions(revision, "base")}
