"""Keep an index equal to the rows in Postgres, whoever writes them."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import psycopg
from sqlalchemy.exc import SQLAlchemyError

from indexer.database.connection import dedicated
from indexer.database.embedded import EmbeddedFailure, EmbeddedServer
from indexer.database.transactions import CHANNEL
from indexer.index.index import Contents, Index, Neighbours
from indexer.memory_copy import MemoryCopy
from indexer.milvus_copy import MilvusCopy
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.changes import Position
from indexer.store.checkpoints import Checkpoint
from trainer.heads.vote import depths

log = logging.getLogger(__name__)

POLL = 1.0
"""Seconds after which the database is asked even when it has not called."""
LOOK = 0.1
"""Seconds between looks at whether to end, while the database does not call."""
AWAY = (SQLAlchemyError, psycopg.Error, OSError)
"""What a database raises that cannot be reached or breaks off."""


class Neighbour(NamedTuple):
    """A reference near a query: `label` 0 real or 1 fake, `similarity` cosine, -1..1."""

    id: int
    label: int
    generator: str | None
    source: str
    similarity: float


class Copy(Protocol):
    """The rows of one checkpoint as an index.

    `load` and `catch_up` raise what the database and the index raise, and return whether the index has everything that
    was written when they began: false where another process has not brought it there yet.
    """

    @property
    def index(self) -> Index:
        """The index; a reload replaces it, so ask for it anew each time."""
        ...

    @property
    def position(self) -> Position:
        """Where the index is complete up to in the history of the store."""
        ...

    @property
    def source_names(self) -> dict[int, str]:
        """Names by the source numbers of the index."""
        ...

    def number(self, source: str) -> int:
        """The number of a source; -2, which none has, for one that is not known."""
        ...

    @property
    def saved_revision(self) -> int | None:
        """Revision that the next start begins from; None where it reads everything."""
        ...

    @property
    def fault(self) -> str | None:
        """What is wrong with what the next start begins from, as one line; None where nothing is."""
        ...

    @property
    def engine_away(self) -> bool:
        """Whether the index is in a search engine that does not answer."""
        ...

    def contents(self) -> Contents:
        """A copy of everything in the index."""
        ...

    def load(self, *, anew: bool, on_rows: Callable[[int], None]) -> bool:
        """Make the index complete; `anew` trusts nothing but the rows, `on_rows` is told how many each page brought."""
        ...

    def catch_up(self) -> bool:
        """Bring the index to the latest revision. After a failure, the next call goes on from there."""
        ...

    def save(self) -> None:
        """Keep what makes the next start quick, where there is such a thing."""
        ...

    def try_to_save(self) -> None:
        """`save`, where that can be done; a warning says otherwise, for nothing is lost."""
        ...

    def keep(self, end: threading.Event, poll: float) -> None:
        """Work in the background until the end, looking every `poll` seconds."""
        ...


class Follower:
    """The index of one checkpoint, loaded, then kept up to date, with the names that go with it. Thread safe.

    Attributes:
        copy: The index and what keeps it.
        active: The store's active checkpoint, which may be another one than is followed here.
        degraded: Whether following failed last time, mostly for want of the database; searches go on from memory.
        away: Whether the index is behind for want of what all processes share: the database, or a search engine.
        generator_names: Names by id.

    Args:
        settings: They say where the index is.
        store: The rows.
        checkpoint_id: Whose embeddings.
        dim: Their length.
    """

    def __init__(self, settings: Settings, store: Store, checkpoint_id: str, dim: int) -> None:
        self.settings, self.store, self.checkpoint_id, self.dim = settings, store, checkpoint_id, dim
        self.copy = _copy(settings, store, checkpoint_id, dim)
        self.active: Checkpoint | None = None
        self.degraded = self.away = False
        self.generator_names: dict[int, str] = {}
        self._complete_at = time.monotonic()
        self._warned: set[str] = set()  # of what fails again and again, since the database was last there
        self._following = threading.Lock()
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def index(self) -> Index:
        """The index; a reload replaces it, so ask for it anew each time."""
        return self.copy.index

    @property
    def position(self) -> Position:
        """Where the index is complete up to in the history of the store."""
        return self.copy.position

    @property
    def source_names(self) -> dict[int, str]:
        """Names by the source numbers of the index."""
        return self.copy.source_names

    @property
    def revision(self) -> int:
        """The store's revision up to which the index is complete."""
        return self.position.revision

    @property
    def lag(self) -> float:
        """Seconds since the index was last known to be complete."""
        return time.monotonic() - self._complete_at

    @property
    def engine_away(self) -> bool:
        """Whether the index is in a search engine that does not answer."""
        return self.copy.engine_away

    @property
    def saved_revision(self) -> int | None:
        """Revision of the snapshot as it was read or written here; None where there is no good one."""
        return self.copy.saved_revision

    def load(self, *, anew: bool = False, on_rows: Callable[[int], None] = lambda rows: None) -> int:
        """Make the index complete, from what was kept of it and the rows since; returns the revision reached.

        Args:
            anew: Read all rows: a snapshot is replaced by `save`, a search engine loads another collection.
            on_rows: Called with how many rows have come in since the last time.

        Raises:
            sqlalchemy.exc.DBAPIError: The database cannot be reached.
            UnknownCheckpoint: The store has never heard of the checkpoint.
        """
        with self._following:
            return self._catch_up(lambda: self.copy.load(anew=anew, on_rows=on_rows))

    def catch_up(self) -> int:
        """Apply what was written since; returns the revision reached.

        Raises:
            sqlalchemy.exc.DBAPIError: The database cannot be reached; searches go on, the next call goes on from here.
        """
        with self._following:
            try:
                return self._catch_up(self.copy.catch_up)
            except AWAY as error:
                self._lose(error)
                raise

    def save(self) -> None:
        """Write the snapshot if it is out of date; commands that change references end with it.

        Raises:
            OSError: It cannot be written. Nothing is lost: the next start reads Postgres instead.
        """
        self.copy.save()

    def try_to_save(self) -> None:
        """`save`, where it can be written; a warning says otherwise, for nothing is lost."""
        self.copy.try_to_save()

    def start(self) -> None:
        """Follow in the background: on notification, and each second anyway. Call `load` before."""
        for work in (self._follow, self._keep):
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
        """The k nearest of each of q raw vectors (q, dim), see `Index.search`; filters by name.

        Generators' names match in upper and lower case. A name that is not known finds nothing.
        """
        neighbours = self.index.search(
            vectors,
            k,
            label=label,
            generator=_generator(self.generator_names, generator),
            source=None if source is None else self.copy.number(source),
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
        """The real and the fake references that vote: as `Index.search_both`, as deep as `depths` says for k.

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

    def _catch_up(self, work: Callable[[], bool]) -> int:
        """What `work` reaches, with the names that the store has by then."""
        start = time.monotonic()
        complete = work()
        self.generator_names, self.active = self.store.generators.names(), self.store.checkpoints.active()
        if self.degraded:
            log.warning("the database is back")
            self._warned.clear()
        self.degraded, self.away = False, not complete
        if complete:
            self._complete_at = start
        return self.revision

    def _keep(self) -> None:
        self.copy.keep(self._end, POLL)

    def _lose(self, error: Exception) -> None:
        if not self.degraded:
            log.warning("the database is away, searches go on from memory: %s", " ".join(str(error).split()))
        self.degraded = self.away = True

    def _follow(self) -> None:
        while not self._end.is_set():
            try:
                with dedicated(self.store.engine, "follower") as connection:
                    connection.execute(f"listen {CHANNEL}")  # before catching up, so that nothing falls between
                    while not self._end.is_set():
                        self.catch_up()
                        self._await_call(connection)
            except AWAY as error:
                self._lose(error)
                self._end.wait(POLL)
                self._revive()
            except Exception:  # a fault of ours must not end the following
                if not self.degraded:
                    log.exception("following failed, searches go on from memory while it is tried again")
                self.degraded, self.away = True, False
                self._end.wait(POLL)

    def _await_call(self, connection: psycopg.Connection[Any]) -> None:
        """Until the database calls, `POLL` seconds have passed, or following ends."""
        deadline = time.monotonic() + POLL
        while not self._end.is_set() and (left := deadline - time.monotonic()) > 0:
            if next(connection.notifies(timeout=min(left, LOOK), stop_after=1), None) is not None:
                return

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


def _copy(settings: Settings, store: Store, checkpoint_id: str, dim: int) -> Copy:
    """The index where LINEUP_INDEX says that it is."""
    if settings.index is None:
        return MemoryCopy(settings, store, checkpoint_id, dim)
    return MilvusCopy(settings.index, store, checkpoint_id, dim)


def _generator(names: dict[int, str], name: str | None) -> int | None:
    """The id of a generator, by its name in any case; -2, which none has, for one that is not known; None for None."""
    if name is None:
        return None
    return next((id for id, known in names.items() if known.casefold() == name.casefold()), -2)
