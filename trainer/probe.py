"""How good the embedding is so far: a linear head fitted on training images, judged on validation images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.augmentations import Pixels
from trainer.batches import Pictures
from trainer.images import UnreadableImage
from trainer.views import Views

LIMIT = 1024
"""The most images of a role that are looked at."""


def fixed_views(
    pictures: Pictures, views: Views, *, per_image: int, seed: int, limit: int
) -> tuple[Pixels, np.ndarray, np.ndarray]:
    """Views that stay the same from call to call: the plain one of an image, then augmented ones.

    Args:
        pictures: Where from; unreadable images are left out.
        views: How.
        per_image: At least 1.
        seed: Decides the augmented views.
        limit: The most images; a random subset when there are more.

    Returns:
        Pixels (n, s, s, 3) uint8, labels (n,), and the image's place in `pictures` (n,).
    """
    places = np.random.default_rng(seed).permutation(len(pictures))[:limit]
    pixels, origin = [], []
    for place in np.sort(places):
        try:
            image, plain = pictures[int(place)]
        except UnreadableImage:
            continue
        rng = np.random.default_rng((seed, int(place)))
        pixels.extend([plain, *(views.augmented(image, rng) for _ in range(per_image - 1))])
        origin.extend([place] * per_image)
    size = views.preprocess.image_size
    stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
    kept = np.array(origin, np.int64)
    return stacked, pictures.labels[kept], kept


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
        train, train_labels, _ = fixed_views(training, views, per_image=2, seed=seed, limit=LIMIT)
        held, held_labels, _ = fixed_views(validation, views, per_image=2, seed=seed, limit=LIMIT)
        return cls(train, train_labels, held, held_labels)

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
