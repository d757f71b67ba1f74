"""What a finished training run writes: weights, heads, calibration images, metrics and a model card, in one folder."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.cores import usable_cores
from trainer.fit.batches import Pictures
from trainer.fit.probe import chosen_places, fixed_views
from trainer.fit.state import SUMMARY_FILE, EpochSummary, write_table
from trainer.heads.calibration_set import CALIBRATION_IMAGES, CalibrationSet
from trainer.heads.heads import Heads, LinearHead, fit_heads
from trainer.images import Preprocess
from trainer.model.checkpoint import CheckpointConfig, save_checkpoint
from trainer.model.embedder import Embedder
from trainer.model.seen_images import SeenImages
from trainer.views.augmentations import Pixels
from trainer.views.views import Views

MOST_VIEWS = 8
"""Views per training image that the heads are fitted on, at most: the plain one and augmented ones."""


def normalised(pixels: Pixels, preprocess: Preprocess) -> np.ndarray:
    """Pixels (n, s, s, 3) uint8 as the backbone reads them, shape (n, 3, s, s), float32."""
    mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
    scaled: np.ndarray = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))  # (n, 3, s, s)


def embed_pictures(
    embedder: Embedder,
    pictures: Pictures,
    views: Views,
    seed: int,
    *,
    limit: int,
    augmented: bool = False,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of one view of each picture, a block per thread at a time.

    Args:
        embedder: The checkpoint.
        pictures: Where from; unreadable ones are left out.
        views: How.
        seed: Decides augmented views, and the subset where there are more than `limit`.
        limit: The most pictures.
        augmented: Instead of the plain view.
        block: Pictures held as pixels at a time and thread.

    Returns:
        Embeddings (n, d) float32, and the places of their pictures (n,).
    """
    places = chosen_places(len(pictures), limit, seed)

    def embed(start: int) -> tuple[np.ndarray, np.ndarray]:
        pixels, found = fixed_views(pictures, views, places[start : start + block], seed, augmented=augmented)
        return embedder.embed_pixels(normalised(pixels, embedder.preprocess), batch_size=block), found

    with ThreadPoolExecutor(usable_cores()) as pool:
        parts = list(pool.map(embed, range(0, len(places), block)))
    if not parts:
        return np.empty((0, embedder.dim), np.float32), places
    return np.concatenate([x for x, _ in parts]), np.concatenate([found for _, found in parts])  # (n, d), (n,)


def calibration_set(embedder: Embedder, pictures: Pictures, views: Views, seed: int) -> CalibrationSet:
    """Embeddings of the plain views of calibration images, 10,000 at most, with what each image is."""
    x, places = embed_pictures(embedder, pictures, views, seed, limit=CALIBRATION_IMAGES)
    entries = [pictures.entries[place] for place in places]
    return CalibrationSet(
        embeddings=x,
        labels=pictures.labels[places],
        generators=[entry.generator or "" for entry in entries],
        sources=[entry.source for entry in entries],
        sha256=[pictures.hashes[place] for place in places.tolist()],
        groups=[entry.group for entry in entries],
    )


def release(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: CheckpointConfig,
    roles: Mapping[str, Pictures],
    views: Views,
    *,
    seed: int,
    head_images: int,
    device: str = "cpu",
    deadline: float = math.inf,
    classifier: LinearHead | None = None,
    training: Mapping[str, Any] | None = None,
    history: Sequence[dict[str, Any]] = (),
    unreadable: Mapping[str, str] | None = None,
    seen: SeenImages | None = None,
) -> dict[str, Any]:
    """Write the checkpoint folder: aside first, then renamed, so that no half-made checkpoint is ever seen.

    Args:
        folder: Replaced when it is there.
        weights: State dict of the backbone.
        config: What rebuilds it.
        roles: Pictures by role: training, calibration, validation.
        views: How the heads' training images are augmented.
        seed: Decides those views.
        head_images: The most views that the heads are fitted on.
        device: Where embeddings are computed.
        deadline: On the clock `time.monotonic()`; the heads get fewer views where it comes near.
        classifier: The linear head where the training itself made one (loss `bce`).
        training: How the training went, kept in `metrics.json`.
        history: Its epochs, written as `summary.csv`.
        unreadable: Reason by uri of images left out; with those of `roles` written as `unreadable.csv`.
        seen: Images that trained the backbone, where not all are in `roles`.

    Returns:
        The metrics.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (folder.with_name(f".{folder.name}.{age}") for age in ("new", "old"))
    for leftover in (aside, old):  # of a run that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    save_checkpoint(aside, weights, config)
    embedder = Embedder.load(aside, device=device)
    heads = _heads(embedder, roles, views, seed, head_images, classifier, deadline)
    heads.save(aside)
    validation = _validation(embedder, heads, roles["validation"], views, seed)
    left_out = dict(unreadable or {})  # complete only now: a file may go while the heads are fitted
    for pictures in roles.values():
        left_out |= pictures.unreadable
    metrics = {
        "checkpoint": embedder.id,
        "heads": heads.id,
        "images": {role: _counts(pictures) for role, pictures in roles.items()},
        "validation": validation,
        "training": dict(training or {}),
        "unreadable": len(left_out),
    }
    SeenImages.joined([*([seen] if seen else []), *(pictures.seen for pictures in roles.values())]).save(aside)
    write_table(aside / SUMMARY_FILE, list(EpochSummary.__dataclass_fields__), history)
    if left_out:
        rows = [{"uri": uri, "reason": reason} for uri, reason in sorted(left_out.items())]
        write_table(aside / "unreadable.csv", ["uri", "reason"], rows)
    (aside / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (aside / "README.md").write_text(model_card(config, metrics))
    if folder.exists():
        folder.replace(old)
    aside.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    return metrics


def _heads(
    embedder: Embedder,
    roles: Mapping[str, Pictures],
    views: Views,
    seed: int,
    limit: int,
    classifier: LinearHead | None,
    deadline: float,
) -> Heads:
    """Heads on augmented views of the training images, with calibration; its set is saved beside the checkpoint."""
    calibration = calibration_set(embedder, roles["calibration"], views, seed)
    trained = {entry.generator for entry in roles["training"].entries if entry.generator}
    calibration = replace(calibration, trained=sorted(trained))
    calibration.save(embedder.folder)
    training = roles["training"]
    x, y = [], []
    for number in range(max(1, min(MOST_VIEWS, limit // max(1, len(training))))):
        started = time.monotonic()
        embeddings, places = embed_pictures(embedder, training, views, seed + number, limit=limit, augmented=number > 0)
        x.append(embeddings)
        y.append(training.labels[places])
        if time.monotonic() + 1.5 * (time.monotonic() - started) > deadline:
            break
    heads = fit_heads(np.concatenate(x), np.concatenate(y), seed=seed, calibration=calibration)
    return heads if classifier is None else replace(heads, linear=classifier)


def _counts(pictures: Pictures) -> dict[str, int]:
    return dict(sorted(Counter(entry.generator or "real" for entry in pictures.entries).items()))


def _validation(
    embedder: Embedder, heads: Heads, pictures: Pictures, views: Views, seed: int
) -> dict[str, dict[str, float]]:
    """Balanced accuracy and AUROC of each head on the plain views of validation images; empty without both labels."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    x, places = embed_pictures(embedder, pictures, views, seed, limit=CALIBRATION_IMAGES)
    labels = pictures.labels[places]
    if len(set(labels.tolist())) < 2:
        return {}
    scores = heads.logits(x) | ({"nn1": heads.nearest.margin(x)} if heads.nearest else {})
    return {
        name: {
            "accuracy": float(balanced_accuracy_score(labels, score > 0)),
            "auroc": float(roc_auc_score(labels, score)),
        }
        for name, score in scores.items()
    }


def model_card(config: CheckpointConfig, metrics: Mapping[str, Any]) -> str:
    """README.md of a checkpoint, in the hub's form."""
    counts = "\n".join(
        f"| {role} | {sum(images.values())} | " + ", ".join(f"{name} {n}" for name, n in images.items()) + " |"
        for role, images in metrics["images"].items()
    )
    quality = "\n".join(
        f"| {head} | {values['accuracy']:.3f} | {values['auroc']:.3f} |"
        for head, values in metrics["validation"].items()
    )
    settings = "\n".join(f"- `{key}`: {value}" for key, value in sorted(config.training.items()))
    return f"""---
license: {config.licence.lower()}
library_name: lineup
tags: [deepfake-detection, image-embedding]
---
# {config.name}

A CoDE embedding (Contrastive Deepfake Embeddings, ECCV 2024, arXiv 2407.20337): {config.architecture}, CLS token,
{config.dim} dimensions, trained from {"pretrained weights" if config.training.get("pretrained") else "scratch"} by
`lineup train fit`. It tells images made by generators from photographs by their neighbours and by three heads.

Images are brought to {config.image_size} pixels by `{config.preprocess.mode}`.

## Data
| role | images | of |
| --- | --- | --- |
{counts}

## On validation images
Balanced accuracy and AUROC on images that trained neither embedding nor heads, but chose between them.

| head | accuracy | AUROC |
| --- | --- | --- |
{quality}

These are images of the generators it was trained on. An unknown generator is recognised less well; compression,
resizing and content that differ between real and generated training images can be mistaken for the trace of a
generator. A verdict is evidence, no proof.

## Settings
{settings}
"""
