"""The nineteen augmentations and the eight views: sizes, ranges, order, and what each does to pixels."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.augmentations import picture_sheet
from trainer.images import Preprocess
from trainer.views.augmentations import (
    AUGMENTATIONS,
    Augmentation,
    Augmenter,
    Pixels,
    aspect_ratio,
    blur,
    brightness,
    contrast,
    greyscale,
    horizontal_flip,
    inner_rectangle,
    jpeg,
    opacity,
    overlay_stripes,
    pad,
    pixelization,
    random_crop,
    resize,
    resize_square,
    rotate,
    saturation,
    scale,
    sharpen,
    shuffle_pixels,
    skew,
)
from trainer.views.views import (
    GLOBAL_SCALE,
    LOCAL_SCALE,
    Views,
    centre_crop,
    finish,
    random_resized_crop,
    random_window,
)

NAMES = tuple(augmentation.name for augmentation in AUGMENTATIONS)
DRAWN = [
    *(("horizontal_flip", 0.0), ("overlay_stripes", 0.294), ("horizontal_flip", 0.0), ("aspect_ratio", 1.768)),
    *(("rotate", 198.018), ("brightness", 1.702), ("pixelization", 0.366), ("sharpen", 1.981), ("skew", 0.215)),
    *(("blur", 1.079), ("random_crop", 88.161), ("opacity", 0.475), ("overlay_stripes", 0.283), ("pad", 0.082)),
]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def photograph(height: int = 60, width: int = 80, seed: int = 0) -> Pixels:
    """Smooth colour, with some contrast at every scale."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 1.5))


def test_there_are_the_nineteen_of_the_paper_in_its_order_and_ranges() -> None:
    assert [(a.name, a.low, a.high) for a in AUGMENTATIONS] == [
        ("blur", 0.1, 2),
        ("brightness", 0.5, 2),
        ("aspect_ratio", 0.75, 2),
        ("pixelization", 0.3, 1),
        ("rotate", 90, 270),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("jpeg", 40, 100),
        ("greyscale", 0, 0),
        ("horizontal_flip", 0, 0),
        ("opacity", 0.2, 1),
        ("overlay_stripes", 0.05, 0.35),
        ("pad", 0.01, 0.25),
        ("resize_square", 64, 512),
        ("random_crop", 64, 512),
        ("scale", 0.5, 1.5),
        ("sharpen", 1.2, 2),
        ("shuffle_pixels", 0, 0.35),
        ("skew", -1, 1),
    ]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=NAMES)
@pytest.mark.parametrize("shape", [(60, 80), (33, 17), (1, 1)], ids=str)
def test_every_augmentation_gives_an_image_and_leaves_its_input_alone(
    augmentation: Augmentation, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    image = photograph(*shape)
    before = image.copy()
    for parameter in (augmentation.low, (augmentation.low + augmentation.high) / 2, augmentation.high):
        result = augmentation.apply(image, parameter, rng)
        assert result.dtype == np.uint8
        assert result.ndim == 3
        assert result.shape[2] == 3
        assert min(result.shape) >= 1
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("apply", "parameter"),
    [
        (brightness, 1),
        (contrast, 1),
        (saturation, 1),
        (opacity, 1),
        (scale, 1),
        (shuffle_pixels, 0),
        (skew, 0),
        (sharpen, 1),
    ],
)
def test_the_neutral_parameter_changes_nothing(
    apply: Callable[[Pixels, float, np.random.Generator], Pixels], parameter: float, rng: np.random.Generator
) -> None:
    image = photograph()
    np.testing.assert_array_equal(apply(image, parameter, rng), image)


def test_colour_augmentations_by_hand(rng: np.random.Generator) -> None:
    image = np.array([[[100, 50, 200], [10, 20, 30]]], np.uint8)
    np.testing.assert_array_equal(brightness(image, 1.5, rng), [[[150, 75, 255], [15, 30, 45]]])
    np.testing.assert_array_equal(opacity(image, 0.2, rng), [[[224, 214, 244], [206, 208, 210]]])
    mean = 0.299 * 55 + 0.587 * 35 + 0.114 * 115
    np.testing.assert_allclose(contrast(image, 0.5, rng), image / 2 + mean / 2, atol=1)
    grey = image @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(saturation(image, 0.5, rng), image / 2 + grey[..., None] / 2, atol=1)
    np.testing.assert_allclose(greyscale(image, 0, rng), np.repeat(grey[..., None], 3, 2), atol=1)
    np.testing.assert_array_equal(horizontal_flip(image, 0, rng), image[:, ::-1])


def test_blur_smooths_and_sharpen_does_the_opposite(rng: np.random.Generator) -> None:
    image = photograph()
    detail = [
        np.abs(np.diff(x.astype(int), axis=1)).mean() for x in (blur(image, 2, rng), image, sharpen(image, 2, rng))
    ]
    assert detail[0] < 0.7 * detail[1] < 0.7 * detail[2]


def test_sizes_by_hand(rng: np.random.Generator) -> None:
    image = photograph(60, 80)
    assert pad(image, 0.25, rng).shape == (90, 120, 3)
    assert (pad(image, 0.25, rng)[:15] == 0).all()
    assert resize_square(image, 64, rng).shape == (64, 64, 3)
    assert scale(image, 0.5, rng).shape == (30, 40, 3)
    assert pixelization(image, 0.3, rng).shape == image.shape
    height, width = aspect_ratio(image, 2, rng).shape[:2]
    assert width / height == pytest.approx(2, rel=0.03)
    assert width * height == pytest.approx(4800, rel=0.05)
    assert random_crop(image, 100, rng).shape == (100, 100, 3)
    assert random_crop(image, 32, rng).shape == (32, 32, 3)


def test_random_crop_pads_all_round_and_moves_about(rng: np.random.Generator) -> None:
    image = np.full((10, 10, 3), 255, np.uint8)
    padded = random_crop(image, 20, rng)
    assert padded.sum() == image.sum()
    assert (padded[5:15, 5:15] == 255).all()
    gradient = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 3, 2).repeat(200, 0)
    assert len({int(random_crop(gradient, 64, rng)[0, 0, 0]) for _ in range(40)}) > 20


def test_rotation_by_quarter_turns_keeps_all_pixels(rng: np.random.Generator) -> None:
    image = photograph(60, 80)
    np.testing.assert_array_equal(rotate(image, 90, rng), np.rot90(image))
    np.testing.assert_array_equal(rotate(image, 180, rng), image[::-1, ::-1])
    np.testing.assert_array_equal(rotate(image, 270, rng), np.rot90(image, 3))


def test_rotation_leaves_no_empty_corner(rng: np.random.Generator) -> None:
    white = np.full((60, 80, 3), 255, np.uint8)
    for degrees in range(90, 271, 7):
        turned = rotate(white, degrees, rng)
        assert (turned == 255).all()
        assert min(turned.shape[:2]) > 25
    assert inner_rectangle(100, 100, np.pi / 4) == (70, 70)


def test_jpeg_is_a_real_compression_with_channels_in_order(rng: np.random.Generator) -> None:
    image = photograph()
    good, bad = (np.abs(jpeg(image, quality, rng).astype(int) - image).mean() for quality in (100, 40))
    assert 0 < good < bad < 20
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    np.testing.assert_allclose(jpeg(red, 95, rng), red, atol=4)


def test_stripes_are_white_rows_that_grow_with_the_width(rng: np.random.Generator) -> None:
    image = np.zeros((100, 120, 3), np.uint8)
    shares = [(overlay_stripes(image, width, rng) == 255).mean() for width in (0.05, 0.35)]
    assert shares == pytest.approx([0.06, 0.36], abs=0.03)
    striped = overlay_stripes(image, 0.2, rng)
    assert (striped[50] == 255).all()
    assert {row.max() - row.min() for row in striped} == {0}


def test_shuffled_pixels_stay_in_the_image(rng: np.random.Generator) -> None:
    image = photograph()
    shuffled = shuffle_pixels(image, 0.35, rng)
    moved = (shuffled != image).any(2).mean()
    assert 0.25 < moved <= 0.35
    np.testing.assert_array_equal(np.sort(image.reshape(-1, 3), axis=0), np.sort(shuffled.reshape(-1, 3), axis=0))


def test_skew_shears_rows_about_the_middle(rng: np.random.Generator) -> None:
    image = np.zeros((41, 101, 3), np.uint8)
    image[:, 50] = 255
    columns = skew(image, 1, rng)[..., 0].argmax(1)
    assert columns[20] in (50, 51)
    assert columns[30] - columns[20] == -10
    assert columns[10] - columns[20] == 10


def test_zero_to_two_are_drawn_alike_often_without_repetition(rng: np.random.Generator) -> None:
    drawn = [Augmenter().draw(rng) for _ in range(6000)]
    counts = np.bincount([len(names) for names in drawn])
    np.testing.assert_allclose(counts / 6000, [1 / 3] * 3, atol=0.03)
    used = [augmentation.name for chosen in drawn for augmentation, _ in chosen]
    assert set(used) == set(NAMES)
    assert min(map(used.count, NAMES)) > 0.8 * 6000 / 19
    for chosen in drawn:
        places = [NAMES.index(augmentation.name) for augmentation, _ in chosen]
        assert places == sorted(set(places))
        for augmentation, parameter in chosen:
            assert augmentation.low <= parameter <= augmentation.high


def test_sizes_in_pixels_scale_with_the_image_size(rng: np.random.Generator) -> None:
    drawn = [pair for _ in range(3000) for pair in Augmenter(image_size=112).draw(rng)]
    for name in ("resize_square", "random_crop"):
        parameters = [parameter for augmentation, parameter in drawn if augmentation.name == name]
        assert min(parameters) == pytest.approx(32, abs=4)
        assert max(parameters) == pytest.approx(256, abs=4)


@pytest.mark.parametrize("most", [-1, 20])
def test_no_more_augmentations_than_there_are(most: int) -> None:
    with pytest.raises(ValueError, match=rf"{most} augmentations per view: set --augmentations to 0\.\.19"):
        Augmenter(most=most)


def test_a_seed_gives_the_augmentations_it_always_has() -> None:
    pairs = [pair for seed in range(8) for pair in Augmenter().draw(np.random.default_rng(seed))]
    assert [(augmentation.name, round(parameter, 3)) for augmentation, parameter in pairs] == DRAWN


def test_picture_sheet_shows_each_at_three_parameters() -> None:
    assert picture_sheet(photograph(), side=60).shape == (19 * 60, 4 * 60, 3)


@pytest.mark.parametrize("shape", [(30, 300), (300, 30), (5, 5), (224, 224)], ids=str)
@pytest.mark.parametrize("size", [32, 96])
def test_every_view_ends_at_its_size(shape: tuple[int, int], size: int, rng: np.random.Generator) -> None:
    image = photograph(*shape)
    assert finish(image, size).shape == (size, size, 3)
    assert random_window(image, size, rng).shape == (size, size, 3)
    assert centre_crop(image, size).shape == (size, size, 3)
    for scale_range in (GLOBAL_SCALE, LOCAL_SCALE):
        assert random_resized_crop(image, size, scale_range, rng).shape == (size, size, 3)


def test_finish_shows_the_middle_nine_tenths() -> None:
    ramp = np.repeat(np.linspace(0, 200, 100)[None, :, None], 3, 2).repeat(100, 0).astype(np.uint8)
    row = finish(ramp, 90)[45, :, 0].astype(int)
    assert row[0] == pytest.approx(10, abs=2)
    assert row[-1] == pytest.approx(190, abs=2)


@pytest.mark.parametrize("shape", [(300, 410), (64, 50), (224, 224)], ids=str)
def test_finish_is_a_resize_and_a_centre_crop_to_within_a_pixel(shape: tuple[int, int]) -> None:
    """The recipe's order, all of the square resized, gives the same picture."""
    image = np.asarray(cv2.GaussianBlur(photograph(*shape), (0, 0), 8))
    side = round(96 / 0.9)
    slow = centre_crop(resize(centre_crop(image, min(shape)), side, side), 96)
    np.testing.assert_allclose(finish(image, 96).astype(int), slow.astype(int), atol=3)


def test_crops_cover_the_stated_share_of_the_area(rng: np.random.Generator) -> None:
    """Positions are encoded as values, so the range of values in a crop is its extent."""
    size = 200
    yy, xx = np.mgrid[0:size, 0:size].astype(np.uint8)
    coded = np.stack([yy, xx, np.zeros_like(xx)], 2)
    for low, high in (GLOBAL_SCALE, LOCAL_SCALE):
        shares = []
        for _ in range(200):
            part = random_resized_crop(coded, 50, (low, high), rng).astype(float)
            extent = (np.ptp(part[..., 0]) * 50 / 49) * (np.ptp(part[..., 1]) * 50 / 49)
            shares.append(extent / size**2)
        assert low * 0.9 < min(shares) < low + 0.15 * (high - low)
        assert high - 0.25 * (high - low) < max(shares) < high * 1.1


@pytest.mark.parametrize("scale_mode", ["resized", "native"])
@pytest.mark.parametrize("local", [16, 32])
def test_a_record_has_eight_views_that_follow_from_the_generator(scale_mode: str, local: int) -> None:
    preprocess = Preprocess(image_size=32)
    views = Views(
        preprocess=preprocess,
        local_size=local,
        augmenter=Augmenter(32),
        scale="native" if scale_mode == "native" else "resized",
    )
    images = [photograph(50, 70, seed) for seed in (1, 2)]
    pairs = [(image, np.asarray(preprocess.crop(Image.fromarray(image)))) for image in images]
    whole, crops = views.record(pairs[0], pairs[1], np.random.default_rng(5))
    assert (whole.shape, whole.dtype) == ((3, 2, 32, 32, 3), np.dtype(np.uint8))
    assert (crops.shape, crops.dtype) == ((2, local, local, 3), np.dtype(np.uint8))
    for label in (0, 1):  # the plain view is the checkpoint's own, or a window of the image
        own = np.array_equal(whole[0, label], pairs[label][1])
        assert own == (scale_mode == "resized")
        assert own or is_window(whole[0, label], images[label])
    again = views.record(pairs[0], pairs[1], np.random.default_rng(5))
    np.testing.assert_array_equal(whole, again[0])
    np.testing.assert_array_equal(crops, again[1])
    assert not np.array_equal(whole, views.record(pairs[0], pairs[1], np.random.default_rng(6))[0])


def is_window(view: Pixels, image: Pixels) -> bool:
    """Whether a view is a part of the image, pixel by pixel."""
    height, width = view.shape[:2]
    places = np.lib.stride_tricks.sliding_window_view(image, (height, width, 3))[:, :, 0]
    return bool((places == view).all((2, 3, 4)).any())


@pytest.mark.parametrize("local_size", [16, 32])
def test_native_views_are_windows_at_random_places(local_size: int) -> None:
    """Without augmentations all eight are, of one size where the local one is set to that of the whole."""
    images = [np.random.default_rng(seed).integers(0, 256, (70, 70, 3), dtype=np.uint8) for seed in (0, 1)]
    views = Views(Preprocess("center_crop", 32), local_size, augmenter=Augmenter(32, most=0), scale="native")
    pairs = [(image, centre_crop(image, 32)) for image in images]
    for seed in range(2):
        whole, local = views.record(pairs[0], pairs[1], np.random.default_rng(seed))
        for label in (0, 1):
            stack = [*whole[:, label], local[label]]
            assert [view.shape[0] for view in stack] == [32, 32, 32, local_size]
            assert all(is_window(view, images[label]) for view in stack)
            assert not any(np.array_equal(view, pairs[label][1]) for view in stack)
            assert len({view[:16, :16].tobytes() for view in stack}) == 4


@pytest.mark.parametrize(("chance", "changed"), [(0.0, False), (1.0, True)])
def test_recompression_happens_never_at_0_and_always_at_1(chance: float, changed: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    views = Views(
        Preprocess("center_crop", 32), local_size=16, augmenter=Augmenter(32, most=0), scale="native", recompress=chance
    )
    own = {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}
    for seed in range(5):
        whole, local = views.image(image, centre_crop(image, 32), np.random.default_rng(seed))
        assert is_window(whole[0], image)
        assert (not {tuple(pixel) for pixel in local.reshape(-1, 3).tolist()} <= own) == changed
