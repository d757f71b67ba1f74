"""Fitting the heads of a checkpoint: augmented embeddings of training images, plain ones for calibration."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
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
from trainer.heads.heads import Heads, HeadsError, LinearHead, fit_heads
from trainer.images import FileFacts, decode_image
from trainer.model.checkpoint import CheckpointConfig
from trainer.model.embedder import Embedder
from trainer.model.seen_images import SeenImages

IMAGES = 50_000
"""Embeddings that the heads are fitted on (the paper: 10,000 records of five images)."""
VIEWS = 8
"""Embeddings of an image, at most, the plain one included: a small data set does not fill the 50,000."""
PLAIN = Transform("none", unchanged)


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
        training, calibration, rejected = embed_for_heads(
            embedder, read_dataset(data, split=split), images=images, views=views, seed=seed, on_image=on_image
        )
        if cache:
            training.save(cache / "training.safetensors", origin)
            calibration.save(cache / "calibration.safetensors", origin)
    return write_heads(checkpoint, training, calibration, seed=seed), rejected


def embed_for_heads(
    embedder: Embedder,
    entries: Iterable[Entry],
    *,
    images: int,
    seed: int,
    views: int = VIEWS,
    decode: Callable[[Entry], tuple[Image.Image, FileFacts]] = lambda entry: decode_image(entry.read()),
    deadline: float = math.inf,
    on_image: Callable[[int], None] = lambda _: None,
) -> tuple[EmbeddedSet, EmbeddedSet, list[Rejected]]:
    """Embed what heads are fitted on: views of training images, and plain calibration images.

    Args:
        embedder: The checkpoint.
        entries: Images of all roles; those of other roles than training and calibration are not used.
        images: Embeddings of training images, at most; either label gets at most half of them.
        seed: Of the augmentations.
        views: Embeddings per training image, at most.
        decode: Gives the image of an entry.
        deadline: On the clock `time.monotonic()`; images get fewer views where it comes near.
        on_image: Called after each image that is embedded, with the number of all.

    Returns:
        Training and calibration images, and those that could not be read.

    Raises:
        HeadsError: No training image can be read.
    """
    copies = training_views(embedder.config, views)
    work = list(_work(entries, copies, images))
    rounds = [work]
    if deadline < math.inf:  # one view of all images, then the next
        rounds = [[(entry, [of[number]]) for entry, of in work if number < len(of)] for number in range(views)]
    total = sum(map(len, rounds))
    sets: dict[str, EmbeddedSet] = {}
    rejected: dict[str, Rejected] = {}
    for part in rounds:
        started = time.monotonic()
        embedded, unreadable = embed_entries(embedder, part, seed=seed, decode=decode, on_image=lambda: on_image(total))
        sets |= embedded
        rejected |= {image.file: image for image in unreadable}
        if time.monotonic() + 1.5 * (time.monotonic() - started) > deadline:
            break
    parts = [sets[copy.name] for copy in copies if copy.name in sets]
    if not parts:
        raise HeadsError("no image of the role training can be read: add images, or change --data or --split")
    training = EmbeddedSet.joined(parts)
    calibration = sets.get(PLAIN.name) or training.take(training.labels > 1)  # none at all: an empty set
    return training, calibration, list(rejected.values())


def write_heads(
    folder: Path,
    training: EmbeddedSet,
    calibration: EmbeddedSet,
    *,
    seed: int,
    generators: Iterable[str] = (),
    classifier: LinearHead | None = None,
) -> Heads:
    """Fit the heads, and write them into a checkpoint folder with calibration set and record of their images.

    Args:
        folder: Of the checkpoint.
        training: What they are fitted on.
        calibration: What they are calibrated on.
        seed: Recorded with the heads.
        generators: Those that trained the embedding, besides those of `training`.
        classifier: The linear head where the training of the embedding itself made one (loss `bce`).

    Raises:
        HeadsError: Fewer than two training images of a label.
    """
    trained = sorted({*training.generators, *generators} - {""})
    calibration_set = replace(calibration.calibration_set(), trained=trained)
    heads = fit_heads(training.embeddings, training.labels, seed=seed, calibration=calibration_set)
    if classifier is not None:
        heads = replace(heads, linear=classifier)
    # First of the three: a kill in between leaves too much on record rather than too little.
    images = EmbeddedSet.joined([training, calibration])
    seen = SeenImages.of((facts.sha256 for facts in images.facts), images.groups, complete=False)
    SeenImages.joined([SeenImages.load(folder), seen]).save(folder)
    calibration_set.save(folder)
    heads.save(folder)
    return heads


def training_views(config: CheckpointConfig, count: int) -> list[Transform]:
    """What an image's embeddings for the heads are made of: the plain image, then augmented views as in training.

    Where an image is judged by several windows, it is augmented as a whole, and then cut into them.

    Args:
        config: Of the checkpoint; its training settings decide the views.
        count: How many, the plain one included.
    """
    from trainer.views.augmentations import Augmenter
    from trainer.views.views import Views

    views = Views(
        preprocess=config.preprocess,
        augmenter=Augmenter(config.preprocess.image_size, most=int(config.training.get("augmentations", 2))),
        scale=config.training.get("scale", "resized"),
    )

    def augmented(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return Image.fromarray(views.judged(np.asarray(image), rng))

    finished = config.preprocess.windows == 1
    copies = [Transform(f"augmented-{i}", augmented, finished=finished) for i in range(1, count)]
    return [Transform("plain", unchanged), *copies]


def _work(entries: Iterable[Entry], copies: list[Transform], images: int) -> Iterator[tuple[Entry, list[Transform]]]:
    """Entries with what they are embedded under; either label gets at most half of the images."""
    remaining = {0: images // 2, 1: images - images // 2}
    limits = {("training", label): -(-remaining[label] // len(copies)) for label in (0, 1)}
    limits |= {("calibration", label): CALIBRATION_IMAGES // 2 for label in (0, 1)}
    for entry in spread(entries, limits):
        if role(entry.group) == "calibration":
            yield entry, [PLAIN]
        else:
            transforms = copies[: remaining[entry.label]]
            remaining[entry.label] -= len(transforms)
            yield entry, transforms


def spread(entries: Iterable[Entry], limits: dict[tuple[str, int], int]) -> list[Entry]:
    """At most so many entries of each role and label, those whose hashes are lowest: generators come by their shares.

    They are in the order of `entries`, so that archives are read from front to back.
    """
    heaps: dict[tuple[str, int], list[tuple[int, int, Entry]]] = {key: [] for key in limits}
    for place, entry in enumerate(entries):
        key = role(entry.group), entry.label
        if not limits.get(key):
            continue
        digest = blake2b(f"lineup heads {entry.key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
        item = -int.from_bytes(digest, "big"), place, entry  # a heap gives up its least: the highest hash
        (heappush if len(heaps[key]) < limits[key] else heappushpop)(heaps[key], item)
    return [entry for _, entry in sorted((place, entry) for heap in heaps.values() for _, place, entry in heap)]
