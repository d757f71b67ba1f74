"""What a finished training run writes: weights, heads, calibration images, metrics and a model card, in one folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.augmentations import Pixels
from trainer.batches import Pictures
from trainer.calibration_set import LIMIT as CALIBRATION_LIMIT
from trainer.calibration_set import CalibrationSet
from trainer.embedder import CheckpointConfig, Embedder, save_checkpoint
from trainer.heads import Heads, LinearHead, fit_heads
from trainer.images import Preprocess
from trainer.probe import fixed_views
from trainer.views import Views

MOST_VIEWS = 8
"""Views per training image that the heads are fitted on, at most: the plain one and augmented ones."""


def normalised(pixels: Pixels, preprocess: Preprocess) -> np.ndarray:
    """Pixels (n, s, s, 3) uint8 as the backbone reads them, shape (n, 3, s, s), float32."""
    mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
    scaled: np.ndarray = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))  # (n, 3, s, s)


def embed_fixed(embedder: Embedder, pixels: Pixels, block: int = 64) -> np.ndarray:
    """Embeddings (n, d) of pixels (n, s, s, 3), a block per thread at a time."""

    def embed(start: int) -> np.ndarray:
        return embedder.embed_pixels(normalised(pixels[start : start + block], embedder.preprocess), batch_size=block)

    with ThreadPoolExecutor(os.cpu_count() if embedder.device == "cpu" else 1) as pool:
        blocks = list(pool.map(embed, range(0, len(pixels), block)))
    return np.concatenate(blocks) if blocks else np.empty((0, embedder.dim), np.float32)  # (n, d)


def calibration_set(embedder: Embedder, pictures: Pictures, views: Views, seed: int) -> CalibrationSet:
    """Embeddings of the plain views of calibration images, 10,000 at most, with what each image is."""
    pixels, labels, places = fixed_views(pictures, views, per_image=1, seed=seed, limit=CALIBRATION_LIMIT)
    entries = [pictures.entries[place] for place in places]
    return CalibrationSet(
        embeddings=embed_fixed(embedder, pixels),
        labels=labels,
        generators=[entry.generator or "" for entry in entries],
        sources=[entry.source for entry in entries],
        sha256=[hashlib.sha256(entry.read()).hexdigest() for entry in entries],
        groups=[entry.group for entry in entries],
    )


def augmented_round(pictures: Pictures, views: Views, seed: int, number: int, limit: int) -> tuple[Pixels, np.ndarray]:
    """One more augmented view of each image (at most `limit`): pixels (n, s, s, 3) uint8 and labels (n,).

    Round 0 holds the plain views, every later one augmented views of its own.
    """
    per_image = 2 if number else 1
    pixels, labels, _ = fixed_views(pictures, views, per_image=per_image, seed=seed + 1000 * number, limit=limit)
    return pixels[per_image - 1 :: per_image], labels[per_image - 1 :: per_image]


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
    report: Mapping[str, Any] | None = None,
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
        report: Of the training, kept in `metrics.json`.

    Returns:
        The metrics.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        aside = Path(scratch) / "new"
        save_checkpoint(aside, weights, config)
        embedder = Embedder.load(aside, device=device)
        heads = _heads(embedder, roles, views, seed, head_images, classifier, deadline)
        heads.save(aside)
        metrics = {
            "checkpoint": embedder.id,
            "heads": heads.id,
            "images": {role: _counts(pictures) for role, pictures in roles.items()},
            "validation": _validation(embedder, heads, roles["validation"], views, seed),
            "training": dict(report or {}),
        }
        (aside / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (aside / "README.md").write_text(model_card(config, metrics))
        if folder.exists():
            folder.replace(Path(scratch) / "old")
        aside.replace(folder)
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
    calibration.save(embedder.folder)
    training = roles["training"]
    rounds, x, y = 0, [], []
    while rounds < max(1, min(MOST_VIEWS, limit // max(1, len(training)))):
        started = time.monotonic()
        pixels, labels = augmented_round(training, views, seed, rounds, limit)
        x.append(embed_fixed(embedder, pixels))
        y.append(labels)
        rounds += 1
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

    pixels, labels, _ = fixed_views(pictures, views, per_image=1, seed=seed, limit=CALIBRATION_LIMIT)
    if len(set(labels.tolist())) < 2:
        return {}
    x = embed_fixed(embedder, pixels)
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
`python -m trainer fit`. It tells images made by generators from photographs by their neighbours and by three heads.

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
