"""How good the embedding is so far: a linear head fitted on training images, judged on validation images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from trainer.fit.image_roles import Pictures, Roles
from trainer.images import UnreadableImage
from trainer.views.augmentations import Pixels
from trainer.views.views import Views

PROBE_IMAGES = 1024
"""The most images of a role that are looked at."""


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """Fixed views of training and of validation images, each plain and once augmented."""

    training: Pixels
    training_labels: np.ndarray
    validation: Pixels
    validation_labels: np.ndarray

    @classmethod
    def of(cls, roles: Roles, views: Views, seed: int) -> Self:
        """Draw the images and their views, which the seed decides."""
        training, training_labels = fixed_views(roles["training"], views, seed)
        validation, validation_labels = fixed_views(roles["validation"], views, seed)
        return cls(training, training_labels, validation, validation_labels)

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


def fixed_views(pictures: Pictures, views: Views, seed: int) -> tuple[Pixels, np.ndarray]:
    """The plain views of some pictures, then their augmented ones; unreadable images are left out.

    Returns:
        Pixels (n, s, s, 3) uint8, and labels (n,).
    """
    plain, augmented, labels = [], [], []
    for place in np.sort(np.random.default_rng(seed).permutation(len(pictures))[:PROBE_IMAGES]).tolist():
        entry = pictures.entries[place]
        try:
            decoded = pictures.read(entry)
        except UnreadableImage:
            continue
        plain.append(decoded.plain)
        augmented.append(views.augmented(decoded.image, np.random.default_rng((seed, place))))
        labels.append(entry.label)
    size = views.preprocess.image_size
    return np.array(plain + augmented, np.uint8).reshape(-1, size, size, 3), np.array(labels + labels, np.uint8)
