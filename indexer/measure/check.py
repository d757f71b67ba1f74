"""Whether rows, index and snapshot of a checkpoint say the same, and rows and object storage."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np

from indexer.follower import Follower
from indexer.index.index import Contents
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.blobs import SHARDS
from indexer.store.changes import Additions
from indexer.store.checkpoints import Checkpoint

ATTEMPTS = 5
# Half precision keeps eleven bits of each component of a unit vector.
TOLERANCE = 1e-3


@dataclass(slots=True)
class Agreement:
    """The comparison at one revision.

    Attributes:
        checkpoint: Its id.
        name: Its name.
        revision: The revision of the rows.
        rows: Embeddings in Postgres.
        index: Vectors in the index as a service would load it now: the snapshot, and what was written since.
        snapshot: Revision of the snapshot, None where there is none (which loses nothing).
        problems: What differs.
    """

    checkpoint: str
    name: str
    revision: int = 0
    rows: int = 0
    index: int = 0
    snapshot: int | None = None
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        snapshot = "no snapshot" if self.snapshot is None else f"snapshot of revision {self.snapshot}"
        counts = f"revision {self.revision}, {self.rows:,} rows, {self.index:,} in the index, {snapshot}"
        return f"{self.name} {self.checkpoint}: {counts}: {'; '.join(self.problems) or 'they agree'}"


def compare(settings: Settings, store: Store, checkpoint: Checkpoint) -> Agreement:
    """Read everything that the rows and the index hold, and compare ids, labels, generators, sources and vectors."""
    follower = Follower(settings, store, checkpoint.id, checkpoint.dim)
    follower.load()
    result = Agreement(checkpoint.id, checkpoint.name, snapshot=follower.saved_revision)
    fault = follower.copy.fault
    for _ in range(ATTEMPTS):  # someone may be writing
        result.revision = follower.catch_up()
        result.problems = _differences(result, follower, store)
        if not result.problems or store.checkpoints.revision(checkpoint.id) == result.revision:
            break
    if fault:
        result.problems.append(fault)
    return result


@dataclass(slots=True)
class BlobAgreement:
    """The comparison of names in rows and objects.

    Attributes:
        objects: How many there were.
        bytes: Of all of them.
        missing: Hexadecimal names in rows that have no object.
        orphans: Objects that no row names and that are older than was asked for, and still there.
        deleted: Objects that were deleted, with those that the outbox noted.
    """

    objects: int = 0
    bytes: int = 0
    missing: list[str] = field(default_factory=list)
    orphans: int = 0
    deleted: int = 0

    def __str__(self) -> str:
        counts = f"{self.objects:,} objects of {self.bytes:,} bytes, {self.deleted:,} deleted"
        missing = f"{len(self.missing)} missing, {self.missing[0]} for one: restore them" if self.missing else ""
        orphans = f"{self.orphans:,} that no row names: --repair deletes them" if self.orphans else ""
        return f"object storage: {counts}: {'; '.join(filter(None, (missing, orphans))) or 'all are named and there'}"


def compare_blobs(
    store: Store, *, repair: bool = False, hours: float = 24, on_shard: Callable[[], None] = lambda: None
) -> BlobAgreement:
    """Compare the names in rows with the objects; others may write meanwhile.

    Args:
        store: The rows.
        repair: Delete what the outbox notes, and orphans.
        hours: Orphans that were put later than so long ago do not count: their rows may be about to be committed.
        on_shard: Called once for each of the `SHARDS`.

    Raises:
        BlobsAway: Object storage cannot be used.
    """
    blobs, result = store.blobs, BlobAgreement()
    blobs.claim()
    if repair:
        result.deleted = blobs.drain()
    before = datetime.now(UTC) - timedelta(hours=hours)
    for shard in SHARDS:
        names = blobs.names(shard)  # first: what was named by then has been put
        stored = blobs.stored(shard)
        result.objects += len(stored)
        result.bytes += sum(blob.size for blob in stored.values())
        # What was dropped meanwhile may be deleted by now; what was named meanwhile is no orphan.
        result.missing += sorted(sha256.hex() for sha256 in blobs.named(names - stored.keys()))
        unnamed = {sha256 for sha256 in stored.keys() - names if stored[sha256].at < before}
        if repair:
            result.deleted += blobs.delete_unnamed(unnamed)
        else:
            result.orphans += len(unnamed - blobs.named(unnamed))
        on_shard()
    return result


def _differences(result: Agreement, follower: Follower, store: Store) -> list[str]:
    held = follower.copy.contents()
    ids = held.ids
    rows, wrong = 0, 0
    missing: list[int] = []
    for page in store.changes.between(follower.checkpoint_id, 0, result.revision):
        if not isinstance(page, Additions):
            continue
        rows += len(page.ids)
        at = np.searchsorted(ids, page.ids).clip(max=max(len(ids) - 1, 0))
        there = ids[at] == page.ids if len(ids) else np.zeros(len(page.ids), bool)
        missing += page.ids[~there].tolist()
        wrong += int((~_equal(page, there, held, at[there])).sum())
    result.rows, result.index = rows, len(ids)
    problems = []
    if missing:
        problems.append(f"{len(missing)} rows are not in the index, {missing[0]} for one")
    if surplus := len(ids) - (rows - len(missing)):
        problems.append(f"{surplus} vectors of the index have no row")
    if wrong:
        problems.append(f"{wrong} vectors of the index differ from their rows")
    return problems


def _equal(page: Additions, there: np.ndarray, held: Contents, at: np.ndarray) -> np.ndarray:
    """Which of the rows that are there are the same in the index, where they are `at`, shape (there.sum(),)."""
    unit = page.vectors[there] / np.linalg.norm(page.vectors[there], axis=1, keepdims=True)  # (m, d)
    return (  # type: ignore[no-any-return]
        (np.abs(unit - held.vectors[at]).max(1, initial=0) < TOLERANCE)
        & (held.labels[at] == page.labels[there])
        & (held.generators[at] == page.generators[there])
        & (held.sources[at] == np.array(page.sources, object)[there])
    )
