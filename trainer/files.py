"""Files and folders that are there as a whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the disk, which name no file themselves, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the file, then rename over it: a reader sees the old bytes or the new, never half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file without a name while it is written, so that a kill leaves nothing; it takes `path`'s place at the end.

    Where the system has no such files it has a name of its own. Of several writers the last one's file stays, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        handle, unnamed = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666), True
    except (AttributeError, OSError):
        handle, unnamed = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), False
    try:
        with naming(path), os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(handle)
            if unnamed:
                _name(file, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _name(file: BinaryIO, path: Path) -> None:
    """Give a file without a name one, by a link, or by a copy where the system links none."""
    try:
        # Given a folder, Python calls linkat(2), which alone takes the file for its link in /proc.
        os.link(f"/proc/self/fd/{file.fileno()}", path, src_dir_fd=file.fileno())
    except OSError:  # as without /proc
        file.seek(0)
        with path.open("xb") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to be filled, which takes its place at the end and is gone where anything fails.

    Raises:
        OSError: Something else lies at `path` by then; an empty folder may.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    aside.mkdir()
    try:
        yield aside
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
