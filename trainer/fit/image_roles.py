"""The images of a data set by what they serve (training, calibration or validation), in memory where they fit."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.cores import usable_cores
from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry, role
from trainer.fit.fit_settings import FitError, FitSettings
from trainer.heads.calibration_set import CALIBRATION_IMAGES
from trainer.images import FileFacts, Preprocess, UnreadableImage, decode_image
from trainer.model.seen_images import SeenImages
from trainer.views.augmentations import Pixels


class Decoded(NamedTuple):
    """An image, its plain view and what its file is."""

    image: Pixels
    """Shape (h, w, 3), uint8."""
    plain: Pixels
    """The middle window where an image has several, shape (s, s, 3), uint8."""
    facts: FileFacts


@dataclass(slots=True)
class Pictures:
    """Images of one role, decoded on demand and kept while they fit into memory.

    Workers are forked, so what the parent decoded is shared and never copied.
    """

    entries: list[Entry]
    preprocess: Preprocess
    memory: dict[str, Decoded] = field(default_factory=dict)
    """By uri, as the others."""
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the images that were read here."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Reason."""

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> np.ndarray:
        """0 real, 1 fake, shape (n,)."""
        return np.array([entry.label for entry in self.entries], np.uint8)

    @property
    def seen(self) -> SeenImages:
        """The record of these images: every group, and the bytes of those that were read."""
        return SeenImages.of(self.hashes.values(), (entry.group for entry in self.entries))

    def decode(self, entry: Entry) -> Decoded:
        """One image, from memory or from its file.

        Raises:
            UnreadableImage: The file has gone, or does not decode.
        """
        if entry.uri in self.memory:
            return self.memory[entry.uri]
        try:
            image, facts = decode_image(entry.read())
        except OSError as error:
            raise UnreadableImage(str(error)) from error
        return Decoded(np.asarray(image), np.asarray(self.preprocess.crop(image)), facts)

    def read(self, entry: Entry) -> Decoded:
        """Decode one image, and record that it was read, or why it could not be.

        Raises:
            UnreadableImage: As `decode`.
        """
        try:
            decoded = self.decode(entry)
        except UnreadableImage as error:
            self.unreadable[entry.uri] = str(error)
            raise
        self.hashes[entry.uri] = decoded.facts.sha256
        return decoded

    def keep(self) -> int:
        """Decode all images into memory, drop the unreadable among them, and return the bytes used."""

        def attempt(entry: Entry) -> Decoded | None:
            try:
                return self.read(entry)
            except UnreadableImage:
                return None

        with ThreadPoolExecutor(usable_cores()) as pool:
            attempts = zip(self.entries, pool.map(attempt, self.entries), strict=True)
            self.memory = {entry.uri: decoded for entry, decoded in attempts if decoded}
        self.entries = [entry for entry in self.entries if entry.uri in self.memory]
        return sum(decoded.image.nbytes + decoded.plain.nbytes for decoded in self.memory.values())


Roles = dict[str, Pictures]


def read_roles(settings: FitSettings) -> Roles:
    """The images of the data set by role, decoded now where all of them fit into memory.

    Of shards, which are streamed in training, only the first images are listed: as many as heads, calibration and
    validation look at.

    Raises:
        FitError: There are not at least two real and two generated training images.
    """
    roles = {name: Pictures([], settings.preprocessing) for name in ("training", "calibration", "validation")}
    streamed = bool(shard_paths(settings.data))
    for entry in read_dataset(settings.data, split=settings.split):
        part = role(entry.group)
        limit = settings.head_images if part == "training" else CALIBRATION_IMAGES
        if not streamed or len(roles[part]) < limit:
            roles[part].entries.append(entry)
        elif part == "training":
            break
    if not streamed and fits_into_memory(roles, settings.cache_bytes):
        for pictures in roles.values():
            pictures.keep()
    labels = roles["training"].labels
    real, fake = int((labels == 0).sum()), int((labels == 1).sum())
    if min(real, fake) < 2:
        raise FitError(
            f"{settings.data} has {real} real and {fake} generated training images (split {settings.split}); "
            "at least 2 of each are needed: add images or change --split"
        )
    return roles


def fits_into_memory(roles: Roles, budget: int) -> bool:
    """Whether a sample of the images says that all of them take no more than so many bytes when decoded."""
    largest = max(roles.values(), key=len)
    sample = Pictures(largest.entries[:: max(1, len(largest) // 32)], largest.preprocess)
    size = sample.keep() / max(1, len(sample))
    return size * sum(map(len, roles.values())) <= budget


def shard_paths(data: Path) -> list[Path]:
    """The shards of a data set: the file itself, or a folder's `*.tar`; empty where it is another layout."""
    if data.is_file():
        return [data] if data.suffix.lower() == ".tar" else []
    if not data.is_dir() or (data / "manifest.csv").exists():
        return []
    return sorted(path for path in data.iterdir() if path.suffix.lower() == ".tar")
