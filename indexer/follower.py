"""Keep a VectorIndex equal to the rows in Postgres, whoever writes them."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import psycopg
from sqlalchemy.exc import SQLAlchemyError

from indexer.database.connection import AnsweringConnection
from indexer.database.embedded import EmbeddedFailure, EmbeddedServer
from indexer.database.transactions import CHANNEL
from indexer.index.label_index import Neighbours
from indexer.index.snapshot import BadSnapshot
from indexer.index.vector_index import IndexChanged, VectorIndex
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.changes import Additions, Position
from indexer.store.checkpoints import Checkpoint
from trainer.heads.vote import depths

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds after which the database is asked even when it has not called."""
QUIET = 10.0
"""Seconds without a change before the snapshot is written, so that an enrolment is not written at each step."""
LATEST = 300.0
"""Seconds after which the snapshot is written even while changes go on."""
AWAY = (SQLAlchemyError, psycopg.Error, OSError)
"""What a database raises that cannot be reached or breaks off."""


class Neighbour(NamedTuple):
    """A reference near a query: `label` 0 real or 1 fake, `similarity` cosine, -1..1."""

    id: int
    label: int
    generator: str | None
    source: str
    similarity: float


class Follower:
    """The index of one checkpoint, loaded from its snapshot and Postgres, then kept up to date. Thread safe.

    Attributes:
        index: The index; a reload replaces it, so ask for it anew each time.
        position: Where the index is complete up to in the history of the store.
        active: The store's active checkpoint, which may be another one than is followed here.
        degraded: Whether following failed last time, mostly for want of the database; searches go on from memory.
        away: Whether it was for want of the database.
        generator_names: Names by id.
        source_names: Names by the source numbers of the index.

    Args:
        settings: For the home folder (snapshots) and the device.
        store: The rows.
        checkpoint_id: Whose embeddings.
        dim: Their length.
    """

    def __init__(self, settings: Settings, store: Store, checkpoint_id: str, dim: int) -> None:
        self.settings, self.store, self.checkpoint_id, self.dim = settings, store, checkpoint_id, dim
        self.index = VectorIndex(dim, settings.device)
        self.position = Position()
        self.active: Checkpoint | None = None
        self.degraded = self.away = False
        self.generator_names: dict[int, str] = {}
        self.source_names: dict[int, str] = {}
        self._store_id = ""
        self._begun = Position()  # further than `position` where applying ended half-way
        self._saved: tuple[str, Position] | None = None  # store and position of the snapshot on disk
        self._complete_at = time.monotonic()
        self._warned: set[str] = set()  # of what fails again and again, since it last went well
        self._following = threading.Lock()
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def revision(self) -> int:
        """The store's revision up to which the index is complete."""
        return self.position.revision

    @property
    def lag(self) -> float:
        """Seconds since the index was last known to be complete."""
        return time.monotonic() - self._complete_at

    @property
    def snapshot(self) -> Path:
        """The snapshot's file."""
        return self.settings.home / "index" / self._store_id / self.checkpoint_id / "snapshot"

    @property
    def saved_revision(self) -> int | None:
        """Revision of the snapshot as it was read or written here; None where there is no good one."""
        return None if self._saved is None else self._saved[1].revision

    def load(self, *, anew: bool = False) -> int:
        """Read the snapshot where it is good, then the rest from Postgres; returns the revision reached.

        Args:
            anew: Read everything from Postgres, and have `save` replace the snapshot.

        Raises:
            sqlalchemy.exc.DBAPIError: The database cannot be reached.
            UnknownCheckpoint: The store has never heard of the checkpoint.
        """
        with self._following:
            self._store_id = self.store.id()
            try:
                if anew:
                    raise BadSnapshot("so it was asked for")
                index, header = VectorIndex.load(self.snapshot, self.settings.device)
                self.position = self._begun = self._check(header, index)
                self.index, self.source_names = index, dict(enumerate(header["sources"]))
                self._saved = self._store_id, self.position
            except BadSnapshot as error:
                log.info("reading the index from the database: %s", error)
            return self._catch_up()

    def catch_up(self) -> int:
        """Apply what was written since; returns the revision reached.

        Raises:
            sqlalchemy.exc.DBAPIError: The database cannot be reached; searches go on, the next call goes on from here.
        """
        with self._following:
            try:
                return self._catch_up()
            except AWAY as error:
                self._lose(error)
                raise

    def save(self) -> None:
        """Write the snapshot if it is out of date; commands that change references end with it.

        Raises:
            OSError: It cannot be written. Nothing is lost: the next start reads Postgres instead.
        """
        with self._following:
            position, path, half_way = self.position, self.snapshot, self._begun != self.position
            header = {
                "store": self._store_id,
                "checkpoint": self.checkpoint_id,
                "revision": position.revision,
                "nonce": position.nonce and str(position.nonce),
                "sources": [self.source_names[number] for number in range(len(self.source_names))],
            }
            index = self.index
        if self._saved != (header["store"], position) and not half_way:
            index.save(path, header)
            self._saved = str(header["store"]), position
            self._warned.clear()

    def try_to_save(self) -> None:
        """`save`, where it can be written; a warning says otherwise, for nothing is lost."""
        try:
            self.save()
        except IndexChanged as error:
            log.debug("%s", error)
        except OSError as error:
            self._warn_once(f"the snapshot was not written, the next start reads the database: {error}")

    def start(self) -> None:
        """Follow in the background: on notification, and each second anyway. Call `load` before."""
        for work in (self._follow, self._keep_snapshot):
            self._threads.append(threading.Thread(target=work, name=f"follower{work.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """End the background threads, also one that makes lists; the snapshot is written where it is out of date."""
        self._end.set()
        for thread in self._threads:
            thread.join()
        self.try_to_save()

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        label: int | None = None,
        generator: str | None = None,
        source: str | None = None,
    ) -> list[list[Neighbour]]:
        """The k nearest of each of q raw vectors (q, dim), see `VectorIndex.search`; filters by name.

        Generators' names match in upper and lower case. A name that is not known finds nothing.
        """
        neighbours = self.index.search(
            vectors,
            k,
            label=label,
            generator=_number(self.generator_names, generator, str.casefold),
            source=_number(self.source_names, source, str),
        )
        return self.neighbours(neighbours)

    def voters(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        exclude_ids: np.ndarray | None = None,
        exclude_each: Sequence[np.ndarray] | None = None,
    ) -> tuple[Neighbours, Neighbours]:
        """The real and the fake references that vote: as `VectorIndex.search_both`, as deep as `depths` says for k.

        Args:
            vectors: Raw embeddings, shape (q, dim).
            k: Neighbours of the label that has fewer references.
            exclude_ids: Ids that no query must find, shape (m,).
            exclude_each: Ids that one query must not find though others may, q arrays of any length.
        """
        each_label = depths(k, *self.index.counts(exclude_ids))
        return self.index.search_both(vectors, each_label, exclude_ids=exclude_ids, exclude_each=exclude_each)

    def neighbours(self, arrays: Neighbours) -> list[list[Neighbour]]:
        """What arrays from the index say, with names; padding is left out."""
        generators, sources = self.generator_names, self.source_names
        columns = (arrays.ids, arrays.labels, arrays.generators, arrays.sources, arrays.similarities)
        return [
            [
                Neighbour(number, label, generators.get(generator), sources[source], similarity)
                for number, label, generator, source, similarity in zip(*row, strict=True)
                if number >= 0
            ]
            for row in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def _check(self, header: dict[str, Any], index: VectorIndex) -> Position:
        """Where a snapshot ends; one of something else, or of a history that the database has not had, is refused."""
        if (header["store"], header["checkpoint"], index.dim) != (self._store_id, self.checkpoint_id, self.dim):
            raise BadSnapshot(f"{self.snapshot} is of another store or checkpoint")
        if "nonce" not in header:
            raise BadSnapshot(f"{self.snapshot} was written by an earlier version")
        position = Position(header["revision"], header["nonce"] and UUID(header["nonce"]))
        _, stands = self.store.changes.position(self.checkpoint_id, position)
        if not stands:
            raise BadSnapshot(f"{self.snapshot} is of another history: the database was restored from a backup")
        return position

    def _catch_up(self) -> int:
        start = time.monotonic()
        store_id = self.store.id()
        # First: what commits later, or is restored meanwhile, is for the next time.
        target, stands = self.store.changes.position(self.checkpoint_id, self._begun)
        names, active = self.store.generators.names(), self.store.checkpoints.active()
        if store_id != self._store_id or not stands:
            log.warning("the database is another one, or was restored from a backup: loading all of it")
            index = VectorIndex(self.dim, self.settings.device)
            self._apply(index, 0, target.revision)
            self.index, self._store_id = index, store_id
        elif target != self.position:
            self._begun = target
            self._apply(self.index, self.revision, target.revision)
        if self.degraded:
            log.warning("the database is back")
            self._warned.clear()
        self.position = self._begun = target
        self.generator_names, self.active = names, active
        self._complete_at, self.degraded, self.away = start, False, False
        return target.revision

    def _apply(self, index: VectorIndex, seen: int, target: int) -> None:
        """Bring an index from one revision to another. Repeating it after a failure half-way does no harm."""
        numbers = {name: number for number, name in self.source_names.items()}
        for change in self.store.changes.between(self.checkpoint_id, seen, target):
            if not isinstance(change, Additions):
                index.remove(change.ids)
                continue
            for name in sorted(set(change.sources) - numbers.keys()):
                numbers[name] = len(numbers)
                self.source_names = self.source_names | {numbers[name]: name}  # replaced: a search may be reading it
            index.remove(change.ids)  # of an earlier try, or embedded anew
            sources = np.array([numbers[name] for name in change.sources])
            index.add(change.ids, change.vectors, change.labels, change.generators, sources)

    def _lose(self, error: Exception) -> None:
        if not self.degraded:
            log.warning("the database is away, searches go on from memory: %s", " ".join(str(error).split()))
        self.degraded = self.away = True

    def _follow(self) -> None:
        while not self._end.is_set():
            try:
                with self._listen() as connection:  # before catching up, so that nothing falls between
                    while not self._end.is_set():
                        self.catch_up()
                        next(connection.notifies(timeout=POLL, stop_after=1), None)
            except AWAY as error:
                self._lose(error)
                self._end.wait(POLL)
                self._revive()
            except Exception:  # a fault of ours must not end the following
                if not self.degraded:
                    log.exception("following failed, searches go on from memory while it is tried again")
                self.degraded, self.away = True, False
                self._end.wait(POLL)

    def _listen(self) -> AnsweringConnection:
        """A connection of our own: one from the pool would be handed on, and must not be in a transaction."""
        engine = self.store.engine
        arguments, options = engine.dialect.create_connect_args(engine.url)
        options.update(autocommit=True, application_name=f"{options['application_name']} follower")
        connection = AnsweringConnection.connect(*arguments, **options)
        connection.execute(f"listen {CHANNEL}")
        return connection

    def _revive(self) -> None:
        """Start the embedded server again after a crash; one that was stopped stays down."""
        server = EmbeddedServer(self.settings.home)
        if self.settings.database_url is None and not server.was_stopped():
            try:
                server.start()
            except EmbeddedFailure as error:
                self._warn_once(str(error))

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            log.warning("%s", message)
        self._warned.add(message)

    def _keep_snapshot(self) -> None:
        revision, changed, stale, may_grow = self.revision, time.monotonic(), time.monotonic(), True
        while not self._end.wait(POLL):
            now = time.monotonic()
            if self.revision != revision:
                revision, changed = self.revision, now
            quiet = now - changed >= QUIET
            try:
                if quiet and may_grow and self.index.grow(self._end.is_set):
                    log.info("searching %s from now on, recall %.4f", self.index.kind, self.index.recall)
                    self._saved = None
            except Exception:  # for want of memory, say; searches go on as they were, and so must the snapshots
                log.exception("the index could not be given inverted lists, nor is it tried again")
                may_grow = False
            if self._saved == (self._store_id, self.position):
                stale = now
            elif quiet or now - stale >= LATEST:
                self.try_to_save()
                changed = stale = now  # one that failed is not tried again at once


def _number(names: dict[int, str], name: str | None, key: Callable[[str], str]) -> int | None:
    """The number of a name, -2 (which nothing has) for one that is not known; None for None."""
    if name is None:
        return None
    return next((number for number, known in names.items() if key(known) == key(name)), -2)
