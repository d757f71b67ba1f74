"""How far the references of each checkpoint are in the search engine, where there is one."""

from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import select

from indexer.database.tables import ShipmentRow
from indexer.database.transactions import CHANNEL, Rows
from indexer.store.changes import Position

UPDATE = """
update shipment set revision = %(revision)s, nonce = %(nonce)s, timestamp = %(timestamp)s,
                    "real" = %(real)s, fake = %(fake)s, recall = %(recall)s
where checkpoint_id = %(checkpoint)s and collection = %(collection)s
"""
SWITCH = """
insert into shipment (checkpoint_id, collection, revision, nonce, timestamp, "real", fake, recall)
values (%(checkpoint)s, %(collection)s, %(revision)s, %(nonce)s, %(timestamp)s, %(real)s, %(fake)s, %(recall)s)
on conflict (checkpoint_id) do update set
    collection = excluded.collection, revision = excluded.revision, nonce = excluded.nonce,
    timestamp = excluded.timestamp, "real" = excluded.real, fake = excluded.fake, recall = excluded.recall
"""
HOLD = "select collection from shipment where checkpoint_id = %(checkpoint)s for update"


BEGINNING = Position()


@dataclass(frozen=True, slots=True)
class Shipment:
    """A collection, and what it holds once the engine has got to a time.

    Attributes:
        collection: Its name in the engine.
        position: Up to where the rows are in it.
        timestamp: The engine's, of the mark that was written after them.
        real: References of that label.
        fake: References of that label.
        recall: Share of the exact nearest that a search finds, 0..1, as last measured.
    """

    collection: str
    position: Position = BEGINNING
    timestamp: int = 0
    real: int = 0
    fake: int = 0
    recall: float = 1.0

    def __len__(self) -> int:
        return self.real + self.fake


class Shipments(Rows):
    """The reading side; whoever ships writes over a connection of its own, which holds the lock that lets it."""

    def latest(self, checkpoint_id: str) -> Shipment | None:
        """What searches are asked of; None before anything was shipped."""
        row = self.read_one(select(ShipmentRow.__table__).where(ShipmentRow.checkpoint_id == checkpoint_id))
        if row is None:
            return None
        position = Position(row["revision"], row["nonce"])
        counts = (row["timestamp"], row["real"], row["fake"], row["recall"])
        return Shipment(row["collection"], position, *counts)


def publish(connection: psycopg.Connection[Any], checkpoint_id: str, shipment: Shipment) -> bool:
    """Have searches see this; False where another collection has taken the place of its one."""
    with connection.transaction():
        changed = connection.execute(UPDATE, _values(checkpoint_id, shipment)).rowcount == 1
        _notify(connection, checkpoint_id, shipment)
    return changed


def hold(connection: psycopg.Connection[Any], checkpoint_id: str) -> None:
    """Let nobody publish until the transaction ends."""
    connection.execute(HOLD, {"checkpoint": checkpoint_id})


def switch(connection: psycopg.Connection[Any], checkpoint_id: str, shipment: Shipment) -> None:
    """Have searches see this in place of any other collection."""
    connection.execute(SWITCH, _values(checkpoint_id, shipment))
    _notify(connection, checkpoint_id, shipment)


def _values(checkpoint_id: str, shipment: Shipment) -> dict[str, object]:
    return {
        "checkpoint": checkpoint_id,
        "collection": shipment.collection,
        "revision": shipment.position.revision,
        "nonce": shipment.position.nonce,
        "timestamp": shipment.timestamp,
        "real": shipment.real,
        "fake": shipment.fake,
        "recall": shipment.recall,
    }


def _notify(connection: psycopg.Connection[Any], checkpoint_id: str, shipment: Shipment) -> None:
    connection.execute("select pg_notify(%s, %s)", [CHANNEL, f"{checkpoint_id} {shipment.position.revision}"])
