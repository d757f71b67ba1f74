"""Image bytes to upright RGB pixels and facts about the file, and pixels to what the backbone reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


class UnreadableImage(ValueError):
    """The bytes are empty, truncated or broken."""


class ImageTooLarge(UnreadableImage):
    """The header promises more pixels than allowed."""


class UnsupportedFormat(UnreadableImage):
    """The bytes are no image, or one of a format outside `FORMATS`."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the file says without its pixels. `width` and `height` are those of the upright image."""

    sha256: str
    bytes: int
    width: int
    height: int
    format: str
    jpeg_quality: int | None


def decode_image(data: bytes, *, max_pixels: int = 50_000_000) -> tuple[Image.Image, FileFacts]:
    """Decode to an upright RGB image, checking the size in the header before any pixel is decompressed."""
    raise NotImplementedError


def thumbnail(image: Image.Image, size: int = 256) -> bytes:
    """A WebP whose longest side is at most `size` pixels."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How an RGB image becomes the backbone's input. Saved next to the weights."""

    mode: Literal["center_crop", "resize_crop"] = "resize_crop"
    image_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """What is judged of an image of this size: x, y, width, height in its pixels."""
        raise NotImplementedError

    def crop(self, image: Image.Image) -> Image.Image:
        """What is judged, as an image of `image_size` by `image_size` pixels."""
        raise NotImplementedError

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Normalised pixels, shape (n, 3, s, s), float32."""
        raise NotImplementedError
