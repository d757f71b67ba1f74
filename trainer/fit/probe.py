"""How good the embedding is so far: a linear head fitted on training images, judged on validation images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.fit.batches import Pictures
from trainer.images import UnreadableImage
from trainer.views.augmentations import Pixels
from trainer.views.views import Views

LIMIT = 1024
"""The most images of a role that are looked at."""


def chosen_places(count: int, limit: int, seed: int) -> np.ndarray:
    """Places of `count` pictures, a random subset where they are more than `limit`; in order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def fixed_views(
    pictures: Pictures, views: Views, places: np.ndarray, seed: int, *, augmented: bool = False
) -> tuple[Pixels, np.ndarray]:
    """A view of each of some pictures that stays the same from call to call.

    Args:
        pictures: Where from; unreadable images are left out.
        views: How.
        places: Which pictures, shape (m,).
        seed: Decides an augmented view.
        augmented: Instead of the plain view.

    Returns:
        Pixels (n, s, s, 3) uint8, and the places that they are of (n,).
    """
    size = views.preprocess.image_size
    pixels, found = [], []
    for place in places.tolist():
        try:
            image, plain, pictures.hashes[place] = pictures[place]
        except UnreadableImage as error:
            pictures.unreadable[pictures.entries[place].uri] = str(error)
            continue
        rng = np.random.default_rng((seed, place))
        pixels.append(views.augmented(image, rng) if augmented else plain)
        found.append(place)
    return np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8), np.array(found, np.int64)


@dataclass(frozen=True, slots=True)
class Probe:
    """Fixed views of training and of validation images, each plain and once augmented."""

    training: Pixels
    training_labels: np.ndarray
    validation: Pixels
    validation_labels: np.ndarray

    @classmethod
    def of(cls, training: Pictures, validation: Pictures, views: Views, seed: int) -> Probe:
        """Draw the images; see `fixed_views`."""
        parts = []
        for pictures in (training, validation):
            places = chosen_places(len(pictures), LIMIT, seed)
            both = [fixed_views(pictures, views, places, seed, augmented=augmented) for augmented in (False, True)]
            parts += [np.concatenate([pixels for pixels, _ in both])]
            parts += [pictures.labels[np.concatenate([found for _, found in both])]]
        return cls(*parts)

    @property
    def usable(self) -> bool:
        """Whether there are validation images of both labels."""
        return len(set(self.validation_labels.tolist())) == 2

    def __len__(self) -> int:
        return len(self.training) + len(self.validation)

    def score(self, embed: Callable[[Pixels], np.ndarray]) -> tuple[float, float]:
        """Balanced accuracy and AUROC on the validation images, 0..1; NaN where there are not both labels.

        Args:
            embed: Pixels (n, s, s, 3) uint8 -> embeddings (n, d).
        """
        if not self.usable:
            return float("nan"), float("nan")
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000))
        head.fit(embed(self.training), self.training_labels)
        logits = head.decision_function(embed(self.validation))
        accuracy = balanced_accuracy_score(self.validation_labels, logits > 0)
        return float(accuracy), float(roc_auc_score(self.validation_labels, logits))
