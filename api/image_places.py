"""Where the images to be judged lie: files, folders, data sets, addresses, and lists of all these."""

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import TextIOWrapper
from itertools import islice, zip_longest
from pathlib import Path, PurePath
from random import Random
from ssl import SSLContext
from urllib.parse import unquote

from api.judge.uploads import Upload
from api.schemas.problems import ApiError, FailedFile, Kind
from indexer.ingest.public_files import download, public_client
from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry, plain, read_file
from trainer.data.folders import is_image_name
from trainer.images import ImageTooLarge, UnreadableImage

READERS = 8
"""Files that are read or fetched ahead of those being judged."""
LIST = "-"
"""The list on standard input, one place in each line."""
DATA_SETS = (".csv", ".tar", ".parquet")
"""Suffixes of the files that are data sets by themselves."""

Image = tuple[str, Callable[[], bytes]]
"""What an image is called, and how to read it."""


@dataclass(frozen=True, slots=True)
class Places:
    """The images that a command names.

    Attributes:
        names: Files, folders, data sets in one file (manifest, shard, parquet, `hf://...`), `https://...`, and `-`.
        split: Only these splits, a comma list; then every place is a data set.
        sample: So many images in all, real and fake in turns, drawn with a fixed seed; then every place is a data set.
        most_bytes: A larger file is not read to its end.
        private: Whether addresses of servers that are not public are asked, too.
        verify: Whose certificates are trusted.
    """

    names: tuple[str, ...]
    split: str | None = None
    sample: int | None = None
    most_bytes: int = 2**30
    private: bool = False
    verify: SSLContext | bool = True

    def __iter__(self) -> Iterator[Image]:
        """Every image, in the order of the names and of the files within.

        Raises:
            DatasetError: A place is no data set that can be read, and is to be one.
        """
        if self.split is not None or self.sample is not None:
            yield from self._of_data_sets()
            return
        for name in self.names:
            if name == LIST:
                yield from self._of_list()
            elif name.startswith("hf://") or (PurePath(name).suffix.lower() in DATA_SETS and "://" not in name):
                yield from map(image_of, read_dataset(Path(name)))
            elif "://" in name:
                yield plain(name), partial(self._fetch, name)
            else:
                yield from self._of_folder(Path(name))

    @property
    def count(self) -> int | None:
        """How many images there are, None where that is known only in the end."""
        in_data_sets = self.split is not None or self.sample is not None
        if in_data_sets or not all(is_folder(Path(name)) or is_image_name(Path(name)) for name in self.names):
            return None
        return sum(1 for _ in self)

    def uploads(self, failures: list[FailedFile]) -> Iterator[Upload]:
        """The images as they are judged; those that cannot be read go to `failures`."""
        with ThreadPoolExecutor(READERS, "read") as pool:
            ahead: deque[tuple[str, Future[bytes]]] = deque()
            images = iter(self)
            while True:
                ahead.extend((name, pool.submit(read)) for name, read in islice(images, READERS - len(ahead)))
                if not ahead:
                    return
                name, data = ahead.popleft()
                try:
                    yield Upload(name, data.result())
                except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
                    kind: Kind = "too-large" if isinstance(error, ImageTooLarge) else "unreadable"
                    detail = f"{name}: {getattr(error, 'strerror', None) or error}"
                    failures.append(FailedFile(file=name, error=ApiError(kind, detail).problem()))

    def _of_list(self) -> Iterator[Image]:
        """The images of the lines on standard input; a line that names none is one that cannot be read."""
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # names of files are any bytes
        for line in map(str.strip, sys.stdin):
            if line in ("", LIST):
                continue
            try:
                yield from replace(self, names=(line,))
            except (OSError, ValueError) as error:
                yield plain(line), partial(_unreadable, str(error))

    def _of_folder(self, path: Path) -> Iterator[Image]:
        files = sorted(file for file in path.rglob("*") if is_image_name(file)) if is_folder(path) else [path]
        for file in files:
            yield plain(str(file)), partial(read_file, file, self.most_bytes)

    def _of_data_sets(self) -> Iterator[Image]:
        entries = [entry for name in self.names for entry in read_dataset(Path(name), split=self.split)]
        if self.sample is not None:
            Random(0).shuffle(entries)
            kinds = [[entry for entry in entries if entry.label == label] for label in (1, 0)]
            turns = (entry for pair in zip_longest(*kinds) for entry in pair if entry)
            entries = list(islice(turns, self.sample))
        yield from map(image_of, entries)

    def _fetch(self, address: str) -> bytes:
        async def fetch() -> bytes:
            async with public_client(self.verify, private=self.private) as client:
                return await download(client, address, self.most_bytes)

        return asyncio.run(fetch())


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; a name that no file can have is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _unreadable(reason: str) -> bytes:
    raise UnreadableImage(reason)


def image_of(entry: Entry) -> Image:
    """An image of a data set; one of a file is called by its path."""
    path = entry.uri.removeprefix("file://")
    return plain(path if path == entry.uri else unquote(path, errors="surrogateescape")), entry.read
