"""The store: everything that is kept in Postgres, behind one object. Each noun has its own module."""

from indexer.database.transactions import CHANNEL
from indexer.store.changes import Additions, Changes, Removals
from indexer.store.checkpoints import (
    Checkpoint,
    CheckpointSwitched,
    SavedCalibration,
    UnknownCheckpoint,
    with_active_folder,
)
from indexer.store.detections import ApiKey, Detection, KeyExists, ListedDetection, Records
from indexer.store.generators import (
    BadGeneratorName,
    Enrolment,
    Generator,
    GeneratorExists,
    UnknownGenerator,
    check_generator_name,
)
from indexer.store.references import LABELS, Known, Reference, References, kind
from indexer.store.removing import Removed, Removing
from indexer.store.writing import Added, Adding, BadVector, Conflict, NewReference

__all__ = [
    "CHANNEL",
    "LABELS",
    "Added",
    "Additions",
    "ApiKey",
    "BadGeneratorName",
    "BadVector",
    "Checkpoint",
    "CheckpointSwitched",
    "Conflict",
    "Detection",
    "Enrolment",
    "Generator",
    "GeneratorExists",
    "KeyExists",
    "Known",
    "ListedDetection",
    "NewReference",
    "Reference",
    "Removals",
    "Removed",
    "SavedCalibration",
    "Store",
    "UnknownCheckpoint",
    "UnknownGenerator",
    "check_generator_name",
    "kind",
    "with_active_folder",
]


class Store(Adding, Removing, References, Changes, Records):
    """Reference images, embeddings, revisions, calibrations and verdicts. Safe to share between threads."""
