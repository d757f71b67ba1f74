"""Logistic maps from raw head scores to calibrated logits, fitted by numpy alone: serving refits them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

LOGIT_LIMIT = 30.0
"""Calibrated logits stay within +-30: further out float64 probabilities cannot be told from 1."""
RIDGE = 1.0
"""Penalty on the common weight of standardised inputs, as scikit-learn's 1 / C; keeps separable data finite."""
APART = 10.0
"""Penalty on what sets the weights of several inputs apart. From few images equal weights are hard to beat (Clemen,
"Combining forecasts", 1989), and without it one of three heads that agree often gets no say at all."""


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow, same shape, float64 in 0..1."""
    x = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, small) / (1.0 + small))


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Weights that give both classes the same sum, prior 0.5, shape (n,), summing to n; both labels must occur."""
    fakes = labels.mean()
    return np.asarray(np.where(labels == 1, 0.5 / fakes, 0.5 / (1 - fakes)))


@dataclass(frozen=True, slots=True)
class LogisticMap:
    """Calibrated logit = weights . raw scores + intercept, at prior 0.5. One head (Platt 1999) or several combined."""

    heads: tuple[str, ...]
    """Whose raw scores go in, in this order."""
    weights: tuple[float, ...]
    """None is negative: no head's evidence for fake lowers the probability."""
    intercept: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Calibrated logits of raw scores (n, heads), shape (n,), float32, within +-30; NaN where a score is NaN.

        They are as precise as the tables they are compared with, and an image scored alone ties with itself scored
        among others: the last bits of a float64 product depend on how many are multiplied at once.
        """
        logits = scores @ np.asarray(self.weights) + self.intercept  # (n, h) -> (n,)
        return np.asarray(np.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT), np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"heads": list(self.heads), "weights": list(self.weights), "intercept": self.intercept}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_json` back.

        Raises:
            ValueError: A number is not finite, or a head has no weight.
        """
        weights = tuple(float(weight) for weight in values["weights"])
        logistic = cls(tuple(values["heads"]), weights, float(values["intercept"]))
        if len(logistic.heads) != len(weights) or not np.isfinite([*weights, logistic.intercept]).all():
            raise ValueError(f"a calibration map is {logistic}; expected a finite weight for each head")
        return logistic


def fit_logistic(heads: tuple[str, ...], scores: np.ndarray, labels: np.ndarray) -> LogisticMap:
    """Ridge logistic regression with classes weighted to prior 0.5 and no negative weight.

    Minimises sum of weighted log losses + `RIDGE` / 2 * h mean(w)^2 + `APART` / 2 * |w - mean(w)|^2, w the weights of h
    standardised scores, by Newton's method; a head whose weight comes out negative is left out (weight 0) and the rest
    fitted again.

    Args:
        heads: Names of the columns.
        scores: Raw scores, shape (n, heads), finite.
        labels: 0 real, 1 fake, shape (n,); both must occur.
    """
    scores = np.asarray(scores, np.float64)
    class_weights = balanced_weights(labels)
    mean = np.average(scores, axis=0, weights=class_weights)
    spread = np.sqrt(np.average((scores - mean) ** 2, axis=0, weights=class_weights))
    spread[spread < 1e-12] = 1.0  # a constant column: its weight stays 0 by the ridge
    standard = (scores - mean) / spread  # (n, h)
    active = np.ones(len(heads), dtype=bool)
    weights = np.zeros(len(heads))
    intercept = 0.0
    while active.any():
        weights[:] = 0.0
        weights[active], intercept = _newton(standard[:, active], labels, class_weights)
        if (weights >= 0).all():
            break
        active[weights.argmin()] = False
    else:
        weights[:], intercept = 0.0, 0.0
    weights = weights / spread
    return LogisticMap(heads, tuple(float(w) for w in weights), float(intercept - weights @ mean))


def _newton(x: np.ndarray, labels: np.ndarray, class_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (h,) and intercept by damped Newton steps (iteratively reweighted least squares)."""
    design = np.column_stack([x, np.ones(len(x))])  # (n, h + 1)
    common = np.full((x.shape[1],) * 2, 1 / x.shape[1])  # (h, h): projects weights on their mean
    penalty = np.zeros((len(common) + 1,) * 2)  # (h + 1, h + 1): the intercept is free
    penalty[:-1, :-1] = RIDGE * common + APART * (np.eye(len(common)) - common)
    beta = np.zeros(design.shape[1])

    def loss(beta: np.ndarray) -> float:
        margin = design @ beta
        return float(class_weights @ (np.logaddexp(0, margin) - labels * margin) + 0.5 * beta @ penalty @ beta)

    current = loss(beta)
    for _ in range(100):
        p = sigmoid(design @ beta)
        gradient = design.T @ (class_weights * (p - labels)) + penalty @ beta
        curvature = (design * (class_weights * p * (1 - p))[:, None]).T @ design + penalty
        curvature[np.diag_indices_from(curvature)] += 1e-9
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while (proposed := loss(beta - size * step)) > current and size > 1e-6:
            size /= 2
        beta, gain, current = beta - size * step, current - proposed, proposed
        if gain <= 1e-12 * max(1.0, abs(current)):
            break
    return beta[:-1], float(beta[-1])
