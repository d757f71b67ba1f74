"""Two candidate libraries for the nineteen augmentations beside Pillow, which the reference uses, on one core.

    python -m benchmarks.augmentations [--images 16] [--sheet PHOTOGRAPH OUT.png]

Each is timed at a third of its range on textured images of 256 to 640 pixels. `--sheet` draws all of them at the
low, middle and high end instead.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from benchmarks.pillow_views import PILLOW
from benchmarks.training import source_images
from trainer.views.augmentations import AUGMENTATIONS, Pixels, inner_rectangle, resize

Apply = Callable[[torch.Tensor, float], torch.Tensor]


def _resize(image: torch.Tensor, width: float, height: float) -> torch.Tensor:
    size = [max(1, round(height)), max(1, round(width))]
    resized: torch.Tensor = tv.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
    return resized


def _blur(image: torch.Tensor, radius: float) -> torch.Tensor:
    blurred: torch.Tensor = tv.gaussian_blur(image, [2 * math.ceil(3 * radius) + 1] * 2, [radius] * 2)
    return blurred


def _aspect_ratio(image: torch.Tensor, ratio: float) -> torch.Tensor:
    height = math.sqrt(image.shape[1] * image.shape[2] / ratio)
    return _resize(image, height * ratio, height)


def _pixelization(image: torch.Tensor, ratio: float) -> torch.Tensor:
    height, width = image.shape[1:]
    return _resize(_resize(image, width * ratio, height * ratio), width, height)


def _rotate(image: torch.Tensor, degrees: float) -> torch.Tensor:
    width, height = inner_rectangle(image.shape[2], image.shape[1], math.radians(degrees))
    turned = tv.rotate(image, degrees, InterpolationMode.BILINEAR, expand=True)
    cropped: torch.Tensor = tv.center_crop(turned, [height, width])
    return cropped


def _stripes(image: torch.Tensor, width: float) -> torch.Tensor:
    period = min(image.shape[1:]) / 2
    phase = ((torch.arange(image.shape[1]) - image.shape[1] / 2) / period + 0.5).abs() % 1 - 0.5
    return torch.where((phase.abs() < width / 2)[None, :, None], torch.tensor(255, dtype=torch.uint8), image)


def _crop(image: torch.Tensor, side: float) -> torch.Tensor:
    cropped: torch.Tensor = tv.center_crop(image, [round(side)] * 2)
    return cropped


def _shuffle(image: torch.Tensor, share: float) -> torch.Tensor:
    flat = image.flatten(1).clone()  # (3, h * w)
    places = torch.randperm(flat.shape[1])[: int(share * flat.shape[1])]
    flat[:, places.sort().values] = flat[:, places]
    return flat.view_as(image)


TORCHVISION: dict[str, Apply] = {
    "blur": _blur,
    "brightness": tv.adjust_brightness,
    "aspect_ratio": _aspect_ratio,
    "pixelization": _pixelization,
    "rotate": _rotate,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "jpeg": lambda image, quality: tv.jpeg(image, round(quality)),
    "greyscale": lambda image, _: tv.rgb_to_grayscale(image, 3),
    "horizontal_flip": lambda image, _: tv.horizontal_flip(image),
    "opacity": lambda image, level: (image * level + 255 * (1 - level)).to(torch.uint8),
    "overlay_stripes": _stripes,
    "pad": lambda image, factor: tv.pad(image, [round(image.shape[2] * factor), round(image.shape[1] * factor)]),
    "resize_square": lambda image, side: _resize(image, side, side),
    "random_crop": _crop,
    "scale": lambda image, factor: _resize(image, image.shape[2] * factor, image.shape[1] * factor),
    "sharpen": tv.adjust_sharpness,
    "shuffle_pixels": _shuffle,
    "skew": lambda image, factor: tv.affine(
        image, 0.0, [0, 0], 1.0, [math.degrees(math.atan(factor)), 0.0], InterpolationMode.BILINEAR
    ),
}
"""On uint8 tensors (3, h, w)."""


def picture_sheet(image: Pixels, side: int = 192) -> Pixels:
    """Every augmentation (a row) at the low, middle and high end of its range (columns), with names."""
    rows: list[Pixels] = []
    for augmentation in AUGMENTATIONS:
        cells: list[Pixels] = [label_cell(augmentation.name, side)]
        for parameter in (augmentation.low, (augmentation.low + augmentation.high) / 2, augmentation.high):
            example = augmentation.apply(image, parameter, np.random.default_rng(0))
            factor = (side - 18) / max(example.shape[:2])
            small = resize(example, round(example.shape[1] * factor), round(example.shape[0] * factor))
            cell = label_cell(f"{parameter:.3g}  {example.shape[1]}x{example.shape[0]}", side)
            cell[18 : 18 + small.shape[0], : small.shape[1]] = small
            cells.append(cell)
        rows.append(np.hstack(cells))
    return np.vstack(rows)


def label_cell(text: str, side: int) -> Pixels:
    """A grey square with text along its top."""
    cell = np.full((side, side, 3), 200, np.uint8)
    cv2.putText(cell, text, (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return cell


def milliseconds(apply: Callable[..., object], images: Sequence[object], parameter: float, rounds: int = 3) -> float:
    """Least processor time per image."""
    best = math.inf
    for _ in range(rounds):
        started = time.process_time()
        for image in images:
            apply(image, parameter)
        best = min(best, time.process_time() - started)
    return 1000 * best / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--sheet", type=Path, nargs=2, metavar=("PHOTOGRAPH", "OUT"))
    asked = parser.parse_args()
    if asked.sheet:
        picture = np.asarray(Image.open(asked.sheet[0]).convert("RGB"))
        Image.fromarray(picture_sheet(picture)).save(asked.sheet[1])
        return
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    images = source_images(asked.images)
    pictures = [Image.fromarray(image) for image in images]
    tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]  # (3, h, w)
    rng = np.random.default_rng(0)
    rows = []
    print("| ms per image | OpenCV | torchvision v2 | Pillow |\n|---|---:|---:|---:|")
    for augmentation in AUGMENTATIONS:
        name, third = augmentation.name, augmentation.low + (augmentation.high - augmentation.low) / 3
        sides = (
            (lambda image, parameter, apply=augmentation.apply: apply(image, parameter, rng), images),
            (TORCHVISION[name], tensors),
            (PILLOW[name][0], pictures),
        )
        rows.append([milliseconds(apply, of, third) for apply, of in sides])
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in rows[-1]) + " |")
    print("| **mean** | " + " | ".join(f"{value:.2f}" for value in np.mean(rows, 0)) + " |")


if __name__ == "__main__":
    main()
