"""One image of a data set: what is known of it before its bytes are read, and how they are read again later."""

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from trainer.images import ImageTooLarge, UnreadableImage

Role = Literal["training", "calibration", "validation"]
FIT_FORBIDDEN_SPLITS = ("test", "unseen")
"""Neither training nor thresholds may ever see these."""
MAX_FILE_BYTES = 2**30

GENERATOR = r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}"
"""What may name a generator, but for `RESERVED` words in any case."""
RESERVED = ("real", "all", "unknown", "none")
MOST_SOURCE_BYTES = 2600
"""Of the name of a source in UTF-8: an entry of Postgres' b-trees has 2,704 bytes."""


class DatasetError(ValueError):
    """The path holds no data set that can be read; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a data set.

    Attributes:
        key: Its place in the data set, such as the relative path.
        group: Images that must not be split apart share it: one record, one scene, one prompt.
            Empty where equal bytes alone belong together, as in uploads.
        label: 0 real, 1 fake.
        generator: What made a fake; none for a real image.
        source: The data set or feed it came from.
        uri: `file:///abs/path`, or `file:///x.tar#member`; `datasets.read_uri` reads it again.
        split: What the data set calls its part, if it has parts.
        size: Bytes, where known without reading.
        mtime: Seconds since 1970, of the archive for a member.
        attributes: Whatever else the data set says of it.
        read: Gives its bytes, or raises `UnreadableImage`. Can be pickled.
        public_uri: Where anybody can read it, or the file that it is a part of: `https://...`, if that is known.
    """

    key: str
    group: str
    label: int
    generator: str | None
    source: str
    uri: str
    split: str | None
    size: int | None
    mtime: float | None
    attributes: dict[str, str]
    read: Callable[[], bytes] = field(compare=False)
    public_uri: str | None = None


def role(group: str) -> Role:
    """What the images of a group serve: 10 % validation, 10 % calibration, the rest training, fixed by the hash."""
    share = _fraction("lineup" + group)
    return "validation" if share < 0.1 else "calibration" if share < 0.2 else "training"


def default_split(group: str) -> str:
    """The split of an image whose data set names none: 70 % train, 30 % test, independent of the role."""
    return "train" if _fraction("lineup split" + group) < 0.7 else "test"


def _fraction(text: str) -> float:
    digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def check_generator(name: str, where: str) -> str:
    """The name, if it may name a generator.

    Raises:
        DatasetError: Otherwise; `where` says which folder or line it came from.
    """
    if fault := generator_fault(name):
        raise DatasetError(f"{where}: {fault}")
    return name


def generator_fault(name: str) -> str | None:
    """What keeps a name from naming a generator; None where nothing does."""
    if re.fullmatch(GENERATOR, name) and name.lower() not in RESERVED:
        return None
    return (
        f"{name!r} cannot name a generator; expected 1-100 letters, digits, spaces or . _ + -, "
        f"starting with a letter or digit, and none of {', '.join(RESERVED)}"
    )


def check_source(name: str, where: str) -> str:
    """The name, if it may name a source.

    Raises:
        DatasetError: It is too long; `where` says which line or option it came from.
    """
    if (size := len(os.fsencode(name))) > MOST_SOURCE_BYTES:
        raise DatasetError(f"{where}: {name[:20]!r}... has {size:,} bytes; a source has at most {MOST_SOURCE_BYTES:,}")
    return name


def plain(text: str) -> str:
    """Text that UTF-8 and Postgres can hold, whatever bytes a file name or a caption is made of."""
    return os.fsencode(text).decode("utf-8", "replace").replace("\0", "")


def file_entry(
    path: Path,
    key: str,
    label: int,
    generator: str | None,
    *,
    home: str,
    source: str | None = None,
    split: str | None = None,
    group: str | None = None,
    attributes: dict[str, str] | None = None,
    public_uri: str | None = None,
) -> Entry:
    """The entry of one file, which need not exist: then its `read` says so.

    Args:
        path: Absolute.
        key: The path inside the data set.
        label: 0 real, 1 fake.
        generator: None for a real image.
        home: The data set's own name: the default source, and what keeps equal paths of two data sets apart.
        source: By default `home`.
        split: None where the data set names none.
        group: By default each file is its own.
        attributes: Whatever else is known.
        public_uri: See `Entry`.
    """
    try:
        status = path.stat()
        size, mtime = (status.st_size, status.st_mtime) if stat.S_ISREG(status.st_mode) else (None, None)
    except (OSError, ValueError):
        size = mtime = None
    return Entry(
        key=plain(key),
        group=group or plain(f"{home}/{key}"),
        label=label,
        generator=generator,
        source=source or plain(home),
        uri=path.as_uri(),
        split=split,
        size=size,
        mtime=mtime,
        attributes=attributes or {},
        read=partial(read_file, path),
        public_uri=public_uri,
    )


def read_file(path: Path, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file of at most `most_bytes`.

    Raises:
        UnreadableImage: It is missing, no regular file (a pipe would block for ever) or not permitted.
        ImageTooLarge: It is larger.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("not a regular file")
        if status.st_size > most_bytes:
            raise ImageTooLarge(f"the file has {status.st_size:,} bytes; at most {most_bytes:,} are read")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UnreadableImage("no such file") from error
    except OSError as error:
        raise UnreadableImage(f"cannot be read ({error.strerror or error})") from error
