"""The images of a data set by what they serve: training, calibration or validation."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.data.datasets import read_dataset
from trainer.data.entry import role
from trainer.fit.batches import Pictures
from trainer.fit.fit_settings import FitError, FitSettings
from trainer.fit.stream import shard_paths
from trainer.heads.calibration_set import CALIBRATION_IMAGES

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
    if not streamed:
        keep_all(list(roles.values()), settings.cache_bytes)
    labels = roles["training"].labels
    real, fake = int((labels == 0).sum()), int((labels == 1).sum())
    if min(real, fake) < 2:
        raise FitError(
            f"{settings.data} has {real} real and {fake} generated training images (split {settings.split}); "
            "at least 2 of each are needed: add images or change --split"
        )
    return roles


def keep_all(parts: Sequence[Pictures], budget: int) -> None:
    """Decode all images into memory, or none where a sample of them says that they will not fit."""
    largest = max(parts, key=len)
    sample = Pictures(largest.entries[:: max(1, len(largest) // 32)], largest.preprocess)
    size = sample.keep() / max(1, len(sample))
    if size * sum(map(len, parts)) <= budget:
        for pictures in parts:
            pictures.keep()
