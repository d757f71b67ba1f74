"""How good the embedding is so far: a linear head fitted on training images, judged on validation images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
from PIL import Image

from trainer.fit.image_roles import Pictures, Roles
from trainer.images import Preprocess, UnreadableImage
from trainer.views.augmentations import Pixels
from trainer.views.views import Views

PROBE_IMAGES = 1024
"""The most images of a role that are looked at, where one has one window; fewer where it has several."""


class FixedViews(NamedTuple):
    """n views of images, cut into the windows that an image is judged by."""

    pixels: Pixels
    """Of all windows, shape (m, s, s, 3), uint8."""
    counts: list[int]
    """Windows of each view, n numbers."""
    labels: np.ndarray
    """0 real, 1 fake, shape (n,)."""


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """Fixed views of training and of validation images, each plain and once augmented."""

    training: FixedViews
    validation: FixedViews
    preprocess: Preprocess

    @classmethod
    def of(cls, roles: Roles, views: Views, seed: int) -> Self:
        """Draw the images and their views, which the seed decides."""
        training, validation = (fixed_views(roles[name], views, seed) for name in ("training", "validation"))
        return cls(training, validation, views.preprocess)

    @property
    def usable(self) -> bool:
        """Whether there are validation images of both labels."""
        return len(set(self.validation.labels.tolist())) == 2

    def __len__(self) -> int:
        return len(self.training.pixels) + len(self.validation.pixels)

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
        training, validation = (
            self.preprocess.joined(embed(part.pixels), part.counts) for part in (self.training, self.validation)
        )
        head.fit(training, self.training.labels)
        logits = head.decision_function(validation)
        accuracy = balanced_accuracy_score(self.validation.labels, logits > 0)
        return float(accuracy), float(roc_auc_score(self.validation.labels, logits))


def fixed_views(pictures: Pictures, views: Views, seed: int) -> FixedViews:
    """The plain views of some pictures, then their augmented ones; unreadable images are left out."""
    native = replace(views.preprocess, mode="center_crop")  # leaves an image of one window as it is

    def cut(image: Pixels) -> list[Pixels]:
        return [np.asarray(crop) for crop in native.crops(Image.fromarray(image))]

    plain, augmented, labels = [], [], []
    most = max(1, PROBE_IMAGES // native.windows)
    for place in np.sort(np.random.default_rng(seed).permutation(len(pictures))[:most]).tolist():
        entry = pictures.entries[place]
        try:
            decoded = pictures.read(entry)
        except UnreadableImage:
            continue
        plain.append(cut(decoded.plain if native.windows == 1 else decoded.image))
        augmented.append(cut(views.judged(decoded.image, np.random.default_rng((seed, place)))))
        labels.append(entry.label)
    size = views.preprocess.image_size
    windows = [window for view in plain + augmented for window in view]
    return FixedViews(
        pixels=np.array(windows, np.uint8).reshape(-1, size, size, 3),
        counts=[len(view) for view in plain + augmented],
        labels=np.array(labels + labels, np.uint8),
    )
