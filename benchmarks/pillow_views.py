"""The reference pipeline re-enacted: AugLy's transforms through Pillow, one by one, and torchvision's crops.

Written from the documentation of AugLy 1.0 and of CoDE's reference code, to measure against; it is used nowhere else.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision import transforms

from trainer.views.augmentations import inner_rectangle

Apply = Callable[[Image.Image, float], Image.Image]
Size = tuple[int, int]


def _aspect_ratio(image: Image.Image, ratio: float) -> Image.Image:
    height = math.sqrt(image.width * image.height / ratio)
    return image.resize((max(1, round(height * ratio)), max(1, round(height))))


def _pixelization(image: Image.Image, ratio: float) -> Image.Image:
    small = image.resize((max(1, round(image.width * ratio)), max(1, round(image.height * ratio))))
    return small.resize(image.size)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    width, height = inner_rectangle(image.width, image.height, math.radians(degrees))
    turned = image.rotate(degrees, expand=True, resample=Image.Resampling.BILINEAR)
    left, top = (turned.width - width) // 2, (turned.height - height) // 2
    return turned.crop((left, top, left + width, top + height))


def _jpeg(image: Image.Image, quality: float) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(quality))
    return Image.open(buffer).convert("RGB")


def _opacity(image: Image.Image, level: float) -> Image.Image:
    return Image.blend(Image.new("RGB", image.size, "white"), image, level)


def _stripes(image: Image.Image, width: float) -> Image.Image:
    rows = np.arange(image.height) - image.height / 2
    wave = (np.cos(2 * np.pi * rows / (min(image.size) / 2)) + 1) / 2
    mask = np.repeat((wave > (math.cos(math.pi * width) + 1) / 2)[:, None], image.width, 1)
    return Image.composite(Image.new("RGB", image.size, "white"), image, Image.fromarray(mask))


def _pad(image: Image.Image, factor: float) -> Image.Image:
    return ImageOps.expand(image, (round(image.width * factor), round(image.height * factor)))


def _square(image: Image.Image, side: float) -> Image.Image:
    return image.resize((round(side), round(side)))


def _crop(image: Image.Image, side: float) -> Image.Image:
    cropped: Image.Image = transforms.RandomCrop(round(side), pad_if_needed=True)(image)
    return cropped


def _scale(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))


def _shuffle(image: Image.Image, share: float) -> Image.Image:
    flat = np.array(image).reshape(-1, 3)
    rng = np.random.default_rng(random.getrandbits(32))
    mask = rng.random(len(flat)) < share
    flat[mask] = rng.permutation(flat[mask])
    return Image.fromarray(flat.reshape(image.height, image.width, 3))


def _skew(image: Image.Image, factor: float) -> Image.Image:
    matrix = (1, factor, -factor * image.height / 2, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


PILLOW: dict[str, tuple[Apply, float, float]] = {
    "blur": (lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)), 0.1, 2),
    "brightness": (lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), 0.5, 2),
    "aspect_ratio": (_aspect_ratio, 0.75, 2),
    "pixelization": (_pixelization, 0.3, 1),
    "rotate": (_rotate, 90, 270),
    "contrast": (lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), 0.5, 1.5),
    "saturation": (lambda image, factor: ImageEnhance.Color(image).enhance(factor), 0.5, 1.5),
    "jpeg": (_jpeg, 40, 100),
    "greyscale": (lambda image, _: image.convert("L").convert("RGB"), 0, 0),
    "horizontal_flip": (lambda image, _: ImageOps.mirror(image), 0, 0),
    "opacity": (_opacity, 0.2, 1),
    "overlay_stripes": (_stripes, 0.05, 0.35),
    "pad": (_pad, 0.01, 0.25),
    "resize_square": (_square, 64, 512),
    "random_crop": (_crop, 64, 512),
    "scale": (_scale, 0.5, 1.5),
    "sharpen": (lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor), 1.2, 2),
    "shuffle_pixels": (_shuffle, 0, 0.35),
    "skew": (_skew, -1, 1),
}


class PillowViews:
    """Four views of an image as the reference code makes them: Pillow images to normalised float tensors."""

    def __init__(self, size: int, local_size: int) -> None:
        self.size, self.local_size = size, local_size
        self.global_crop = transforms.RandomResizedCrop(size, scale=(0.4, 1.0))
        self.local_crop = transforms.RandomResizedCrop(local_size, scale=(0.05, 0.4))
        self.plain = transforms.Compose([transforms.Resize(round(size * 248 / 224)), transforms.CenterCrop(size)])
        normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.tensor = transforms.Compose([transforms.ToTensor(), normalise])

    def augment(self, image: Image.Image, size: int) -> Image.Image:
        """0 to 2 of the nineteen, then to its size."""
        for name in sorted(random.sample(list(PILLOW), random.randint(0, 2)), key=list(PILLOW).index):
            apply, low, high = PILLOW[name]
            image = apply(image, random.uniform(low, high))
        resize = transforms.Resize(round(size / 0.9), interpolation=transforms.InterpolationMode.BICUBIC)
        finished: Image.Image = transforms.CenterCrop(size)(resize(image))
        return finished

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain, augmented and global view (3, 3, s, s), and the local one (3, l, l), float32."""
        whole = [self.plain(image), self.augment(image, self.size), self.augment(self.global_crop(image), self.size)]
        local: torch.Tensor = self.tensor(self.augment(self.local_crop(image), self.local_size))
        return torch.stack([self.tensor(view) for view in whole]), local
