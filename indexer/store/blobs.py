"""Thumbnails and kept uploads in object storage, each under the hash of its bytes; in Postgres where none is set.

Rows name nothing that is not there. An object is put before the transaction that names it commits, and deleted after
one that dropped a name of it, which notes the hash in an outbox. Whoever puts holds a lock with all others who put,
until its commit; whoever deletes holds it alone: nothing is put between its look at the rows and its deletion. Who is
killed leaves objects that no row names at worst, which `lineup index check --blobs` finds.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine, text

from indexer.database.transactions import Rows

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

# Any constant; whoever holds this advisory lock may put objects (shared), or delete them (alone).
LOCK = 0x11_E0_B1
REQUESTS = 16
"""Objects that are put, got or deleted at the same time."""
DRAINED = 256
"""Names that are taken from the outbox at a time: who wants to put waits meanwhile."""
RETRY_LIMIT = timedelta(seconds=10)
TIMEOUTS = {"connect_timeout": timedelta(seconds=3), "timeout": RETRY_LIMIT}
"""Of one request: storage that stalls would hold all threads of a service."""
OWNER = "store"
"""The object that says whose the place is."""
SHARDS = tuple(f"{first:02x}" for first in range(256))
"""Beginnings of names, which are folders of the place."""
KEY = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
NAMES = """
select thumbnail_sha256 as sha256 from reference_image where thumbnail_sha256 {condition}
union select sha256 from reference_file where sha256 {condition}
union select thumbnail_sha256 from detection where thumbnail_sha256 {condition}
"""
NAMED = NAMES.format(condition="= any(:hashes)")
NAMED_BETWEEN = NAMES.format(condition="between :lowest and :highest")
ANY_NAMED = f"select exists({NAMES.format(condition='is not null')} union select sha256 from blob_outbox)"
NOTE = "insert into blob_outbox (sha256) select unnest(cast(:hashes as bytea[]))"
NOTE_DROPPED = """
insert into blob_outbox (sha256)
select thumbnail_sha256 from reference_image where id = any(:ids) and thumbnail_sha256 is not null
union select sha256 from reference_file where image_id = any(:ids) and sha256 is not null
"""
NEXT = "select id, sha256 from blob_outbox order by id limit :most"
DONE = "delete from blob_outbox where id = any(:ids)"


class BlobsAway(RuntimeError):
    """Object storage cannot be used; the message is one line and names the setting to look at."""


class Kept(NamedTuple):
    """What a row holds of some bytes: themselves, or the name of their object."""

    data: bytes | None = None
    sha256: bytes | None = None


class StoredBlob(NamedTuple):
    """What is known of an object: its size in bytes, and when it was put."""

    size: int
    at: datetime


class Drained(NamedTuple):
    """What came of some names of the outbox: how many they were, and how many objects were deleted."""

    names: int = 0
    deleted: int = 0

    @property
    def last(self) -> bool:
        """Whether no more were noted."""
        return self.names < DRAINED


class Blobs(Rows):
    """The objects that rows name.

    Args:
        engine: The rows.
        place: `s3://BUCKET/PREFIX`, or the like with gs, az or file; None keeps all in Postgres.
    """

    def __init__(self, engine: Engine, place: str | None = None) -> None:
        super().__init__(engine)
        self.place = place
        self._claimed = False

    def claim(self) -> None:
        """See that the place can be used and is this store's, which it becomes if it is nobody's.

        Raises:
            BlobsAway: It cannot be reached, refuses, belongs to another store, or lacks what the rows name.
        """
        if self.place is None or self._claimed:
            return
        owner = self._owner()
        identity = str(self.read(text("select id from store"))[0]["id"])
        if owner is None:
            if self.read(text(ANY_NAMED))[0]["exists"]:
                raise BlobsAway(
                    f"LINEUP_BLOBS {self.place} is new, and this store's pictures lie elsewhere: "
                    "name that place, or copy all of it here first"
                )
            owner = self._become_owner(identity)
        if owner != identity:
            raise BlobsAway(f"LINEUP_BLOBS {self.place} holds the pictures of another store: name another prefix")
        self._claimed = True

    def keep(self, connection: Connection, contents: Sequence[bytes | None]) -> list[Kept]:
        """Put what is not None, and say what rows of this transaction, which is to commit soon, are to hold of each.

        Raises:
            BlobsAway: Not everything could be put; the transaction has to end.
        """
        if self.place is None:
            return [Kept(data) for data in contents]
        self.claim()
        connection.execute(text("select pg_advisory_xact_lock_shared(:key)"), {"key": LOCK})
        hashes = [None if data is None else hashlib.sha256(data).digest() for data in contents]
        objects = {sha256: data for sha256, data in zip(hashes, contents, strict=True) if sha256 and data is not None}
        self._each(lambda sha256: self._put(_key(sha256), objects[sha256]), objects)
        return [Kept(sha256=sha256) for sha256 in hashes]

    def note_spare(self, connection: Connection, kept: Iterable[Kept]) -> None:
        """Note what was put in this transaction and no row names, because the image was known, for instance."""
        hashes = {one.sha256 for one in kept if one.sha256 is not None}
        if hashes:
            spare = hashes - _named(connection, hashes)
            connection.execute(text(NOTE), {"hashes": sorted(spare)})

    def load(self, kept: Kept) -> bytes | None:
        """The bytes; None where a row has none, or its object is missing.

        Raises:
            BlobsAway: Object storage cannot be used.
        """
        return self.load_all([kept])[0]

    def load_all(self, kept: Sequence[Kept]) -> list[bytes | None]:
        """The bytes of each; see `load`."""
        hashes = {one.sha256 for one in kept if one.sha256 is not None}
        if hashes and self.place is None:
            raise BlobsAway("pictures of this store lie in object storage: set LINEUP_BLOBS to where")
        objects = dict(self._each(lambda sha256: (sha256, self._get(_key(sha256))), hashes))
        return [one.data if one.sha256 is None else objects[one.sha256] for one in kept]

    def drain(self) -> int:
        """Delete what the outbox notes and no row names; safe to end at any point. Returns how many objects it were.

        Raises:
            BlobsAway: Object storage cannot be used; what is left stays noted.
        """
        drained = [self.drain_some()]
        while not drained[-1].last:
            drained.append(self.drain_some())
        return sum(some.deleted for some in drained)

    def drain_some(self) -> Drained:
        """As `drain`, of the first `DRAINED` names alone."""
        self.claim()
        return Drained() if self.place is None else self.transaction(self._drain)

    def waiting(self) -> int:
        """How many names the outbox notes."""
        return int(self.read(text("select count(*) as names from blob_outbox"))[0]["names"])

    def names(self, shard: str) -> set[bytes]:
        """The names in rows that begin with these two hexadecimal digits."""
        first = bytes.fromhex(shard)
        limits = {"lowest": first.ljust(32, b"\0"), "highest": first.ljust(32, b"\xff")}
        return {row["sha256"] for row in self.read(text(NAMED_BETWEEN), limits)}

    def named(self, hashes: Collection[bytes]) -> set[bytes]:
        """Those of these names that are in rows."""
        return {row["sha256"] for row in self.read(text(NAMED), {"hashes": list(hashes)})} if hashes else set()

    def stored(self, shard: str) -> dict[bytes, StoredBlob]:
        """The objects whose names begin with these two hexadecimal digits.

        Raises:
            BlobsAway: Object storage cannot be used.
        """
        import obstore

        with self._failures():
            metas = [meta for page in obstore.list(self._objects, prefix=shard) for meta in page]
        blobs: dict[bytes, StoredBlob] = {}
        for meta in metas:
            if KEY.fullmatch(meta["path"]):  # nothing else is ours
                blobs[bytes.fromhex(meta["path"][3:])] = StoredBlob(meta["size"], meta["last_modified"])
        return blobs

    def delete_unnamed(self, hashes: Collection[bytes]) -> int:
        """Delete those of these objects that no row names; returns how many.

        Raises:
            BlobsAway: Object storage cannot be used.
        """
        self.claim()
        return sum(self.transaction(partial(self._delete_unnamed, hashes=some)) for some in _parts(hashes, DRAINED))

    def _drain(self, connection: Connection) -> Drained:
        _exclude_others(connection)  # first: another process may be deleting the next names
        rows = connection.execute(text(NEXT), {"most": DRAINED}).all()
        deleted = self._delete_unnamed(connection, {row.sha256 for row in rows})
        connection.execute(text(DONE), {"ids": [row.id for row in rows]})
        return Drained(len(rows), deleted)

    def _delete_unnamed(self, connection: Connection, hashes: Collection[bytes]) -> int:
        _exclude_others(connection)
        unnamed = set(hashes) - _named(connection, hashes)
        for some in _parts(unnamed, REQUESTS):
            connection.execute(text("select 1"))  # fails where the connection is lost, and with it the lock
            self._each(lambda sha256: self._delete(_key(sha256)), some)
        return len(unnamed)

    def _become_owner(self, identity: str) -> str | None:
        """The owner, which is this store unless another one was quicker."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._failures(), suppress(AlreadyExistsError):
            obstore.put(self._objects, OWNER, identity.encode(), mode="create")
        return self._owner()

    def _owner(self) -> str | None:
        with self._failures():
            owner = self._get(OWNER)
        return None if owner is None else owner.decode(errors="replace")

    def _put(self, key: str, data: bytes) -> None:
        import obstore

        obstore.put(self._objects, key, data)

    def _get(self, key: str) -> bytes | None:
        import obstore

        try:
            return bytes(obstore.get(self._objects, key).bytes())
        except FileNotFoundError:
            return None

    def _delete(self, key: str) -> None:
        import obstore

        with suppress(FileNotFoundError):
            obstore.delete(self._objects, key)

    def _each(self, request: Callable[[bytes], T], hashes: Collection[bytes]) -> list[T]:
        """One request for each, some at a time."""
        if not hashes:
            return []
        with self._failures(), ThreadPoolExecutor(min(REQUESTS, len(hashes)), "blob") as pool:
            return list(pool.map(request, hashes))

    @cached_property
    def _objects(self) -> ObjectStore:
        from obstore.store import from_url

        place = self.place or ""
        if place.startswith("file:"):
            return from_url(place)
        retries = {"max_retries": 2, "retry_timeout": RETRY_LIMIT}
        # Options of the client replace those that it reads from the environment.
        options = TIMEOUTS | {"allow_http": os.environ.get("AWS_ALLOW_HTTP", "false")}
        return from_url(place, retry_config=retries, client_options=options)  # type: ignore[call-overload, no-any-return]

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Whatever the storage's client raises, as one line."""
        try:
            from obstore.exceptions import BaseError
        except ImportError as error:
            raise BlobsAway("LINEUP_BLOBS needs obstore: pip install 'lineup[blobs]'") from error
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].partition(": <?xml")[0]
            advice = "look at its name, and at the environment's credentials"
            raise BlobsAway(f"LINEUP_BLOBS {self.place} cannot be used ({reason}): {advice}") from error


def note_dropped(connection: Connection, image_ids: Sequence[int]) -> None:
    """Note the names in rows of these references, which this transaction is about to delete."""
    connection.execute(text(NOTE_DROPPED), {"ids": list(image_ids)})


def _named(connection: Connection, hashes: Collection[bytes]) -> set[bytes]:
    return set(connection.scalars(text(NAMED), {"hashes": list(hashes)})) if hashes else set()


def _exclude_others(connection: Connection) -> None:
    """Wait until nobody else puts or deletes objects, which nobody does until this transaction ends."""
    connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": LOCK})


def _parts(hashes: Collection[bytes], most: int) -> Iterator[list[bytes]]:
    """All of them, so many at a time."""
    rest = list(hashes)
    return (rest[start : start + most] for start in range(0, len(rest), most))


def _key(sha256: bytes) -> str:
    name = sha256.hex()
    return f"{name[:2]}/{name}"
