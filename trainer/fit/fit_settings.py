"""The settings of a training run, and the learning rate that follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.data.entry import FIT_FORBIDDEN_SPLITS
from trainer.fit.loss import Anchors, Terms
from trainer.images import Preprocess
from trainer.views.views import Scale

REFERENCE_BATCH = 1024
"""Records per step for which the learning rate is stated."""


class FitError(ValueError):
    """The settings or the data do not allow training; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """Everything that decides the weights. Defaults are the paper's where it names a value."""

    data: Path
    """A data set of any layout that `datasets.read_dataset` reads, or D3 shards."""
    output: Path
    """The checkpoint folder to write."""
    split: str = "train"
    """Comma list of splits to use, of 70 % of the groups where the data set names none; test and unseen are refused."""
    name: str = "code"
    image_size: int = 224
    """Side in pixels of what the backbone is fed."""
    local_size: int | None = None
    """Side in pixels of local crops; the paper's text says 96 at 224, its code 224. Default: 96, scaled alike."""
    architecture: str = "vit_tiny_patch16_224"
    architecture_args: tuple[tuple[str, Any], ...] = ()
    """Passed to timm, for tiny models; pairs of name and value."""
    pretrained: bool = False
    """Start from timm's weights (an ablation; needs the network once)."""
    preprocess: Literal["center_crop", "resize_crop"] = "resize_crop"
    """How images are brought to size in validation, heads, index and API."""
    scale: Scale = "resized"
    """Crops as in the paper, or windows at the image's own resolution."""
    tokens: int | None = None
    """Patches of a view that training feeds at most, drawn at random; all of them outside of training. Fewer make a
    step cheaper, and large images affordable."""
    augmentations: int = 2
    """At most so many per view, 0 to 19."""
    recompress: float = 0.0
    """Chance that an image's views are made of a JPEG copy of it, real or fake alike."""
    batch_size: int = 32
    """Records per step and process; the paper's is 1,024 over all GPUs."""
    epoch_steps: int | None = None
    """Updates per epoch; default 1,700, or fewer for data that is small (see `train.epoch_steps`)."""
    epochs: int = 150
    """At most."""
    warmup_epochs: float = 5
    learning_rate: float = 2e-3
    """At 1,024 records per step over all processes; scaled by the square root of the ratio."""
    weight_decay: float = 2e-5
    temperature: float = 0.1
    terms: Terms = "both"
    anchors: Anchors = "both"
    loss: Literal["infonce", "bce"] = "infonce"
    gather: bool = True
    """Take negatives from all processes."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 = no clipping."""
    ema: float = 0.0
    """Decay per update of an average of the weights, which then is what is kept; 0 = none."""
    patience: int = 6
    """Epochs without a better linear head on validation images before training stops; 0 = never. The best epoch's
    weights are kept. Without effect under `max_minutes`, whose schedule ends in time, and where there are no validation
    images of both labels: the last weights are kept."""
    max_minutes: float | None = None
    """Wall time from start to the finished checkpoint, heads included. A resumed run has what the finished epochs left
    of it."""
    seed: int = 42
    precision: Literal["bf16", "float32"] = "bf16"
    workers: int | None = None
    """Processes that make views; default: half of the cores on a CPU, all but one beside a GPU."""
    device: str = "auto"
    cache_bytes: int = 4 << 30
    """Decoded images are kept in memory up to this size."""
    head_images: int = 50_000
    """Augmented views that the heads are fitted on, at most."""

    tensorboard: Path | None = None
    """Folder for TensorBoard's event files; none are written without it."""

    def __post_init__(self) -> None:
        splits = {part.strip() for part in self.split.split(",")}
        if forbidden := sorted(splits & set(FIT_FORBIDDEN_SPLITS)):
            raise FitError(
                f"split {', '.join(forbidden)} must not train anything: set --split to another, such as train"
            )
        if self.batch_size < 2:
            raise FitError(
                f"batch size {self.batch_size}: a positive comes from another record; set --batch-size to 2 or more"
            )
        for size, option in ((self.image_size, "--image-size"), (self.local, "--local-size")):
            if size < self.patch or size % self.patch:
                raise FitError(f"{size} pixels are not whole patches of {self.patch}: change {option}")
        for value, option in (
            (self.epochs, "--epochs"),
            (self.max_minutes, "--max-minutes"),
            (self.epoch_steps, "--epoch-steps"),
            (self.tokens, "--tokens"),
        ):
            if value is not None and value <= 0:
                raise FitError(f"{option} is {value}: set it above 0")

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        digits = self.architecture.partition("patch")[2].partition("_")[0]
        return int(dict(self.architecture_args).get("patch_size", digits or 1))

    @property
    def local(self) -> int:
        """Side of local crops in pixels."""
        patches = max(1, round(96 / 224 * self.image_size / self.patch))
        return self.local_size or patches * self.patch

    @property
    def preprocessing(self) -> Preprocess:
        """The checkpoint's preprocessing."""
        return Preprocess(mode=self.preprocess, image_size=self.image_size)

    def record(self) -> dict[str, Any]:
        """What the checkpoint says of its training: every setting that can change the weights, as JSON types."""
        ignored = {"output", "workers", "device", "cache_bytes", "architecture_args", "name", "tensorboard"}
        values = {key: value for key, value in asdict(self).items() if key not in ignored}
        values |= {"data": str(self.data), "local_size": self.local}
        return values | ({"architecture_args": dict(self.architecture_args)} if self.architecture_args else {})


def learning_rate(settings: FitSettings, progress: float, processes: int = 1) -> float:
    """Linear warm-up from 1e-6, then a cosine to 0.

    Args:
        settings: Peak value, batch size and the warm-up's share of the epochs.
        progress: Share of the training that is done, 0..1: the larger of updates done and time used.
        processes: Each adds its batch.
    """
    peak = settings.learning_rate * math.sqrt(settings.batch_size * processes / REFERENCE_BATCH)
    warmup = min(0.5, settings.warmup_epochs / settings.epochs)
    if progress < warmup:
        return 1e-6 + (peak - 1e-6) * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
