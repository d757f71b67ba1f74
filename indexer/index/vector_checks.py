"""What the index refuses: FAISS would take duplicate and negative ids, NaN and vectors of length zero in silence."""

import numpy as np


class BadVectors(ValueError):
    """Vectors, ids or labels that the index refuses; nothing of the call was done."""


def unit_vectors(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The same directions at length 1, shape (n, dim), float32.

    Args:
        vectors: Raw, shape (n, dim).
        dim: Length of the index's vectors.

    Raises:
        BadVectors: Another shape, or a vector that is zero or not finite.
    """
    x = np.asarray(vectors, np.float32)
    if x.ndim != 2 or x.shape[1] != dim:
        raise BadVectors(f"vectors have shape {x.shape}, this index holds (n, {dim}): another checkpoint's?")
    length = np.sqrt(np.einsum("nd,nd->n", x, x))  # (n,), infinite where squares overflow
    good = np.isfinite(length) & (length > 0)
    if not good.all():
        raise BadVectors(f"vector {int(np.argmin(good))} is zero or not finite: the checkpoint or its input is broken")
    unit: np.ndarray = x / length[:, None]  # (n, d)
    return unit


def check_rows(n: int, ids: np.ndarray, labels: np.ndarray, *others: np.ndarray) -> None:
    """Refuse columns that do not describe n new references.

    Raises:
        BadVectors: Other shapes, labels beside 0 and 1, ids that are negative, no integers, or come twice.
    """
    if {column.shape for column in (ids, labels, *others)} != {(n,)}:
        raise BadVectors(f"{n} vectors came with another number of ids, labels, generators or sources")
    if not np.isin(labels, (0, 1)).all():
        raise BadVectors("labels must be 0 (real) or 1 (fake)")
    if n and (not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0):
        raise BadVectors(f"ids must be integers from 0 up, not {ids.dtype} from {ids.min()}")
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < n:
        raise BadVectors(f"id {unique[counts.argmax()]} comes twice in one call")
