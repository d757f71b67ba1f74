"""The keys of those who may use the HTTP interface."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert

from indexer.database.tables import ApiKeyRow
from indexer.database.transactions import Rows


class KeyExists(ValueError):
    """Another API key has this name."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret."""

    id: int
    name: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


KEYS = select(*(ApiKeyRow.__table__.c[name] for name in ApiKey.__slots__)).order_by(ApiKeyRow.id)


class ApiKeys(Rows):
    """API keys by the hashes of their secrets; names are unique."""

    def create(self, name: str, hash: bytes, scopes: list[str], *, expires_at: datetime | None = None) -> ApiKey:
        """Keep a new key's hash.

        Raises:
            KeyExists: The name is taken.
        """
        row = {"name": name, "hash": hash, "scopes": scopes, "expires_at": expires_at}
        query = insert(ApiKeyRow).values(row).on_conflict_do_nothing(index_elements=["name"]).returning(ApiKeyRow.id)
        if self.transaction(lambda connection: connection.scalar(query)) is None:
            raise KeyExists(f"there is an API key {name!r} already")
        return next(key for key in self.list() if key.name == name)

    def find(self, hash: bytes) -> ApiKey | None:
        """The key with this hash, revoked and expired ones included."""
        row = self.read_one(KEYS.where(ApiKeyRow.hash == hash))
        return None if row is None else ApiKey(**row)

    def revoke(self, name: str) -> bool:
        """End a key; False where no key in force has this name."""
        in_force = (ApiKeyRow.name == name) & ApiKeyRow.revoked_at.is_(None)
        query = update(ApiKeyRow).where(in_force).values(revoked_at=func.now())
        return self.transaction(lambda connection: connection.execute(query).rowcount) == 1

    # Last in its class: below it, `list` would mean this method.
    def list(self) -> Sequence[ApiKey]:
        """All keys, oldest first."""
        return [ApiKey(**row) for row in self.read(KEYS)]
