"""What the store holds and how far its index is, as `lineup index status --json` prints it."""

from typing import Any

from indexer.database.connection import address, read_url
from indexer.follower import Follower
from indexer.measure.calibrate import latest_calibration
from indexer.measure.drift import drift
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.checkpoints import Checkpoint
from indexer.store.enrolments import Enrolment
from indexer.store.generators import GENERATOR_FACTS

ENROLMENTS = 5


def store_status(settings: Settings, store: Store, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Counts of rows, and the state of the index that a service would have now.

    `not_embedded` counts references that searches with this checkpoint do not find; an enrolment's `references` are
    those that are still there.

    Args:
        settings: Where database and snapshots are.
        store: The rows.
        checkpoint: Whose index; None in a store without any.
    """
    references = store.references.counts()
    status: dict[str, Any] = {
        "checkpoint": None,
        "name": None,
        "active": False,
        "revision": 0,
        "not_embedded": 0,
        "references": references,
        "generators": [
            {"name": one.name, "references": one.references}
            | {name: getattr(one, name) for name in GENERATOR_FACTS[1:]}
            for one in store.generators.list()
        ],
        "sources": [{"name": name, "references": count} for name, count in store.references.sources().items()],
        "index": {"kind": None, "device": None, "size": 0, "revision": 0},
        "calibration": None,
        "drift": None,
        "store": store.id(),
        "database": _database(settings),
        "checkpoints": [
            {"id": one.id, "name": one.name, "dim": one.dim, "active": one.active} for one in store.checkpoints.list()
        ],
        "enrolments": [_enrolment(one) for one in store.enrolments.list(limit=ENROLMENTS)],
    }
    if checkpoint is None:
        return status
    follower = Follower(settings, store, checkpoint.id, checkpoint.dim)
    follower.load()
    index = follower.index
    saved = store.calibrations.load(checkpoint.id)
    return status | {
        "checkpoint": checkpoint.id,
        "name": checkpoint.name,
        "active": checkpoint.active,
        "revision": store.checkpoints.revision(checkpoint.id),
        "not_embedded": max(0, sum(references.values()) - len(index)),
        "index": {
            "kind": index.kind,
            "device": index.device,
            "size": len(index),
            "revision": follower.revision,
            "recall": index.recall,
        },
        "drift": drift(store, checkpoint.id, latest_calibration(store, checkpoint.id)),
        "calibration": None
        if saved is None
        else {
            "revision": saved.revision,
            "real": saved.params["n_real"],
            "fake": saved.params["n_fake"],
            "new_sources": saved.params.get("new_sources"),
        },
    }


def _database(settings: Settings) -> str:
    if settings.database_url is None:
        return f"embedded in {settings.home.absolute() / 'postgres'}"
    return address(read_url(settings.database_url))


def _enrolment(enrolment: Enrolment) -> dict[str, Any]:
    report = enrolment.report or {}
    return {
        "id": enrolment.id,
        "at": enrolment.at.isoformat(timespec="seconds"),
        "generator": enrolment.generator,
        "source": enrolment.source,
        "added": report.get("added"),
        "references": enrolment.references,
        "effect": report.get("effect"),
    }
