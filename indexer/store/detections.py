"""Verdicts as they were given, and the keys of those who may ask for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import RowMapping, delete, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import ApiKeyRow, DetectionRow
from indexer.database.transactions import Rows

KEY = (
    ApiKeyRow.id,
    ApiKeyRow.name,
    ApiKeyRow.scopes,
    ApiKeyRow.created_at,
    ApiKeyRow.expires_at,
    ApiKeyRow.revoked_at,
)
LISTED = (
    DetectionRow.id,
    DetectionRow.at,
    DetectionRow.sha256,
    *(DetectionRow.result[name].label(name) for name in ("file", "verdict", "score", "thresholds")),
    DetectionRow.feedback,
)


class KeyExists(ValueError):
    """Another API key has this name."""


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


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret."""

    id: int
    name: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class Records(Rows):
    """Detections and API keys."""

    def record_detections(self, detections: Sequence[Detection]) -> None:
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

    def get_detection(self, detection_id: UUID) -> Detection | None:
        """One verdict."""
        query = select(DetectionRow.__table__).where(DetectionRow.id == detection_id)
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _detection(row)

    def list_detections(self, *, before: UUID | None = None, limit: int = 50) -> list[ListedDetection]:
        """Verdicts, newest first; `before` is the last id of the page before."""
        place = tuple_(DetectionRow.at, DetectionRow.id)
        query = select(*LISTED).order_by(DetectionRow.at.desc(), DetectionRow.id.desc()).limit(limit)
        if before is not None:
            last = select(DetectionRow.at, DetectionRow.id).where(DetectionRow.id == before)
            query = query.where(place < last.scalar_subquery())
        with self.engine.connect() as connection:
            rows = connection.execute(query).mappings()
            return [ListedDetection(**{**row, "sha256": row["sha256"].hex()}) for row in rows]

    def delete_detections(self, before: datetime) -> int:
        """Forget verdicts given before this time; returns how many there were."""
        query = delete(DetectionRow).where(DetectionRow.at < before)
        return self.transaction(lambda connection: connection.execute(query).rowcount)

    def set_feedback(self, detection_id: UUID, feedback: Mapping[str, Any]) -> bool:
        """Attach what a person said of the verdict; False where it is not known."""
        query = update(DetectionRow).where(DetectionRow.id == detection_id).values(feedback=dict(feedback))
        return self.transaction(lambda connection: connection.execute(query).rowcount) == 1

    def create_key(self, name: str, hash: bytes, scopes: list[str], *, expires_at: datetime | None = None) -> ApiKey:
        """Keep a new key's hash.

        Raises:
            KeyExists: The name is taken.
        """
        row = {"name": name, "hash": hash, "scopes": scopes, "expires_at": expires_at}
        query = insert(ApiKeyRow).values(row).on_conflict_do_nothing(index_elements=["name"]).returning(ApiKeyRow.id)
        if self.transaction(lambda connection: connection.scalar(query)) is None:
            raise KeyExists(f"there is an API key {name!r} already")
        return next(key for key in self.list_keys() if key.name == name)

    def find_key(self, hash: bytes) -> ApiKey | None:
        """The key with this hash, revoked and expired ones included."""
        with self.engine.connect() as connection:
            row = connection.execute(select(*KEY).where(ApiKeyRow.hash == hash)).mappings().first()
        return None if row is None else ApiKey(**row)

    def list_keys(self) -> list[ApiKey]:
        """All keys, oldest first."""
        with self.engine.connect() as connection:
            return [ApiKey(**row) for row in connection.execute(select(*KEY).order_by(ApiKeyRow.id)).mappings()]

    def revoke_key(self, name: str) -> bool:
        """End a key; False where no key in force has this name."""
        in_force = (ApiKeyRow.name == name) & ApiKeyRow.revoked_at.is_(None)
        query = update(ApiKeyRow).where(in_force).values(revoked_at=func.now())
        return self.transaction(lambda connection: connection.execute(query).rowcount) == 1


def _detection(row: RowMapping) -> Detection:
    vector = np.frombuffer(row["vector"], "<f4")
    return Detection(**{**row, "sha256": row["sha256"].hex(), "vector": vector})
