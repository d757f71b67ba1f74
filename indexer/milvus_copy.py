"""The index in Milvus: this process asks it, and fills it while no other process does."""

import logging
import threading
import time
from collections.abc import Callable

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from indexer.index.index import Contents
from indexer.index.milvus import EngineAway, Milvus, MilvusIndex, Stamp
from indexer.shipper import AlreadyRebuilding, Ended, Shipper
from indexer.store import Store
from indexer.store.changes import Position
from indexer.store.shipments import Shipment

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that one call waits for the process that leads to ship what is written."""
PAUSE = 0.05
"""Seconds between two looks at how far it is."""


class MilvusCopy:
    """See `indexer.follower.Copy`. An engine that is away raises nothing here; searches say so.

    Args:
        url: As in LINEUP_INDEX.
        store: The rows.
        checkpoint_id: Whose embeddings.
        dim: Their length.
    """

    def __init__(self, url: str, store: Store, checkpoint_id: str, dim: int) -> None:
        self.store, self.checkpoint_id, self.dim = store, checkpoint_id, dim
        self.engine = Milvus(url)
        self.index = MilvusIndex(self.engine, dim)
        self.shipper = Shipper(store, self.engine, checkpoint_id, dim)
        self.position = Position()
        self._away = False

    @property
    def source_names(self) -> dict[int, str]:
        """Names by the source numbers of the index."""
        return self.index.source_names

    @property
    def saved_revision(self) -> int | None:
        """None: nothing is kept on this machine."""
        return None

    @property
    def fault(self) -> str | None:
        """None: see `saved_revision`."""
        return None

    def number(self, source: str) -> int:
        """The number of a source; -2 for one that nothing has come from."""
        return self.index.number(source)

    @property
    def engine_away(self) -> bool:
        """Whether the last call was not answered."""
        return self.engine.away

    def contents(self) -> Contents:
        """Everything in the collection that searches are asked of."""
        stamp = self.index.stamp
        if stamp is None:
            raise EngineAway("nothing was shipped to the search engine yet: run lineup index ship")
        return self.engine.contents(stamp.collection, self.dim)

    def load(self, *, anew: bool, on_rows: Callable[[int], None]) -> bool:
        """Have the engine filled, by this process unless another one does that; `anew` loads a new collection."""
        self._tell(self.engine.check)
        try:
            if anew:
                self.shipper.rebuild(on_rows)
            elif self.shipper.lead():
                self._tell(self.shipper.ship)
        finally:
            self.shipper.resign()  # to whoever keeps at it, this process by `keep` perhaps
        return self.catch_up()

    def catch_up(self) -> bool:
        """Ask the engine for what is written by now, as soon as it is shipped: for `PATIENCE` seconds at most.

        Returns:
            Whether it was shipped, and the engine answers.
        """
        self._tell(self.engine.ping)  # or nobody knows that it is away before somebody searches
        deadline = time.monotonic() + PATIENCE
        while True:
            latest = self.store.shipments.latest(self.checkpoint_id)
            shipped = Position() if latest is None else latest.position
            target, stands = self.store.changes.position(self.checkpoint_id, shipped)
            if latest is not None:
                self._show(latest)
            complete = stands and shipped.revision >= target.revision
            if complete or self.engine.away or time.monotonic() >= deadline or self.shipper.end.is_set():
                return complete and not self.engine.away
            if self.shipper.leads and self.shipper.working.acquire(blocking=False):  # a load takes too long to wait for
                try:
                    self._tell(self.shipper.ship)
                finally:
                    self.shipper.working.release()
            else:
                self.shipper.end.wait(PAUSE)

    def save(self) -> None:
        """Nothing: the engine keeps what it was given."""

    def try_to_save(self) -> None:
        """Nothing, see `save`."""

    def keep(self, end: threading.Event, poll: float) -> None:
        """Ship, whenever no other process does, until the end, also of a load that takes long."""
        self.shipper.end = end
        while not end.is_set():
            try:
                if self.shipper.lead():
                    self._tell(self.shipper.ship)
                self.shipper.wait(poll)
            except (psycopg.Error, SQLAlchemyError, OSError) as error:  # the follower tells of the database
                log.debug("%s", error)
                self.shipper.resign()
                end.wait(poll)
            except Exception:  # a fault of ours must not end the shipping
                log.exception("shipping failed and is tried again")
                end.wait(poll)
        self.shipper.resign()

    def _show(self, latest: Shipment) -> None:
        columns = (latest.timestamp, latest.real, latest.fake, latest.recall)
        self.index.stamp = Stamp(latest.collection, *columns)
        self.position = latest.position

    def _tell(self, work: Callable[[], object]) -> None:
        """Do it, and say once when the engine is away and when it is back."""
        try:
            work()
        except (AlreadyRebuilding, Ended) as error:
            log.info("%s", error)
        except EngineAway as error:
            if not self._away:
                log.warning("%s; the neighbours do not vote until then", error)
            self._away = True
        else:
            if self._away:
                log.warning("the search engine is back")
            self._away = False
