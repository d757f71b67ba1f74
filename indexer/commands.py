"""What every command of the indexer shares: options, expected failures, the store it opens, the snapshot it leaves."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import psycopg
import typer
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from indexer.database.connection import DatabaseBehind, DatabaseUnreachable, connect
from indexer.database.embedded import EmbeddedFailure
from indexer.follower import Follower
from indexer.index.milvus import EngineAway
from indexer.ingest.exchange import BadExport
from indexer.measure import NothingToMeasure
from indexer.measure.calibrate import recalibrate
from indexer.measure.discovery import CandidateEnrolled, UnknownCandidate
from indexer.settings import Settings, SettingsError
from indexer.shipper import AlreadyRebuilding
from indexer.store import Store
from indexer.store.blobs import BlobsAway
from indexer.store.checkpoints import Checkpoint, CheckpointSwitched, UnknownCheckpoint
from indexer.store.generators import BadGeneratorName, GeneratorExists, UnknownGenerator
from indexer.store.writing import BadVector
from trainer.data.entry import DatasetError
from trainer.model.checkpoint import CheckpointError, read_id

REFUSALS = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.ReadOnlySqlTransaction,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
)
"""What a database raises that is another one than was meant, or does not let its user in."""
MEASURING_LIBRARIES = ("cv2", "sklearn")
"""Libraries of the extra `train` that `evaluate`, `audit` and `discover` use."""

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
CheckpointFolder = Annotated[Path | None, typer.Option("--checkpoint", help="Checkpoint folder.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]


@contextmanager
def expected_failures() -> Iterator[None]:
    """What can go wrong without a fault of the program ends as one line on stderr and exit code 1."""
    try:
        yield
    except BrokenPipeError:  # of stdout, whose reader has had enough: no failure of ours
        raise
    except (DBAPIError, psycopg.Error) as error:
        reason = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(reason, psycopg.errors.LockNotAvailable):
            fail(f"another transaction holds a lock ({reason}): end it (see pg_stat_activity), then run this again")
        if isinstance(reason, psycopg.errors.DiskFull):
            fail(f"the database has no room left ({reason}): make room on its disk, then run the command again")
        if isinstance(reason, psycopg.OperationalError):
            fail(f"the database stopped answering ({reason}); what was written stays, run the command again")
        if isinstance(reason, REFUSALS):
            fail(f"the database refuses ({reason}): look at LINEUP_DATABASE_URL and the rights of its user")
        fail(f"the database cannot do that: {reason}")
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in MEASURING_LIBRARIES:
            raise
        fail(f'this command needs {library}, which is not installed: pip install "lineup[train]"')
    except (
        SettingsError,
        DatabaseUnreachable,
        DatabaseBehind,
        EmbeddedFailure,
        DatasetError,
        CheckpointError,
        BadExport,
        NothingToMeasure,
        BadGeneratorName,
        GeneratorExists,
        BadVector,
        AlreadyRebuilding,
        EngineAway,
        BlobsAway,
        UnknownGenerator,
        UnknownCheckpoint,
        UnknownCandidate,
        CandidateEnrolled,
        CheckpointSwitched,
        CommandError,
        OSError,
    ) as error:
        fail(str(error))


def fail(message: str, code: int = 1) -> NoReturn:
    """Say it in one line, and end: 1 failed, 2 wrong usage."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def opened(settings: Settings, *, check: bool = True) -> Iterator[Store]:
    """The store of these settings."""
    engine = connect(settings, check=check)
    try:
        yield Store(engine, settings.blobs)
    finally:
        engine.dispose()


def checkpoint_of(folder: Path, store: Store) -> Checkpoint:
    """What the store knows of the checkpoint in a folder.

    Raises:
        CheckpointError: The folder holds none.
        UnknownCheckpoint: Nothing was added with it.
    """
    return store.checkpoints.require(read_id(folder))


def serving_checkpoint(settings: Settings, store: Store) -> Checkpoint | None:
    """The checkpoint that the settings name; where they name none, or nothing was added with it, the active one."""
    if settings.checkpoint is not None:
        with suppress(CheckpointError, UnknownCheckpoint):
            return checkpoint_of(settings.checkpoint, store)
    return store.checkpoints.active()


def renew_snapshot(
    settings: Settings,
    store: Store,
    checkpoint_id: str,
    *,
    folder: Path | None = None,
    anew: bool = False,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Follower:
    """Write the snapshot and the calibration of the index as the rows are now, and return the index.

    Args:
        settings: Where it lies.
        store: The rows.
        checkpoint_id: Whose index.
        folder: See `recalibrate`.
        anew: Do not trust the snapshot that is there, and fail where none can be written.
        on_rows: See `Follower.load`.
    """
    follower = Follower(settings, store, checkpoint_id, store.checkpoints.require(checkpoint_id).dim)
    follower.load(anew=anew, on_rows=on_rows)
    if anew:
        follower.save()
    else:
        follower.try_to_save()  # the rows are committed: the command has done what it was to do
    recalibrate(settings, follower, folder)
    return follower
