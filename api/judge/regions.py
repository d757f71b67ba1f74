"""Where in an image a verdict comes from (regions), and whether it survives re-encoding (stability)."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from api.judge.detail import shortfall
from api.schemas.verdicts import Region
from trainer.images import Box, Preprocess

MOST_REGIONS = 64
FAKE, REAL, STRONGEST = (214, 39, 40), (31, 119, 180), 170
"""Colours of an overlay, and its alpha where a score is 0 or 1."""


def grid(width: int, height: int, size: int, most: int = MOST_REGIONS) -> list[Box]:
    """Boxes (x, y, width, height) of `size` pixels spread evenly over an image, row by row, at most `most` of them.

    They overlap where the image is no multiple of `size`, and leave gaps where `most` would be exceeded. A side shorter
    than `size` is covered whole.
    """
    columns, rows = math.ceil(width / size), math.ceil(height / size)
    if columns * rows > most:
        shrink = math.sqrt(most / (columns * rows))
        columns = min(max(1, int(columns * shrink)), most)
        rows = min(max(1, int(rows * shrink)), most // columns)
    return [
        (x, y, min(size, width), min(size, height))
        for y in _starts(height, size, rows)
        for x in _starts(width, size, columns)
    ]


def _starts(length: int, size: int, count: int) -> list[int]:
    """First pixels of `count` intervals of `size`, the first at the start and the last at the end; one is centred."""
    room = max(0, length - size)
    return [room // 2] if count == 1 else [round(i * room / (count - 1)) for i in range(count)]


def judged_boxes(image: Image.Image, preprocess: Preprocess) -> list[Box]:
    """The boxes of the grid that hold enough to be judged."""
    native = replace(preprocess, mode="center_crop")
    boxes = []
    for x, y, w, h in grid(image.width, image.height, preprocess.image_size):
        part = image.crop((x, y, x + w, y + h))
        if shortfall(part.size, native.crops(part), native) is None:
            boxes.append((x, y, w, h))
    return boxes


def region_pixels(image: Image.Image, boxes: Sequence[Box], preprocess: Preprocess) -> np.ndarray:
    """The boxes' pixels at native resolution, one window each, shape (n, 3, s, s), uint8."""
    native = replace(preprocess, mode="center_crop")
    return native([image.crop((x, y, x + w, y + h)) for x, y, w, h in boxes])


def _encoded(image: Image.Image, format: str, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format=format, quality=quality)
    return Image.open(buffer).convert("RGB")


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


VARIANTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    **{f"jpeg-{quality}": partial(_encoded, format="JPEG", quality=quality) for quality in (90, 70, 50)},
    "webp-80": partial(_encoded, format="WEBP", quality=80),
    **{f"scale-{factor}": partial(_scaled, factor=factor) for factor in (0.5, 0.75, 1.25)},
}
"""What platforms do to an image between its maker and its reader."""
LARGEST_SIDE = 2048
"""Pixels; a larger image is scaled down to this first, as platforms do, which also bounds the work."""


def windows_and_shortfall(image: Image.Image, preprocess: Preprocess) -> tuple[np.ndarray, str | None]:
    """The windows of an image, shape (w, 3, s, s), uint8, and why they hold too little, if so."""
    windows = preprocess.crops(image)
    as_they_are = replace(preprocess, mode="center_crop", windows=1)  # for images that have the size already
    return as_they_are(windows), shortfall(image.size, windows, preprocess)


def variant_windows(image: Image.Image, preprocess: Preprocess) -> dict[str, np.ndarray]:
    """The windows, each of shape (w, 3, s, s), uint8, of those of `VARIANTS` that still hold enough to be judged."""
    if max(image.size) > LARGEST_SIDE:
        image = _scaled(image, LARGEST_SIDE / max(image.size))
    judged = {name: windows_and_shortfall(change(image), preprocess) for name, change in VARIANTS.items()}
    return {name: windows for name, (windows, shortage) in judged.items() if shortage is None}


def overlay(width: int, height: int, regions: Sequence[Region], side: int = LARGEST_SIDE) -> bytes:
    """Regions as a transparent PNG to lay over the image: red where fake, blue where real, clearer near 0.5.

    Where regions overlap their mean counts.

    Args:
        width: Of the upright image, pixels.
        height: Of the upright image, pixels.
        regions: Their boxes and scores.
        side: The PNG is smaller than the image where this is its longest side.
    """
    scale = min(1.0, side / max(width, height))
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    total, count = np.zeros((high, wide), np.float32), np.zeros((high, wide), np.uint8)
    for region in regions:
        x, y, w, h = region.box
        rows = slice(round(y * scale), max(round((y + h) * scale), round(y * scale) + 1))
        columns = slice(round(x * scale), max(round((x + w) * scale), round(x * scale) + 1))
        total[rows, columns] += region.score
        count[rows, columns] += 1
    mean = np.where(count > 0, total / np.maximum(count, 1), 0.5)  # (high, wide)
    colour = np.where(mean[..., None] >= 0.5, np.array(FAKE, np.uint8), np.array(REAL, np.uint8))  # (high, wide, 3)
    strength = np.rint(STRONGEST * 2 * np.abs(mean - 0.5)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([colour, strength])).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
