"""Bring the rows of a checkpoint into the search engine: one process at a time, in the order of their revisions.

Additions are upserts and removals are deletions by primary key, so that repeating what was half done does no harm. The
order of one revision: the collection's mark says what is begun, the rows follow, the mark is written again, and its
time goes to Postgres, from where every process takes what its searches ask for.

Whoever holds an advisory lock of Postgres leads, and publishes over the very connection that holds it, which is asked
before each batch of rows: a process that has lost its lock ends the batch that it is at, and publishes nothing.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from typing import Any, LiteralString
from uuid import UUID

import numpy as np
import psycopg

from indexer.database.connection import AnsweringConnection, dedicated
from indexer.database.transactions import CHANNEL
from indexer.index.milvus import CALL_SECONDS, ROWS, EngineAway, Milvus
from indexer.store import Store
from indexer.store.changes import Additions, Position
from indexer.store.shipments import Shipment, hold, publish, switch

log = logging.getLogger(__name__)

GRACE = 3.0
"""Seconds for which a collection outlives the switch to another: every process has heard of it by then."""


SETTLED = 2 * CALL_SECONDS
"""Seconds after a takeover by which no write of an earlier leader is under way: it asks for its lock before each batch,
which is one upsert for each label."""
RECENT = 10_000
"""Removals that a new leader repeats, at once and when `SETTLED` has passed: an earlier one may have read such a row
before it was removed, and have written it afterwards."""
NONE = np.empty(0, np.int64)


class AlreadyRebuilding(RuntimeError):
    """Another process is loading a new collection."""


class Ended(RuntimeError):
    """This process ends before everything is shipped; another goes on, or this one when it starts again."""


class Shipper:
    """One process's part in it; others may take over at any time. Threads may share it.

    Attributes:
        leads: Whether this process ships.
        end: Once it is set, what is being shipped ends after the batch of rows that it is at.
        working: Held by the thread that is at it, for as long as a whole load.

    Args:
        store: The rows.
        engine: Where they go.
        checkpoint_id: Whose embeddings.
        dim: Their length.
    """

    def __init__(self, store: Store, engine: Milvus, checkpoint_id: str, dim: int) -> None:
        self.store, self.engine, self.checkpoint_id, self.dim = store, engine, checkpoint_id, dim
        self.leads = False
        self._connection: AnsweringConnection | None = None
        self._verified: str | None = None  # the collection that was seen to continue this history
        self._repeats: list[float] = []  # when recent removals are due again
        self.end = threading.Event()
        self.working = threading.RLock()

    def lead(self) -> bool:
        """Whether this process leads from now on.

        Raises:
            psycopg.OperationalError: The database cannot be reached.
        """
        with self.working:
            try:
                self._connected()
                if self.leads:
                    self._row("select 1")  # whether the lock is still ours: it goes with the connection
                else:
                    (self.leads,) = self._row("select pg_try_advisory_lock(%s)", self._lock("ship"))
                    self._repeats = [time.monotonic() + seconds for seconds in (0, SETTLED)] if self.leads else []
            except psycopg.Error:
                self.resign()
                raise
            return self.leads

    def resign(self) -> None:
        """Let another process lead."""
        with self.working:
            if self._connection is not None:
                self._connection.close()
            self._connection, self.leads, self._verified = None, False, None

    def wait(self, seconds: float) -> None:
        """Return once something was written, or after so many seconds."""
        next(self._connected().notifies(timeout=seconds, stop_after=1), None)

    def ship(self) -> None:
        """Bring the engine to the latest revision; only while this process leads.

        Raises:
            EngineAway: The engine does not answer; repeating it goes on from the last revision that was published.
            WrongEngine: It holds something else under the collection's name.
            psycopg.OperationalError: This process does not lead, or no longer.
            Ended: See `end`.
        """
        with self.working:
            connection = self._connection
            if connection is None:
                raise psycopg.OperationalError("only the process that holds the lock may ship")
            latest = self.store.shipments.latest(self.checkpoint_id)
            seen = Position() if latest is None else latest.position
            target, stands = self.store.changes.position(self.checkpoint_id, seen)
            due = bool(self._repeats) and time.monotonic() >= self._repeats[0]
            removed = self.store.changes.last_removed(self.checkpoint_id, RECENT if due else 0)
            try:
                if latest is None or not stands or not self._continues(latest.collection):
                    self.rebuild()
                elif target != latest.position or len(removed):
                    publish(connection, self.checkpoint_id, self._extended(connection, latest, target, removed=removed))
                del self._repeats[:due]
            except EngineAway:
                self._verified = None  # what comes back may be another
                raise
            except psycopg.Error:
                self.resign()
                raise

    def rebuild(self, on_rows: Callable[[int], None] = lambda rows: None) -> Shipment:
        """Load a new collection from the rows, have searches use it, and drop the others of this checkpoint.

        It may be called while another process leads, which goes on with the old collection until the switch.

        Args:
            on_rows: Called with how many rows have come into the new collection since the last time.

        Raises:
            AlreadyRebuilding: Another process is at it.
            EngineAway: The engine does not answer; searches go on with the old collection.
            Ended: See `end`; likewise.
        """
        with self.working:
            connection, lock = self._connected(), self._lock("rebuild")
            if not self._row("select pg_try_advisory_lock(%s)", lock)[0]:
                raise AlreadyRebuilding("another process is loading a new collection: wait until it has ended")
            try:
                return self._rebuild(connection, on_rows)
            finally:
                if not connection.closed:
                    connection.execute("select pg_advisory_unlock(%s)", [lock])

    def _rebuild(self, connection: AnsweringConnection, on_rows: Callable[[int], None]) -> Shipment:
        prefix = f"lineup_{self.store.id().replace('-', '')}_{self.checkpoint_id}"
        before = self.store.shipments.latest(self.checkpoint_id)
        for name in self.engine.collections(prefix):
            if before is None or name != before.collection:  # of a rebuild that did not come to its end
                self.engine.drop(name)
        log.info("loading a new collection of checkpoint %s", self.checkpoint_id)
        shipment = Shipment(self.engine.create(prefix, self.dim))
        target, _ = self.store.changes.position(self.checkpoint_id, shipment.position)
        shipment = self._extended(connection, shipment, target, on_rows, empty=True)

        def pause(seconds: float) -> None:
            if self.end.wait(seconds):
                raise Ended("shipping ended before the search engine had made its lists")
            connection.execute("select 1")  # whether the lock is still ours; and nobody cuts an idle connection

        self.engine.settle(shipment.collection, pause)
        target, _ = self.store.changes.position(self.checkpoint_id, shipment.position)
        shipment = self._extended(connection, shipment, target, on_rows)  # so that the switch waits for little
        shipment = replace(shipment, recall=self._recall(shipment))
        with connection.transaction():
            hold(connection, self.checkpoint_id)
            target, _ = self.store.changes.position(self.checkpoint_id, shipment.position)
            shipment = self._extended(connection, shipment, target, on_rows)
            switch(connection, self.checkpoint_id, shipment)
        self._verified = shipment.collection
        self._repeats.clear()  # no earlier leader knows this collection
        self.engine.point(prefix, shipment.collection)
        others = [name for name in self.engine.collections(prefix) if name != shipment.collection]
        if others:
            time.sleep(GRACE)
        for name in others:
            self.engine.drop(name)
        return shipment

    def _extended(
        self,
        connection: AnsweringConnection,
        shipment: Shipment,
        target: Position,
        on_rows: Callable[[int], None] = lambda rows: None,
        *,
        removed: np.ndarray = NONE,
        empty: bool = False,
    ) -> Shipment:
        """The collection at another position; its mark is written before the rows and after them.

        Args:
            connection: What holds the lock, without which nothing may be written.
            shipment: Its present state, or an earlier one that an interrupted call began from.
            target: Up to where.
            on_rows: Called with how many rows have come in since the last time.
            removed: Ids that are deleted once more, shape (m,).
            empty: Nothing was ever written to it, so that nothing need be removed; and its recall is not measured,
                for it has no lists yet.
        """
        name, seen = shipment.collection, shipment.position.revision
        self._mark(name, target)
        for change in self.store.changes.between(self.checkpoint_id, seen, target.revision, page=ROWS):
            if self.end.is_set():
                raise Ended("shipping ended before everything was in the search engine")
            connection.execute("select 1")  # reading may have taken long: whether the lock is still ours
            if isinstance(change, Additions):
                self._upsert(name, change, new=empty)
                on_rows(len(change.ids))
            elif not empty:
                self.engine.delete(name, change.ids)
        self.engine.delete(name, removed)
        timestamp = self._mark(name, target)
        counts = (self.engine.counts(name, 0), self.engine.counts(name, 1))
        extended = Shipment(name, target, timestamp, *counts, shipment.recall)
        if not empty and len(extended).bit_length() != len(shipment).bit_length():  # now and then: whole searches
            extended = replace(extended, recall=self._recall(extended))
        return extended

    def _recall(self, shipment: Shipment) -> float:
        """Share of the nearest that a search finds, of the label of which it finds fewer."""
        return min(
            self.engine.recall(shipment.collection, label, count)
            for label, count in enumerate((shipment.real, shipment.fake))
        )

    def _upsert(self, collection: str, added: Additions, *, new: bool) -> None:
        sources = np.array(added.sources, object)
        for label in (0, 1):
            rows = added.labels == label
            if rows.any():
                columns = (added.ids[rows], added.vectors[rows], added.generators[rows], sources[rows].tolist())
                self.engine.upsert(collection, label, *columns, new=new)

    def _mark(self, collection: str, position: Position) -> int:
        return self.engine.mark(collection, f"{position.revision} {position.nonce}", self.dim)

    def _continues(self, collection: str) -> bool:
        """Whether the engine has the collection, filled from the history that the database has."""
        if self._verified != collection:
            if not self.engine.holds(collection, self.dim):
                return False
            mark = self.engine.read_mark(collection)
            if mark is None:
                return False
            revision, nonce = mark.split()
            begun = Position(int(revision), None if nonce == "None" else UUID(nonce))
            _, stands = self.store.changes.position(self.checkpoint_id, begun)
            if not stands:
                log.warning("the database was restored from a backup: loading a new collection")
                return False
            self._verified = collection
        return True

    def _lock(self, purpose: str) -> int:
        """The advisory lock of this checkpoint for a purpose."""
        digest = blake2b(f"lineup {purpose} {self.checkpoint_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)

    def _row(self, query: LiteralString, *values: object) -> Any:
        return self._connected().execute(query, values).fetchone()

    def _connected(self) -> AnsweringConnection:
        """The connection that holds the locks: without it they are gone."""
        if self._connection is None or self._connection.closed:
            self._connection, self.leads = dedicated(self.store.engine, "shipper"), False
            self._connection.execute(f"listen {CHANNEL}")
        return self._connection
