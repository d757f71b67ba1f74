"""Enrolments: what brought references, and what each changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb
from sqlalchemy import Connection, RowMapping, case, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import UNFINISHED, EnrolmentRow, GeneratorRow
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
    case((UNFINISHED, None), else_=EnrolmentRow.report).label("report"),
    EnrolmentRow.images.label("references"),
).outerjoin(GeneratorRow, GeneratorRow.id == EnrolmentRow.generator_id)


BEGIN_PART = text("""update enrolment set report = report #- array['done', cast(:part as text)]
where id = (select max(id) from enrolment where report->>'job' = :job and not report ? 'ending') returning id""")
FINISH_PART = text("""update enrolment set report = jsonb_set(report, array['done', cast(:part as text)], :report)
where id = :enrolment and report ? 'job' and not report ? 'ending' returning report""")
END = text("""update enrolment set report = report || '{"ending": true}' where id = :enrolment""")
ADDITIONS = text("""select coalesce(g.name, case r.label when 0 then 'real' else 'fake' end) as name, r.source,
       count(*) as images
from reference_image r left join generator g on g.id = r.generator_id
where r.enrolment_id = :enrolment group by 1, 2 order by 1, 2""")


class Enrolments(Rows):
    """The log of additions."""

    def open(self, generator: str | None, source: str | None) -> int:
        """Begin an enrolment; `generator` is given when all its images are of one, and is created if new."""

        def work(connection: Connection) -> int:
            generator_id = None if generator is None else generator_ids(connection, [generator])[generator.lower()]
            query = insert(EnrolmentRow).values(generator_id=generator_id, source=source)
            return connection.execute(query.returning(EnrolmentRow.id)).scalar_one()

        return self.transaction(work)

    def join(self, job: str, part: int, parts: int, generator: str | None, source: str | None) -> int:
        """Begin one part of an enrolment that several workers fill, or begin it again.

        Until it is finished the column of its report has {"job", "parts", "done": {part: its report}}, and "ending"
        once its last part has ended: one that begins again then has an enrolment of its own.

        Args:
            job: What the workers have in common.
            part: Of this worker, 1..`parts`.
            parts: How many there are.
            generator: See `open`.
            source: Likewise.

        Returns:
            The unfinished enrolment of this job; a new one where there is none.
        """

        def work(connection: Connection) -> int:
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"lineup job {job}", 0))))
            if enrolment_id := connection.execute(BEGIN_PART, {"job": job, "part": str(part)}).scalar():
                return int(enrolment_id)
            generator_id = None if generator is None else generator_ids(connection, [generator])[generator.lower()]
            report = {"job": job, "parts": parts, "done": {}}
            query = insert(EnrolmentRow).values(generator_id=generator_id, source=source, report=report)
            return connection.execute(query.returning(EnrolmentRow.id)).scalar_one()

        return self.transaction(work)

    def finish_part(self, enrolment_id: int, part: int, report: Mapping[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """Keep what one part changed.

        Args:
            enrolment_id: See `join`.
            part: Of this worker.
            report: Its own.

        Returns:
            How many parts are to come, and the reports of those that are done. Where none is to come, the caller
            finishes the enrolment. Of a part that another worker repeated, and that has ended with the others, 1 and
            nothing: whoever ends them finishes.
        """
        values = {"enrolment": enrolment_id, "part": str(part), "report": Jsonb(dict(report))}

        def work(connection: Connection) -> tuple[int, list[dict[str, Any]]]:
            unfinished = connection.execute(FINISH_PART, values).scalar()
            if unfinished is None:
                return 1, []
            left = unfinished["parts"] - len(unfinished["done"])
            if not left:
                connection.execute(END, {"enrolment": enrolment_id})
            return left, [*unfinished["done"].values()]

        return self.transaction(work)

    def additions(self, enrolment_id: int) -> Sequence[RowMapping]:
        """How many `images` an enrolment brought, by `name` of the generator, else of the label, and by `source`."""
        return self.read(ADDITIONS, {"enrolment": enrolment_id})

    def discard(self, enrolment_id: int) -> None:
        """Forget an enrolment that brought nothing."""
        query = delete(EnrolmentRow).where(EnrolmentRow.id == enrolment_id)
        self.transaction(lambda connection: connection.execute(query))

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
        """Enrolments, newest first; `before` is the last id of the page before.

        Left out are those of parts that have brought nothing so far: a part that is repeated after the others' end
        leaves one for good.
        """
        brought = EnrolmentRow.report.is_(None) | ~EnrolmentRow.report.has_key("job") | (EnrolmentRow.images > 0)
        query = ENROLMENTS.where(brought).order_by(EnrolmentRow.id.desc()).limit(limit)
        if before is not None:
            query = query.where(EnrolmentRow.id < before)
        return [Enrolment(**row) for row in self.read(query)]
