"""Batches of views: which real image is paired with which fake, and the views of both."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.fit.image_roles import Decoded, Pictures
from trainer.images import UnreadableImage
from trainer.views.augmentations import Pixels
from trainer.views.views import Views


class Origin(NamedTuple):
    """What an image of a record is."""

    sha256: str
    group: str
    generator: str
    """Empty for a real image."""


Batch = tuple[torch.Tensor, torch.Tensor, list[str], list[Origin]]
"""Whole views (n, 3, 2, s, s, 3), local views (n, 2, l, l, 3), uint8, what could not be read, and what was: real and
fake in turn."""
Sample = tuple[Pixels, Pixels, list[str], list[Origin]]
"""Whole views (3, 2, s, s, 3), local views (2, l, l, 3), the uris that could not be read, and what was read."""


@dataclass(frozen=True, slots=True)
class Share:
    """Images of a label, drawn so that neither a large source or generator nor a large group decides.

    A source or generator of n images is drawn with a weight of sqrt(n), which lies between alike for all and by size;
    of it any group, and of the group any image, alike often.
    """

    weights: np.ndarray
    """Chance of each name; they add up to 1."""
    groups: list[list[list[int]]]
    """Places of the images of each group of each name."""

    @classmethod
    def of(cls, names: Mapping[int, tuple[str, str]]) -> Self:
        """From the name (source or generator) and the group of the image at each place."""
        tree: dict[str, dict[str, list[int]]] = {}
        for place, (name, group) in names.items():
            tree.setdefault(name, {}).setdefault(group, []).append(place)
        weights = np.sqrt([sum(map(len, groups.values())) for groups in tree.values()])
        return cls(weights / weights.sum(), [list(groups.values()) for groups in tree.values()])

    def draw(self, rng: np.random.Generator) -> int:
        """The place of an image."""
        groups = self.groups[rng.choice(len(self.groups), p=self.weights)]
        group = groups[rng.integers(len(groups))]
        return group[rng.integers(len(group))]


@dataclass(slots=True)
class Pairs(Dataset[Sample]):
    """Records of a set that is not paired: each real image in turn, with a fake drawn at random per epoch.

    The generators are drawn alike often, however many images each has. Balanced, real images are drawn at random too,
    and both by `Share`. Everything about record r of epoch e follows from (seed, e, r), whichever process makes it.
    """

    pictures: Pictures
    views: Views
    seed: int
    balance: bool = False
    paired: float = 0.0
    """Chance that the fake is of the real image's group, where one is."""
    shares: list[Share] = field(init=False)
    """Of real images by source and of fakes by generator, where they are drawn so."""
    reals: np.ndarray = field(init=False)
    fakes: list[np.ndarray] = field(init=False)
    """Places of the fakes of each generator."""
    fakes_of: dict[str, list[int]] = field(init=False)
    """Places of the fakes of each group, where they are paired by it."""

    def __post_init__(self) -> None:
        labels, entries = self.pictures.labels, self.pictures.entries
        self.shares, self.fakes_of = [], {}
        if self.balance:
            real, fake = ([place for place, entry in enumerate(entries) if entry.label == label] for label in (0, 1))
            self.shares = [
                Share.of({place: (entries[place].source, entries[place].group) for place in real}),
                Share.of({place: (entries[place].generator or "", entries[place].group) for place in fake}),
            ]
        if self.paired:
            for place in np.flatnonzero(labels == 1).tolist():
                self.fakes_of.setdefault(entries[place].group, []).append(place)
        self.reals = np.flatnonzero(labels == 0)
        names = np.array([entry.generator or "" for entry in self.pictures.entries])
        self.fakes = [np.flatnonzero((names == name) & (labels == 1)) for name in sorted(set(names[labels == 1]))]

    def __len__(self) -> int:
        return len(self.reals)

    def pair(self, epoch: int, record: int) -> tuple[int, int, np.random.Generator]:
        """Places of the real image and of the fake, and the generator that decides the views."""
        rng = np.random.default_rng((self.seed, epoch, record))
        if self.balance:
            real, fake = (share.draw(rng) for share in self.shares)
        else:
            turn, place = divmod(record, len(self.reals))
            real = int(self.reals[_order(self.seed, epoch, turn, len(self.reals))[place]])
            fake = int(rng.choice(self.fakes[rng.integers(len(self.fakes))]))
        if self.paired and rng.random() < self.paired:
            relatives = self.fakes_of.get(self.pictures.entries[real].group, [fake])
            fake = relatives[rng.integers(len(relatives))]
        return real, fake, rng

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        """The views of (epoch, record); unreadable images are replaced by the next of their label."""
        real, fake, rng = self.pair(*index)
        unreadable: list[str] = []
        origins: list[Origin] = []
        first, second = (self._next_readable(place, unreadable, origins)[:2] for place in (real, fake))
        whole, local = self.views.record(first, second, rng)
        return whole, local, unreadable, origins

    def _next_readable(self, first: int, unreadable: list[str], origins: list[Origin]) -> Decoded:
        entries = self.pictures.entries
        for step in range(first, first + len(entries)):
            place = step % len(entries)
            if entries[place].label != entries[first].label:
                continue
            try:
                decoded = self.pictures.decode(entries[place])
            except UnreadableImage as error:
                unreadable.append(f"{entries[place].uri}\t{error}")
            else:
                origins.append(Origin(decoded.facts.sha256, entries[place].group, entries[place].generator or ""))
                return decoded
        raise UnreadableImage(
            f"none of {len(unreadable)} images of one label can be read any more, the last: {unreadable[-1]}"
        )


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
    """Stack samples: whole (n, 3, 2, s, s, 3) and local (n, 2, l, l, 3), uint8, the unreadable and the read."""
    whole, local, unreadable, origins = zip(*samples, strict=True)
    return (
        torch.from_numpy(np.stack(whole)),
        torch.from_numpy(np.stack(local)),
        [line for lines in unreadable for line in lines],
        [origin for pair in origins for origin in pair],
    )


def joined(parts: Iterator[Batch], count: int) -> Iterator[Batch]:
    """Batches of `count` parts each, whose records follow one another."""
    if count == 1:  # left in the pinned memory where it lies
        yield from parts
    while batch := list(islice(parts, count)):
        whole, local, unreadable, origins = zip(*batch, strict=True)
        yield torch.cat(whole), torch.cat(local), [*chain(*unreadable)], [*chain(*origins)]
