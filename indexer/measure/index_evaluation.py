"""The trainer's tables with the index's heads: what a service that follows this index would say of a data set."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from indexer.follower import Follower
from indexer.measure.calibrate import recalibrate
from indexer.measure.near_duplicates import relatives
from indexer.settings import Settings
from trainer.evaluation.embedded_set import EmbeddedSet, Rejected, embed_entries
from trainer.evaluation.metrics import RESAMPLES
from trainer.evaluation.splits import measure_splits, split_entries, split_mask
from trainer.evaluation.transforms import table_transforms
from trainer.heads.calibration import Calibration
from trainer.heads.heads import Heads
from trainer.heads.vote import vote
from trainer.model.embedder import Embedder
from trainer.model.seen_images import LeftOut, SeenImages


class EvaluationError(ValueError):
    """There is nothing to evaluate; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured at one revision.

    Attributes:
        revision: Of the index.
        rows: See `trainer.evaluation.metrics.measure`; heads knn, nn1, linear, svm and combined.
        verdicts: {"split", "transform", "generator", "images", "fake", "real", "uncertain", "coverage"}, shares.
        thresholds: Of the combined score, {"fake", "real"}; null where the rate cannot be promised.
        rejected: Images that could not be read.
        left_out: What the checkpoint saw, and so was not measured.
    """

    revision: int
    rows: list[dict[str, Any]]
    verdicts: list[dict[str, Any]]
    thresholds: dict[str, float | None]
    rejected: list[Rejected] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def evaluate(
    settings: Settings,
    follower: Follower,
    embedder: Embedder,
    data: Path,
    *,
    split: str = "test,unseen",
    seed: int = 0,
    resamples: int = RESAMPLES,
    on_image: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure every head on every split, plain, augmented and with both labels recompressed alike.

    Images that trained, calibrated or chose the checkpoint, or whose group did, are left out.
    References of an image's own group, its own bytes, or near duplicates of it do not answer for it.

    Args:
        settings: For k, the promised rates, and the checkpoint's folder.
        follower: A loaded index of the embedder's checkpoint.
        embedder: Of the same checkpoint as the index.
        data: A data set of any layout.
        split: Comma list. The unseen split borrows the real images of `test`, which are read even if not listed.
        seed: Fixes transforms and bootstraps.
        resamples: Of the bootstraps.
        on_image: Called after each image.

    Raises:
        CheckpointError: The heads are missing or broken.
        DatasetError: The data cannot be read.
        EvaluationError: No image could be read, or the index is empty.
    """
    if not len(follower.index):
        raise EvaluationError("the index is empty: add references first (lineup index add PATH)")
    splits = [part.strip() for part in split.split(",") if part.strip()]
    heads = Heads.load(settings.checkpoint_folder)
    calibration = recalibrate(settings, follower)
    tables = table_transforms(embedder.preprocess.image_size)
    left_out, leave_out = LeftOut.by(SeenImages.load(settings.checkpoint_folder))
    work = split_entries(data, splits, tables, [], leave_out)
    sets, rejected = embed_entries(embedder, work, seed=seed, on_image=on_image)
    if not sets:
        reason = f" ({len(rejected)} unreadable, the first: {rejected[0].file})" if rejected else ""
        reason += f" ({left_out})" if left_out.images else ""
        raise EvaluationError(f"{data} holds no readable image of split {split}{reason}: change --data or --split")
    t_fake, t_real = (
        calibration.thresholds(settings.max_false_alarm, settings.max_miss) if calibration else (None, None)
    )
    rows, verdicts = [], []
    for name, images in sets.items():  # not always the same images: D3's archive brings its own transformed ones
        related = relatives(follower.store, [facts.sha256 for facts in images.facts], images.groups)
        scores = index_scores(images.embeddings, related, follower, heads, calibration, settings.k)
        rows += measure_splits(images, scores, splits, name, resamples, seed)
        if "combined" in scores:
            for part in splits:
                chosen = np.flatnonzero(split_mask(images, part, splits[0]))
                found = verdict_shares(images.take(chosen), scores["combined"][chosen], t_fake, t_real)
                verdicts += [{"split": part, "transform": name} | row for row in found]
    thresholds = {"fake": t_fake, "real": t_real}
    return Evaluation(follower.revision, rows, verdicts, thresholds, rejected, left_out)


def index_scores(
    embeddings: np.ndarray,
    related: list[np.ndarray],
    follower: Follower,
    heads: Heads,
    calibration: Calibration | None,
    k: int,
) -> dict[str, np.ndarray]:
    """Scores by head, each of shape (n,), higher for fake; NaN where the head cannot answer.

    knn is the vote's logit, nn1 the similarity of the nearest fake minus that of the nearest real, linear and svm are
    the checkpoint's own, combined is the calibrated probability.

    Args:
        embeddings: Raw, shape (n, d).
        related: Per image, ids that may not answer.
        follower: The index.
        heads: Of its checkpoint.
        calibration: Of its revision.
        k: Neighbours that vote, of the label with fewer references.
    """
    real, fake = follower.voters(embeddings, k, exclude_each=related)
    votes = vote(real.similarities, fake.similarities, fake.generators, k)
    logits = {"knn": votes.logit} | heads.logits(embeddings)
    combined = {"combined": calibration.combine_many(logits)} if calibration and calibration.maps else {}
    return logits | {"nn1": votes.nearest_fake - votes.nearest_real} | combined


def verdict_shares(
    images: EmbeddedSet, scores: np.ndarray, t_fake: float | None, t_real: float | None
) -> list[dict[str, Any]]:
    """Shares of the verdicts for reals and for each generator; `coverage` is the share that is not uncertain.

    Args:
        images: n of them.
        scores: Combined, shape (n,).
        t_fake: `fake` from here up; None for never.
        t_real: `real` below, where it is not fake; None for never.
    """
    fake = scores >= (np.inf if t_fake is None else t_fake)
    real = ~fake & (scores < (-np.inf if t_real is None else t_real))
    names = np.array([name if label else "real" for name, label in zip(images.generators, images.labels, strict=True)])
    rows = []
    for name in ["real", *sorted(set(names.tolist()) - {"real"})]:
        chosen = names == name
        if chosen.any():
            shares = {"fake": fake[chosen].mean(), "real": real[chosen].mean()}
            shares |= {"uncertain": (~fake & ~real)[chosen].mean(), "coverage": (fake | real)[chosen].mean()}
            row = {"generator": name, "images": int(chosen.sum())}
            rows.append(row | {key: round(float(value), 6) for key, value in shares.items()})
    return rows
