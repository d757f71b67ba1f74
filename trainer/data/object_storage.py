"""Files of object storage (`s3://`, `gs://`, `az://`) and of web servers (`https://`), read in place by ranges.

A uri `s3://BUCKET/KEY` has, as a `PurePath`, one slash less. Credentials come from the usual environment (AWS_...,
GOOGLE_..., AZURE_...) or from the machine's own role.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import PurePath, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from trainer.data.entry import MAX_FILE_BYTES, DatasetError
from trainer.images import ImageTooLarge, UnreadableImage

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore.store import ObjectStore

SCHEMES = ("s3:", "gs:", "az:", "https:")
READ_BYTES = 8 << 20
"""Of one request where an archive is read from front to back."""
RETRY_LIMIT = timedelta(seconds=30)
_SLICE = re.compile(r";offset=(\d+);size=(\d+)$")


class StoredObject(NamedTuple):
    """What is known of an object before it is read: its size in bytes, and when it was written, seconds since 1970."""

    path: PurePosixPath
    size: int
    mtime: float


def in_object_storage(path: PurePath) -> bool:
    """Whether a path is of a bucket or of a web server."""
    return path.parts[:1] != () and path.parts[0] in SCHEMES


def object_uri(path: PurePath, member: str = "", offset: int = 0, size: int = 0) -> str:
    """`s3://...` of an object, or of a member of the archive that it is, whose bytes lie there."""
    uri = f"{path.parts[0]}//{quote('/'.join(path.parts[1:]), safe='/:@+=,')}"
    return f"{uri}#{quote(member, errors='surrogateescape')};offset={offset};size={size}" if member else uri


def stored_objects(path: PurePath) -> list[StoredObject]:
    """The object of this name, else those below it, in order.

    Raises:
        DatasetError: There is none, or the storage does not let us in; one line.
    """
    try:
        with storage_failures(path):
            return _stored_objects(path)
    except (OSError, ImportError) as error:
        raise DatasetError(str(error)) from error


def _stored_objects(path: PurePath) -> list[StoredObject]:
    import obstore

    root, key = PurePosixPath(*path.parts[:2]), "/".join(path.parts[2:])
    store = _store(path.parts[0], path.parts[1])
    if suffix := PurePath(key).suffix.lower():
        try:
            meta = obstore.head(store, key)
            return [StoredObject(root / key, meta["size"], meta["last_modified"].timestamp())]
        except FileNotFoundError:
            if suffix in (".tar", ".parquet") or path.parts[0] == "https:":  # else a folder such as `images.v2`
                raise
    objects = [
        StoredObject(root / meta["path"], meta["size"], meta["last_modified"].timestamp())
        for page in obstore.list(store, prefix=key or None)
        for meta in page
    ]
    if not objects:
        raise FileNotFoundError("no objects begin with it")
    return sorted(objects)


def read_object(uri: str) -> bytes:
    """The bytes of an object, or of the member of an archive that the part after `#` places.

    Raises:
        UnreadableImage: They cannot be had.
        ImageTooLarge: They are more than are read of an image.
    """
    parts = urlsplit(uri)
    path = PurePosixPath(f"{parts.scheme}:", parts.netloc, *unquote(parts.path).split("/")[1:])
    place = _SLICE.search(parts.fragment)
    try:
        if place is None:
            [stored] = stored_objects(path)
            offset, size = 0, stored.size
        else:
            offset, size = int(place[1]), int(place[2])
        return read_range(path, offset, size)
    except (OSError, ImportError, DatasetError) as error:
        raise UnreadableImage(str(error)) from error


def read_range(path: PurePath, offset: int, size: int) -> bytes:
    """Bytes of an object.

    Raises:
        ImageTooLarge: They are more than are read of an image.
        OSError: They cannot be had.
    """
    if size > MAX_FILE_BYTES:
        raise ImageTooLarge(f"the file has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    import obstore

    with storage_failures(path):
        store = _store(path.parts[0], path.parts[1])
        return bytes(obstore.get_range(store, "/".join(path.parts[2:]), start=offset, length=size)) if size else b""


def open_object(stored: StoredObject) -> io.BufferedReader:
    """A file of an object, which is read by ranges of `READ_BYTES`."""
    return io.BufferedReader(_ObjectFile(stored), READ_BYTES)


class _ObjectFile(io.RawIOBase):
    def __init__(self, stored: StoredObject) -> None:
        self._path, self._size, self._place = stored.path, stored.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = read_range(self._path, self._place, max(0, min(len(view), self._size - self._place)))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


@lru_cache(maxsize=32)
def _store(scheme: str, bucket: str) -> ObjectStore:
    from obstore.store import from_url

    retries = {"max_retries": 3, "retry_timeout": RETRY_LIMIT}
    return from_url(f"{scheme}//{bucket}", retry_config=retries)  # type: ignore[call-overload, no-any-return]


@contextmanager
def storage_failures(path: PurePath) -> Iterator[None]:
    """Whatever the storage's client raises, as an `OSError` of one line."""
    try:
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise ImportError(f"{object_uri(path)} needs obstore: pip install 'lineup[datasets]'") from error
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"{object_uri(path)} cannot be read ({reason}): look at its name, and at the environment's credentials"
        ) from error
