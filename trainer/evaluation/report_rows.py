"""What a report says beside the main rows: calibration, file facts, sources and enrolment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.evaluation.enrolment_curve import enrolment_curve
from trainer.evaluation.file_facts import file_fact_scores
from trainer.evaluation.head_evaluation import Evaluation
from trainer.evaluation.metrics import RESAMPLES, expected_calibration_error, interval, measure, resampled_weights
from trainer.evaluation.splits import THRESHOLDS, UNSEEN, rows_of
from trainer.heads.logistic import balanced_weights, sigmoid

RATE = 0.05
"""Promised false alarms and misses whose keeping is reported."""


def probabilities_of(evaluation: Evaluation, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Calibrated probabilities of the heads that have a map."""
    maps = evaluation.scorer.heads.maps
    found = {head: sigmoid(maps[head](scores[head][:, None])) for head in ("linear", "svm") if head in maps}
    return found | ({"combined": scores["combined"]} if "combined" in scores else {})


def calibration_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Calibration error of every head with a map, and of `combined` what its thresholds do on the split."""
    images, rows = evaluation.sets["none"], []
    splits = evaluation.splits
    for split in splits:
        chosen = rows_of(images, split, splits[0])
        part = images.take(chosen)
        if len(np.unique(part.labels)) < 2:
            continue
        weights = resampled_weights(part.labels, part.groups, RESAMPLES, np.random.default_rng(0))
        balance = balanced_weights(part.labels)
        scores = {head: values[chosen] for head, values in evaluation.scores["none"].items()}
        for head, values in probabilities_of(evaluation, scores).items():
            low, high = interval(expected_calibration_error(values, part.labels, weights * balance))
            row = {"split": split, "head": head, "ece_low": low, "ece_high": high}
            row["ece"] = float(expected_calibration_error(values, part.labels, balance))
            row |= {"false_alarms": None, "misses": None, "uncertain": None}
            t_fake = t_real = None
            if head == "combined" and evaluation.scorer.calibration:
                t_fake, t_real = evaluation.scorer.calibration.thresholds(RATE, RATE)
            if t_fake is not None and t_real is not None:
                fake, real = values >= t_fake, (values < t_real) & (values < t_fake)
                row["false_alarms"] = float(fake[part.labels == 0].mean())
                row["misses"] = float(real[part.labels == 1].mean())
                row["uncertain"] = float((~fake & ~real).mean())
            rows.append(row)
    return rows


def file_fact_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """How far facts of the file alone tell the label, a row for each split."""
    images, rows = evaluation.sets["none"], []
    splits = evaluation.splits
    for split in splits:
        part = images.take(rows_of(images, split, splits[0]))
        scores = file_fact_scores(part.facts, part.labels, part.groups)
        if not np.isnan(scores).all():
            measured = measure(scores, part.labels, part.generators, part.groups, 0.5, split=split, head="file facts")
            rows.append(measured[0])
    return rows


def source_accuracies(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Share of right decisions on the real images of each source, by head."""
    images = evaluation.sets["none"]
    found: dict[str, dict[str, float]] = {}
    for source in sorted({name for name, label in zip(images.sources, images.labels, strict=True) if label == 0}):
        rows = (np.array(images.sources) == source) & (images.labels == 0)
        found[source] = {"images": float(rows.sum())} | {
            head: float((values[rows] <= THRESHOLDS[head]).mean()) for head, values in evaluation.scores["none"].items()
        }
    return found


def enrolment_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The enrolment curve of the unseen split; empty without one."""
    images, nearest = evaluation.sets["none"], evaluation.scorer.heads.nearest
    splits = evaluation.splits
    if UNSEEN not in splits or nearest is None:
        return []
    return enrolment_curve(nearest, images.take(rows_of(images, UNSEEN, splits[0])))
