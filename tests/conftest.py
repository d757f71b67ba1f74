"""Shared fixtures: small images, a tiny random checkpoint, and a real Postgres."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter


def small_image(seed: int, fake: bool, size: int = 48) -> Image.Image:
    """A blob of smooth colour noise; a fake one is upsampled by two without a filter, which leaves a grid."""
    rng = np.random.default_rng(seed)
    side = size // 2 if fake else size
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1))
    return image.resize((size, size), Image.Resampling.NEAREST)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 real and 2 x 30 fake images as `real/` and `fake/<generator>/`; formats alternate alike for both labels."""
    root = tmp_path_factory.mktemp("images")
    folders = [("real", 60, False), ("fake/gen-a", 30, True), ("fake/gen-b", 30, True)]
    for number, (name, count, fake) in enumerate(folders):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = small_image(1000 * number + i, fake)
            image.save(root / name / f"{i:03d}.{'png' if i % 2 else 'jpg'}")
    return root
