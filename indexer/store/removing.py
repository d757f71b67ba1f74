"""Removing references, so that no follower of any checkpoint keeps them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import ARRAY, BigInteger, ColumnElement, Connection, any_, delete, literal, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from indexer.database.tables import BlockedHashRow, GeneratorRow, ReferenceRow
from indexer.database.transactions import notify
from indexer.store.generators import Generators

BATCH = 1000
STAMP = """update index_revision set revision = revision + 1
where checkpoint_id in (select checkpoint_id from embedding where image_id = any(:ids))
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


class Removing(Generators):
    """The only code that deletes references and records removals."""

    def remove(
        self,
        *,
        ids: Iterable[int] | None = None,
        generator: str | None = None,
        source: str | None = None,
        enrolment: int | None = None,
        forget: bool = False,
    ) -> Removed:
        """Remove references by exactly one criterion, 1,000 per transaction.

        Args:
            ids: These rows; unknown ones are passed over.
            generator: All of this generator.
            source: All from this source.
            enrolment: All that this enrolment added.
            forget: Also block their hashes from being added again.

        Raises:
            UnknownGenerator: No generator has this name.
            ValueError: No criterion, or more than one.
        """
        criteria: list[ColumnElement[bool]] = []
        if ids is not None:
            criteria.append(ReferenceRow.id == any_(literal([int(image_id) for image_id in ids], ARRAY(BigInteger))))
        if generator is not None:
            criteria.append(ReferenceRow.generator_id == self.known_generator(generator).id)
        if source is not None:
            criteria.append(ReferenceRow.source == source)
        if enrolment is not None:
            criteria.append(ReferenceRow.enrolment_id == enrolment)
        if len(criteria) != 1:
            raise ValueError("give one of ids, generator, source and enrolment")
        removed = Removed()
        while (more := self.transaction(lambda connection: _remove(connection, criteria[0], forget))).references:
            removed += more
        return removed

    def delete_generator(self, name: str, *, forget: bool = False) -> Removed:
        """Remove a generator's references, then the generator itself.

        Raises:
            UnknownGenerator: No generator has this name.
        """
        query = delete(GeneratorRow).where(GeneratorRow.id == self.known_generator(name).id)
        removed = Removed()
        while True:
            removed += self.remove(generator=name, forget=forget)
            try:
                self.transaction(lambda connection: connection.execute(query))
            except IntegrityError:  # someone added one meanwhile
                continue
            return removed


def _remove(connection: Connection, criterion: ColumnElement[bool], forget: bool) -> Removed:
    # Locks every checkpoint's row, and against new ones too: an embedding that appeared now would stay in an index.
    connection.execute(text("lock table index_revision in exclusive mode"))
    query = select(ReferenceRow.id, ReferenceRow.sha256).where(criterion).order_by(ReferenceRow.id).limit(BATCH)
    rows = connection.execute(query).all()
    if not rows:
        return Removed()
    ids = {"ids": [row.id for row in rows]}
    revisions = {row.checkpoint_id: row.revision for row in connection.execute(text(STAMP), ids)}
    vectors = Counter(connection.scalars(text(RECORD), ids))
    if forget:
        blocked = [{"sha256": row.sha256} for row in rows]
        connection.execute(insert(BlockedHashRow).values(blocked).on_conflict_do_nothing())
    connection.execute(text("delete from reference_image where id = any(:ids)"), ids)
    for checkpoint_id, revision in revisions.items():
        notify(connection, f"{checkpoint_id} {revision}")
    return Removed(len(rows), vectors, revisions)
