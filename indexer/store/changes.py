"""What followers of an index read: additions, then removals, between two revisions, and whether those still stand."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, LiteralString, NamedTuple, cast
from uuid import UUID

import numpy as np
import psycopg
from sqlalchemy import text

from indexer.database.transactions import Rows
from indexer.store.checkpoints import UnknownCheckpoint


@dataclass(frozen=True, slots=True)
class Additions:
    """One page of embeddings.

    Attributes:
        ids: Shape (n,), int64.
        vectors: As stored, shape (n, d), float32, any norm; read-only.
        labels: Shape (n,), int8, 0 real and 1 fake.
        generators: Generator ids, shape (n,), int64, -1 for none.
        sources: Names, n of them.
    """

    ids: np.ndarray
    vectors: np.ndarray
    labels: np.ndarray
    generators: np.ndarray
    sources: list[str]


@dataclass(frozen=True, slots=True)
class Removals:
    """Images that are gone: ids, shape (n,), int64. Some may never have been seen."""

    ids: np.ndarray


# All aggregates see the rows in one order, so position i means the same image in each.
ADDITIONS = """
select count(*), max(revision),
       string_agg(int8send(image_id), ''), string_agg(int8send(revision), ''), string_agg(vector, ''),
       string_agg(int2send(label), ''), string_agg(int8send(coalesce(generator_id, -1)), ''), array_agg(source)
from (
    select e.image_id, e.revision, e.vector, r.label, r.generator_id, r.source
    from embedding e join reference_image r on r.id = e.image_id
    where e.checkpoint_id = %(checkpoint)s and e.revision <= %(target)s
      and (e.revision, e.image_id) > (%(revision)s, %(image)s)
    order by e.revision, e.image_id limit %(page)s
) page
"""
REMOVALS = """
select string_agg(int8send(image_id), '') from removal
where checkpoint_id = %(checkpoint)s and revision > %(seen)s and revision <= %(target)s
"""
LAST_REMOVED = """
select string_agg(int8send(image_id), '') from (
    select image_id from removal where checkpoint_id = %(checkpoint)s order by revision desc limit %(count)s
) recent
"""
EMBEDDED = (
    "select string_agg(int8send(image_id), '' order by image_id) from embedding where checkpoint_id = %(checkpoint)s"
)
NUMBER_EMBEDDED = text("select count(*) from embedding where checkpoint_id = :checkpoint")

POSITION = text("""
select r.revision, latest.nonce, seen.nonce as seen_nonce
from index_revision r
left join timeline latest using (checkpoint_id, revision)
left join timeline seen on seen.checkpoint_id = r.checkpoint_id and seen.revision = :seen
where r.checkpoint_id = :checkpoint
""")


class Position(NamedTuple):
    """A revision in one history of the rows; `nonce` is drawn at random when it is committed, None before the first."""

    revision: int = 0
    nonce: UUID | None = None


class Changes(Rows):
    """The reading side of the revision rules.

    A backup that is restored and then written to reaches revision numbers that were there before, with other rows
    behind them: the number alone would let an old index pass for complete. Hence a follower remembers its position.
    """

    def between(
        self, checkpoint_id: str, seen: int, target: int, *, page: int = 20_000
    ) -> Iterator[Additions | Removals]:
        """Everything with seen < revision <= target: pages of additions first, then one of removals.

        Take `target` from `position` before calling; then this is complete whatever others write meanwhile,
        and applying all of it makes `target` the new `seen`. `between(checkpoint_id, 0, target)` is a full load (its
        removals are of ids that never come, and may be skipped).
        """
        place: dict[str, object] = {"checkpoint": checkpoint_id, "target": target, "page": page}
        place |= {"revision": seen, "image": 2**63 - 1}  # after everything that was seen
        count = page
        while count == page:
            count, revision, ids, revisions, vectors, labels, generators, sources = self._row(ADDITIONS, place)
            if count:
                numbers = unpacked(ids)
                latest = unpacked(revisions) == revision
                place |= {"revision": revision, "image": int(numbers[latest].max())}
                yield Additions(
                    ids=numbers,
                    vectors=np.frombuffer(vectors, "<f4").reshape(count, -1),  # (n, d)
                    labels=np.frombuffer(labels, ">i2").astype(np.int8),
                    generators=unpacked(generators),
                    sources=sources,
                )
        (gone,) = self._row(REMOVALS, {"checkpoint": checkpoint_id, "seen": seen, "target": target})
        if gone:
            yield Removals(unpacked(gone))

    def last_removed(self, checkpoint_id: str, count: int) -> np.ndarray:
        """Ids of the latest removals, at most so many, shape (n,), int64, in any order."""
        (ids,) = self._row(LAST_REMOVED, {"checkpoint": checkpoint_id, "count": count})
        return unpacked(ids)

    def embedded(self, checkpoint_id: str) -> int:
        """How many references have an embedding now."""
        return int(self.read(NUMBER_EMBEDDED, {"checkpoint": checkpoint_id})[0]["count"])

    def embedded_ids(self, checkpoint_id: str) -> np.ndarray:
        """Ids that have an embedding now, shape (n,), int64, ascending."""
        (ids,) = self._row(EMBEDDED, {"checkpoint": checkpoint_id})
        return unpacked(ids)

    def position(self, checkpoint_id: str, seen: Position) -> tuple[Position, bool]:
        """The latest committed position of a checkpoint's index, and whether its history went through `seen`.

        Raises:
            UnknownCheckpoint: It was never registered.
        """
        row = self.read_one(POSITION, {"checkpoint": checkpoint_id, "seen": seen.revision})
        if row is None:
            raise UnknownCheckpoint(f"the store has no embeddings of checkpoint {checkpoint_id}")
        return Position(row["revision"], row["nonce"]), row["seen_nonce"] == seen.nonce

    def _row(self, query: LiteralString, values: Mapping[str, object]) -> Any:
        """One row, fetched in binary: a text reply would be twice as long."""
        with self.engine.connect() as connection:
            driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
            # Starting workers and passing rows between them takes three times as long as reading a page alone.
            driver.execute("set local max_parallel_workers_per_gather = 0")
            return driver.cursor(binary=True).execute(query, values).fetchone()


def unpacked(data: bytes | None) -> np.ndarray:
    """What `string_agg` of `int8send` packed, shape (n,), int64; of no rows it is None, and nothing."""
    return np.frombuffer(data or b"", ">i8").astype(np.int64)
