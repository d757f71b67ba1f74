"""From data sets to batches of views: who is paired with whom, decoded once for its views, in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.augmentations import Pixels
from trainer.datasets import Entry
from trainer.images import Preprocess, UnreadableImage, decode_image
from trainer.views import Views

Batch = tuple[torch.Tensor, torch.Tensor, list[str]]
"""Whole views (n, 3, 2, s, s, 3), local views (n, 2, l, l, 3), uint8, and what could not be read."""
Sample = tuple[Pixels, Pixels, list[str]]
"""Whole views (3, 2, s, s, 3), local views (2, l, l, 3), and the uris that could not be read on the way."""


@dataclass(slots=True)
class Pictures:
    """Images of one role, decoded on demand and kept while they fit into memory.

    Workers are forked, so what the parent decoded is shared and never copied.
    """

    entries: list[Entry]
    preprocess: Preprocess
    kept: dict[int, tuple[Pixels, Pixels]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Reason by uri."""

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> np.ndarray:
        """0 real, 1 fake, shape (n,)."""
        return np.array([entry.label for entry in self.entries], np.uint8)

    def decode(self, entry: Entry) -> tuple[Pixels, Pixels]:
        """An image and its plain view, shapes (h, w, 3) and (s, s, 3), uint8.

        Raises:
            UnreadableImage: As `decode_image`.
        """
        try:
            image = decode_image(entry.read())[0]
        except OSError as error:
            raise UnreadableImage(str(error)) from error
        return np.asarray(image), np.asarray(self.preprocess.crop(image))

    def keep(self, threads: int = 2) -> int:
        """Decode all images into memory, drop the unreadable among them, and return the bytes used."""

        def attempt(entry: Entry) -> tuple[Pixels, Pixels] | str:
            try:
                return self.decode(entry)
            except UnreadableImage as error:
                return str(error)

        readable: list[Entry] = []
        with ThreadPoolExecutor(threads) as pool:
            for entry, decoded in zip(self.entries, pool.map(attempt, self.entries), strict=True):
                if isinstance(decoded, str):
                    self.unreadable[entry.uri] = decoded
                else:
                    self.kept[len(readable)] = decoded
                    readable.append(entry)
        self.entries = readable
        return sum(image.nbytes + plain.nbytes for image, plain in self.kept.values())

    def __getitem__(self, index: int) -> tuple[Pixels, Pixels]:
        """Raises UnreadableImage where the file does not decode."""
        return self.kept[index] if index in self.kept else self.decode(self.entries[index])


@dataclass(slots=True)
class Pairs(Dataset[Sample]):
    """Records of a set that is not paired: each real image in turn, with a fake drawn at random per epoch.

    The generators are drawn alike often, however many images each has. Everything about record r of epoch e follows
    from (seed, e, r), whichever process makes it.
    """

    pictures: Pictures
    views: Views
    seed: int
    reals: np.ndarray = field(init=False)
    fakes: list[np.ndarray] = field(init=False)
    """Places of the fakes of each generator."""

    def __post_init__(self) -> None:
        labels = self.pictures.labels
        self.reals = np.flatnonzero(labels == 0)
        names = np.array([entry.generator or "" for entry in self.pictures.entries])
        self.fakes = [np.flatnonzero((names == name) & (labels == 1)) for name in sorted(set(names[labels == 1]))]

    def __len__(self) -> int:
        return len(self.reals)

    def pair(self, epoch: int, record: int) -> tuple[int, int, np.random.Generator]:
        """Places of the real image and of the fake, and the generator that decides the views."""
        turn, place = divmod(record, len(self.reals))
        real = self.reals[_order(self.seed, epoch, turn, len(self.reals))[place]]
        rng = np.random.default_rng((self.seed, epoch, record))
        return int(real), int(rng.choice(self.fakes[rng.integers(len(self.fakes))])), rng

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        """The views of (epoch, record); unreadable images are replaced by the next of their label."""
        real, fake, rng = self.pair(*index)
        failed: list[str] = []
        readable = [self._next_readable(place, failed) for place in (real, fake)]
        whole, local = self.views.record(readable[0], readable[1], rng)
        return whole, local, failed

    def _next_readable(self, place: int, failed: list[str], attempts: int = 20) -> tuple[Pixels, Pixels]:
        label = self.pictures.entries[place].label
        for _ in range(attempts):
            try:
                return self.pictures[place]
            except UnreadableImage as error:
                failed.append(f"{self.pictures.entries[place].uri}\t{error}")
                place = next(
                    step % len(self.pictures)
                    for step in range(place + 1, place + 1 + len(self.pictures))
                    if self.pictures.entries[step % len(self.pictures)].label == label
                )
        raise UnreadableImage(f"{attempts} images in a row could not be read, the last: {failed[-1]}")


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, turn: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, turn, 1)).permutation(n)


@dataclass(slots=True)
class EpochSampler:
    """Indices (epoch, record) of an epoch's batches for one of several processes; workers live on as it changes."""

    steps: int
    batch_size: int
    rank: int = 0
    world: int = 1
    epoch: int = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            yield [(self.epoch, first + place) for place in range(self.batch_size)]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples: whole (n, 3, 2, s, s, 3) and local (n, 2, l, l, 3), uint8, and the unreadable."""
    whole, local, failed = zip(*samples, strict=True)
    return (
        torch.from_numpy(np.stack(whole)),
        torch.from_numpy(np.stack(local)),
        [line for lines in failed for line in lines],
    )
