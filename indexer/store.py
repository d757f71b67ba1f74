"""The store: everything that is kept in Postgres, behind one object. Each noun has its own module."""

from indexer.adding import Added, Adding, BadVector, Conflict, NewReference
from indexer.changes import Additions, Changes, Removals
from indexer.checkpoints import Checkpoint, CheckpointSwitched, SavedCalibration, UnknownCheckpoint, with_active_folder
from indexer.generators import (
    BadGeneratorName,
    Enrolment,
    Generator,
    GeneratorExists,
    UnknownGenerator,
    check_generator_name,
)
from indexer.records import ApiKey, Detection, KeyExists, ListedDetection, Records
from indexer.references import LABELS, Known, Reference, References, kind
from indexer.removing import Removed, Removing
from indexer.rows import CHANNEL

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
