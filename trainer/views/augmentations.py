"""The 19 augmentations of CoDE, on uint8 RGB arrays of shape (h, w, 3).

Each takes an image, its one parameter and a random generator (used by the two that place something at random) and
returns an image, often of another size. Definitions follow AugLy, which the paper used (arXiv 2201.06494), written
for OpenCV: no copy between libraries, and several times its speed on one core.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np

Pixels: TypeAlias = np.ndarray
"""uint8, shape (h, w, 3), RGB."""

REFERENCE_SIZE = 224
"""Image size for which the parameters in pixels are stated; other sizes scale them."""


def resize(image: Pixels, width: int, height: int) -> Pixels:
    """Bicubic where it enlarges, area-averaged where it shrinks (bicubic without a low-pass would alias)."""
    shrinks = width < image.shape[1] or height < image.shape[0]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, (max(1, width), max(1, height)), interpolation=interpolation)


def blend(image: Pixels, other: float, factor: float) -> Pixels:
    """Mix with a constant, clipped: factor * image + (1 - factor) * other; one table look-up per byte."""
    table = np.clip(np.arange(256) * factor + other * (1 - factor) + 0.5, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def blur(image: Pixels, radius: float, rng: np.random.Generator) -> Pixels:
    """Gaussian blur; the radius is the standard deviation in pixels."""
    return cv2.GaussianBlur(image, (0, 0), radius)


def brightness(image: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """Multiply every value."""
    return blend(image, 0.0, factor)


def aspect_ratio(image: Pixels, ratio: float, rng: np.random.Generator) -> Pixels:
    """Resize to width / height = ratio, keeping the area."""
    height = math.sqrt(image.shape[0] * image.shape[1] / ratio)
    return resize(image, round(height * ratio), round(height))


def pixelization(image: Pixels, ratio: float, rng: np.random.Generator) -> Pixels:
    """Shrink by the ratio and enlarge again."""
    height, width = image.shape[:2]
    return resize(resize(image, round(width * ratio), round(height * ratio)), width, height)


def rotate(image: Pixels, degrees: float, rng: np.random.Generator) -> Pixels:
    """Rotate about the centre and keep the largest upright rectangle without empty corners."""
    height, width = image.shape[:2]
    inner_width, inner_height = inner_rectangle(width, height, math.radians(degrees))
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    matrix[:, 2] += (inner_width - width) / 2, (inner_height - height) / 2
    return cv2.warpAffine(
        image, matrix, (inner_width, inner_height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )


def inner_rectangle(width: int, height: int, angle: float) -> tuple[int, int]:
    """Width and height of the largest upright rectangle inside a rotated one; angle in radians."""
    sin, cos = abs(math.sin(angle)), abs(math.cos(angle))
    long, short = max(width, height), min(width, height)
    if short <= 2 * sin * cos * long or abs(sin - cos) < 1e-10:  # two corners touch the long side
        across, along = 0.5 * short / max(sin, 1e-10), 0.5 * short / max(cos, 1e-10)
        inner = (across, along) if width >= height else (along, across)
    else:
        spread = cos * cos - sin * sin
        inner = ((width * cos - height * sin) / spread, (height * cos - width * sin) / spread)
    return max(1, int(inner[0] + 1e-6)), max(1, int(inner[1] + 1e-6))


def contrast(image: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """Move every value away from (or to) the mean grey."""
    red, green, blue, _ = cv2.mean(image)
    return blend(image, 0.299 * red + 0.587 * green + 0.114 * blue, factor)


def saturation(image: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """Move every pixel away from (or to) its own grey."""
    grey = np.array([0.299, 0.587, 0.114])
    return cv2.transform(image, factor * np.eye(3) + (1 - factor) * grey)


def jpeg(image: Pixels, quality: float, rng: np.random.Generator) -> Pixels:
    """Compress and decompress, 4:2:0."""
    options = (cv2.IMWRITE_JPEG_QUALITY, round(quality))
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB))


def greyscale(image: Pixels, _: float, rng: np.random.Generator) -> Pixels:
    """Three equal channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def horizontal_flip(image: Pixels, _: float, rng: np.random.Generator) -> Pixels:
    """Mirror left and right."""
    return cv2.flip(image, 1)


def opacity(image: Pixels, level: float, rng: np.random.Generator) -> Pixels:
    """Lay the image over white with this opacity."""
    return blend(image, 255.0, level)


def overlay_stripes(image: Pixels, width: float, rng: np.random.Generator) -> Pixels:
    """White horizontal stripes, `width` of a period that is half the shorter side, one of them through the centre."""
    height = image.shape[0]
    period = max(2.0, min(image.shape[:2]) / 2)
    phase = np.abs((np.arange(height) - height / 2) / period + 0.5) % 1 - 0.5
    striped = image.copy()
    striped[np.abs(phase) < width / 2] = 255
    return striped


def pad(image: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """Add a black border of this share of the side, on every side."""
    rows, columns = round(image.shape[0] * factor), round(image.shape[1] * factor)
    return cv2.copyMakeBorder(image, rows, rows, columns, columns, cv2.BORDER_CONSTANT)


def resize_square(image: Pixels, side: float, rng: np.random.Generator) -> Pixels:
    """Resize to a square whatever the shape was."""
    return resize(image, round(side), round(side))


def random_crop(image: Pixels, side: float, rng: np.random.Generator) -> Pixels:
    """Cut a square at a random place; a smaller image gets a black border first."""
    size = round(side)
    rows, columns = max(0, size - image.shape[0]), max(0, size - image.shape[1])
    if rows or columns:
        above, before = rows // 2, columns // 2
        image = cv2.copyMakeBorder(image, above, rows - above, before, columns - before, cv2.BORDER_CONSTANT)
    top = int(rng.integers(image.shape[0] - size + 1))
    left = int(rng.integers(image.shape[1] - size + 1))
    return image[top : top + size, left : left + size]


def scale(image: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """Resize both sides by a factor."""
    return resize(image, round(image.shape[1] * factor), round(image.shape[0] * factor))


def sharpen(image: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """Move away from a 3 x 3 smoothing, as Pillow's sharpness enhancer does."""
    smooth = np.full((3, 3), 1 / 13)
    smooth[1, 1] = 5 / 13
    kernel = (1 - factor) * smooth
    kernel[1, 1] += factor
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def shuffle_pixels(image: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    """Permute this share of the pixels among their own places."""
    flat = image.reshape(-1, 3).copy()  # (h * w, 3)
    places = rng.choice(len(flat), int(share * len(flat)), replace=False, shuffle=True)
    flat[np.sort(places)] = flat[places]
    return flat.reshape(image.shape)  # (h, w, 3)


def skew(image: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """Shear along x by this factor about the middle row; what comes from outside is black."""
    height, width = image.shape[:2]
    matrix = np.array([[1, factor, -factor * height / 2], [0, 1, 0]])
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """One augmentation and the range its parameter is drawn from, uniformly."""

    name: str
    apply: Callable[[Pixels, float, np.random.Generator], Pixels]
    low: float = 0.0
    high: float = 0.0

    @property
    def in_pixels(self) -> bool:
        """Whether the parameter is a side in pixels, which scales with the image size."""
        return self.apply in (resize_square, random_crop)


AUGMENTATIONS: tuple[Augmentation, ...] = (
    Augmentation("blur", blur, 0.1, 2.0),
    Augmentation("brightness", brightness, 0.5, 2.0),
    Augmentation("aspect_ratio", aspect_ratio, 0.75, 2.0),
    Augmentation("pixelization", pixelization, 0.3, 1.0),
    Augmentation("rotate", rotate, 90, 270),
    Augmentation("contrast", contrast, 0.5, 1.5),
    Augmentation("saturation", saturation, 0.5, 1.5),
    Augmentation("jpeg", jpeg, 40, 100),
    Augmentation("greyscale", greyscale),
    Augmentation("horizontal_flip", horizontal_flip),
    Augmentation("opacity", opacity, 0.2, 1.0),
    Augmentation("overlay_stripes", overlay_stripes, 0.05, 0.35),
    Augmentation("pad", pad, 0.01, 0.25),
    Augmentation("resize_square", resize_square, 64, 512),
    Augmentation("random_crop", random_crop, 64, 512),
    Augmentation("scale", scale, 0.5, 1.5),
    Augmentation("sharpen", sharpen, 1.2, 2.0),
    Augmentation("shuffle_pixels", shuffle_pixels, 0.0, 0.35),
    Augmentation("skew", skew, -1.0, 1.0),
)
"""In the order in which they are applied."""


@dataclass(frozen=True, slots=True)
class Augmenter:
    """Draws 0 to `most` different augmentations and applies them in the fixed order."""

    image_size: int = REFERENCE_SIZE
    """Scales the parameters that are sides in pixels."""
    most: int = 2
    """The number drawn is uniform in 0..most."""

    def __post_init__(self) -> None:
        if not 0 <= self.most <= len(AUGMENTATIONS):
            raise ValueError(f"{self.most} augmentations per view: set --augmentations to 0..{len(AUGMENTATIONS)}")

    def draw(self, rng: np.random.Generator) -> list[tuple[Augmentation, float]]:
        """Augmentations with their parameters, in the order of application."""
        count = int(rng.integers(self.most + 1))
        pairs = []
        for index in sorted(rng.choice(len(AUGMENTATIONS), count, replace=False)):
            augmentation = AUGMENTATIONS[index]
            unit = self.image_size / REFERENCE_SIZE if augmentation.in_pixels else 1.0
            pairs.append((augmentation, float(rng.uniform(augmentation.low, augmentation.high)) * unit))
            rng.random()  # decides nothing: without it a seed would give other test images than it always has
        return pairs

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """An augmented image, of any size."""
        for augmentation, parameter in self.draw(rng):
            image = augmentation.apply(image, parameter, rng)
        return image
