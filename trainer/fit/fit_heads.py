"""Fitting the heads of a checkpoint again: augmented embeddings of training images, plain ones for calibration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import blake2b
from heapq import heappush, heappushpop
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data.datasets import read_dataset
from trainer.data.entry import FIT_FORBIDDEN_SPLITS, Entry, role
from trainer.evaluation.embedded_set import EmbeddedSet, Rejected, embed_entries
from trainer.evaluation.transforms import Transform, unchanged
from trainer.heads.calibration_set import CALIBRATION_IMAGES
from trainer.heads.heads import Heads, HeadsError, fit_heads
from trainer.model.checkpoint import CheckpointConfig
from trainer.model.embedder import Embedder
from trainer.model.seen_images import SeenImages

IMAGES = 50_000
"""Embeddings that the heads are fitted on (the paper: 10,000 records of five images)."""
VIEWS = 8
"""Embeddings of an image, at most, the plain one included: a small data set does not fill the 50,000."""


def refit(
    checkpoint: Path,
    data: Path,
    *,
    split: str = "train",
    images: int = IMAGES,
    views: int = VIEWS,
    seed: int = 42,
    device: str = "auto",
    cache: Path | None = None,
    on_image: Callable[[int], None] = lambda _: None,
) -> tuple[Heads, list[Rejected]]:
    """Fit heads and calibration set, and write both into the checkpoint folder, with a record of their images.

    Args:
        checkpoint: The folder.
        data: A data set of any layout; images of the role "validation" are not used.
        split: Comma list, of 70 % of the groups where the data set names no splits; test and unseen are refused.
        images: Embeddings to fit on, at most.
        views: Embeddings per image, at most.
        seed: Of the augmentations.
        device: auto, cpu or cuda.
        cache: Folder of embeddings that a second call with the same checkpoint, data and settings reads instead.
        on_image: Called after each image that is embedded, with the number of all.

    Raises:
        HeadsError: A forbidden split, or too few images.
        CheckpointError: The checkpoint cannot be loaded.
        DatasetError: The data cannot be read.
    """
    if forbidden := set(split.replace(" ", "").split(",")) & set(FIT_FORBIDDEN_SPLITS):
        raise HeadsError(f"split {', '.join(sorted(forbidden))} must not fit heads: set --split to another, as train")
    embedder = Embedder.load(checkpoint, device=device)
    origin = json.dumps([embedder.id, str(data.resolve()), split, images, views, seed])
    training = cache and EmbeddedSet.load(cache / "training.safetensors", origin)
    calibration = cache and EmbeddedSet.load(cache / "calibration.safetensors", origin)
    rejected: list[Rejected] = []
    if not training or not calibration:
        copies = training_views(embedder.config, views)
        work = list(_work(data, split, copies, images))
        sets, rejected = embed_entries(embedder, work, seed=seed, on_image=lambda: on_image(len(work)))
        parts = [sets[copy.name] for copy in copies if copy.name in sets]
        if not parts:
            raise HeadsError(f"{data} (split {split}) holds no image of the role training: add images")
        training = EmbeddedSet.joined(parts)
        calibration = sets.get("none") or training.take(training.labels > 1)  # none at all: an empty set
        if cache:
            training.save(cache / "training.safetensors", origin)
            calibration.save(cache / "calibration.safetensors", origin)
    held = replace(calibration.calibration_set(), trained=sorted(set(training.generators) - {""}))
    heads = fit_heads(training.embeddings, training.labels, seed=seed, calibration=held)
    # First of the three: a kill in between leaves too much on record rather than too little.
    read = [training, calibration]
    contents = {facts.sha256 for part in read for facts in part.facts}
    seen = SeenImages.of(contents, {group for part in read for group in part.groups}, complete=False)
    SeenImages.joined([SeenImages.load(checkpoint), seen]).save(checkpoint)
    held.save(checkpoint)
    heads.save(checkpoint)
    return heads, rejected


def training_views(config: CheckpointConfig, count: int) -> list[Transform]:
    """What an image's embeddings for the heads are made of: the plain image, then augmented views as in training.

    Args:
        config: Of the checkpoint; its training settings decide the views.
        count: How many, the plain one included.
    """
    from trainer.views.augmentations import Augmenter
    from trainer.views.views import Views

    settings = config.training
    views = Views(
        preprocess=config.preprocess,
        augmenter=Augmenter(config.preprocess.image_size, most=int(settings.get("augmentations", 2))),
        scale=settings.get("scale", "resized"),
        recompress=float(settings.get("recompress", 0.0)),
    )

    def augmented(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return Image.fromarray(views.augmented(np.asarray(image), rng))

    copies = [Transform(f"augmented-{i}", augmented, finished=True) for i in range(1, count)]
    return [Transform("plain", unchanged), *copies]


def _work(data: Path, split: str, copies: list[Transform], images: int) -> Iterator[tuple[Entry, list[Transform]]]:
    """Entries with what they are embedded under; either label gets at most half of the images."""
    left = {0: images // 2, 1: images - images // 2}
    most = {("training", label): -(-left[label] // len(copies)) for label in (0, 1)}
    most |= {("calibration", label): CALIBRATION_IMAGES // 2 for label in (0, 1)}
    for entry in _chosen(data, split, most):
        if role(entry.group) == "calibration":
            yield entry, [Transform("none", unchanged)]
        else:
            chosen = copies[: left[entry.label]]
            left[entry.label] -= len(chosen)
            yield entry, chosen


def _chosen(data: Path, split: str, most: dict[tuple[str, int], int]) -> list[Entry]:
    """At most so many entries of each role and label, those whose hashes are lowest: generators come by their shares.

    In the order of the data set, so that archives are read from front to back.
    """
    heaps: dict[tuple[str, int], list[tuple[int, int, Entry]]] = {key: [] for key in most}
    for place, entry in enumerate(read_dataset(data, split=split)):
        key = role(entry.group), entry.label
        if not most.get(key):
            continue
        digest = blake2b(f"lineup heads {entry.key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
        item = -int.from_bytes(digest, "big"), place, entry  # a heap gives up its least: the highest hash
        (heappush if len(heaps[key]) < most[key] else heappushpop)(heaps[key], item)
    kept = sorted((place, entry) for heap in heaps.values() for _, place, entry in heap)
    return [entry for _, entry in kept]
