"""An index in one file, a NumPy archive (.npz) with a header: written aside and renamed, so it is whole or not there.

The checksum of each member of the zip is compared before anything in it is believed.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np
from filelock import FileLock

from trainer.files import whole_file

HEADER = "header.json"


class BadSnapshot(ValueError):
    """A snapshot that is missing, damaged, or of something else."""


def write_snapshot(path: Path, header: Mapping[str, Any], arrays: Iterable[np.ndarray]) -> None:
    """Write a header and arrays, which are kept in their order; nothing of it is seen before all is on disk.

    Processes that write the same path wait for each other.

    Args:
        path: The file; its folder is made.
        header: Any JSON.
        arrays: Their bytes are stored as they are. An exception that they raise leaves the file as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(path.with_name(f"{path.name}.lock")),
        whole_file(path) as file,
        ZipFile(file, "w") as archive,
    ):
        archive.writestr(ZipInfo(HEADER), json.dumps(header))
        for number, array in enumerate(arrays):
            with archive.open(f"{number}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


@contextmanager
def read_snapshot(path: Path) -> Iterator[tuple[dict[str, Any], Iterator[np.ndarray]]]:
    """Open a snapshot: gives its header, and its arrays in the order they were written, each read when it is asked for.

    Raises:
        BadSnapshot: It is missing, damaged, or not what the code in the context expects; also from within the context.
    """
    try:
        with ZipFile(path) as archive:
            members = (archive.read(f"{number}.npy") for number in count())
            arrays = (np.lib.format.read_array(BytesIO(member), allow_pickle=False) for member in members)
            yield json.loads(archive.read(HEADER)), arrays
    except FileNotFoundError as error:
        raise BadSnapshot(f"{path} does not exist") from error
    # What the readers raise at other bytes: a wrong checksum, an unknown method, a password, an early end.
    except (BadZipFile, zlib.error, OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise BadSnapshot(f"{path}: {' '.join(str(error).split())}") from error
