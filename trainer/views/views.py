"""The eight views of a record: what of an image the backbone sees in training (CoDE, section 3.2).

Of a real image and of a fake: the plain view, an augmented view, a global crop and a local crop. The order in a view
is crop, then augmentations, then `finish`, so every view ends at its size whatever the augmentations did.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np

from trainer.images import Preprocess
from trainer.views.augmentations import Augmenter, Pixels, jpeg, resize

Scale = Literal["resized", "native"]
GLOBAL_SCALE = (0.4, 1.0)
"""Share of the image's area in a global crop."""
LOCAL_SCALE = (0.05, 0.4)
"""Share of the image's area in a local crop."""
MARGIN = 0.9
"""The shorter side is brought to size / MARGIN before the centre crop."""


def random_resized_crop(
    image: Pixels,
    size: int,
    scale: tuple[float, float],
    rng: np.random.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Pixels:
    """A random part of the image, resized to a square (torchvision's RandomResizedCrop).

    Args:
        image: Shape (h, w, 3).
        size: Side of the result in pixels.
        scale: Lowest and highest share of the image's area, drawn uniformly.
        rng: Decides.
        ratio: Lowest and highest width / height, drawn uniformly in the logarithm.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return resize(image[y : y + h, x : x + w], size, size)
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    y, x = (height - h) // 2, (width - w) // 2
    return resize(image[y : y + h, x : x + w], size, size)


def centre_crop(image: Pixels, size: int) -> Pixels:
    """The middle square of this side; black where the image is smaller."""
    return window(image, size, (image.shape[0] - size) // 2, (image.shape[1] - size) // 2)


def random_window(image: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """A square of this side at a random place, not resized; black where the image is smaller."""
    rows, columns = image.shape[0] - size, image.shape[1] - size
    top = int(rng.integers(rows + 1)) if rows > 0 else rows // 2
    left = int(rng.integers(columns + 1)) if columns > 0 else columns // 2
    return window(image, size, top, left)


def window(image: Pixels, size: int, top: int, left: int) -> Pixels:
    """The square with this corner; rows and columns outside the image are black."""
    height, width = image.shape[:2]
    inside = image[max(0, top) : top + size, max(0, left) : left + size]
    if inside.shape[:2] == (size, size):
        return inside
    above, before = max(0, -top), max(0, -left)
    below, after = max(0, top + size - height), max(0, left + size - width)
    return cv2.copyMakeBorder(inside, above, below, before, after, cv2.BORDER_CONSTANT)


def finish(image: Pixels, size: int) -> Pixels:
    """Shorter side to round(size / 0.9), then the middle square of `size`; what is cut off is not resized first."""
    inner = max(1, round(min(image.shape[:2]) * size / round(size / MARGIN)))
    return resize(centre_crop(image, inner), size, size)


@dataclass(frozen=True, slots=True)
class Views:
    """Makes the views of a record."""

    preprocess: Preprocess = field(default_factory=Preprocess)
    local_size: int = 96
    """Side of a local crop in pixels."""
    augmenter: Augmenter = field(default_factory=Augmenter)
    scale: Scale = "resized"
    """`resized` is the paper's; `native` takes every crop as a window at the image's own resolution."""
    recompress: float = 0.0
    """Chance that all views but the plain ones of an image are made of a JPEG copy of it, alike for both labels."""

    def augmented(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """The uncropped augmented view, shape (s, s, 3)."""
        size = self.preprocess.image_size
        if self.scale == "native":
            if min(image.shape[:2]) > 2 * size:
                image = random_window(image, 2 * size, rng)
            return random_window(self.augmenter(image, rng), size, rng)
        return finish(self.augmenter(image, rng), size)

    def judged(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """An augmented image as heads see it: `augmented`, or whole where an image is judged by several windows."""
        if self.preprocess.windows == 1:
            return self.augmented(image, rng)
        return np.ascontiguousarray(self.augmenter(image, rng))

    def crop(self, image: Pixels, size: int, scale: tuple[float, float], rng: np.random.Generator) -> Pixels:
        """An augmented random crop, shape (size, size, 3)."""
        if self.scale == "native":
            image = self.augmenter(random_window(image, round(size / MARGIN), rng), rng)
            return random_window(image, size, rng)
        return finish(self.augmenter(random_resized_crop(image, size, scale, rng), rng), size)

    def image(self, image: Pixels, plain_view: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
        """The four views of one image.

        Args:
            image: Decoded, shape (h, w, 3), uint8.
            plain_view: Of the same image, shape (s, s, 3); made once per image as it does not change. At native
                resolution a random window takes its place.
            rng: Decides.

        Returns:
            Plain, augmented and global crop, shape (3, s, s, 3), and the local crop, shape (l, l, 3); uint8.
        """
        size = self.preprocess.image_size
        if self.scale == "native":
            plain_view = random_window(image, size, rng)
        if self.recompress and rng.random() < self.recompress:
            image = jpeg(image, float(rng.uniform(60, 100)), rng)
        augmented, crop = self.augmented(image, rng), self.crop(image, size, GLOBAL_SCALE, rng)
        whole = np.stack([plain_view, augmented, crop])  # (3, s, s, 3)
        return whole, self.crop(image, self.local_size, LOCAL_SCALE, rng)

    def record(
        self, real: tuple[Pixels, Pixels], fake: tuple[Pixels, Pixels], rng: np.random.Generator
    ) -> tuple[Pixels, Pixels]:
        """The eight views of a record; `real` and `fake` are each (image, plain view).

        Returns:
            Shape (3, 2, s, s, 3): plain, augmented, global by real, fake; and (2, l, l, 3): local by real, fake; uint8.
        """
        wholes, locals_ = zip(self.image(*real, rng), self.image(*fake, rng), strict=True)
        return np.stack(wholes, 1), np.stack(locals_)  # (3, 2, s, s, 3), (2, l, l, 3)
