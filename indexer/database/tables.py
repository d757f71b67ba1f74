"""The tables in Postgres. Rows are the truth; every index is derived from them."""

from datetime import date, datetime
from typing import Any, ClassVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

FINGERPRINT_BANDS = (-0x6DB6_DB6D_B6DB_6DB7, 0x2492_4924_9249_2492, 0x4924_9249_2492_4924)
"""Masks of every third bit of a fingerprint, signed: neighbouring bits are alike in flat parts of pictures, so that a
band of them would have few values."""


class Base(DeclarativeBase):
    """Base of all tables; constraints get their names by rule, so that migrations can name them."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        str: sa.Text,
        bytes: sa.LargeBinary,
        float: sa.Double,
        datetime: sa.DateTime(timezone=True),
        dict[str, Any]: JSONB,
        dict[str, str]: JSONB,
        list[str]: sa.ARRAY(sa.Text),
    }


class StoreRow(Base):
    """One row: which store this is, so that a snapshot of another one is never mistaken for it."""

    __tablename__ = "store"
    __table_args__ = (sa.CheckConstraint("single", name="single"),)

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=sa.text("gen_random_uuid()"))
    single: Mapped[bool] = mapped_column(sa.Boolean, unique=True, server_default=sa.text("true"))


class CheckpointRow(Base):
    """A checkpoint that has embeddings here; at most one is active."""

    __tablename__ = "checkpoint"
    __table_args__ = (sa.Index("uq_checkpoint_active", "active", unique=True, postgresql_where=sa.text("active")),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    dim: Mapped[int]
    config: Mapped[dict[str, Any]]
    active: Mapped[bool] = mapped_column(server_default=sa.text("false"))
    created_at: Mapped[datetime] = mapped_column(server_default=sa.func.now())


class GeneratorRow(Base):
    """A named source of fake images."""

    __tablename__ = "generator"
    __table_args__ = (sa.Index("uq_generator_name", sa.func.lower(sa.text("name")), unique=True),)

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(always=True), primary_key=True)
    name: Mapped[str]
    family: Mapped[str | None]
    vendor: Mapped[str | None]
    version: Mapped[str | None]
    released_on: Mapped[date | None]
    notes: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=sa.func.now())


class EnrolmentRow(Base):
    """One call of `lineup index add` or of `POST /v1/references` that added something."""

    __tablename__ = "enrolment"

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(always=True), primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=sa.func.now())
    generator_id: Mapped[int | None] = mapped_column(sa.ForeignKey("generator.id", ondelete="SET NULL"))
    source: Mapped[str | None]
    report: Mapped[dict[str, Any] | None]
    images: Mapped[int] = mapped_column(sa.BigInteger, server_default=sa.text("0"))


UNFINISHED = EnrolmentRow.report.is_(None) | EnrolmentRow.report.has_key("job")
"""An enrolment that is worked on, or was cut off: it has no report, or what its parts have done so far."""


class ReferenceRow(Base):
    """A known image. Its id is the FAISS id and is never given again."""

    __tablename__ = "reference_image"
    __table_args__ = (
        sa.CheckConstraint("label in (0, 1)", name="label"),
        sa.CheckConstraint("label = 1 or generator_id is null", name="real_has_no_generator"),
        sa.Index("ix_reference_image_kind_sha256", "label", sa.text("coalesce(generator_id, 0)"), "sha256"),
        sa.Index(None, "generator_id", "id"),
        sa.Index(None, "source", "id"),
        sa.Index(None, "enrolment_id"),
        # A path may be longer than a b-tree entry can be.
        sa.Index(None, "uri", postgresql_using="hash"),
        sa.Index(None, "group", postgresql_using="hash"),
        sa.Index(None, "thumbnail_sha256", postgresql_where=sa.text("thumbnail_sha256 is not null")),
        *(
            # Flat pictures have 0: a partial index would leave them out too, but the planner asks no statistics of one.
            sa.Index(
                f"ix_reference_image_fingerprint_band_{number}", sa.text(f"(nullif(fingerprint, 0) & '{band}'::bigint)")
            )
            for number, band in enumerate(FINGERPRINT_BANDS)
        ),
    )

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(always=True), primary_key=True)
    sha256: Mapped[bytes] = mapped_column(unique=True)
    label: Mapped[int] = mapped_column(sa.SmallInteger)
    generator_id: Mapped[int | None] = mapped_column(sa.ForeignKey("generator.id"))
    source: Mapped[str]
    group: Mapped[str]
    uri: Mapped[str | None]
    file_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    mtime: Mapped[float | None]
    width: Mapped[int]
    height: Mapped[int]
    format: Mapped[str]
    jpeg_quality: Mapped[int | None] = mapped_column(sa.SmallInteger)
    fingerprint: Mapped[int | None] = mapped_column(sa.BigInteger)
    thumbnail: Mapped[bytes | None]
    thumbnail_sha256: Mapped[bytes | None]
    attributes: Mapped[dict[str, str]]
    enrolment_id: Mapped[int | None] = mapped_column(sa.ForeignKey("enrolment.id", ondelete="SET NULL"))
    added_at: Mapped[datetime] = mapped_column(server_default=sa.func.now())


class ReferenceCountRow(Base):
    """How many references of one label, generator and source there are; no row for none."""

    __tablename__ = "reference_count"
    __table_args__ = (
        sa.Index("uq_reference_count_kind", "label", sa.text("coalesce(generator_id, 0)"), "source", unique=True),
    )

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(always=True), primary_key=True)
    label: Mapped[int] = mapped_column(sa.SmallInteger)
    generator_id: Mapped[int | None] = mapped_column(sa.ForeignKey("generator.id", ondelete="CASCADE"))
    source: Mapped[str]
    images: Mapped[int] = mapped_column(sa.BigInteger)


PICTURED = ReferenceRow.thumbnail.is_not(None) | ReferenceRow.thumbnail_sha256.is_not(None)
"""Whether a reference has a thumbnail, here or in object storage."""


class ReferenceFileRow(Base):
    """The bytes of a reference that came over HTTP, or the name of their object, for a later checkpoint to embed."""

    __tablename__ = "reference_file"
    __table_args__ = (
        sa.CheckConstraint("num_nonnulls(bytes, sha256) = 1", name="bytes_or_sha256"),
        sa.Index(None, "sha256", postgresql_where=sa.text("sha256 is not null")),
    )

    image_id: Mapped[int] = mapped_column(
        sa.BigInteger, sa.ForeignKey("reference_image.id", ondelete="CASCADE"), primary_key=True
    )
    sha256: Mapped[bytes | None]
    bytes: Mapped[bytes | None]


class BlobOutboxRow(Base):
    """A name of an object that a row had until it was deleted: the object goes too, unless another row names it."""

    __tablename__ = "blob_outbox"

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(always=True), primary_key=True)
    sha256: Mapped[bytes]
    at: Mapped[datetime] = mapped_column(server_default=sa.func.now())


class BlockedHashRow(Base):
    """Images that were removed with `--forget` and may not come back."""

    __tablename__ = "blocked_hash"

    sha256: Mapped[bytes] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=sa.func.now())


class RevisionRow(Base):
    """The revision that followers of a checkpoint have to reach. Its row lock orders the writers."""

    __tablename__ = "index_revision"

    checkpoint_id: Mapped[str] = mapped_column(sa.ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    revision: Mapped[int] = mapped_column(sa.BigInteger, server_default=sa.text("0"))


class TimelineRow(Base):
    """A revision that was committed, and its nonce: a restored backup reaches the same numbers by another history."""

    __tablename__ = "timeline"

    checkpoint_id: Mapped[str] = mapped_column(sa.ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    revision: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    nonce: Mapped[UUID] = mapped_column(server_default=sa.text("gen_random_uuid()"))


class ShipmentRow(Base):
    """How far a checkpoint's references are in a search engine: its collection, and the time that searches name."""

    __tablename__ = "shipment"

    checkpoint_id: Mapped[str] = mapped_column(sa.ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    collection: Mapped[str]
    revision: Mapped[int] = mapped_column(sa.BigInteger)
    nonce: Mapped[UUID | None]
    timestamp: Mapped[int] = mapped_column(sa.BigInteger)
    real: Mapped[int] = mapped_column(sa.BigInteger)
    fake: Mapped[int] = mapped_column(sa.BigInteger)
    recall: Mapped[float] = mapped_column(sa.Double)


class EmbeddingRow(Base):
    """What a checkpoint made of an image: raw float32, little-endian."""

    __tablename__ = "embedding"
    __table_args__ = (sa.Index(None, "checkpoint_id", "revision", "image_id"),)

    image_id: Mapped[int] = mapped_column(
        sa.BigInteger, sa.ForeignKey("reference_image.id", ondelete="CASCADE"), primary_key=True
    )
    checkpoint_id: Mapped[str] = mapped_column(sa.ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    vector: Mapped[bytes]
    revision: Mapped[int] = mapped_column(sa.BigInteger)


class RemovalRow(Base):
    """An image that a follower of this checkpoint has to drop. Never pruned: ids are never reused."""

    __tablename__ = "removal"
    __table_args__ = (sa.Index(None, "checkpoint_id", "revision"),)

    checkpoint_id: Mapped[str] = mapped_column(sa.ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    image_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    revision: Mapped[int] = mapped_column(sa.BigInteger)


class CalibrationRow(Base):
    """Score maps and thresholds that were fitted at one revision of the index."""

    __tablename__ = "calibration"

    checkpoint_id: Mapped[str] = mapped_column(sa.ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    heads_id: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    params: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=sa.func.now())


class ApiKeyRow(Base):
    """A key for the HTTP interface; only its hash is kept."""

    __tablename__ = "api_key"

    id: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(always=True), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    hash: Mapped[bytes] = mapped_column(unique=True)
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(server_default=sa.func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class DetectionRow(Base):
    """A verdict as it was given. It outlives the references and checkpoint it names, hence no foreign keys to them."""

    __tablename__ = "detection"
    __table_args__ = (
        sa.Index(None, "at", "id"),
        sa.Index(None, "api_key_id", "at", "id"),
        sa.Index(None, "sha256"),
        sa.Index(None, "thumbnail_sha256", postgresql_where=sa.text("thumbnail_sha256 is not null")),
        sa.Index("ix_detection_with_thumbnail", "id", postgresql_where=sa.text("thumbnail is not null")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=sa.func.now())
    sha256: Mapped[bytes]
    file_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    width: Mapped[int] = mapped_column(sa.Integer)
    height: Mapped[int] = mapped_column(sa.Integer)
    vector: Mapped[bytes]
    result: Mapped[dict[str, Any]]
    checkpoint_id: Mapped[str]
    heads_id: Mapped[str | None]
    revision: Mapped[int] = mapped_column(sa.BigInteger)
    api_key_id: Mapped[int | None] = mapped_column(sa.ForeignKey("api_key.id", ondelete="SET NULL"))
    feedback: Mapped[dict[str, Any] | None]
    thumbnail: Mapped[bytes | None]
    thumbnail_sha256: Mapped[bytes | None]


class JobRow(Base):
    """Images that are judged in the background, and what became of them so far."""

    __tablename__ = "job"
    __table_args__ = (
        sa.Index(None, "at", "id"),
        sa.Index("ix_job_unfinished", "taken_at", "id", postgresql_where=sa.text("ended_at is null")),
        sa.Index("uq_job_idempotency_key", sa.text("coalesce(api_key_id, 0)"), "idempotency_key", unique=True),
        sa.Index("ix_job_untold", "ended_at", postgresql_where=sa.text("webhook_state = 'pending'")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=sa.text("gen_random_uuid()"))
    at: Mapped[datetime] = mapped_column(server_default=sa.func.clock_timestamp())
    ended_at: Mapped[datetime | None]
    state: Mapped[str] = mapped_column(server_default="queued")
    question: Mapped[dict[str, Any]]
    images: Mapped[int]
    fake: Mapped[int] = mapped_column(server_default=sa.text("0"))
    real: Mapped[int] = mapped_column(server_default=sa.text("0"))
    uncertain: Mapped[int] = mapped_column(server_default=sa.text("0"))
    failed: Mapped[int] = mapped_column(server_default=sa.text("0"))
    kept_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    api_key_id: Mapped[int | None] = mapped_column(sa.ForeignKey("api_key.id", ondelete="SET NULL"))
    webhook: Mapped[str | None]
    webhook_state: Mapped[str | None]
    webhook_error: Mapped[str | None]
    leased_until: Mapped[datetime | None]
    taken_at: Mapped[datetime] = mapped_column(server_default=sa.func.clock_timestamp())
    idempotency_key: Mapped[str | None]


class JobImageRow(Base):
    """An image of a job: to be judged until it has a result, and then without its bytes."""

    __tablename__ = "job_image"
    __table_args__ = (
        sa.Index("ix_job_image_waiting", "job_id", "fetched", "number", postgresql_where=sa.text("result is null")),
    )

    job_id: Mapped[UUID] = mapped_column(sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[str]
    fetched: Mapped[bool]
    file_bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    bytes: Mapped[bytes | None]
    attempts: Mapped[int] = mapped_column(sa.SmallInteger, server_default=sa.text("0"))
    leased_until: Mapped[datetime | None]
    # Not JSONB, which refuses a NUL: what a file says of itself may hold one.
    result: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
