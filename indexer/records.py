"""Verdicts as they were given, and the keys of those who may ask for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import numpy as np

from indexer.rows import Rows


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

    def record_detection(self, detection: Detection) -> None:
        """Keep a verdict; `at` is set by the database."""
        raise NotImplementedError

    def get_detection(self, detection_id: UUID) -> Detection | None:
        """One verdict."""
        raise NotImplementedError

    def list_detections(self, *, before: UUID | None = None, limit: int = 50) -> list[Detection]:
        """Verdicts, newest first; `before` is the last id of the page before."""
        raise NotImplementedError

    def set_feedback(self, detection_id: UUID, feedback: Mapping[str, Any]) -> bool:
        """Attach what a person said of the verdict; False where it is not known."""
        raise NotImplementedError

    def create_key(self, name: str, hash: bytes, scopes: list[str], *, expires_at: datetime | None = None) -> ApiKey:
        """Keep a new key's hash.

        Raises:
            KeyExists: The name is taken.
        """
        raise NotImplementedError

    def find_key(self, hash: bytes) -> ApiKey | None:
        """The key with this hash, revoked and expired ones included."""
        raise NotImplementedError

    def list_keys(self) -> list[ApiKey]:
        """All keys, oldest first."""
        raise NotImplementedError

    def revoke_key(self, name: str) -> bool:
        """End a key; False where no key in force has this name."""
        raise NotImplementedError
