"""Grids cover an image, stay few, and overlays colour what they should."""

import io

import numpy as np
import pytest
from conftest import small_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from api.judge.regions import FAKE, REAL, STRONGEST, VARIANTS, grid, overlay, region_pixels, variant_windows
from api.judge.uploads import Question, Upload, prepare, prepare_here
from api.schemas.verdicts import Region
from api.service_settings import ServiceSettings
from trainer.heads.heads import fit_heads
from trainer.images import Preprocess, decode_image, thumbnail
from trainer.model.embedder import Embedder

SIDES = st.integers(1, 5000)


@given(SIDES, SIDES, st.sampled_from([32, 224]))
def test_boxes_lie_inside_and_are_few(width: int, height: int, size: int) -> None:
    boxes = grid(width, height, size)
    assert 1 <= len(boxes) <= 64
    assert len(set(boxes)) == len(boxes)
    for x, y, w, h in boxes:
        assert (w, h) == (min(size, width), min(size, height))
        assert 0 <= x <= width - w
        assert 0 <= y <= height - h


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 31), st.integers(0, 31))
def test_boxes_cover_an_image_that_needs_no_more_than_64(columns: int, rows: int, less: int, short: int) -> None:
    width, height = 32 * columns - less, 32 * rows - short
    covered = np.zeros((height, width), bool)
    for x, y, w, h in grid(width, height, 32):
        covered[y : y + h, x : x + w] = True
    assert covered.all()


def test_a_large_image_keeps_its_shape_in_the_grid() -> None:
    boxes = grid(22400, 11200, 224)
    assert (len({x for x, *_ in boxes}), len({y for _, y, *_ in boxes})) == (11, 5)


def test_a_region_is_seen_at_native_resolution() -> None:
    preprocess = Preprocess(mode="resize_crop", image_size=32)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    boxes = grid(96, 64, 32)
    seen = region_pixels(Image.fromarray(pixels), boxes, preprocess)
    for (x, y, w, h), region in zip(boxes, seen, strict=True):
        np.testing.assert_array_equal(region.transpose(1, 2, 0), pixels[y : y + h, x : x + w])


def test_every_variant_changes_the_image_a_little() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    preprocess = Preprocess(image_size=32)
    plain = preprocess.normalised(preprocess([image]))
    variants = variant_windows(image, preprocess)
    assert list(variants) == list(VARIANTS)
    assert [variant.shape for variant in variants.values()] == [(1, 3, 32, 32)] * len(VARIANTS)
    for variant in variants.values():
        assert 0 < np.abs(preprocess.normalised(variant) - plain).mean() < 1


def test_an_upload_is_embedded_as_everywhere(windowed: Embedder) -> None:
    """Congruence of what is served with `Embedder.embed`: the image, its regions and its variants, by their windows."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    question = Question(explain=frozenset({"regions", "stability"}))
    prepared = prepare(Upload("a.png", file.getvalue()), question, windowed.preprocess, ServiceSettings())
    assert prepared.image.crop == (0, 0, 70, 40)
    assert prepared.image.windows == [(19, 4, 32, 32), (0, 0, 32, 32), (38, 8, 32, 32), (38, 0, 32, 32), (0, 8, 32, 32)]
    regions = [image.crop((x, y, x + w, y + h)) for x, y, w, h in prepared.boxes]
    [embeddings] = windowed.embed_stacks([prepared.views])
    variants = [change(image) for change in VARIANTS.values()]
    np.testing.assert_allclose(embeddings, windowed.embed([image, *regions, *variants]), atol=1e-5)


def test_an_upload_is_decoded_in_whole_where_more_than_its_windows_is_shown() -> None:
    """Congruence with the whole of a JPEG, of which the windows alone need fewer rows."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 40, 3), dtype=np.uint8)).save(file, "JPEG")
    image, _ = decode_image(file.getvalue())
    upload, preprocess = Upload("a.jpg", file.getvalue()), Preprocess("center_crop", 32)
    plain = prepare_here(upload, Question(), preprocess, image.width * image.height)
    pictured = prepare_here(upload, Question(), preprocess, image.width * image.height, keep_thumbnail=True)
    explained = prepare_here(upload, Question(explain=frozenset({"regions"})), preprocess, image.width * image.height)
    for prepared in (plain, pictured, explained):
        np.testing.assert_array_equal(prepared.views[0], preprocess([image]))
    assert pictured.thumbnail == thumbnail(image)
    assert len(explained.boxes) == 20
    np.testing.assert_array_equal(
        np.concatenate(explained.views[1:]), region_pixels(image, explained.boxes, preprocess)
    )


def test_heads_of_images_of_several_windows_know_regions_and_variants(windowed: Embedder) -> None:
    """Regions are single windows, and must be embedded as what the heads were fitted on."""
    labels, native = np.arange(40) % 2, windowed.preprocess
    images = [ImageEnhance.Brightness(small_image(i, True, size=72)).enhance(0.6 + 0.4 * (i % 2)) for i in range(40)]
    heads = fit_heads(windowed.embed(images[:30]), labels[:30])
    assert heads.svm is not None
    boxes = grid(72, 72, 32)
    regions = np.concatenate([windowed.embed_pixels(region_pixels(image, boxes, native)) for image in images[30:]])
    variants = windowed.embed_windows([variant_windows(image, native)["scale-1.25"] for image in images[30:]])
    sureness, spread = [], []
    for embeddings in (windowed.embed(images[30:]), variants, regions):
        logits = heads.linear.logit(embeddings)
        np.testing.assert_array_equal(logits > 0, np.repeat(labels[30:], len(embeddings) // 10))
        sureness.append(np.abs(logits).mean())
        spread.append(heads.svm.score(embeddings).std())
    np.testing.assert_allclose(sureness[1:], sureness[0], rtol=0.2)
    np.testing.assert_allclose(spread[1:], spread[0], rtol=0.2)
    assert spread[0] > 0.1  # on unit vectors the kernel is next to constant


@pytest.mark.parametrize("size", [(64, 32), (8000, 4000)])
def test_an_overlay_is_transparent_red_and_blue(size: tuple[int, int]) -> None:
    half = (0, 0, size[0] // 2, size[1])
    other = (size[0] // 2, 0, size[0] // 2, size[1])
    regions = [Region(box=half, score=1.0, generator=None), Region(box=other, score=0.5, generator=None)]
    with Image.open(io.BytesIO(overlay(*size, regions))) as image:
        assert (image.format, image.mode) == ("PNG", "RGBA")
        assert image.size == ((64, 32) if size[0] == 64 else (2048, 1024))
        left, right = image.getpixel((image.width // 4, 10)), image.getpixel((3 * image.width // 4, 10))
    assert left == (*FAKE, STRONGEST)
    assert isinstance(right, tuple)
    assert right[3] == 0


def test_where_regions_overlap_their_mean_is_drawn_and_between_them_nothing() -> None:
    regions = [Region(box=(0, 0, 20, 30), score=0.9), Region(box=(10, 0, 20, 30), score=0.2)]
    with Image.open(io.BytesIO(overlay(40, 30, regions))) as image:
        drawn = np.asarray(image)
    for x, score in ((5, 0.9), (15, 0.55), (25, 0.2)):
        colour = FAKE if score >= 0.5 else REAL
        assert drawn[15, x].tolist() == [*colour, round(STRONGEST * 2 * abs(score - 0.5))], x
    assert drawn[15, 35, 3] == 0
