"""Reading reference images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import ARRAY, BigInteger, ColumnElement, LargeBinary, Row, Select, Text, any_, func, literal, select

from indexer.database.tables import BlockedHashRow, EmbeddingRow, GeneratorRow, ReferenceFileRow, ReferenceRow
from indexer.database.transactions import Rows

LABELS = ("real", "fake")


def kind(label: int, generator: str | None) -> str:
    """A label in words, with the generator where there is one."""
    return LABELS[label] if generator is None else f"{LABELS[label]} ({generator})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What is kept of an image beside its pixels.

    Attributes:
        sha256: Of the file's bytes, hexadecimal.
        label: 0 real, 1 fake.
        generator: Name, None for real images (and for fakes of which it is not known).
        source: The data set or feed it came from.
        group: Images that must not be split apart share it.
        uri: Where the bytes can be read again; None for uploads.
        file_bytes: Size of the file.
        mtime: Modification time of the file in seconds, for skipping it next time.
        width: Of the upright image, pixels.
        height: Of the upright image, pixels.
        format: As Pillow names it.
        jpeg_quality: Estimate 1..100, None for other formats.
        fingerprint: 64-bit difference hash of the pixels as a signed integer; near duplicates differ in few bits.
        attributes: Anything else that is known.
    """

    sha256: str
    label: int
    generator: str | None
    source: str
    group: str
    uri: str | None
    file_bytes: int
    mtime: float | None
    width: int
    height: int
    format: str
    jpeg_quality: int | None
    fingerprint: int | None = None
    attributes: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference(ImageFacts):
    """A known image, without its thumbnail."""

    id: int
    enrolment_id: int | None
    added_at: datetime


@dataclass(frozen=True, slots=True)
class Known:
    """What decides whether a file has to be read: its row, and whether this checkpoint has embedded it."""

    id: int
    sha256: str
    label: int
    generator: str | None
    embedded: bool


class References(Rows):
    """Look-ups by id, hash and filter."""

    def get(self, image_id: int) -> Reference | None:
        """One reference."""
        return self.get_many([image_id]).get(image_id)

    def get_many(self, image_ids: Iterable[int], hashes: Sequence[str] = ()) -> dict[int, Reference]:
        """References by id, and those of exactly these bytes (hexadecimal); what is not known is left out."""
        ids = literal([int(image_id) for image_id in image_ids], ARRAY(BigInteger))
        wanted: ColumnElement[bool] = ReferenceRow.id == any_(ids)
        if hashes:
            wanted |= ReferenceRow.sha256 == any_(_binary(hashes))
        return {reference.id: reference for reference in self._select(_references().where(wanted))}

    def find(self, sha256: str) -> Reference | None:
        """The reference with exactly these bytes (hexadecimal hash)."""
        query = _references().where(ReferenceRow.sha256 == bytes.fromhex(sha256))
        return next(iter(self._select(query)), None)

    def thumbnail(self, image_id: int) -> bytes | None:
        """JPEG bytes, longest side at most 256."""
        with self.engine.connect() as connection:
            return connection.scalar(select(ReferenceRow.thumbnail).where(ReferenceRow.id == image_id))

    def file(self, image_id: int) -> bytes | None:
        """The bytes of an image that came over HTTP, where they were kept."""
        with self.engine.connect() as connection:
            return connection.scalar(select(ReferenceFileRow.bytes).where(ReferenceFileRow.image_id == image_id))

    def counts(self) -> dict[str, int]:
        """How many references there are: {"real": n, "fake": n}."""
        query = select(ReferenceRow.label, func.count().label("images")).group_by(ReferenceRow.label)
        with self.engine.connect() as connection:
            found = {row.label: row.images for row in connection.execute(query)}
        return {name: found.get(label, 0) for label, name in enumerate(LABELS)}

    def sources(self) -> dict[str, int]:
        """How many references each source has."""
        counted = select(ReferenceRow.source, func.count().label("images"))
        query = counted.group_by(ReferenceRow.source).order_by(ReferenceRow.source)
        with self.engine.connect() as connection:
            return {row.source: row.images for row in connection.execute(query)}

    def known_files(self, uris: Sequence[str], checkpoint_id: str) -> dict[tuple[str, int | None, float | None], Known]:
        """Rows of these uris, by (uri, size in bytes, mtime)."""
        query = _known(checkpoint_id).where(ReferenceRow.uri == any_(literal(list(uris), ARRAY(Text))))
        with self.engine.connect() as connection:
            rows = connection.execute(query).all()
        return {(row.uri, row.file_bytes, row.mtime): _as_known(row) for row in rows}

    def known_hashes(self, hashes: Sequence[str], checkpoint_id: str) -> dict[str, Known]:
        """Rows of these hashes (hexadecimal)."""
        query = _known(checkpoint_id).where(ReferenceRow.sha256 == any_(_binary(hashes)))
        with self.engine.connect() as connection:
            rows = connection.execute(query).all()
        return {row.sha256.hex(): _as_known(row) for row in rows}

    def blocked_hashes(self, hashes: Sequence[str]) -> set[str]:
        """Those of these hashes (hexadecimal) that were removed for good."""
        query = select(BlockedHashRow.sha256).where(BlockedHashRow.sha256 == any_(_binary(hashes)))
        with self.engine.connect() as connection:
            return {sha256.hex() for sha256 in connection.scalars(query)}

    # Last in its class: below it, `list` would mean this method.
    def list(
        self,
        *,
        label: int | None = None,
        generator: str | None = None,
        source: str | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> Sequence[Reference]:
        """References with ids above `after`, in order of id; filters narrow them down."""
        query = _references().where(ReferenceRow.id > after).order_by(ReferenceRow.id).limit(limit)
        if label is not None:
            query = query.where(ReferenceRow.label == label)
        if generator is not None:
            named = select(GeneratorRow.id).where(func.lower(GeneratorRow.name) == generator.lower())
            query = query.where(ReferenceRow.generator_id == named.scalar_subquery())
        if source is not None:
            query = query.where(ReferenceRow.source == source)
        return self._select(query)

    def _select(self, query: Select[Any]) -> Sequence[Reference]:
        # One statement needs no transaction, whose beginning and end are two more ways to the server and back.
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            rows = connection.execute(query).mappings().all()
        return [Reference(**{**row, "sha256": row["sha256"].hex()}) for row in rows]


def _binary(hashes: Sequence[str]) -> ColumnElement[Any]:
    return literal([bytes.fromhex(sha256) for sha256 in hashes], ARRAY(LargeBinary))


def _references() -> Select[Any]:
    left_out = {"thumbnail", "generator_id"}
    columns = [column for column in ReferenceRow.__table__.columns if column.name not in left_out]
    return select(*columns, GeneratorRow.name.label("generator")).outerjoin(
        GeneratorRow, GeneratorRow.id == ReferenceRow.generator_id
    )


def _known(checkpoint_id: str) -> Select[Any]:
    embedded = (EmbeddingRow.image_id == ReferenceRow.id) & (EmbeddingRow.checkpoint_id == checkpoint_id)
    query = (
        select(
            ReferenceRow.id,
            ReferenceRow.sha256,
            ReferenceRow.label,
            ReferenceRow.uri,
            ReferenceRow.file_bytes,
            ReferenceRow.mtime,
            GeneratorRow.name.label("generator"),
            EmbeddingRow.image_id.is_not(None).label("embedded"),
        )
        .outerjoin(GeneratorRow, GeneratorRow.id == ReferenceRow.generator_id)
        .outerjoin(EmbeddingRow, embedded)
    )
    return cast("Select[Any]", query)


def _as_known(row: Row[Any]) -> Known:
    return Known(row.id, row.sha256.hex(), row.label, row.generator, row.embedded)
