"""The index in this process's memory, read from its snapshot and the rows, and kept equal to them."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from indexer.index.index import Contents
from indexer.index.snapshot import BadSnapshot
from indexer.index.vector_index import IndexChanged, VectorIndex
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.changes import Additions, Position

log = logging.getLogger(__name__)

QUIET = 10.0
"""Seconds without a change before the snapshot is written, so that an enrolment is not written at each step."""
LATEST = 300.0
"""Seconds after which the snapshot is written even while changes go on."""


class MemoryCopy:
    """See `indexer.follower.Copy`.

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
        self.source_names: dict[int, str] = {}
        self._store_id = ""
        self._begun = Position()  # further than `position` where applying ended half-way
        self._saved: tuple[str, Position] | None = None  # store and position of the snapshot on disk
        self._warned: set[str] = set()  # of what fails again and again, since it last went well
        self._changing = threading.Lock()

    @property
    def snapshot(self) -> Path:
        """The snapshot's file."""
        return self.settings.home / "index" / self._store_id / self.checkpoint_id / "snapshot"

    @property
    def saved_revision(self) -> int | None:
        """Revision of the snapshot as it was read or written here; None where there is no good one."""
        return None if self._saved is None else self._saved[1].revision

    def number(self, source: str) -> int:
        """The number of a source; -2, which none has, for one that is not known."""
        return next((number for number, known in self.source_names.items() if known == source), -2)

    @property
    def fault(self) -> str | None:
        """That the snapshot cannot be used."""
        if self.saved_revision is not None or not self.snapshot.exists():
            return None
        return "the snapshot is damaged or of another history: run lineup index rebuild"

    @property
    def engine_away(self) -> bool:
        """False: the index is in this process."""
        return False

    def contents(self) -> Contents:
        """A copy of everything in the index."""
        ids, vectors = self.index.vectors()
        order = np.argsort(ids)
        ids, vectors = ids[order], vectors[order]
        labels, generators, sources = self.index.metadata(ids)
        names = np.array([self.source_names.get(number) for number in sources.tolist()], object)
        return Contents(ids, vectors, labels, generators, names)

    def load(self, *, anew: bool, on_rows: Callable[[int], None]) -> bool:
        """Read the snapshot where it is good, then the rest from Postgres."""
        with self._changing:
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
            self._catch_up(on_rows)
        return True

    def catch_up(self) -> bool:
        """Apply what was written since."""
        with self._changing:
            self._catch_up()
        return True

    def save(self) -> None:
        """Write the snapshot if it is out of date.

        Raises:
            OSError: It cannot be written. Nothing is lost: the next start reads Postgres instead.
        """
        with self._changing:
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
            message = f"the snapshot was not written, the next start reads the database: {error}"
            if message not in self._warned:
                log.warning("%s", message)
            self._warned.add(message)

    def keep(self, end: threading.Event, poll: float) -> None:
        """Write snapshots once changes rest, and give large labels inverted lists, until the end."""
        position, changed, stale, may_grow = self.position, time.monotonic(), time.monotonic(), True
        while not end.wait(poll):
            now = time.monotonic()
            if self.position != position:
                position, changed = self.position, now
            quiet = now - changed >= QUIET
            try:
                if quiet and may_grow and self.index.grow(end.is_set):
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

    def _catch_up(self, on_rows: Callable[[int], None] = lambda rows: None) -> None:
        store_id = self.store.id()
        # First: what commits later, or is restored meanwhile, is for the next time.
        target, stands = self.store.changes.position(self.checkpoint_id, self._begun)
        if store_id != self._store_id or not stands:
            log.warning("the database is another one, or was restored from a backup: loading all of it")
            index = VectorIndex(self.dim, self.settings.device)
            self._apply(index, 0, target.revision, on_rows)
            self.index, self._store_id = index, store_id
        elif target != self.position:
            self._begun = target
            self._apply(self.index, self.position.revision, target.revision, on_rows)
        self.position = self._begun = target

    def _apply(self, index: VectorIndex, seen: int, target: int, on_rows: Callable[[int], None]) -> None:
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
            on_rows(len(change.ids))
