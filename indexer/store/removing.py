"""Removing references, so that no follower of any checkpoint keeps them."""

from collections import Counter
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Connection, select, text
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import BlockedHashRow, ReferenceRow
from indexer.database.transactions import TRANSACTION_IMAGES, Rows, notify
from indexer.store.blobs import note_dropped
from indexer.store.counts import count_removed

STAMP = """with stamped as (
    update index_revision set revision = revision + 1
    where checkpoint_id in (select checkpoint_id from embedding where image_id = any(:ids))
    returning checkpoint_id, revision)
insert into timeline (checkpoint_id, revision) select checkpoint_id, revision from stamped
returning checkpoint_id, revision"""
RECORD = """insert into removal (checkpoint_id, image_id, revision)
select e.checkpoint_id, e.image_id, r.revision from embedding e join index_revision r using (checkpoint_id)
where e.image_id = any(:ids) returning checkpoint_id"""


@dataclass(frozen=True, slots=True)
class Removed:
    """What one `remove` did.

    Attributes:
        references: Rows that are gone, with thumbnails and kept files.
        vectors: Embeddings that are gone, by checkpoint.
        revisions: What each index has now, by checkpoint.
    """

    references: int = 0
    vectors: Counter[str] = field(default_factory=Counter)
    revisions: dict[str, int] = field(default_factory=dict)

    def __add__(self, later: "Removed") -> "Removed":
        return Removed(
            self.references + later.references, self.vectors + later.vectors, self.revisions | later.revisions
        )


def remove_all(rows: Rows, criterion: ColumnElement[bool], forget: bool) -> Removed:
    """Remove the references that meet a criterion, 1,000 per transaction; `forget` blocks their hashes for good."""
    removed = Removed()
    while (batch := rows.transaction(lambda connection: _remove(connection, criterion, forget))).references:
        removed += batch
    return removed


def _remove(connection: Connection, criterion: ColumnElement[bool], forget: bool) -> Removed:
    # Locks every checkpoint's row, and against new ones too: an embedding that appeared now would stay in an index.
    connection.execute(text("lock table index_revision in exclusive mode"))
    query = (
        select(ReferenceRow.id, ReferenceRow.sha256)
        .where(criterion)
        .order_by(ReferenceRow.id)
        .limit(TRANSACTION_IMAGES)
    )
    rows = connection.execute(query).all()
    if not rows:
        return Removed()
    ids = {"ids": [row.id for row in rows]}
    revisions = {row.checkpoint_id: row.revision for row in connection.execute(text(STAMP), ids)}
    vectors = Counter(connection.scalars(text(RECORD), ids))
    if forget:
        blocked = [{"sha256": row.sha256} for row in rows]
        connection.execute(insert(BlockedHashRow).values(blocked).on_conflict_do_nothing())
    count_removed(connection, ids["ids"])
    note_dropped(connection, ids["ids"])
    connection.execute(text("delete from reference_image where id = any(:ids)"), ids)
    for checkpoint_id, revision in revisions.items():
        notify(connection, f"{checkpoint_id} {revision}")
    return Removed(len(rows), vectors, revisions)
