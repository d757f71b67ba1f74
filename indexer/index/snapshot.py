"""One file of arrays with checksums: written aside and renamed, so that it is whole or not there."""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

# Magic and version, length of the header, CRC-32 of the header, CRC-32 of the arrays.
START = struct.Struct("<16sQII")
MAGIC = b"lineup index 1\n\0"


class BadSnapshot(ValueError):
    """A snapshot that is missing, damaged, or of something else."""


def write_snapshot(path: Path, header: Mapping[str, Any], parts: Iterable[np.ndarray]) -> None:
    """Write `header` and the bytes of `parts`, one after the other; nothing of it is seen before all is on disk.

    Processes that write the same path wait for each other; what a killed one left behind is overwritten.

    Args:
        path: The file; its folder is made.
        header: Any JSON; has to say how to read the parts.
        parts: Arrays. An exception that they raise ends the writing, and the file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    text = json.dumps(header).encode()
    with FileLock(path.with_name(f"{path.name}.lock")):
        try:
            with aside.open("wb") as file:
                file.write(START.pack(MAGIC, len(text), zlib.crc32(text), 0) + text)
                checksum = 0
                for part in parts:
                    data = _bytes(np.ascontiguousarray(part))
                    checksum = zlib.crc32(data, checksum)
                    file.write(data)
                file.seek(0)
                file.write(START.pack(MAGIC, len(text), zlib.crc32(text), checksum))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def read_snapshot(path: Path) -> Iterator[tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]]:
    """Open a snapshot: gives its header, and a function that fills contiguous arrays in the order they were written.

    Trust the arrays only when the context has ended without an error: the checksum is known then.

    Raises:
        BadSnapshot: It is missing, cut, too long, or a byte is not what was written (CRC-32 misses no single one).
    """
    try:
        with path.open("rb") as file:
            magic, length, header_sum, arrays_sum = START.unpack(file.read(START.size))
            text = file.read(length) if length < path.stat().st_size else b""
            if magic != MAGIC or zlib.crc32(text) != header_sum:
                raise BadSnapshot("its header is damaged, or of another version")
            checksum = 0

            def fill(array: np.ndarray) -> np.ndarray:
                nonlocal checksum
                data = _bytes(array)
                if file.readinto(data) != len(data):
                    raise BadSnapshot("it ends too early")
                checksum = zlib.crc32(data, checksum)
                return array

            yield json.loads(text), fill
            if file.read(1) or checksum != arrays_sum:
                raise BadSnapshot("its checksum is wrong")
    except FileNotFoundError as error:
        raise BadSnapshot(f"{path} does not exist") from error
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise BadSnapshot(f"{path}: {error}") from error


def _bytes(array: np.ndarray) -> memoryview:
    """The array's own memory."""
    return array.reshape(-1).view(np.uint8).data
