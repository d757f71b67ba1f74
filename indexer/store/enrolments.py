"""Enrolments: what brought references, and what each changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import EnrolmentRow, GeneratorRow
from indexer.database.transactions import Rows
from indexer.store.generators import generator_ids


@dataclass(frozen=True, slots=True)
class Enrolment:
    """One addition of references: when, of what, and what it changed (`report`, None while it runs or was killed)."""

    id: int
    at: datetime
    generator: str | None
    source: str | None
    report: dict[str, Any] | None
    references: int = 0
    """Those that are still there."""


ENROLMENTS = select(
    EnrolmentRow.id,
    EnrolmentRow.at,
    GeneratorRow.name.label("generator"),
    EnrolmentRow.source,
    EnrolmentRow.report,
    EnrolmentRow.images.label("references"),
).outerjoin(GeneratorRow, GeneratorRow.id == EnrolmentRow.generator_id)


class Enrolments(Rows):
    """The log of additions."""

    def open(self, generator: str | None, source: str | None) -> int:
        """Begin an enrolment; `generator` is given when all its images are of one, and is created if new."""

        def work(connection: Connection) -> int:
            generator_id = None if generator is None else generator_ids(connection, [generator])[generator.lower()]
            query = insert(EnrolmentRow).values(generator_id=generator_id, source=source)
            return connection.execute(query.returning(EnrolmentRow.id)).scalar_one()

        return self.transaction(work)

    def finish(self, enrolment_id: int, report: Mapping[str, Any]) -> None:
        """Keep what the enrolment changed."""
        query = update(EnrolmentRow).where(EnrolmentRow.id == enrolment_id).values(report=dict(report))
        self.transaction(lambda connection: connection.execute(query))

    def get(self, enrolment_id: int) -> Enrolment | None:
        """One enrolment."""
        row = self.read_one(ENROLMENTS.where(EnrolmentRow.id == enrolment_id))
        return None if row is None else Enrolment(**row)

    # Last in its class: below it, `list` would mean this method.
    def list(self, *, before: int | None = None, limit: int = 50) -> Sequence[Enrolment]:
        """Enrolments, newest first; `before` is the last id of the page before."""
        query = ENROLMENTS.order_by(EnrolmentRow.id.desc()).limit(limit)
        if before is not None:
            query = query.where(EnrolmentRow.id < before)
        return [Enrolment(**row) for row in self.read(query)]
