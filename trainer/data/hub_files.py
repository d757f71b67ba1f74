"""Parquet files of data sets on the Hugging Face hub, read in place by ranges: nothing is kept on this machine.

A path is `hf://datasets/OWNER/NAME[@REVISION][/FILE, FOLDER or PATTERN]`; as a `PurePath` it has one slash less.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath
from shlex import quote
from typing import IO, cast

from trainer.data.entry import DatasetError

SCHEME = "hf:"


def on_hub(path: PurePath) -> bool:
    """Whether a path is of the hub."""
    return path.parts[:1] == (SCHEME,)


def hub_parquets(path: PurePath) -> list[PurePosixPath]:
    """The parquet files that a path of the hub names, sorted, at the commit that its revision means now.

    Raises:
        DatasetError: It names no data set, or one without such files, or the hub cannot be reached.
    """
    if path.parts[1:2] != ("datasets",) or len(path.parts) < 4:
        raise DatasetError(f"{hub_uri(path)} names no data set; expected hf://datasets/OWNER/NAME[/FILES]")
    owner, (name, _, revision), pattern = path.parts[2], path.parts[3].partition("@"), "/".join(path.parts[4:])
    try:
        from huggingface_hub import HfApi

        with hub_failures(path):
            info = HfApi().dataset_info(f"{owner}/{name}", revision=revision or None)
    except ImportError as error:
        raise DatasetError(f"{hub_uri(path)} needs the hub's client: pip install 'lineup[train,datasets]'") from error
    except OSError as error:
        files = pattern if pattern.endswith(".parquet") else f"{pattern or '*'}/*.parquet"
        fetch = f"hf download {owner}/{name} --repo-type dataset --include {quote(files)} --local-dir {name}"
        raise DatasetError(
            f"{error}. Without the network: `{fetch}` on another machine, then give that folder's parquet files here"
        ) from error
    names = [one.rfilename for one in info.siblings or () if one.rfilename.endswith(".parquet")]
    chosen = [one for one in names if not pattern or one.startswith(f"{pattern}/") or fnmatchcase(one, pattern)]
    if not chosen:
        known = f"; it has {', '.join(sorted(names)[:3])}" if names else ""
        raise DatasetError(f"{hub_uri(path)} has no such parquet files{known}")
    return [PurePosixPath(SCHEME, "datasets", owner, f"{name}@{info.sha}", one) for one in sorted(chosen)]


def hub_uri(path: PurePath) -> str:
    """`hf://...` of a path."""
    return f"{SCHEME}//{'/'.join(path.parts[1:])}"


def open_on_hub(path: PurePath) -> IO[bytes]:
    """A file of the hub, of which only what is asked for is read.

    Raises:
        OSError: The hub does not give it.
    """
    from huggingface_hub import HfFileSystem, constants

    with hub_failures(path):
        return cast("IO[bytes]", HfFileSystem(endpoint=constants.ENDPOINT).open("/".join(path.parts[1:])))


@contextmanager
def hub_failures(path: PurePath) -> Iterator[None]:
    """Whatever the hub's client and its transport raise, as an `OSError` of one line."""
    from httpx2 import HTTPError

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:  # of a name that cannot be, a ValueError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"the hub does not give {hub_uri(path)} ({reason})") from error
