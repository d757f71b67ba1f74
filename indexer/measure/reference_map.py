"""A map of the references: the directions of their embeddings, projected to a plane.

The axes are the two first principal components (Pearson 1901, by FAISS). They are linear, so that a reference which
comes later is placed by the same projection, and take a second. Embeddings of neighbourhoods (t-SNE, UMAP) part groups
better, but take minutes and move every point when one comes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import faiss
import numpy as np
from sqlalchemy import text

from indexer.store import Store
from indexer.store.reference_facts import LABEL_NAMES

MOST_POINTS = 50_000
"""References on the map; of more, those with the smallest hashes, which is as good as a draw and the same each time."""
PAGE = 2_000
"""Embeddings that are read at a time."""
FITTED_PAGES = 5
"""Of those that the axes are found from, at most."""
GRID = 9_999
"""The largest number of a place in a summary."""
OUTGROWN = 2
"""The axes are found anew once there are so many times as many references on the map."""

POINTS = text("""
select r.id, r.label, coalesce(r.generator_id, -1) as generator
from reference_image r join embedding e on e.image_id = r.id and e.checkpoint_id = :checkpoint
order by r.sha256 limit :most
""")
VECTORS = text("select image_id, vector from embedding where checkpoint_id = :checkpoint and image_id = any(:ids)")


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map to the plane.

    Attributes:
        matrix: Shape (d, 2), float32.
        offset: Shape (2,), float32.
        explained: Share of the variance along each axis, 0..1.
        references: How many there were on the map when it was fitted.
    """

    matrix: np.ndarray
    offset: np.ndarray
    explained: tuple[float, float]
    references: int

    def __call__(self, directions: np.ndarray) -> np.ndarray:
        """Places of directions of shape (n, d): shape (n, 2), float32."""
        places: np.ndarray = directions @ self.matrix + self.offset  # (n, 2)
        return places

    @classmethod
    def fit(cls, directions: np.ndarray, references: int) -> "Projection":
        """The two directions along which these vary most, of shape (n, d), d at least 2, drawn from so many references.

        Each points to where its largest weight is positive, so that the same references give the same map.
        """
        d = directions.shape[1]
        components = faiss.PCAMatrix(d, 2)
        components.train(directions)
        matrix = faiss.vector_to_array(components.A).reshape(-1, d)[:2].T.copy()  # (d, 2)
        matrix *= np.sign(matrix[np.abs(matrix).argmax(axis=0), [0, 1]])
        variances = faiss.vector_to_array(components.eigenvalues)
        first, second = (variances[:2] / max(variances.sum(), np.finfo(np.float32).tiny)).tolist()
        return cls(matrix, -directions.mean(axis=0) @ matrix, (first, second), references)


@dataclass(frozen=True, slots=True)
class ReferenceMap:
    """References on the plane.

    Attributes:
        checkpoint_id: Whose embeddings.
        revision: Of the index; what was written later may be there in part.
        ids: Shape (n,), int64.
        labels: 0 real, 1 fake, shape (n,), int8.
        generators: Generator ids, -1 for none, shape (n,), int64.
        places: Shape (n, 2), float32.
        projection: What placed them; None while there are fewer than three, and none of them is placed.
    """

    checkpoint_id: str
    revision: int
    ids: np.ndarray
    labels: np.ndarray
    generators: np.ndarray
    places: np.ndarray
    projection: Projection | None

    def summary(self, names: Mapping[int, str]) -> dict[str, Any]:
        """{"kinds": [{"label", "generator"}], "id", "kind", "x", "y"}, a list each, with places 0..9999.

        Args:
            names: Of generators, by id.
        """
        pairs = np.stack([self.labels, self.generators], axis=1)  # (n, 2)
        kinds, numbers = np.unique(pairs, axis=0, return_inverse=True)
        lowest = self.places.min(axis=0, initial=np.inf)  # (2,)
        extent = float((self.places - lowest).max(initial=0)) or 1.0  # one unit for both axes
        grid = (self.places - lowest) * (GRID / extent)  # (n, 2)
        return {
            "kinds": [
                {"label": LABEL_NAMES[label], "generator": names.get(generator)} for label, generator in kinds.tolist()
            ],
            "id": self.ids.tolist(),
            "kind": numbers.ravel().tolist(),
            "x": grid[:, 0].round().astype(int).tolist(),
            "y": grid[:, 1].round().astype(int).tolist(),
        }


def draw_map(store: Store, checkpoint_id: str, before: ReferenceMap | None = None) -> ReferenceMap:
    """The map of now. References of the map before keep their places, and its projection places the new ones.

    Args:
        store: The rows.
        checkpoint_id: Whose embeddings.
        before: The last map; one of another checkpoint counts for nothing, nor does one that is outgrown.
    """
    revision = store.checkpoints.revision(checkpoint_id)  # first, so that what is read may be newer, and never older
    rows = store.read(POINTS, {"checkpoint": checkpoint_id, "most": MOST_POINTS})
    projection, places = None, {}
    if (
        before
        and before.checkpoint_id == checkpoint_id
        and before.projection
        and len(rows) <= OUTGROWN * before.projection.references
    ):
        projection, places = before.projection, dict(zip(before.ids.tolist(), before.places, strict=True))
    pages = _directions(store, checkpoint_id, [row["id"] for row in rows if row["id"] not in places])
    if projection is None and len(rows) > 2:
        first = list(islice(pages, FITTED_PAGES))
        projection = Projection.fit(np.concatenate([directions for _, directions in first]), len(rows))
        pages = chain(first, pages)
    if projection:
        for ids, directions in pages:
            places |= zip(ids, projection(directions), strict=True)
    placed = [row for row in rows if row["id"] in places]  # the others were removed meanwhile
    return ReferenceMap(
        checkpoint_id=checkpoint_id,
        revision=revision,
        ids=np.array([row["id"] for row in placed], np.int64),
        labels=np.array([row["label"] for row in placed], np.int8),
        generators=np.array([row["generator"] for row in placed], np.int64),
        places=np.array([places[row["id"]] for row in placed], np.float32).reshape(-1, 2),  # (n, 2)
        projection=projection,
    )


def _directions(store: Store, checkpoint_id: str, ids: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Pages of ids, n of them, with their embeddings at unit length, shape (n, d), float32."""
    for start in range(0, len(ids), PAGE):
        rows = store.read(VECTORS, {"checkpoint": checkpoint_id, "ids": list(ids[start : start + PAGE])})
        if rows:
            vectors = np.stack([np.frombuffer(row["vector"], "<f4") for row in rows])  # (n, d)
            yield [row["image_id"] for row in rows], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
