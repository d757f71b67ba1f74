"""The classifiers on raw embeddings: linear, nearest neighbour and one-class SVM (CoDE, section 4.1).

scikit-learn fits them; they are stored as arrays and scored by numpy, so that serving needs neither scikit-learn nor
a pickle. Labels are 0 real and 1 fake, and every score rises with "fake".
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np

from trainer.heads.calibration import enough
from trainer.heads.calibration_set import CalibrationSet, refit_command
from trainer.heads.logistic import LogisticMap, fit_logistic
from trainer.model.checkpoint import CONFIG_FILE, CheckpointError, check_file, read_sections, write_file

HEADS_FILE = "heads.safetensors"
C = 0.316
"""Inverse regularisation of the logistic regression (the paper's), where too few calibration images choose it."""
WEAKER = (C, 0.0316, 0.00316, 0.000316, 0.0000316)
"""Those among which calibration images choose."""
NU = 0.1
"""Share of real training images that the one-class SVM may leave outside (the paper's)."""
DEGREE = 3
"""Of the one-class SVM's polynomial kernel (the paper's)."""
KERNEL_BLOCK = 4_000_000
"""Entries of one block of kernel or similarity values, which bounds memory."""


class HeadsError(CheckpointError):
    """The heads are missing, broken, or of another checkpoint."""


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Logistic regression."""

    weight: np.ndarray
    """Shape (d,), float64."""
    bias: float

    def logit(self, x: np.ndarray) -> np.ndarray:
        """Signed distance of raw embeddings (n, d), shape (n,), above 0 for fake."""
        return np.asarray(x.astype(np.float64) @ self.weight + self.bias)  # (n, d) -> (n,)


@dataclass(frozen=True, slots=True)
class OneClassHead:
    """One-class SVM on real images, kernel (gamma <x, y> + coef0) ^ degree."""

    support: np.ndarray
    """Support vectors, shape (m, d), float32."""
    dual: np.ndarray
    """Their coefficients, shape (m,), float64."""
    intercept: float
    gamma: float
    coef0: float
    degree: int

    def score(self, x: np.ndarray) -> np.ndarray:
        """Minus scikit-learn's decision function (+1 is an inlier there), shape (n,), above 0 for fake.

        `x` are raw embeddings, shape (n, d): on unit length this head degenerates.
        """
        support = self.support.astype(np.float64).T  # (d, m)
        scores = np.empty(len(x))
        rows = max(1, KERNEL_BLOCK // max(1, len(self.support)))
        for start in range(0, len(x), rows):
            block = x[start : start + rows].astype(np.float64)
            kernel = (self.gamma * (block @ support) + self.coef0) ** self.degree  # (rows, m)
            scores[start : start + rows] = -(kernel @ self.dual + self.intercept)
        return scores


@dataclass(frozen=True, slots=True)
class NearestHead:
    """The paper's 1-NN by cosine on the embeddings that the other heads were fitted on."""

    embeddings: np.ndarray
    """Unit length, shape (m, d), float16 (similarities are then off by at most about 1e-3)."""
    labels: np.ndarray
    """0 real, 1 fake, shape (m,), uint8."""

    def margin(self, x: np.ndarray) -> np.ndarray:
        """Similarity of the nearest fake to raw embeddings (n, d) minus that of the nearest real, shape (n,), -2..2.

        Above 0 the nearest is a fake; unlike its label the margin ranks images, which AUROC needs.
        """
        queries = unit_length(x)
        real, fake = (nearest_similarities(queries, self.embeddings[self.labels == label], 1) for label in (0, 1))
        return np.asarray(fake - real)[:, 0]  # (n, 1) -> (n,)


@dataclass(frozen=True, slots=True)
class Heads:
    """All heads of a checkpoint. `svm` and `nearest` are None for heads imported without them."""

    linear: LinearHead
    svm: OneClassHead | None
    nearest: NearestHead | None
    maps: dict[str, LogisticMap]
    """Calibration of linear and svm, fixed by the checkpoint; empty when there were too few calibration images."""
    settings: dict[str, Any]
    """Hyperparameters and what the heads were fitted on, for `config.json`."""
    calibration_digest: str = ""
    """Of the calibration set the maps were fitted on."""

    @property
    def id(self) -> str:
        """Hash of heads and calibration embeddings, 32 hex characters."""
        digest = blake2b(self.calibration_digest.encode(), digest_size=16)
        for name, array in sorted(self.arrays().items()):
            digest.update(f"{name}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def logits(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Linear logit and SVM score by head as `fit_calibration` takes them, each (n,), of raw embeddings (n, d)."""
        scores = {"linear": self.linear.logit(x)}
        return scores | ({"svm": self.svm.score(x)} if self.svm else {})

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that is stored in `heads.safetensors`, by name."""
        arrays = {"linear.weight": self.linear.weight, "linear.bias": np.array([self.linear.bias])}
        if self.svm:
            scalars = np.array([self.svm.intercept, self.svm.gamma, self.svm.coef0, self.svm.degree])
            arrays |= {"svm.support": self.svm.support, "svm.dual": self.svm.dual, "svm.scalars": scalars}
        if self.nearest:
            arrays |= {"nearest.embeddings": self.nearest.embeddings, "nearest.labels": self.nearest.labels}
        return arrays

    def save(self, folder: Path) -> None:
        """Write `heads.safetensors`, then the section `heads` of the folder's `config.json`, each atomically.

        Raises:
            CheckpointError: The folder holds no checkpoint, or one of another dimension.
        """
        from safetensors.numpy import save

        config = read_sections(folder)
        _check_dimension(self, config, folder)
        maps = {head: logistic.to_json() for head, logistic in self.maps.items()}
        section = {"id": self.id, "calibration_digest": self.calibration_digest, "maps": maps} | self.settings
        write_file(folder, HEADS_FILE, save(self.arrays()), {"heads": section})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the heads of a checkpoint folder.

        Raises:
            CheckpointError: The folder holds no checkpoint.
            HeadsError: They are missing, broken, of another dimension, or config and arrays do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        config = read_sections(folder)
        again = f"run `{refit_command(folder)}`"
        check_file(folder, HEADS_FILE, again)
        try:
            section = dict(config.get("heads") or {})
            arrays = load_file(folder / HEADS_FILE)
            if diverged := [key for key, array in arrays.items() if not np.isfinite(array).all()]:
                raise ValueError(f"{diverged[0]} holds values that are not finite")
            heads = cls(
                linear=LinearHead(arrays["linear.weight"], float(arrays["linear.bias"][0])),
                svm=_one_class(arrays) if "svm.support" in arrays else None,
                nearest=_nearest(arrays) if "nearest.labels" in arrays else None,
                maps={head: LogisticMap.from_json(item) for head, item in dict(section.pop("maps", {})).items()},
                calibration_digest=str(section.pop("calibration_digest", "")),
                settings={key: value for key, value in section.items() if key != "id"},
            )
            if unknown := [head for head, logistic in heads.maps.items() if logistic.heads != (head,)]:
                raise ValueError(f"the calibration map of {unknown[0]} is another head's")
        except FileNotFoundError as error:
            raise HeadsError(f"{folder / HEADS_FILE} is missing: {again}") from error
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
            raise HeadsError(f"{folder / HEADS_FILE} is broken ({error}): {again}") from error
        _check_dimension(heads, config, folder)
        if section.get("id") != heads.id:
            raise HeadsError(f"{HEADS_FILE} and {CONFIG_FILE} in {folder} do not belong together: {again}")
        return heads


def unit_length(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, shape (n, d), float32; a zero row stays zero."""
    x = np.asarray(x, np.float32)
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))


def nearest_similarities(queries: np.ndarray, references: np.ndarray, k: int) -> np.ndarray:
    """The k highest cosine similarities, descending, shape (n, k); NaN where there are fewer references.

    Queries (n, d) and references (m, d), of any precision, have unit length.
    """
    references = references.astype(np.float32)
    best = np.full((len(queries), k), np.nan, np.float32)
    depth = min(k, len(references))
    if not depth:
        return best
    size = max(1, KERNEL_BLOCK // len(references))
    for start in range(0, len(queries), size):
        similarity = queries[start : start + size] @ references.T  # (size, m)
        top = np.partition(similarity, len(references) - depth, axis=1)[:, len(references) - depth :]
        best[start : start + size, :depth] = np.sort(top, axis=1)[:, ::-1]
    return best


def fit_heads(
    embeddings: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int = 42,
    calibration: CalibrationSet | None = None,
) -> Heads:
    """Fit the three heads, and the maps of linear and svm where a calibration set is given.

    Args:
        embeddings: Raw embeddings of augmented images, shape (n, d).
        labels: 0 real, 1 fake, shape (n,).
        seed: Recorded; the solvers themselves are deterministic.
        calibration: Images of the role "calibration".

    Raises:
        HeadsError: Fewer than two images of a label, or embeddings that are not finite.
    """
    from sklearn.svm import OneClassSVM

    embeddings, labels = np.asarray(embeddings, np.float32), np.asarray(labels, np.uint8)
    counts = {"real": int((labels == 0).sum()), "fake": int((labels == 1).sum())}
    if min(counts.values()) < 2:
        raise HeadsError(f"heads need at least 2 images of each label, got {counts}: add images or change --split")
    if not np.isfinite(embeddings).all():
        raise HeadsError("embeddings hold values that are not finite: the checkpoint diverged, train it again")
    linear, c = fit_linear(embeddings, labels, calibration)
    svm = OneClassSVM(kernel="poly", degree=DEGREE, gamma="auto", nu=NU)
    svm.fit(embeddings[labels == 0].astype(np.float64))
    heads = Heads(
        linear=linear,
        svm=OneClassHead(
            support=svm.support_vectors_.astype(np.float32),
            dual=svm.dual_coef_[0].astype(np.float64),
            intercept=float(svm.intercept_[0]),
            gamma=1 / embeddings.shape[1],
            coef0=float(svm.coef0),
            degree=DEGREE,
        ),
        nearest=NearestHead(unit_length(embeddings).astype(np.float16), labels),
        maps={},
        settings={"C": c, "nu": NU, "degree": DEGREE, "gamma": "auto", "seed": seed, "images": counts},
    )
    return heads if calibration is None else calibrated(heads, calibration)


def fit_linear(
    embeddings: np.ndarray, labels: np.ndarray, calibration: CalibrationSet | None
) -> tuple[LinearHead, float]:
    """A balanced logistic regression, as regular as calibration images want it, and its inverse regularisation.

    Of `WEAKER` it is the one with the largest AUROC on them, of two alike the larger; `C` where there are too few of
    them. Training images cannot choose: the embedding was trained on them, and parts them by whatever it likes
    (BENCHMARKS.md, The pretrained checkpoint). Thresholds are set on the same images, which one choice of five by all
    of them hardly moves.

    Args:
        embeddings: Raw, shape (n, d).
        labels: 0 real, 1 fake, shape (n,).
        calibration: Images of the role "calibration".
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    x = embeddings.astype(np.float64)

    def fitted(c: float) -> LinearHead:
        logistic = LogisticRegression(C=c, class_weight="balanced", solver="newton-cholesky", tol=1e-10, max_iter=1000)
        logistic.fit(x, labels)
        return LinearHead(logistic.coef_[0].astype(np.float64), float(logistic.intercept_[0]))

    if calibration is None or not enough(calibration.labels):
        return fitted(C), C
    linear = {c: fitted(c) for c in WEAKER}
    auroc = {c: roc_auc_score(calibration.labels, head.logit(calibration.embeddings)) for c, head in linear.items()}
    chosen = max(WEAKER, key=lambda c: (auroc[c], c))
    return linear[chosen], chosen


def calibrated(heads: Heads, calibration: CalibrationSet) -> Heads:
    """The heads with their maps refitted on a calibration set; without maps where it holds fewer than 10 of a label."""
    labels = np.asarray(calibration.labels)
    maps = {}
    if enough(labels):
        for head, scores in heads.logits(calibration.embeddings).items():
            maps[head] = fit_logistic((head,), scores[:, None], labels)
    return replace(heads, maps=maps, calibration_digest=calibration.digest)


def _one_class(arrays: Mapping[str, np.ndarray]) -> OneClassHead:
    intercept, gamma, coef0, degree = (float(value) for value in arrays["svm.scalars"])
    return OneClassHead(arrays["svm.support"], arrays["svm.dual"], intercept, gamma, coef0, int(degree))


def _nearest(arrays: Mapping[str, np.ndarray]) -> NearestHead:
    return NearestHead(arrays["nearest.embeddings"], arrays["nearest.labels"])


def _check_dimension(heads: Heads, config: Mapping[str, Any], folder: Path) -> None:
    dim = len(heads.linear.weight)
    if dim != (expected := int(config.get("dim", dim))):
        raise HeadsError(
            f"the heads are for {dim}-dimensional embeddings, the checkpoint in {folder} gives {expected}: "
            f"run `{refit_command(folder)}`"
        )
