"""Whether an image holds enough to be judged: the limits are measured in BENCHMARKS.md ("Too little to judge")."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from trainer.images import Preprocess

LEAST_SIDE = 0.5
"""Shorter side of an image, as a share of the side that the backbone reads."""
LEAST_CONTRAST = 3.0
"""Standard deviation of luminance, grey levels of 0..255: below it there is one colour and perhaps noise."""
LEAST_DETAIL = 0.005
"""Share of the pixels that must stand out: below it there are smooth gradients, or a blur."""
STEP = 2.0
"""Grey levels by which a pixel that stands out differs from the mean of its four neighbours, which is more than
rounding does to a gradient."""


def shortfall(size: tuple[int, int], windows: Sequence[Image.Image], preprocess: Preprocess) -> str | None:
    """Why an image holds too little to be judged; None where one of its windows holds enough.

    Args:
        size: Width and height of the image, pixels.
        windows: What `preprocess.crops` gave of it; the black around a smaller image does not count.
        preprocess: The checkpoint's.
    """
    least = math.ceil(LEAST_SIDE * preprocess.image_size)
    if min(size) < least:
        return f"too small to judge: {size[0]}x{size[1]} pixels, where {least} a side are needed"
    reasons = (_flatness(luminance(size, window, preprocess)) for window in windows)
    first = next(reasons)
    return None if first is None or None in reasons else first  # the others are looked at where the first is too little


def _flatness(grey: np.ndarray) -> str | None:
    """Why luminance, shape (h, w), holds too little; None where it holds enough."""
    contrast = float(grey.std())
    if contrast < LEAST_CONTRAST:
        return f"too flat to judge: brightness varies by {contrast:.1f} of 255, where {LEAST_CONTRAST:g} are needed"
    detail = detail_share(grey)
    if detail < LEAST_DETAIL:
        needed = f"where {LEAST_DETAIL:.1%} are needed"
        return f"too smooth to judge: {detail:.1%} of the pixels stand out from their neighbours, {needed}"
    return None


def luminance(size: tuple[int, int], window: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Luminance of a window without the black around it, shape (h, w), float32, 0..255; see `shortfall`."""
    if preprocess.mode == "center_crop":
        width, height = (min(length, preprocess.image_size) for length in size)
        left, top = (window.width - width) // 2, (window.height - height) // 2
        window = window.crop((left, top, left + width, top + height))
    return np.asarray(window.convert("L"), np.float32)


def detail_share(grey: np.ndarray) -> float:
    """The share, 0..1, of inner pixels of luminance, shape (h, w), that differ from the mean of four neighbours."""
    neighbours = (grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]) / 4  # (h - 2, w - 2)
    return float((np.abs(grey[1:-1, 1:-1] - neighbours) >= STEP).mean())
