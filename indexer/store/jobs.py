"""Jobs: many images that are judged in the background, by whichever service comes to each first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast
from uuid import UUID

import psycopg
from sqlalchemy import ColumnElement, Connection, RowMapping, delete, func, literal_column, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import JobImageRow, JobRow
from indexer.database.transactions import Rows

Outcome = Literal["fake", "real", "uncertain", "failed"]
COUNTS: tuple[Outcome, ...] = ("fake", "real", "uncertain", "failed")
"""What may become of an image, and where a job counts it."""
IMAGE_COLUMNS = {
    "job_id": "uuid",
    "number": "int4",
    "file": "text",
    "fetched": "bool",
    "file_bytes": "int8",
    "bytes": "bytea",
}
"""What a new image has, and of which type."""


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image of a new job.

    Attributes:
        file: What it is called; without `read` the address that it is fetched from.
        size: Bytes of an upload.
        read: Gives the bytes that are kept until the image is judged; perhaps called more than once.
    """

    file: str
    size: int | None = None
    read: Callable[[], bytes] | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Images that were sent together: how many became what, and who is told of the end (`webhook`)."""

    id: UUID
    at: datetime
    ended_at: datetime | None
    state: Literal["queued", "running", "done", "cancelled", "failed"]
    images: int
    fake: int
    real: int
    uncertain: int
    failed: int
    api_key_id: int | None
    webhook: str | None
    webhook_state: Literal["pending", "delivered", "failed"] | None
    webhook_error: str | None


@dataclass(frozen=True, slots=True)
class JobImage:
    """An image that somebody has taken to judge it, for the `attempts`-th time. `bytes` is None where it is fetched."""

    job_id: UUID
    number: int
    file: str
    file_bytes: int | None
    bytes: bytes | None
    attempts: int
    question: dict[str, Any]
    api_key_id: int | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is not judged yet: jobs, their images, the bytes kept of these, and since when the oldest job waits."""

    jobs: int
    images: int
    bytes: int
    oldest: datetime | None


# Jobs are locked before their images, as by whoever finishes one; `exists` keeps jobs out that have nothing free.
TAKE = text("""with turn as (
    select id, taken_at from job
    where ended_at is null and exists (
        select from job_image
        where job_id = job.id and result is null and fetched = :fetched
          and (leased_until is null or leased_until < now()))
    order by taken_at, id limit :limit for update of job),
waiting as (
    select i.job_id, i.number, turn.taken_at, row_number() over (partition by i.job_id order by i.number) as round
    from turn cross join lateral (
        select job_id, number from job_image
        where job_id = turn.id and result is null and fetched = :fetched
          and (leased_until is null or leased_until < now())
        order by number limit :limit for update skip locked) i),
taken as (select job_id, number from waiting order by round, taken_at, job_id limit :limit)
update job_image i set leased_until = now() + make_interval(secs => :seconds), attempts = i.attempts + 1
from taken where i.job_id = taken.job_id and i.number = taken.number
returning i.job_id, i.number, i.file, i.file_bytes, i.bytes, i.attempts""")
JOBS = select(*(JobRow.__table__.c[name] for name in Job.__slots__))


class Jobs(Rows):
    """Jobs and their images. Several services may take from them at once: none takes what another one has."""

    def add(
        self,
        images: Sequence[NewImage],
        question: Mapping[str, Any],
        *,
        api_key_id: int | None = None,
        webhook: str | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Keep a job as a whole or not at all.

        Args:
            images: At least one.
            question: What is asked of each image, as JSON.
            api_key_id: Who asks.
            webhook: Address that is told of the end.
            idempotency_key: Where who asks has made a job with this one, that is given and no other made.
        """
        row = {
            "question": dict(question),
            "images": len(images),
            "kept_bytes": sum(image.size or 0 for image in images),
            "api_key_id": api_key_id,
            "webhook": webhook,
            "webhook_state": None if webhook is None else "pending",
            "idempotency_key": idempotency_key,
        }

        def work(connection: Connection) -> UUID | None:
            new = insert(JobRow).values(row).on_conflict_do_nothing().returning(JobRow.id)
            job_id: UUID | None = connection.execute(new).scalar()
            if job_id is None:
                return None
            driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
            command = f"copy job_image ({', '.join(IMAGE_COLUMNS)}) from stdin (format binary)"
            with driver.cursor() as cursor, cursor.copy(command) as copy:
                copy.set_types(list(IMAGE_COLUMNS.values()))
                for number, image in enumerate(images, 1):
                    data = None if image.read is None else image.read()
                    copy.write_row((job_id, number, image.file, image.read is None, image.size, data))
            return job_id

        while (job_id := self.transaction(work)) is None:
            if (first := self.made_with(idempotency_key, api_key_id)) is not None:
                return first  # otherwise it was deleted just now
        job = self.get(job_id)
        assert job is not None
        return job

    def made_with(self, idempotency_key: str | None, api_key_id: int | None) -> Job | None:
        """The job that a key's owner, or who has none, made with this idempotency key; None without."""
        owner = func.coalesce(JobRow.api_key_id, literal_column("0")) == (api_key_id or 0)  # as in the unique index
        row = self.read_one(JOBS.where(owner, JobRow.idempotency_key == idempotency_key))
        return None if row is None else Job(**row)

    def get(self, job_id: UUID) -> Job | None:
        """One job."""
        row = self.read_one(JOBS.where(JobRow.id == job_id))
        return None if row is None else Job(**row)

    def results(self, job_id: UUID, *, after: int = 0, limit: int = 100) -> Sequence[tuple[int, dict[str, Any]]]:
        """Results with the numbers of their images, from 1 on; those after the first image that has none come later."""
        query = select(JobImageRow.number, JobImageRow.result).order_by(JobImageRow.number).limit(limit)
        rows = self.read(query.where(JobImageRow.job_id == job_id, JobImageRow.number > after))
        waiting = next((place for place, row in enumerate(rows) if row["result"] is None), len(rows))
        return [(row["number"], row["result"]) for row in rows[:waiting]]

    def waiting(self, *condition: ColumnElement[bool]) -> Waiting:
        """What all jobs together have still to do, or those that fulfil a condition."""
        left = JobRow.images - sum(getattr(JobRow, name) for name in COUNTS)
        totals = (func.count().label("jobs"), func.coalesce(func.sum(left), 0).label("images"))
        kept = func.coalesce(func.sum(JobRow.kept_bytes), 0).label("bytes")
        query = select(*totals, kept, func.min(JobRow.at).label("oldest"))
        row = self.read_one(query.where(JobRow.ended_at.is_(None), *condition))
        assert row is not None
        return Waiting(row["jobs"], int(row["images"]), int(row["bytes"]), row["oldest"])

    def waiting_of(self, api_key_id: int | None) -> Waiting:
        """What the jobs of one key have still to do, or those without a key."""
        return self.waiting(JobRow.api_key_id.is_not_distinct_from(api_key_id))

    def claim(self, *, fetched: bool, limit: int, seconds: float) -> Sequence[JobImage]:
        """Take images that nobody has, for so many seconds; then whoever comes first may take them again.

        Jobs take turns: first comes the one whose last turn, or for want of one its making, was longest ago. So no job
        waits for a larger one, nor for a stream of later ones.

        Args:
            fetched: Those that are fetched from an address, or those that were uploaded.
            limit: How many at most.
            seconds: From now.
        """
        values = {"fetched": fetched, "limit": limit, "seconds": seconds}

        def work(connection: Connection) -> Sequence[JobImage]:
            rows = connection.execute(TAKE, values).mappings().all()
            begun = JobRow.id.in_({row["job_id"] for row in rows})
            if rows:
                turn = update(JobRow).where(begun).values(state="running", taken_at=func.clock_timestamp())
                connection.execute(turn)
            jobs = connection.execute(select(JobRow.id, JobRow.question, JobRow.api_key_id).where(begun)).all()
            asked = {job.id: {"question": job.question, "api_key_id": job.api_key_id} for job in jobs}
            return [JobImage(**row, **asked[row["job_id"]]) for row in rows]

        return self.transaction(work)

    def release(self, images: Sequence[JobImage], *, counted: bool = False) -> None:
        """Give images back that were taken, as if they had not been unless the attempt is `counted`.

        One that somebody else has taken since stays theirs.
        """
        leases = [(image.job_id, image.number, image.attempts) for image in images]
        taken = tuple_(JobImageRow.job_id, JobImageRow.number, JobImageRow.attempts).in_(leases)
        query = update(JobImageRow).where(taken, JobImageRow.result.is_(None))
        query = query.values(leased_until=None, attempts=JobImageRow.attempts - (0 if counted else 1))
        self.transaction(lambda connection: connection.execute(query))

    def finish(self, image: JobImage, outcome: Outcome, result: Mapping[str, Any]) -> bool:
        """Keep what became of an image and no longer its bytes; with the last one the job ends.

        Returns:
            False where it had a result already, or its job was cancelled or deleted: then nothing changes.
        """
        place = (JobImageRow.job_id == image.job_id) & (JobImageRow.number == image.number)
        keep = update(JobImageRow).where(place, JobImageRow.result.is_(None))
        keep = keep.values(result=dict(result), bytes=None, leased_until=None)

        def work(connection: Connection) -> bool:
            job = _locked(connection, image.job_id)
            if job is None or connection.execute(keep).rowcount == 0:
                return False
            values: dict[str, Any] = {outcome: job[outcome] + 1}
            values["kept_bytes"] = job["kept_bytes"] - (image.file_bytes or 0)
            if sum(job[name] for name in COUNTS) + 1 == job["images"]:
                failed = outcome == "failed" and job["failed"] + 1 == job["images"]
                values |= {"state": "failed" if failed else "done", "ended_at": func.now()}
            connection.execute(update(JobRow).where(JobRow.id == image.job_id).values(values))
            return True

        return self.transaction(work)

    def cancel(self, job_id: UUID) -> None:
        """End a job that has not ended: what is not judged is dropped, what is judged stays."""
        drop = delete(JobImageRow).where(JobImageRow.job_id == job_id, JobImageRow.result.is_(None))
        end = update(JobRow).where(JobRow.id == job_id)
        end = end.values(state="cancelled", ended_at=func.now(), kept_bytes=0)

        def work(connection: Connection) -> None:
            job = _locked(connection, job_id)
            if job is not None and job["ended_at"] is None:
                connection.execute(drop)
                connection.execute(end)

        self.transaction(work)

    def delete(self, job_id: UUID) -> bool:
        """Forget a job with its images and results; False where there is none."""
        query = delete(JobRow).where(JobRow.id == job_id)
        return self.transaction(lambda connection: connection.execute(query).rowcount) == 1

    def delete_ended(self, before: datetime) -> int:
        """Forget the jobs that ended before this time; returns how many there were."""
        query = delete(JobRow).where(JobRow.ended_at < before)
        return self.transaction(lambda connection: connection.execute(query).rowcount)

    def claim_untold(self, *, limit: int, seconds: float) -> Sequence[Job]:
        """Take ended jobs whose webhook is to be told so and that nobody has, for so many seconds."""
        untold = (JobRow.webhook_state == "pending") & JobRow.ended_at.is_not(None)
        free = (
            select(JobRow.id)
            .where(untold, JobRow.leased_until.is_(None) | (JobRow.leased_until < func.now()))
            .order_by(JobRow.ended_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
            .cte("free")
        )
        take = update(JobRow).where(JobRow.id == free.c.id)
        take = take.values(leased_until=func.now() + timedelta(seconds=seconds))
        columns = (JobRow.__table__.c[name] for name in Job.__slots__)
        query = take.returning(*columns)
        return self.transaction(lambda connection: [Job(**row) for row in connection.execute(query).mappings()])

    def release_untold(self, jobs: Sequence[Job]) -> None:
        """Give jobs back that were taken to be told of."""
        query = update(JobRow).where(JobRow.id.in_([job.id for job in jobs])).values(leased_until=None)
        self.transaction(lambda connection: connection.execute(query))

    def told(self, job_id: UUID, error: str | None) -> None:
        """Keep that the webhook was told of the end, or why it could not be."""
        state = "delivered" if error is None else "failed"
        query = update(JobRow).where(JobRow.id == job_id, JobRow.webhook_state == "pending")
        query = query.values(webhook_state=state, webhook_error=error, leased_until=None)
        self.transaction(lambda connection: connection.execute(query))

    # Last in its class: below it, `list` would mean this method.
    def list(
        self, *, api_key_id: int | None = None, everybody: bool = False, before: UUID | None = None, limit: int = 50
    ) -> Sequence[Job]:
        """Jobs of a key, or everybody's, newest first; `before` is the last id of the page before."""
        query = JOBS.order_by(JobRow.at.desc(), JobRow.id.desc()).limit(limit)
        if not everybody:
            query = query.where(JobRow.api_key_id == api_key_id)
        if before is not None:
            last = select(JobRow.at, JobRow.id).where(JobRow.id == before)
            query = query.where(tuple_(JobRow.at, JobRow.id) < last.scalar_subquery())
        return [Job(**row) for row in self.read(query)]


def _locked(connection: Connection, job_id: UUID) -> RowMapping | None:
    """A job whose row nobody else changes until this transaction ends."""
    query = select(JobRow.__table__).where(JobRow.id == job_id).with_for_update()
    return connection.execute(query).mappings().one_or_none()
