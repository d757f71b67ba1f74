"""Verdicts as they were given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import delete, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import DetectionRow
from indexer.database.transactions import Rows

LISTED = (
    DetectionRow.id,
    DetectionRow.at,
    DetectionRow.sha256,
    *(DetectionRow.result[name].label(name) for name in ("file", "verdict", "score", "thresholds")),
    DetectionRow.feedback,
)


@dataclass(frozen=True, slots=True)
class Detection:
    """A verdict as it was given. `vector` is the raw embedding, shape (d,), float32; `sha256` is hexadecimal."""

    id: UUID
    sha256: str
    file_bytes: int
    width: int
    height: int
    vector: np.ndarray
    result: dict[str, Any]
    checkpoint_id: str
    heads_id: str | None
    revision: int
    api_key_id: int | None = None
    feedback: dict[str, Any] | None = None
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ListedDetection:
    """What a list shows of a verdict; from `file` to `thresholds` as the result has them, None where it has not."""

    id: UUID
    at: datetime
    sha256: str
    file: str | None
    verdict: str | None
    score: float | None
    thresholds: dict[str, float | None] | None
    feedback: dict[str, Any] | None


class Detections(Rows):
    """The log of verdicts."""

    def add(self, detections: Sequence[Detection]) -> None:
        """Keep verdicts, all or none; the database sets `at`, each a little later than the one before."""
        rows = [
            {name: getattr(detection, name) for name in Detection.__slots__ if name != "at"}
            | {
                "sha256": bytes.fromhex(detection.sha256),
                "vector": np.asarray(detection.vector, "<f4").tobytes(),
            }
            for detection in detections
        ]
        query = insert(DetectionRow).values(at=func.clock_timestamp())
        self.transaction(lambda connection: connection.execute(query, rows))

    def get(self, detection_id: UUID) -> Detection | None:
        """One verdict."""
        query = select(DetectionRow.__table__).where(DetectionRow.id == detection_id)
        row = self.read_one(query)
        if row is None:
            return None
        return Detection(**{**row, "sha256": row["sha256"].hex(), "vector": np.frombuffer(row["vector"], "<f4")})

    def delete(self, before: datetime) -> int:
        """Forget verdicts given before this time; returns how many there were."""
        query = delete(DetectionRow).where(DetectionRow.at < before)
        return self.transaction(lambda connection: connection.execute(query).rowcount)

    def set_feedback(self, detection_id: UUID, feedback: Mapping[str, Any]) -> bool:
        """Attach what a person said of the verdict; False where it is not known."""
        query = update(DetectionRow).where(DetectionRow.id == detection_id).values(feedback=dict(feedback))
        return self.transaction(lambda connection: connection.execute(query).rowcount) == 1

    # Last in its class: below it, `list` would mean this method.
    def list(self, *, before: UUID | None = None, limit: int = 50) -> Sequence[ListedDetection]:
        """Verdicts, newest first; `before` is the last id of the page before."""
        place = tuple_(DetectionRow.at, DetectionRow.id)
        query = select(*LISTED).order_by(DetectionRow.at.desc(), DetectionRow.id.desc()).limit(limit)
        if before is not None:
            last = select(DetectionRow.at, DetectionRow.id).where(DetectionRow.id == before)
            query = query.where(place < last.scalar_subquery())
        return [ListedDetection(**{**row, "sha256": row["sha256"].hex()}) for row in self.read(query)]
