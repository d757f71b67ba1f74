"""What an image goes through before it is judged in an evaluation: nothing, augmentations, recompression, decay.

A transform maps an RGB image to an RGB image before the checkpoint's own preprocessing. Its random choices are seeded
by seed, transform and image content, so that every checkpoint sees the same transformed set in any order.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from trainer.views.augmentations import Augmenter

EQUALISED_QUALITY = 75
"""JPEG quality that both labels are recompressed at."""
EQUALISED_SCALE = (0.88, 1.0)
"""Both labels are resized by a factor from this range, which breaks the grid of an earlier JPEG; the benchmark's
256-pixel crops stay at 225 pixels or more, so that nothing is enlarged or padded for one label only."""


@dataclass(frozen=True, slots=True)
class Transform:
    """A named map from image to image."""

    name: str
    apply: Callable[[Image.Image, np.random.Generator], Image.Image]
    finished: bool = False
    """The result has the checkpoint's size already: preprocessing only normalises it."""

    def __call__(self, image: Image.Image, seed: int, sha256: str) -> Image.Image:
        """The transformed RGB image; what is random follows from the seed and the SHA-256, in hex, of its file."""
        return self.apply(image, np.random.default_rng([seed, crc32(self.name.encode()), int(sha256[:16], 16)]))


def unchanged(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image itself."""
    return image


def augmented(image: Image.Image, rng: np.random.Generator, *, augmenter: Augmenter) -> Image.Image:
    """0 to 2 of the training's augmentations (the paper's "with transforms")."""
    return Image.fromarray(np.ascontiguousarray(augmenter(np.asarray(image), rng)))


def equalised(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shift the grid by 0-7 pixels, shrink by a random factor, then JPEG at one quality: alike for both labels."""
    left, top = (int(offset) for offset in rng.integers(0, 8, 2))
    if min(image.size) > 16:
        image = image.crop((left, top, *image.size))
    return jpeg(resized(image, rng, factor=float(rng.uniform(*EQUALISED_SCALE))), rng, quality=EQUALISED_QUALITY)


def jpeg(image: Image.Image, rng: np.random.Generator, *, quality: int) -> Image.Image:
    """JPEG, 4:2:0, decoded again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=2)
    return Image.open(buffer).convert("RGB")


def resized(image: Image.Image, rng: np.random.Generator, *, factor: float) -> Image.Image:
    """Both sides times a factor, bicubic with antialiasing."""
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def blurred(image: Image.Image, rng: np.random.Generator, *, radius: float) -> Image.Image:
    """Gaussian blur, standard deviation in pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def cropped(image: Image.Image, rng: np.random.Generator, *, side: float) -> Image.Image:
    """A window of this share of either side, at a random place."""
    width, height = (max(1, round(length * side)) for length in image.size)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def shared(image: Image.Image, rng: np.random.Generator, *, longest: int, quality: int, times: int = 1) -> Image.Image:
    """In the style of a social network: longest side limited, then JPEG; more than once for a forwarded image."""
    for _ in range(times):
        factor = min(1.0, longest / max(image.size))
        image = jpeg(resized(image, rng, factor=factor), rng, quality=quality)
        longest = round(longest * 0.9)
    return image


def table_transforms(image_size: int) -> tuple[Transform, ...]:
    """The transforms of the main tables; augmentations that cut to a side in pixels scale with the `image_size`."""
    from trainer.views.augmentations import Augmenter  # before threads share the work: a failing import is one error

    return (
        Transform("none", unchanged),
        Transform("transformed", partial(augmented, augmenter=Augmenter(image_size=image_size))),
        Transform("equalised", equalised),
    )


def curve_transforms() -> list[tuple[str, float, Transform]]:
    """The robustness curves: (curve, strength, transform), each curve in the order of its axis."""
    return [
        *(("jpeg quality", q, Transform(f"jpeg-{q}", partial(jpeg, quality=q))) for q in (95, 85, 75, 65, 50, 40, 30)),
        *(
            ("resize factor", f, Transform(f"resize-{f:g}", partial(resized, factor=f)))
            for f in (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
        ),
        *(("blur radius", r, Transform(f"blur-{r:g}", partial(blurred, radius=r))) for r in (0.5, 1.0, 1.5, 2.0, 3.0)),
        *(("crop side", s, Transform(f"crop-{s:g}", partial(cropped, side=s))) for s in (0.9, 0.75, 0.5)),
        ("social network", 1, Transform("shared-2048-85", partial(shared, longest=2048, quality=85))),
        ("social network", 2, Transform("shared-1080-75", partial(shared, longest=1080, quality=75))),
        ("social network", 3, Transform("shared-640-65", partial(shared, longest=640, quality=65))),
        ("social network", 4, Transform("shared-640-65-twice", partial(shared, longest=640, quality=65, times=2))),
    ]
