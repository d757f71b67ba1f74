"""The official heads, pickled by scikit-learn, as arrays. Loading a pickle can run any code: only ever on request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.heads.heads import Heads, LinearHead, NearestHead, OneClassHead, unit_length
from trainer.model.checkpoint import CheckpointError


def read_pickled_heads(paths: Sequence[Path]) -> Heads:
    """Load trusted joblib files and keep their arrays.

    Args:
        paths: Files of a LogisticRegression, and optionally a KNeighborsClassifier (1-NN, cosine) and a OneClassSVM
            (+1 is real); what each is follows from its class.

    Raises:
        CheckpointError: No logistic regression is among them, or a head is none of these.
    """
    import joblib

    found: dict[str, Any] = {}
    for path in paths:
        try:
            loaded = joblib.load(path)
        except Exception as error:  # a pickle may raise anything
            raise CheckpointError(f"{path} does not unpickle ({type(error).__name__}: {error})") from error
        found[type(loaded).__name__] = loaded
    if "LogisticRegression" not in found:
        raise CheckpointError(f"no LogisticRegression among {', '.join(path.name for path in paths)}")
    linear = found["LogisticRegression"]
    return Heads(
        linear=LinearHead(np.asarray(linear.coef_[0], np.float64), float(linear.intercept_[0])),
        svm=_one_class(found["OneClassSVM"]) if "OneClassSVM" in found else None,
        nearest=_nearest(found["KNeighborsClassifier"]) if "KNeighborsClassifier" in found else None,
        maps={},
        settings={"files": [path.name for path in paths]},
    )


def _one_class(svm: Any) -> OneClassHead:
    if svm.kernel != "poly":
        raise CheckpointError(f"the pickled OneClassSVM has kernel {svm.kernel!r}; expected poly")
    return OneClassHead(
        support=np.asarray(svm.support_vectors_, np.float32),
        dual=np.asarray(svm.dual_coef_[0], np.float64),
        intercept=float(svm.intercept_[0]),
        gamma=float(svm._gamma),
        coef0=float(svm.coef0),
        degree=int(svm.degree),
    )


def _nearest(knn: Any) -> NearestHead:
    labels = np.asarray(knn.classes_)[np.asarray(knn._y).reshape(-1)]
    return NearestHead(unit_length(np.asarray(knn._fit_X)).astype(np.float16), (labels != 0).astype(np.uint8))
