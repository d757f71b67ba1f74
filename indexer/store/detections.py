"""Verdicts as they were given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import Connection, Engine, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import DetectionRow
from indexer.database.transactions import Rows
from indexer.store.blobs import Blobs, Kept

LISTED = (
    DetectionRow.id,
    DetectionRow.at,
    DetectionRow.sha256,
    *(DetectionRow.result[name].label(name) for name in ("file", "verdict", "score", "thresholds")),
    DetectionRow.feedback,
)

LATEST_VERDICTS = 20_000
"""Verdicts that a search for unexplained images goes back."""
# What a person said of any of an image's verdicts counts for all of them, else the latest verdict does.
UNEXPLAINED = """
with latest as (
    select id, at, sha256, feedback->>'label' as said from detection
    where checkpoint_id = :checkpoint{whose}
    order by at desc, id desc limit :verdicts
), images as (
    select sha256, min(at) as first_at, max(at) as last_at, (array_agg(id order by at desc, id desc))[1] as id,
           (array_agg(said order by at desc, id desc) filter (where said is not null))[1] as said
    from latest group by sha256
)
select d.id, encode(d.sha256, 'hex') as sha256, i.first_at, i.last_at, d.vector, d.file_bytes, d.width, d.height,
       coalesce(r.file, '') as file, r.verdict, coalesce(r.image->>'format', 'unknown') as format,
       num_nulls(d.thumbnail, d.thumbnail_sha256) < 2 as pictured, count(*) over () as total
from images i join detection d on d.id = i.id
cross join lateral jsonb_to_record(d.result)
    as r (file text, verdict text, unknown_generator boolean, novelty double precision, image jsonb)
where i.said is distinct from 'real' and r.image->>'shortfall' is null
  and (r.verdict = 'uncertain' or r.unknown_generator or r.novelty < :novelty or i.said <> r.verdict)
  and not exists (select from reference_image k where k.sha256 = d.sha256)
  and not exists (select from blocked_hash b where b.sha256 = d.sha256)
order by i.last_at desc, d.id limit :images
"""
MOVED = 256
"""Thumbnails that are moved to object storage in one transaction."""
IN_ROWS = "select id, thumbnail from detection where thumbnail is not null order by id limit :most"
MOVE = """
update detection set thumbnail = null, thumbnail_sha256 = moved.sha256
from unnest(cast(:ids as uuid[]), cast(:hashes as bytea[])) as moved (id, sha256)
where detection.id = moved.id and thumbnail is not null
"""
# In one statement: a thumbnail may be moved meanwhile.
DELETE = """
with deleted as (delete from detection where at < :before returning thumbnail_sha256), noted as (
    insert into blob_outbox (sha256) select distinct thumbnail_sha256 from deleted where thumbnail_sha256 is not null)
select count(*) from deleted
"""


@dataclass(frozen=True, slots=True)
class JudgedImage:
    """An image by its verdicts; `id` and `verdict` are those of the latest.

    `vector` is the raw embedding, shape (d,), float32; `sha256` is hexadecimal.
    """

    id: UUID
    sha256: str
    first_at: datetime
    last_at: datetime
    vector: np.ndarray
    file_bytes: int
    width: int
    height: int
    file: str
    verdict: str
    format: str
    pictured: bool


@dataclass(frozen=True, slots=True)
class Detection:
    """A verdict as it was given. `vector` is the raw embedding, shape (d,), float32; `sha256` is hexadecimal.

    `thumbnail` is a JPEG of the image, None unless a setting let it be kept, and once it was moved to the object that
    `thumbnail_sha256` names.
    """

    id: UUID
    sha256: str
    file_bytes: int
    width: int
    height: int
    vector: np.ndarray
    result: dict[str, Any]
    checkpoint_id: str
    heads_id: str | None
    revision: int
    api_key_id: int | None = None
    feedback: dict[str, Any] | None = None
    at: datetime | None = None
    thumbnail: bytes | None = None
    thumbnail_sha256: bytes | None = None

    def image(self) -> JudgedImage:
        """The image, by this verdict alone."""
        assert self.at is not None  # the database sets it
        return JudgedImage(
            id=self.id,
            sha256=self.sha256,
            first_at=self.at,
            last_at=self.at,
            vector=self.vector,
            file_bytes=self.file_bytes,
            width=self.width,
            height=self.height,
            file=self.result.get("file", ""),
            verdict=self.result.get("verdict", "uncertain"),
            format=self.result.get("image", {}).get("format", "unknown"),
            pictured=bool(self.thumbnail or self.thumbnail_sha256),
        )


@dataclass(frozen=True, slots=True)
class ListedDetection:
    """What a list shows of a verdict; from `file` to `thresholds` as the result has them, None where it has not."""

    id: UUID
    at: datetime
    sha256: str
    file: str | None
    verdict: str | None
    score: float | None
    thresholds: dict[str, float | None] | None
    feedback: dict[str, Any] | None


class Detections(Rows):
    """The log of verdicts."""

    def __init__(self, engine: Engine, blobs: Blobs) -> None:
        super().__init__(engine)
        self._blobs = blobs

    def add(self, detections: Sequence[Detection]) -> None:
        """Keep verdicts, all or none; the database sets `at`, each a little later than the one before."""
        rows = [
            {name: getattr(detection, name) for name in Detection.__slots__ if name != "at"}
            | {
                "sha256": bytes.fromhex(detection.sha256),
                "vector": np.asarray(detection.vector, "<f4").tobytes(),
            }
            for detection in detections
        ]
        query = insert(DetectionRow).values(at=func.clock_timestamp())
        self.transaction(lambda connection: connection.execute(query, rows))

    def get(self, detection_id: UUID) -> Detection | None:
        """One verdict."""
        query = select(DetectionRow.__table__).where(DetectionRow.id == detection_id)
        row = self.read_one(query)
        if row is None:
            return None
        return Detection(**{**row, "sha256": row["sha256"].hex(), "vector": np.frombuffer(row["vector"], "<f4")})

    def thumbnails(self, ids: Sequence[UUID]) -> dict[UUID, bytes]:
        """The thumbnails that were kept with these verdicts.

        Raises:
            BlobsAway: Some lie in object storage, which cannot be used.
        """
        query = select(DetectionRow.id, DetectionRow.thumbnail, DetectionRow.thumbnail_sha256)
        rows = self.read(query.where(DetectionRow.id.in_(ids)))
        thumbnails = self._blobs.load_all([Kept(row["thumbnail"], row["thumbnail_sha256"]) for row in rows])
        return {row["id"]: data for row, data in zip(rows, thumbnails, strict=True) if data is not None}

    def move_thumbnails(self) -> int:
        """Move some thumbnails to object storage, where that is used: nobody who is judged for waits for it.

        Returns:
            How many they were; fewer than `MOVED` where there are no more.

        Raises:
            BlobsAway: Object storage cannot be used.
        """

        def work(connection: Connection) -> int:
            rows = connection.execute(text(IN_ROWS), {"most": MOVED}).all()
            kept = self._blobs.keep(connection, [row.thumbnail for row in rows])
            names = {"ids": [row.id for row in rows], "hashes": [one.sha256 for one in kept]}
            connection.execute(text(MOVE), names)
            self._blobs.note_spare(connection, kept)  # of verdicts that were deleted meanwhile
            return len(rows)

        return 0 if self._blobs.place is None else self.transaction(work)

    def delete(self, before: datetime) -> int:
        """Forget verdicts given before this time; returns how many there were."""
        return self.transaction(lambda connection: connection.scalar(text(DELETE), {"before": before}) or 0)

    def set_feedback(self, detection_id: UUID, feedback: Mapping[str, Any]) -> bool:
        """Attach what a person said of the verdict; False where it is not known."""
        query = update(DetectionRow).where(DetectionRow.id == detection_id).values(feedback=dict(feedback))
        return self.transaction(lambda connection: connection.execute(query).rowcount) == 1

    def unexplained(
        self, checkpoint_id: str, *, novelty: float, images: int, owner: int | None = None, everybody: bool = True
    ) -> tuple[Sequence[JudgedImage], int]:
        """Images of the latest 20,000 verdicts that are undecided, of an unknown generator, novel or disputed.

        Left out are images that a person called real, that have too little to judge, and references.

        Args:
            checkpoint_id: Whose embeddings.
            novelty: p-value, 0..1, below which an image is novel.
            images: How many to give at most, the last seen first.
            owner: The API key whose verdicts count, None for those given without a key.
            everybody: Count all verdicts, whosever they are.

        Returns:
            The images, and how many there are in all.
        """
        values: dict[str, object] = {"checkpoint": checkpoint_id, "novelty": novelty}
        values |= {"images": images, "verdicts": LATEST_VERDICTS}
        # Each of the three is a condition that an index answers; one that holds them all is not.
        whose = "" if everybody else " and api_key_id is null" if owner is None else " and api_key_id = :api_key_id"
        values |= {"api_key_id": owner} if whose.endswith(":api_key_id") else {}
        rows = self.read(text(UNEXPLAINED.format(whose=whose)), values)
        unexplained = [
            JudgedImage(
                **{name: row[name] for name in JudgedImage.__slots__ if name != "vector"},
                vector=np.frombuffer(row["vector"], "<f4"),
            )
            for row in rows
        ]
        return unexplained, rows[0]["total"] if rows else 0

    # Last in its class: below it, `list` would mean this method.
    def list(self, *, before: UUID | None = None, limit: int = 50) -> Sequence[ListedDetection]:
        """Verdicts, newest first; `before` is the last id of the page before."""
        place = tuple_(DetectionRow.at, DetectionRow.id)
        query = select(*LISTED).order_by(DetectionRow.at.desc(), DetectionRow.id.desc()).limit(limit)
        if before is not None:
            last = select(DetectionRow.at, DetectionRow.id).where(DetectionRow.id == before)
            query = query.where(place < last.scalar_subquery())
        return [ListedDetection(**{**row, "sha256": row["sha256"].hex()}) for row in self.read(query)]
