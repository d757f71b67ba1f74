"""The store: everything that is kept in Postgres, behind one object. Each noun has its own module."""

from sqlalchemy import Engine, select

from indexer.database.tables import StoreRow
from indexer.database.transactions import Rows
from indexer.store.blobs import Blobs
from indexer.store.changes import Changes
from indexer.store.checkpoints import Calibrations, Checkpoints
from indexer.store.detections import Detections
from indexer.store.enrolments import Enrolments
from indexer.store.generators import Generators
from indexer.store.jobs import Jobs
from indexer.store.keys import ApiKeys
from indexer.store.references import References
from indexer.store.shipments import Shipments

__all__ = ["Store"]


class Store(Rows):
    """Reference images, embeddings, revisions, calibrations and verdicts. Safe to share between threads.

    Args:
        engine: The database.
        blobs: Where pictures are kept, see `Blobs`; None keeps them in the database.
    """

    def __init__(self, engine: Engine, blobs: str | None = None) -> None:
        super().__init__(engine)
        self.blobs = Blobs(engine, blobs)
        self.checkpoints = Checkpoints(engine)
        self.calibrations = Calibrations(engine)
        self.generators = Generators(engine)
        self.enrolments = Enrolments(engine)
        self.references = References(engine, self.checkpoints, self.generators, self.blobs)
        self.changes = Changes(engine)
        self.shipments = Shipments(engine)
        self.detections = Detections(engine, self.blobs)
        self.keys = ApiKeys(engine)
        self.jobs = Jobs(engine)

    def id(self) -> str:
        """The identity of this store, made once by the first migration."""
        return str(self.read_value(select(StoreRow.id)))
