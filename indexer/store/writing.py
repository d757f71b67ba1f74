"""Adding references: one short transaction each, revisions in the order of their commits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import Connection, make_url, text

from indexer.database.tables import ReferenceRow
from indexer.database.transactions import PassingConflict, notify
from indexer.index.vector_checks import BadVectors, unit_vectors
from indexer.store.blobs import Blobs, Kept
from indexer.store.checkpoints import CheckpointSwitched
from indexer.store.counts import count_added
from indexer.store.generators import generator_ids
from indexer.store.reference_facts import NewReference, kind

POSTGRES = make_url("postgresql+psycopg://").get_dialect()()
ROW_COLUMNS = [
    column for column in ReferenceRow.__table__.columns if column.name not in {"id", "enrolment_id", "added_at"}
]
# The columns of the temporary table that a batch is copied to, and their types.
INCOMING = {
    "position": "integer",
    **{column.name: column.type.compile(POSTGRES).lower() for column in ROW_COLUMNS},
    "vector": "bytea",
    "bytes": "bytea",
    "file_sha256": "bytea",
}
ROW_NAMES = ", ".join(f'"{column.name}"' for column in ROW_COLUMNS)
CREATE = f"""create temporary table incoming ({", ".join(f'"{name}" {kind}' for name, kind in INCOMING.items())})
on commit drop"""
BLOCK = "delete from incoming i using blocked_hash b where b.sha256 = i.sha256 returning i.position, i.sha256"
# The same order everywhere, so that two writers of the same images wait for each other instead of deadlocking.
INSERT = f"""insert into reference_image ({ROW_NAMES}, enrolment_id)
select distinct on (sha256) {ROW_NAMES}, cast(:enrolment as bigint) from incoming order by sha256, position
on conflict (sha256) do nothing returning id"""
LOCK = "select revision from index_revision where checkpoint_id = :checkpoint for update"
KEEP_FILES = """insert into reference_file (image_id, bytes, sha256)
select distinct on (r.id) r.id, i.bytes, i.file_sha256 from incoming i join reference_image r using (sha256)
where num_nonnulls(i.bytes, i.file_sha256) > 0 order by r.id, i.position on conflict do nothing"""
MATCH = """select i.position, r.id, r.sha256, r.label, r.generator_id, g.name as generator,
       i.label = r.label and i.generator_id is not distinct from r.generator_id as agrees
from incoming i join reference_image r using (sha256) left join generator g on g.id = r.generator_id
order by i.position"""
KEEP_THUMBNAILS = """update reference_image r set thumbnail = i.thumbnail, thumbnail_sha256 = i.thumbnail_sha256
from incoming i
where i.sha256 = r.sha256 and num_nulls(r.thumbnail, r.thumbnail_sha256) = 2
and num_nulls(i.thumbnail, i.thumbnail_sha256) < 2
and i.label = r.label and i.generator_id is not distinct from r.generator_id"""
EMBED = """insert into embedding (image_id, checkpoint_id, vector, revision)
select distinct on (r.id) r.id, :checkpoint, i.vector, :revision from incoming i join reference_image r using (sha256)
where i.label = r.label and i.generator_id is not distinct from r.generator_id
order by r.id, i.position on conflict do nothing returning image_id"""
STAMP = """with stamped as (
    update index_revision set revision = :revision where checkpoint_id = :checkpoint returning checkpoint_id, revision)
insert into timeline (checkpoint_id, revision) select checkpoint_id, revision from stamped"""
ACTIVE = "select active from checkpoint where id = :checkpoint"

EMBED_KNOWN = """insert into embedding (image_id, checkpoint_id, vector, revision)
select r.id, :checkpoint, i.vector, :revision
from unnest(cast(:ids as bigint[]), cast(:vectors as bytea[])) i (id, vector) join reference_image r on r.id = i.id
order by r.id on conflict do nothing"""


class BadVector(ValueError):
    """An embedding that may not be stored: wrong length, not finite, or zero."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """The same bytes are stored with another label or generator; `position` counts from 0 in the batch."""

    position: int
    sha256: str
    id: int
    has: str
    wants: str


@dataclass(frozen=True, slots=True)
class Added:
    """What one `add` did.

    Attributes:
        ids: Row of each item of the batch, None where its hash is blocked; of a conflict the row that stands.
        added: Rows that are new.
        new: Where in the batch they are, each once.
        known: Rows that were there, embedded by this checkpoint already.
        embedded: Rows that were there, but not embedded by this checkpoint until now.
        conflicts: Same bytes, other label or generator; nothing was changed.
        blocked: Hashes that were removed for good.
        revision: Of the checkpoint's index after this.
    """

    ids: list[int | None]
    added: int
    new: list[int]
    known: int
    embedded: int
    conflicts: list[Conflict]
    blocked: list[str]
    revision: int


def add(
    connection: Connection,
    blobs: Blobs,
    batch: Sequence[NewReference],
    vectors: Sequence[bytes],
    checkpoint_id: str,
    enrolment: int | None,
    while_active: bool,
) -> Added:
    """Store a batch, with one vector as `stored_vector` gives it for each image, in this transaction."""
    # Before any row is locked: object storage may be slow.
    thumbnails = blobs.keep(connection, [item.thumbnail for item in batch])
    files = blobs.keep(connection, [item.data for item in batch])
    generators = generator_ids(connection, {item.generator for item in batch if item.generator is not None})
    _copy(connection, batch, vectors, generators, thumbnails, files)
    blocked = {row.position: row.sha256.hex() for row in connection.execute(text(BLOCK))}
    # Rows that nobody sees yet need no lock, and their thumbnails take most of the time.
    inserted = {row.id for row in connection.execute(text(INSERT), {"enrolment": enrolment})}
    connection.execute(text(KEEP_FILES))
    revision = _lock(connection, checkpoint_id)  # which the switch to another checkpoint waits for, and makes wait
    if while_active and not connection.scalar(text(ACTIVE), {"checkpoint": checkpoint_id}):
        raise CheckpointSwitched(f"the active checkpoint is no longer {checkpoint_id}: run the command again")
    connection.execute(text(KEEP_THUMBNAILS))
    blobs.note_spare(connection, thumbnails + files)
    matches = connection.execute(text(MATCH)).all()
    if len(matches) + len(blocked) < len(batch):
        raise PassingConflict("a row was removed after its image was found to be known")
    new = {"checkpoint": checkpoint_id, "revision": revision + 1}
    embedded = {row.image_id for row in connection.execute(text(EMBED), new)}
    if embedded:
        revision += 1
        _stamp(connection, checkpoint_id, revision)
    count_added(connection, list(inserted))
    ids: list[int | None] = [None] * len(batch)
    conflicts = []
    for match in matches:
        ids[match.position] = match.id
        if not match.agrees:
            item = batch[match.position]
            has, wants = kind(match.label, match.generator), kind(item.label, item.generator)
            conflicts.append(Conflict(match.position, match.sha256.hex(), match.id, has, wants))
    first = {image_id: position for position, image_id in reversed(list(enumerate(ids)))}
    return Added(
        ids=ids,
        added=len(inserted),
        new=sorted(first[image_id] for image_id in inserted),
        embedded=len(embedded - inserted),
        known=len(batch) - len(blocked) - len(conflicts) - len(embedded | inserted),
        conflicts=conflicts,
        blocked=sorted(set(blocked.values())),
        revision=revision,
    )


def embed(connection: Connection, ids: Sequence[int], vectors: Sequence[bytes], checkpoint_id: str) -> int:
    """Store embeddings of references that exist, in this transaction; returns how many were new."""
    revision = _lock(connection, checkpoint_id) + 1
    values = {"ids": list(ids), "vectors": list(vectors), "checkpoint": checkpoint_id, "revision": revision}
    count = connection.execute(text(EMBED_KNOWN), values).rowcount
    if count:
        _stamp(connection, checkpoint_id, revision)
    return count


def _lock(connection: Connection, checkpoint_id: str) -> int:
    """The revision, locked: revisions become visible in the order of commits, and nothing is removed meanwhile."""
    return int(connection.execute(text(LOCK), {"checkpoint": checkpoint_id}).scalar_one())


def _stamp(connection: Connection, checkpoint_id: str, revision: int) -> None:
    connection.execute(text(STAMP), {"checkpoint": checkpoint_id, "revision": revision})
    notify(connection, f"{checkpoint_id} {revision}")


def _copy(
    connection: Connection,
    batch: Sequence[NewReference],
    vectors: Sequence[bytes],
    generators: dict[str, int],
    thumbnails: Sequence[Kept],
    files: Sequence[Kept],
) -> None:
    connection.execute(text(CREATE))
    driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
    with driver.cursor() as cursor, cursor.copy("copy incoming from stdin (format binary)") as copy:
        copy.set_types(list(INCOMING.values()))
        rows = zip(batch, vectors, thumbnails, files, strict=True)
        for position, (item, vector, thumbnail, file) in enumerate(rows):
            values = {
                "position": position,
                "sha256": bytes.fromhex(item.sha256),
                "generator_id": None if item.generator is None else generators[item.generator.lower()],
                "vector": vector,
                "thumbnail": thumbnail.data,
                "thumbnail_sha256": thumbnail.sha256,
                "bytes": file.data,
                "file_sha256": file.sha256,
            }
            copy.write_row([values[name] if name in values else _storable(getattr(item, name)) for name in INCOMING])
    connection.execute(text("analyze incoming (sha256)"))


def stored_vector(vector: np.ndarray, dim: int) -> bytes:
    """The vector's bytes; what the index would refuse is not stored, or it could never follow."""
    array = np.asarray(vector, "<f4")
    try:
        unit_vectors(array[None], dim)
    except BadVectors as error:
        raise BadVector(str(error)) from error
    return array.tobytes()


def _storable(value: Any) -> Any:
    if isinstance(value, dict):
        return Jsonb({_clean(key): _clean(text) for key, text in value.items()})
    return _clean(value) if isinstance(value, str) else value


def _clean(value: str) -> str:
    """Without what Postgres cannot hold: NUL, and the stand-ins for bytes of a file name that are not UTF-8."""
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "")
