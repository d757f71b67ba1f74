"""Reference images: read, added, embedded and removed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    LargeBinary,
    RowMapping,
    Select,
    Text,
    any_,
    exists,
    func,
    literal,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import (
    PICTURED,
    BlockedHashRow,
    EmbeddingRow,
    GeneratorRow,
    ReferenceCountRow,
    ReferenceFileRow,
    ReferenceRow,
)
from indexer.database.transactions import TRANSACTION_IMAGES, Rows
from indexer.store import writing
from indexer.store.blobs import Blobs, Kept
from indexer.store.checkpoints import Checkpoints
from indexer.store.generators import Generators
from indexer.store.reference_facts import LABEL_NAMES, NewReference, Reference
from indexer.store.relabelling import Kind, Relabelled, relabel_all
from indexer.store.removing import Removed, remove_all


class ReferenceGone(LookupError):
    """A reference was removed while it was in use."""


@dataclass(frozen=True, slots=True)
class Known:
    """What decides whether a file has to be read: its row, and whether that has thumbnail and embedding."""

    id: int
    sha256: str
    label: int
    generator: str | None
    embedded: bool
    pictured: bool


READABLE = (func.coalesce(ReferenceRow.uri, "") != "") | exists().where(ReferenceFileRow.image_id == ReferenceRow.id)
UNREAD = {"thumbnail", "thumbnail_sha256", "generator_id"}
SortKey = Literal["label", "generator", "source"]

REFERENCES = select(
    *(column for column in ReferenceRow.__table__.columns if column.name not in UNREAD),
    GeneratorRow.name.label("generator"),
    PICTURED.label("pictured"),
).outerjoin(GeneratorRow, GeneratorRow.id == ReferenceRow.generator_id)


class References(Rows):
    """The only way to reference images and their embeddings."""

    def __init__(self, engine: Engine, checkpoints: Checkpoints, generators: Generators, blobs: Blobs) -> None:
        super().__init__(engine)
        self._checkpoints, self._generators, self._blobs = checkpoints, generators, blobs

    def get(self, image_id: int) -> Reference | None:
        """One reference."""
        return self.get_many([image_id]).get(image_id)

    def get_many(self, image_ids: Iterable[int], hashes: Sequence[str] = ()) -> dict[int, Reference]:
        """References by id, and those of exactly these bytes (hexadecimal); what is not known is left out."""
        criterion = _has_id(image_ids)
        if hashes:
            criterion |= ReferenceRow.sha256 == any_(_binary(hashes))
        return {reference.id: reference for reference in self._references(REFERENCES.where(criterion))}

    def find(self, sha256: str) -> Reference | None:
        """The reference with exactly these bytes (hexadecimal hash)."""
        return next(iter(self._references(REFERENCES.where(ReferenceRow.sha256 == bytes.fromhex(sha256)))), None)

    def find_prefix(self, prefix: str) -> Reference | None:
        """A reference whose hash begins with these hexadecimal digits, two for each byte."""
        lowest = bytes.fromhex(prefix)
        hashes = ReferenceRow.sha256.between(lowest.ljust(32, b"\0"), lowest.ljust(32, b"\xff"))
        return next(iter(self._references(REFERENCES.where(hashes).limit(1))), None)

    def thumbnail(self, image_id: int) -> bytes | None:
        """JPEG bytes, longest side at most 256; None where there is no such reference, or no picture of it.

        Raises:
            BlobsAway: It lies in object storage, which cannot be used.
        """
        query = select(ReferenceRow.thumbnail, ReferenceRow.thumbnail_sha256).where(ReferenceRow.id == image_id)
        row = self.read_one(query)
        return None if row is None else self._blobs.load(Kept(row["thumbnail"], row["thumbnail_sha256"]))

    def add_thumbnail(self, image_id: int, thumbnail: bytes) -> None:
        """Keep the thumbnail of a reference that has none.

        Raises:
            BlobsAway: It is to be kept in object storage, which cannot be used.
        """

        def work(connection: Connection) -> None:
            [kept] = self._blobs.keep(connection, [thumbnail])
            query = update(ReferenceRow).where(ReferenceRow.id == image_id, ~PICTURED)
            connection.execute(query.values(thumbnail=kept.data, thumbnail_sha256=kept.sha256))
            self._blobs.note_spare(connection, [kept])

        self.transaction(work)

    def add_file(self, image_id: int, data: bytes) -> None:
        """Keep the bytes of a reference that can be read nowhere.

        Raises:
            BlobsAway: They are to be kept in object storage, which cannot be used.
        """
        if self.readable(image_id):
            return

        def work(connection: Connection) -> None:
            [kept] = self._blobs.keep(connection, [data])
            values = (ReferenceRow.id, literal(kept.data, LargeBinary), literal(kept.sha256, LargeBinary))
            unread = select(*values).where(ReferenceRow.id == image_id, ~READABLE)
            unread = unread.with_for_update(read=True, key_share=True)  # or it might be removed before this is there
            columns = (ReferenceFileRow.image_id, ReferenceFileRow.bytes, ReferenceFileRow.sha256)
            connection.execute(insert(ReferenceFileRow).from_select(columns, unread).on_conflict_do_nothing())
            self._blobs.note_spare(connection, [kept])

        self.transaction(work)

    def file(self, image_id: int) -> bytes | None:
        """The bytes of an image that came over HTTP, where they were kept.

        Raises:
            BlobsAway: They lie in object storage, which cannot be used.
        """
        query = select(ReferenceFileRow.bytes, ReferenceFileRow.sha256).where(ReferenceFileRow.image_id == image_id)
        row = self.read_one(query)
        return None if row is None else self._blobs.load(Kept(row["bytes"], row["sha256"]))

    def readable(self, image_id: int) -> bool:
        """Whether the bytes of a reference lie at its uri or were kept. Object storage is not asked."""
        return bool(self.read_value(select(READABLE).where(ReferenceRow.id == image_id)))

    def vector(self, image_id: int, checkpoint_id: str) -> np.ndarray | None:
        """The embedding of a reference as stored, shape (d,), float32; None where this checkpoint made none."""
        one = (EmbeddingRow.image_id == image_id) & (EmbeddingRow.checkpoint_id == checkpoint_id)
        stored = self.read_value(select(EmbeddingRow.vector).where(one))
        return None if stored is None else np.frombuffer(stored, "<f4")

    def counts(self) -> dict[str, int]:
        """How many references there are: {"real": n, "fake": n}."""
        total = func.sum(ReferenceCountRow.images).label("images")
        query = select(ReferenceCountRow.label, total).group_by(ReferenceCountRow.label)
        images = {row["label"]: int(row["images"]) for row in self.read(query)}
        return {name: images.get(label, 0) for label, name in enumerate(LABEL_NAMES)}

    def sources(self) -> dict[str, int]:
        """How many references each source has."""
        source = ReferenceCountRow.source
        query = select(source, func.sum(ReferenceCountRow.images).label("images")).group_by(source).order_by(source)
        return {row["source"]: int(row["images"]) for row in self.read(query)}

    def known_files(self, uris: Sequence[str], checkpoint_id: str) -> dict[tuple[str, int | None, float | None], Known]:
        """Rows of these uris, by (uri, size in bytes, mtime)."""
        query = _known(checkpoint_id).where(ReferenceRow.uri == any_(literal(list(uris), ARRAY(Text))))
        return {(row["uri"], row["file_bytes"], row["mtime"]): _as_known(row) for row in self.read(query)}

    def known_hashes(self, hashes: Sequence[str], checkpoint_id: str) -> dict[str, Known]:
        """Rows of these hashes (hexadecimal)."""
        query = _known(checkpoint_id).where(ReferenceRow.sha256 == any_(_binary(hashes)))
        return {row["sha256"].hex(): _as_known(row) for row in self.read(query)}

    def blocked_hashes(self, hashes: Sequence[str]) -> set[str]:
        """Those of these hashes (hexadecimal) that were removed for good."""
        query = select(BlockedHashRow.sha256).where(BlockedHashRow.sha256 == any_(_binary(hashes)))
        return {row["sha256"].hex() for row in self.read(query)}

    def add(
        self,
        batch: Sequence[NewReference],
        checkpoint_id: str,
        enrolment: int | None = None,
        *,
        while_active: bool = False,
    ) -> writing.Added:
        """Store images with their embeddings; the same bytes twice change nothing, but bring a thumbnail that lacks.

        Args:
            batch: At most 1,000 images.
            checkpoint_id: What embedded them.
            enrolment: What they are part of.
            while_active: Only if this is the active checkpoint; otherwise what searches ask would lack them.

        Raises:
            CheckpointSwitched: It is not, though `while_active`.
            BadVector: A vector is not finite, zero, or not of the checkpoint's dimension.
            BadGeneratorName: A new generator's name breaks the rule.
            BlobsAway: Pictures are to be kept in object storage, which cannot be used.
            UnknownCheckpoint: The checkpoint was never registered.
            ValueError: More than 1,000 images.
        """
        if len(batch) > TRANSACTION_IMAGES:
            raise ValueError(f"{len(batch)} images in one transaction; {TRANSACTION_IMAGES} are allowed")
        dim = self._checkpoints.require(checkpoint_id).dim
        vectors = [writing.stored_vector(reference.vector, dim) for reference in batch]
        return self.transaction(
            lambda connection: writing.add(
                connection, self._blobs, batch, vectors, checkpoint_id, enrolment, while_active
            )
        )

    def embed(self, ids: Sequence[int], vectors: np.ndarray, checkpoint_id: str) -> int:
        """Store embeddings, shape (n, d), float32, of references that exist; returns how many were new.

        Raises:
            BadVector: A vector is not finite, zero, or not of the checkpoint's dimension.
            UnknownCheckpoint: The checkpoint was never registered.
        """
        dim = self._checkpoints.require(checkpoint_id).dim
        stored = [writing.stored_vector(vector, dim) for vector in vectors]
        numbers = [int(image_id) for image_id in ids]
        return self.transaction(lambda connection: writing.embed(connection, numbers, stored, checkpoint_id))

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
        return remove_all(self, self._selection(ids, generator, source, enrolment), forget)

    def relabel(
        self,
        kind: Kind | None,
        *,
        ids: Iterable[int] | None = None,
        generator: str | None = None,
        source: str | None = None,
        enrolment: int | None = None,
    ) -> Relabelled:
        """Change label and generator of references, chosen as for `remove`; those that change get new ids.

        Each keeps in its attributes what it was before. Vectors of all checkpoints and kept files stay.

        Args:
            kind: What they are; a generator that is new is created. None: what each was before it was relabelled.
            ids: These rows; unknown ones are passed over.
            generator: All of this generator.
            source: All from this source.
            enrolment: All that this enrolment added.

        Raises:
            UnknownGenerator: No generator has the name that they are chosen by.
            BadGeneratorName: The name of a new generator breaks the rule.
            ValueError: No criterion, or more than one.
        """
        return relabel_all(self, self._selection(ids, generator, source, enrolment), kind)

    def _selection(
        self, ids: Iterable[int] | None, generator: str | None, source: str | None, enrolment: int | None
    ) -> ColumnElement[bool]:
        criteria: list[ColumnElement[bool]] = []
        if ids is not None:
            criteria.append(_has_id(ids))
        if generator is not None:
            criteria.append(ReferenceRow.generator_id == self._generators.require(generator).id)
        if source is not None:
            criteria.append(ReferenceRow.source == source)
        if enrolment is not None:
            criteria.append(ReferenceRow.enrolment_id == enrolment)
        if len(criteria) != 1:
            raise ValueError("give one of ids, generator, source and enrolment")
        return criteria[0]

    def sorted(
        self,
        by: SortKey,
        *,
        label: int | None = None,
        generator: str | None = None,
        source: str | None = None,
        after: Reference | None = None,
        newest: bool = False,
        limit: int = 100,
    ) -> Sequence[Reference]:
        """As `list`, with everything of one label, generator or source together; each group is read by its index.

        Real images come first, then fakes of which no generator is known; names are in order of the alphabet.

        Args:
            by: What belongs together.
            label: 0 real, 1 fake.
            generator: Name, in any case.
            source: Name.
            after: The last one of the page before.
            newest: The newest of a group first.
            limit: How many at most.

        Raises:
            ReferenceGone: The last one of the page before was removed with all of its group.
        """
        groups = self._groups(by)
        names, rows = list(groups), list[Reference]()
        first = 0
        if after is not None:
            if _group(by, after) not in groups:
                raise ReferenceGone(f"there is no reference {after.id} to go on after")
            first = names.index(_group(by, after))
        filters = self._filters(label, generator, source)
        for name in names[first:]:
            last = after.id if after is not None and name == names[first] else 0
            rows += self._page([*filters, groups[name]], last, newest, limit - len(rows))
            if len(rows) == limit:
                break
        return rows

    def _groups(self, by: SortKey) -> dict[str, ColumnElement[bool]]:
        """Which references each group has, by its name, in order."""
        if by == "source":
            return {source: ReferenceRow.source == source for source in sorted(self.sources())}
        fakes = ReferenceRow.label == 1
        if by == "label":
            return {LABEL_NAMES[0]: ReferenceRow.label == 0, LABEL_NAMES[1]: fakes}
        counted = select(ReferenceCountRow.generator_id, GeneratorRow.name).distinct()
        rows = self.read(counted.join(GeneratorRow, GeneratorRow.id == ReferenceCountRow.generator_id))
        unnamed = ReferenceRow.generator_id.is_(None)
        return {LABEL_NAMES[0]: unnamed & (ReferenceRow.label == 0), LABEL_NAMES[1]: unnamed & fakes} | {
            f"fake {row['name']}": ReferenceRow.generator_id == row["generator_id"]
            for row in sorted(rows, key=lambda row: row["name"].lower())
        }

    def _filters(self, label: int | None, generator: str | None, source: str | None) -> list[ColumnElement[bool]]:
        filters: list[ColumnElement[bool]] = []
        if label is not None:
            filters.append(ReferenceRow.label == label)
        if generator is not None:
            named = select(GeneratorRow.id).where(func.lower(GeneratorRow.name) == generator.lower())
            filters.append(ReferenceRow.generator_id == named.scalar_subquery())
        if source is not None:
            filters.append(ReferenceRow.source == source)
        return filters

    def _page(
        self, filters: Iterable[ColumnElement[bool]], after: int, newest: bool, limit: int
    ) -> Sequence[Reference]:
        query = REFERENCES.order_by(ReferenceRow.id.desc() if newest else ReferenceRow.id).limit(limit)
        if after:
            query = query.where(ReferenceRow.id < after if newest else ReferenceRow.id > after)
        return self._references(query.where(*filters))

    def _references(self, query: Select[Any]) -> Sequence[Reference]:
        return [Reference(**{**row, "sha256": row["sha256"].hex()}) for row in self.read(query)]

    # Last in its class: below it, `list` would mean this method.
    def list(
        self,
        *,
        label: int | None = None,
        generator: str | None = None,
        source: str | None = None,
        after: int = 0,
        newest: bool = False,
        limit: int = 100,
    ) -> Sequence[Reference]:
        """References in order of id, or with `newest` against it, from `after` on (0: the first); filters narrow."""
        return self._page(self._filters(label, generator, source), after, newest, limit)


def _group(by: SortKey, reference: Reference) -> str:
    """The name of the group that a reference belongs to."""
    if by == "source":
        return reference.source
    label = LABEL_NAMES[reference.label]
    return label if by == "label" or reference.generator is None else f"{label} {reference.generator}"


def _binary(hashes: Sequence[str]) -> ColumnElement[Any]:
    return literal([bytes.fromhex(sha256) for sha256 in hashes], ARRAY(LargeBinary))


def _has_id(image_ids: Iterable[int]) -> ColumnElement[bool]:
    return ReferenceRow.id == any_(literal([int(image_id) for image_id in image_ids], ARRAY(BigInteger)))


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
            PICTURED.label("pictured"),
        )
        .outerjoin(GeneratorRow, GeneratorRow.id == ReferenceRow.generator_id)
        .outerjoin(EmbeddingRow, embedded)
    )
    return cast("Select[Any]", query)


def _as_known(row: RowMapping) -> Known:
    values = {name: row[name] for name in Known.__slots__}
    return Known(**values | {"sha256": row["sha256"].hex()})
