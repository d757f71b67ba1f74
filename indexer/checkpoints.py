"""Checkpoints that have embeddings in the store, their revisions and their calibrations."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select

from indexer.rows import Rows
from indexer.tables import StoreRow


class UnknownCheckpoint(LookupError):
    """The store holds no embeddings of this checkpoint."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as the store knows it; `id` is the hash of its weights and preprocessing."""

    id: str
    name: str
    dim: int
    config: dict[str, Any]
    active: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class SavedCalibration:
    """Calibration parameters, and the index revision they were fitted at."""

    revision: int
    params: dict[str, Any]
    created_at: datetime


class Checkpoints(Rows):
    """Several checkpoints side by side, one of them active; their vectors never mix."""

    def store_id(self) -> str:
        """The identity of this store, made once by the first migration."""
        with self.engine.connect() as connection:
            return str(connection.scalar(select(StoreRow.id)))

    def register_checkpoint(self, checkpoint_id: str, name: str, dim: int, config: Mapping[str, Any]) -> Checkpoint:
        """Make a checkpoint known; the first one becomes active. Known ones stay as they are.

        Raises:
            ValueError: It is known with another dimension.
        """
        raise NotImplementedError

    def activate(self, checkpoint_id: str) -> None:
        """Make this checkpoint the active one.

        Raises:
            UnknownCheckpoint: It was never registered.
        """
        raise NotImplementedError

    def active_checkpoint(self) -> Checkpoint | None:
        """The active checkpoint, or None in a new store."""
        raise NotImplementedError

    def get_checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """One checkpoint by id.

        Raises:
            UnknownCheckpoint: It was never registered.
        """
        raise NotImplementedError

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, oldest first."""
        raise NotImplementedError

    def revision(self, checkpoint_id: str) -> int:
        """The latest committed revision of a checkpoint's index; 0 before the first reference.

        Raises:
            UnknownCheckpoint: It was never registered.
        """
        raise NotImplementedError

    def save_calibration(self, checkpoint_id: str, heads_id: str, revision: int, params: Mapping[str, Any]) -> None:
        """Keep the calibration of one revision; a second one for the same revision replaces it."""
        raise NotImplementedError

    def load_calibration(
        self, checkpoint_id: str, heads_id: str, revision: int | None = None
    ) -> SavedCalibration | None:
        """The calibration of that revision, or of the latest that has one; None where there is none."""
        raise NotImplementedError
