"""Measuring a checkpoint and its own heads on images that trained neither (CoDE, section 5)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from trainer.evaluation.embedded_set import EmbeddedSet, Rejected
from trainer.evaluation.enrolment_curve import knn_logits
from trainer.evaluation.file_facts import file_fact_scores
from trainer.evaluation.metrics import RESAMPLES, expected_calibration_error, interval, measure, resampled_weights
from trainer.evaluation.splits import THRESHOLDS, embed_splits, measure_splits, split_mask
from trainer.evaluation.transforms import curve_transforms, table_transforms
from trainer.heads.calibration import Calibration, fit_calibration
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads
from trainer.heads.logistic import balanced_weights, sigmoid
from trainer.model.checkpoint import CheckpointError
from trainer.model.embedder import Embedder
from trainer.model.seen_images import LeftOut

PROMISED_RATE = 0.05
"""Promised false alarms and misses whose keeping is reported."""


class EvaluationError(ValueError):
    """There is nothing to evaluate; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores of a checkpoint's own heads: what needs no index."""

    heads: Heads
    calibration: Calibration | None
    """Of linear and svm together, from the checkpoint's calibration set; None without one."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Heads and calibration set of a checkpoint folder.

        Raises:
            CheckpointError: The heads are missing or broken.
        """
        heads = Heads.load(folder)
        try:
            images = CalibrationSet.load(folder)
        except CheckpointError:
            return cls(heads, None)
        missing = np.full(len(images), np.nan)
        logits = heads.logits(images.embeddings)
        calibration = fit_calibration(logits, missing, missing, images.labels, images.groups, images.origins)
        return cls(heads, calibration if calibration.maps else None)

    def __call__(self, embeddings: np.ndarray) -> dict[str, np.ndarray]:
        """Scores by head, each of shape (n,), higher for fake: margins of linear, svm, nn1 and knn; combined 0..1.

        The embeddings are raw, shape (n, d).
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
    """The same of the robustness curves, with `curve` and `strength`."""
    sets: dict[str, EmbeddedSet]
    """By transform: none, transformed, equalised; every split together."""
    scores: dict[str, dict[str, np.ndarray]]
    """By transform and head, in the order of the set."""
    scorer: Scorer
    left_out: LeftOut
    rejected: list[Rejected]

    @property
    def splits(self) -> list[str]:
        """Splits that were measured, in the order asked for."""
        return list(dict.fromkeys(row["split"] for row in self.rows))

    def mask(self, split: str, transform: str = "none") -> np.ndarray:
        """Which images of a transform's set a split is measured on, shape (n,), bool."""
        return split_mask(self.sets[transform], split, self.splits[0])

    def part(self, split: str) -> EmbeddedSet:
        """The images that a split is measured on, plain."""
        return self.sets["none"].take(self.mask(split))

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
        checkpoint: Its folder.
        data: A data set of any layout.
        split: Comma list. The unseen split borrows the real images of `test`, which are read even if not listed.
        device: auto, cpu or cuda.
        seed: Fixes transforms and bootstraps.
        with_curves: Also measure robustness curves, on at most 200 images of each split and generator.
        resamples: How many each bootstrap draws.
        on_image: Called after each image.

    Raises:
        CheckpointError: The checkpoint or its heads cannot be loaded.
        DatasetError: The data cannot be read.
        EvaluationError: No image could be read, or one label is missing.
    """
    splits = [part.strip() for part in split.split(",") if part.strip()]
    embedder, scorer = Embedder.load(checkpoint, device=device), Scorer.load(checkpoint)
    tables = table_transforms(embedder.preprocess.image_size)
    points = curve_transforms() if with_curves else []
    strengths = {transform.name: {"curve": curve, "strength": strength} for curve, strength, transform in points}
    extra = [transform for *_, transform in points]
    sets, rejected, left_out = embed_splits(embedder, data, splits, tables, extra, seed=seed, on_image=on_image)
    aside = f" ({left_out})" if left_out.images else ""
    if "none" not in sets:
        if rejected:
            aside = f" ({len(rejected)} unreadable, the first: {rejected[0].file}: {rejected[0].reason}){aside}"
        raise EvaluationError(f"{data} holds no readable image of split {split}{aside}: change --data or --split")
    if len(np.unique(sets["none"].labels)) < 2:
        raise EvaluationError(
            f"{data} holds one label only in split {split}{aside}: both real and fake images are needed"
        )
    scores = {name: scorer(images.embeddings) for name, images in sets.items()}
    rows, curve_rows = [], []
    for name, images in sets.items():
        if name in strengths:
            measures = measure_splits(images, scores[name], splits, name, resamples=0, seed=seed)
            curve_rows += [strengths[name] | row for row in measures]
        else:
            rows += measure_splits(images, scores[name], splits, name, resamples, seed)
    names = [name for name in sets if name not in strengths]
    return Evaluation(
        checkpoint=embedder.id,
        name=embedder.name,
        rows=rows,
        curves=curve_rows,
        sets={name: sets[name] for name in names},
        scores={name: scores[name] for name in names},
        scorer=scorer,
        left_out=left_out,
        rejected=rejected,
    )


def head_probabilities(scorer: Scorer, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Calibrated probabilities by head, each of shape (n,), of those that have a map; `scores` as of the scorer."""
    maps = scorer.heads.maps
    probabilities: dict[str, np.ndarray] = {
        head: sigmoid(maps[head](scores[head][:, None])) for head in ("linear", "svm") if head in maps
    }
    if "combined" in scores:
        probabilities["combined"] = scores["combined"]
    return probabilities


def calibration_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Calibration error of every head with a map, and of `combined` what its thresholds do on the split."""
    rows = []
    for split in evaluation.splits:
        part, mask = evaluation.part(split), evaluation.mask(split)
        if len(np.unique(part.labels)) < 2:
            continue
        weights = resampled_weights(part.labels, part.groups, RESAMPLES, np.random.default_rng(0))
        balance = balanced_weights(part.labels)
        scores = {head: values[mask] for head, values in evaluation.scores["none"].items()}
        for head, values in head_probabilities(evaluation.scorer, scores).items():
            low, high = interval(expected_calibration_error(values, part.labels, weights * balance))
            error = float(expected_calibration_error(values, part.labels, balance))
            row = {"split": split, "head": head, "ece_low": low, "ece_high": high, "ece": error}
            row |= {"false_alarms": None, "misses": None, "uncertain": None}
            t_fake = t_real = None
            if head == "combined" and evaluation.scorer.calibration:
                t_fake, t_real = evaluation.scorer.calibration.thresholds(PROMISED_RATE, PROMISED_RATE)
            if t_fake is not None and t_real is not None:
                fake, real = values >= t_fake, (values < t_real) & (values < t_fake)
                row["false_alarms"] = float(fake[part.labels == 0].mean())
                row["misses"] = float(real[part.labels == 1].mean())
                row["uncertain"] = float((~fake & ~real).mean())
            rows.append(row)
    return rows


def file_fact_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """How far facts of the file alone tell the label, a row for each split."""
    rows = []
    for split in evaluation.splits:
        part = evaluation.part(split)
        scores = file_fact_scores(part.facts, part.labels, part.groups)
        rows += measure(scores, part.labels, part.generators, part.groups, 0.5, split=split, head="file facts")[:1]
    return rows


def source_accuracies(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Share of right decisions on the real images of each source, by head, and their number as `images`."""
    images = evaluation.sets["none"]
    sources, real = np.array(images.sources), images.labels == 0
    accuracies = {}
    for source in np.unique(sources[real]).tolist():
        mask = real & (sources == source)
        accuracies[source] = {"images": float(mask.sum())} | {
            head: float((values[mask] <= THRESHOLDS[head]).mean()) for head, values in evaluation.scores["none"].items()
        }
    return accuracies


def card_figures(evaluation: Evaluation) -> dict[str, Any]:
    """What the model card says of an evaluation: {"head", "rows", "sources", "left_out"}, of the best head there is."""
    head = "combined" if "combined" in evaluation.scores["none"] else "linear"
    columns = ("split", "transform", "generator", "images", "accuracy", "auroc", "auroc_low", "auroc_high")
    rows = [row for row in evaluation.rows if row["head"] == head and row["transform"] in ("none", "equalised")]
    shares = source_accuracies(evaluation).items()
    return {
        "head": head,
        "rows": [{name: row[name] for name in columns} for row in rows],
        "sources": {name: {"images": int(of["images"]), "accuracy": of[head]} for name, of in shares},
        "left_out": evaluation.left_out.images,
    }
