"""Checkpoints that have embeddings in the store, their revisions and their calibrations."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import UNFINISHED, CalibrationRow, CheckpointRow, EnrolmentRow, RevisionRow, StoreRow
from indexer.database.transactions import Rows, notify
from indexer.settings import Settings
from trainer.model.checkpoint import CheckpointError, read_id

SomeSettings = TypeVar("SomeSettings", bound=Settings)

COMPLETE = """select not exists (select from reference_image r where r.id <> all(:without) and not exists (
    select from embedding e where e.image_id = r.id and e.checkpoint_id = :checkpoint))"""
REMEMBER = "update checkpoint set config = config || jsonb_build_object('folder', cast(:folder as text)) where id = :id"
CALIBRATIONS = 20
"""Revisions whose calibration is kept, the latest of each heads: one holds up to half a megabyte."""


class UnknownCheckpoint(LookupError):
    """The store holds no embeddings of this checkpoint."""


class CheckpointSwitched(RuntimeError):
    """Another checkpoint has become the active one since this one was loaded."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as the store knows it; `id` is the hash of its weights and preprocessing.

    Its `config` is that of the folder; `folder` in it says where that lay on the machine that made it known or active.
    """

    id: str
    name: str
    dim: int
    config: dict[str, Any]
    active: bool
    created_at: datetime

    def find(self, elsewhere: Path) -> Path | None:
        """The folder that holds it on this machine, `elsewhere` or where the store remembers it; None: neither."""
        for folder in (elsewhere, Path(self.config.get("folder", elsewhere))):
            with suppress(CheckpointError):
                if read_id(folder) == self.id:
                    return folder
        return None


@dataclass(frozen=True, slots=True)
class SavedCalibration:
    """Calibration parameters, and the index revision they were fitted at."""

    revision: int
    params: dict[str, Any]
    created_at: datetime


class Checkpoints(Rows):
    """Several checkpoints side by side, one of them active; their vectors never mix."""

    def register(
        self, checkpoint_id: str, name: str, dim: int, config: Mapping[str, Any], folder: Path | None = None
    ) -> Checkpoint:
        """Make a checkpoint known; the first one becomes active. Known ones stay as they are.

        Args:
            checkpoint_id: The hash of its weights and preprocessing.
            name: Shown to people.
            dim: Length of its embeddings.
            config: As its folder has it.
            folder: Where it lies; remembered unless a folder is already.

        Raises:
            ValueError: It is known with another dimension.
        """

        def work(connection: Connection) -> None:
            _one_at_a_time(connection)
            row = {"id": checkpoint_id, "name": name, "dim": dim, "config": dict(config)}
            connection.execute(insert(CheckpointRow).values(row).on_conflict_do_nothing())
            connection.execute(insert(RevisionRow).values(checkpoint_id=checkpoint_id).on_conflict_do_nothing())
            if connection.scalar(select(CheckpointRow.id).where(CheckpointRow.active)) is None:
                connection.execute(update(CheckpointRow).where(CheckpointRow.id == checkpoint_id).values(active=True))
            if folder is not None:
                unless = text(f"{REMEMBER} and not config ? 'folder'")
                connection.execute(unless, {"id": checkpoint_id, "folder": str(folder.absolute())})

        try:
            known = self.require(checkpoint_id)
        except UnknownCheckpoint:
            known = None
        if known is None or (folder is not None and "folder" not in known.config):
            self.transaction(work)
            known = self.require(checkpoint_id)
        if known.dim != dim:
            raise ValueError(f"checkpoint {checkpoint_id} is stored with {known.dim} dimensions, this one has {dim}")
        return known

    def activate(self, checkpoint_id: str, without: Sequence[int] = (), folder: Path | None = None) -> bool:
        """Make this checkpoint the active one, unless a reference lacks its embedding. Services follow by themselves.

        Args:
            checkpoint_id: A known one.
            without: Ids of references that may lack it.
            folder: Where it lies, for whoever uses the active checkpoint.

        Returns:
            Whether it is the active one now.

        Raises:
            UnknownCheckpoint: It was never registered.
        """

        def work(connection: Connection) -> bool:
            _one_at_a_time(connection)
            # No one adds or removes until the switch is done.
            connection.execute(text("lock table index_revision in exclusive mode"))
            if not connection.scalar(text(COMPLETE), {"checkpoint": checkpoint_id, "without": list(without)}):
                return False
            connection.execute(update(CheckpointRow).where(CheckpointRow.active).values(active=False))
            connection.execute(update(CheckpointRow).where(CheckpointRow.id == checkpoint_id).values(active=True))
            if folder is not None:
                connection.execute(text(REMEMBER), {"id": checkpoint_id, "folder": str(folder.absolute())})
            notify(connection, f"{checkpoint_id} active")
            return True

        self.require(checkpoint_id)
        return self.transaction(work)

    def active(self) -> Checkpoint | None:
        """The active checkpoint, or None in a new store."""
        return next((checkpoint for checkpoint in self.list() if checkpoint.active), None)

    def require(self, checkpoint_id: str) -> Checkpoint:
        """One checkpoint by id.

        Raises:
            UnknownCheckpoint: It was never registered.
        """
        for checkpoint in self.list():
            if checkpoint.id == checkpoint_id:
                return checkpoint
        raise UnknownCheckpoint(
            f"the store has no embeddings of checkpoint {checkpoint_id}: run `lineup index add` with it"
        )

    def revision(self, checkpoint_id: str) -> int:
        """The latest committed revision of a checkpoint's index; 0 before the first reference.

        Raises:
            UnknownCheckpoint: It was never registered.
        """
        revision = self.read_value(select(RevisionRow.revision).where(RevisionRow.checkpoint_id == checkpoint_id))
        if revision is None:
            raise UnknownCheckpoint(f"the store has no embeddings of checkpoint {checkpoint_id}")
        return revision

    # Last in its class: below it, `list` would mean this method.
    def list(self) -> Sequence[Checkpoint]:
        """All checkpoints, oldest first."""
        query = select(CheckpointRow.__table__).order_by(CheckpointRow.created_at, CheckpointRow.id)
        return [Checkpoint(**row) for row in self.read(query)]


class Calibrations(Rows):
    """What the scores of one revision of a checkpoint's index mean."""

    def save(self, checkpoint_id: str, heads_id: str, revision: int, params: Mapping[str, Any]) -> None:
        """Keep the calibration of one revision; a second one for it replaces the first, old revisions' are dropped.

        The last one before an unfinished enrolment stays: its report will say what changed since.
        """
        row = {"checkpoint_id": checkpoint_id, "heads_id": heads_id, "revision": revision, "params": dict(params)}
        query = insert(CalibrationRow).values(row)
        replace = {"params": query.excluded.params, "created_at": func.now()}
        keys = ["checkpoint_id", "heads_id", "revision"]
        query = query.on_conflict_do_update(index_elements=keys, set_=replace)
        same = (CalibrationRow.checkpoint_id == checkpoint_id) & (CalibrationRow.heads_id == heads_id)
        latest = select(CalibrationRow.revision).where(same).order_by(CalibrationRow.revision.desc())
        old = CalibrationRow.revision <= latest.offset(CALIBRATIONS).limit(1).scalar_subquery()

        begun = select(func.max(CalibrationRow.revision)).where(same, UNFINISHED).group_by(EnrolmentRow.id)
        begun = begun.join(EnrolmentRow, CalibrationRow.created_at < EnrolmentRow.at)

        def work(connection: Connection) -> None:
            connection.execute(query)
            connection.execute(delete(CalibrationRow).where(same & old & CalibrationRow.revision.not_in(begun)))

        self.transaction(work)

    def load(
        self,
        checkpoint_id: str,
        heads_id: str | None = None,
        revision: int | None = None,
        before: datetime | None = None,
    ) -> SavedCalibration | None:
        """The calibration of these heads (of any) at that revision, or at the latest; None where there is none.

        With `before` it is one that was fitted before then.
        """
        query = (
            select(CalibrationRow.revision, CalibrationRow.params, CalibrationRow.created_at)
            .where(CalibrationRow.checkpoint_id == checkpoint_id)
            .order_by(CalibrationRow.revision.desc())
            .limit(1)
        )
        if heads_id is not None:
            query = query.where(CalibrationRow.heads_id == heads_id)
        if revision is not None:
            query = query.where(CalibrationRow.revision == revision)
        if before is not None:
            query = query.where(CalibrationRow.created_at < before)
        row = self.read_one(query)
        return None if row is None else SavedCalibration(**row)


def with_active_folder(settings: SomeSettings, checkpoints: Checkpoints) -> SomeSettings:
    """The settings with the checkpoint folder to use: the active one's, unless they name one or nothing is active yet.

    Raises:
        CheckpointError: The active checkpoint is not on this machine.
    """
    active = checkpoints.active()
    if settings.checkpoint is not None or active is None:
        return settings
    folder = active.find(settings.checkpoint_folder)
    if folder is None:
        places = {str(settings.checkpoint_folder), str(active.config.get("folder", settings.checkpoint_folder))}
        raise CheckpointError(
            f"the active checkpoint {active.name} ({active.id}) is not in {' or '.join(sorted(places))}: put it there, "
            "or make another one active with `lineup index rebuild --checkpoint`, or set LINEUP_CHECKPOINT"
        )
    return settings.model_copy(update={"checkpoint": folder})


def _one_at_a_time(connection: Connection) -> None:
    """Two that choose the active checkpoint at once would break its uniqueness: the store's row is their lock."""
    connection.execute(select(StoreRow.id).with_for_update())
