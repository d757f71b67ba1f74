"""Measuring a checkpoint and its own heads on images that trained neither (CoDE, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.embedded_set import EmbeddedSet, Rejected, embed_entries
from trainer.evaluation.enrolment_curve import knn_logits
from trainer.evaluation.metrics import RESAMPLES
from trainer.evaluation.splits import entries_of, measure_splits
from trainer.evaluation.transforms import basic, curves
from trainer.heads.calibration import Calibration, fit_calibration
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads
from trainer.model.checkpoint import CheckpointError
from trainer.model.embedder import Embedder
from trainer.model.seen_images import LeftOut, SeenImages


class EvaluationError(ValueError):
    """There is nothing to evaluate; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores of a checkpoint's own heads: what needs no index."""

    heads: Heads
    calibration: Calibration | None
    """Of linear and svm together, from the checkpoint's calibration set; None without one."""

    @classmethod
    def load(cls, folder: Path) -> Scorer:
        """Heads and calibration set of a checkpoint folder.

        Raises:
            CheckpointError: The heads are missing or broken.
        """
        heads = Heads.load(folder)
        try:
            held = CalibrationSet.load(folder)
        except CheckpointError:
            return cls(heads, None)
        missing = np.full(len(held), np.nan)
        calibration = fit_calibration(heads.logits(held.embeddings), missing, missing, held.labels, held.groups)
        return cls(heads, calibration if calibration.maps else None)

    def __call__(self, embeddings: np.ndarray) -> dict[str, np.ndarray]:
        """Scores by head, each of shape (n,), higher for fake: margins of linear, svm, nn1 and knn; combined 0..1.

        Args:
            embeddings: Raw, shape (n, d).
        """
        scores = self.heads.logits(embeddings)
        if self.calibration:
            scores["combined"] = self.calibration.combine_many(scores)
        if self.heads.nearest:
            scores["nn1"] = self.heads.nearest.margin(embeddings)
            scores["knn"] = knn_logits(self.heads.nearest, embeddings)
        return scores


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, and the embeddings it was measured on."""

    checkpoint: str
    name: str
    rows: list[dict[str, Any]]
    """See `metrics.measure`."""
    curves: list[dict[str, Any]]
    """Rows likewise, with `curve` and `strength`."""
    sets: dict[str, EmbeddedSet]
    """By transform: none, transformed, equalised; every split together."""
    scores: dict[str, dict[str, np.ndarray]]
    """By transform and head, in the order of the set."""
    scorer: Scorer
    left_out: LeftOut
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def splits(self) -> list[str]:
        """Splits that were measured, in the order asked for."""
        return list(dict.fromkeys(row["split"] for row in self.rows))

    @property
    def simulated(self) -> bool:
        """Whether any image says that it was simulated by `lineup train simulate`."""
        names = {*self.sets["none"].generators, *self.sets["none"].sources}
        return any(name.startswith("sim-") for name in names)


def evaluate(
    checkpoint: Path,
    data: Path,
    *,
    split: str = "test,unseen",
    device: str = "auto",
    seed: int = 0,
    with_curves: bool = False,
    resamples: int = RESAMPLES,
    on_image: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure every head on every split, plain, augmented and with both labels recompressed alike.

    Images that trained, calibrated or chose the checkpoint, or whose group did, are left out.

    Args:
        checkpoint: The folder.
        data: A data set of any layout.
        split: Comma list. The unseen split borrows the real images of `test`, which are read even if not listed.
        device: auto, cpu or cuda.
        seed: Fixes transforms and bootstraps.
        with_curves: Also measure robustness curves, on at most 200 images of each split and generator.
        resamples: Of the bootstraps.
        on_image: Called after each image.

    Raises:
        CheckpointError: The checkpoint or its heads cannot be loaded.
        DatasetError: The data cannot be read.
        EvaluationError: No image could be read, or one label is missing.
    """
    splits = [part.strip() for part in split.split(",") if part.strip()]
    embedder, scorer = Embedder.load(checkpoint, device=device), Scorer.load(checkpoint)
    tables = basic(embedder.preprocess.image_size)
    strengths = {t.name: (name, x) for name, points in curves().items() for x, t in points} if with_curves else {}
    extra = [t for points in curves().values() for _, t in points] if with_curves else []
    left_out, leave_out = LeftOut.by(SeenImages.load(checkpoint))
    work = entries_of(data, splits, tables, extra, leave_out)
    sets, rejected = embed_entries(embedder, work, seed=seed, on_image=on_image)
    if "none" not in sets:
        reason = (
            f" ({len(rejected)} unreadable, the first: {rejected[0].file}: {rejected[0].reason})" if rejected else ""
        )
        reason += f" ({left_out})" if left_out.images else ""
        raise EvaluationError(f"{data} holds no readable image of split {split}{reason}: change --data or --split")
    if len(np.unique(sets["none"].labels)) < 2:
        reason = f" ({left_out})" if left_out.images else ""
        raise EvaluationError(
            f"{data} holds one label only in split {split}{reason}: both real and fake images are needed"
        )
    scores = {name: scorer(images.embeddings) for name, images in sets.items()}
    rows, curve_rows = [], []
    for name, images in sets.items():
        measured = measure_splits(images, scores[name], splits, name, resamples if name not in strengths else 0, seed)
        if name in strengths:
            curve, strength = strengths[name]
            curve_rows += [{"curve": curve, "strength": strength} | row for row in measured]
        else:
            rows += measured
    kept = {table.name: sets[table.name] for table in tables if table.name in sets}
    kept_scores = {name: scores[name] for name in kept}
    return Evaluation(embedder.id, embedder.name, rows, curve_rows, kept, kept_scores, scorer, left_out, rejected)
