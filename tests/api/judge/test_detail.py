"""What holds too little to be judged: small, flat and smooth images, as the backbone sees them."""

import io
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from api.judge.detail import LEAST_CONTRAST, shortfall
from api.judge.regions import grid, judged_boxes
from trainer.images import Preprocess

SIDE = 64
NATIVE, RESIZED = Preprocess("center_crop", SIDE), Preprocess("resize_crop", SIDE)
NOISE = np.random.default_rng(0).normal(size=(SIDE, SIDE))


def grey(values: np.ndarray) -> Image.Image:
    """From luminance, shape (h, w), any range."""
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def lacking(image: Image.Image, preprocess: Preprocess) -> str | None:
    return shortfall(image.size, preprocess.crops(image), preprocess)


def as_jpeg(image: Image.Image, quality: int = 50) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


ACROSS, DOWN = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
FLAT = {
    "black": grey(0 * NOISE),
    "white": grey(0 * NOISE + 255),
    "one colour": Image.new("RGB", (SIDE, SIDE), (30, 90, 200)),
    "one colour, JPEG": as_jpeg(Image.new("RGB", (SIDE, SIDE), (30, 90, 200))),
    "a dark frame's noise": grey(2 + NOISE),
    "blank paper, JPEG": as_jpeg(grey(245 + 2 * NOISE)),
}
SMOOTH = {
    "gradient": grey(128 * ACROSS + 64 * DOWN),
    "glow": grey(255 * np.exp(-8 * ((ACROSS - 0.5) ** 2 + (DOWN - 0.5) ** 2))),
}


@pytest.mark.parametrize("preprocess", [NATIVE, RESIZED], ids=lambda preprocess: preprocess.mode)
def test_images_without_information_are_named_with_what_they_lack(preprocess: Preprocess) -> None:
    for start, images in (("too flat to judge: ", FLAT), ("too smooth to judge: ", SMOOTH)):
        for name, image in images.items():
            for size in (SIDE, 3 * SIDE):  # larger than what is seen, too
                reason = lacking(image.resize((size, size), Image.Resampling.BILINEAR), preprocess)
                assert (reason or "enough").startswith(start), (name, size, reason)
    assert lacking(grey(128 + 20 * NOISE), preprocess) is None


def test_the_limits_by_hand() -> None:
    values = np.zeros((SIDE, SIDE))
    values[:, ::2] = 2 * LEAST_CONTRAST - 1  # two levels in equal parts: the deviation is half their difference
    assert lacking(grey(values), NATIVE) == "too flat to judge: brightness varies by 2.5 of 255, where 3 are needed"
    values[:, ::2] += 1
    assert lacking(grey(values), NATIVE) is None
    halves = np.where(ACROSS < 0.5, 0.0, 20.0)
    points = [(y, x) for y in range(3, SIDE - 2, 9) for x in (9, 20)]
    # Both columns beside the edge stand out: 124 of 62 * 62 inner pixels. A point stands out with its four neighbours.
    assert lacking(grey(halves), NATIVE) is None
    ramp = 100 + 40 * ACROSS
    for count, enough in ((3, False), (4, True)):  # 15 and 20 of 3,844 pixels; 19.2 are needed
        dotted = ramp.copy()
        for y, x in points[:count]:
            dotted[y, x] += 60
        assert (lacking(grey(dotted), NATIVE) is None) == enough, count
    assert lacking(grey(ramp), NATIVE) == (
        "too smooth to judge: 0.0% of the pixels stand out from their neighbours, where 0.5% are needed"
    )


@pytest.mark.parametrize("preprocess", [NATIVE, RESIZED], ids=lambda preprocess: preprocess.mode)
def test_size_counts_against_what_the_backbone_reads(preprocess: Preprocess) -> None:
    noise = grey(128 + 60 * np.random.default_rng(1).normal(size=(32, 300)))
    assert lacking(noise, preprocess) is None
    assert lacking(noise.crop((0, 0, 300, 31)), preprocess) == (
        "too small to judge: 300x31 pixels, where 32 a side are needed"
    )
    odd = Preprocess(preprocess.mode, 65)
    assert lacking(noise, odd) == "too small to judge: 300x32 pixels, where 33 a side are needed"


def test_the_black_around_a_small_image_is_no_detail() -> None:
    assert lacking(Image.new("RGB", (40, 40), "white"), NATIVE) == (
        "too flat to judge: brightness varies by 0.0 of 255, where 3 are needed"
    )


def test_windows_after_one_that_holds_enough_are_not_looked_at() -> None:
    other = Mock(spec=Image.Image)
    assert shortfall((3 * SIDE, SIDE), [grey(128 + 60 * NOISE), other], NATIVE) is None
    assert not other.mock_calls


def test_what_surrounds_the_crop_does_not_count() -> None:
    values = 128 + 60 * np.random.default_rng(2).normal(size=(3 * SIDE, 3 * SIDE))
    values[SIDE : 2 * SIDE, SIDE : 2 * SIDE] = 90
    image = grey(values)
    assert lacking(image, NATIVE) is not None
    assert lacking(image, RESIZED) is None
    assert lacking(image, Preprocess("center_crop", SIDE, windows=5)) is None  # the corners' windows hold enough
    boxes = grid(*image.size, SIDE)
    middle = (SIDE, SIDE, SIDE, SIDE)
    assert middle in boxes
    assert judged_boxes(image, RESIZED) == [box for box in boxes if box != middle]
