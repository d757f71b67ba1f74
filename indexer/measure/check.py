"""Whether rows, index and snapshot of a checkpoint say the same."""

from dataclasses import dataclass, field

import numpy as np

from indexer.follower import Follower
from indexer.index.index import Contents
from indexer.settings import Settings
from indexer.store import Store
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
        snapshot = "no good snapshot" if self.snapshot is None else f"snapshot of revision {self.snapshot}"
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
