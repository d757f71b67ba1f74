"""Decoding, file facts and inference preprocessing."""

import contextlib
import hashlib
import io
import json
import re
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer.images import (
    FORMATS,
    ImageTooLarge,
    Preprocess,
    UnreadableImage,
    UnsupportedFormat,
    decode_image,
    thumbnail,
)

HEIC = Path(__file__).parents[1] / "heic"
"""Pictures of 64x48 pixels, encoded by pillow-heif 1.8: Pillow itself cannot."""
ENCODED = tuple(name for name in FORMATS if name != "HEIF")


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def ramp(width: int = 48, height: int = 32) -> Image.Image:
    """Red grows to the right, green downwards: every turn and flip shows."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"")


@pytest.mark.parametrize("file_format", ENCODED)
def test_every_format_gives_rgb_and_facts(file_format: str) -> None:
    data = encode(ramp(), file_format)
    image, facts = decode_image(data)
    assert image.mode == "RGB"
    assert (facts.width, facts.height) == image.size == (48, 32)
    assert (facts.format, facts.bytes, facts.sha256) == (file_format, len(data), hashlib.sha256(data).hexdigest())
    assert (facts.jpeg_quality is not None) == (file_format == "JPEG")
    assert np.abs(np.asarray(image, int) - np.asarray(ramp(), int)).mean() < 40  # GIF has few colours


@pytest.mark.parametrize("quality", range(1, 101))
def test_jpeg_quality_is_read_from_the_quantisation_table(quality: int) -> None:
    assert decode_image(encode(ramp(16, 16), "JPEG", quality=quality))[1].jpeg_quality == quality


def test_jpeg_quality_of_another_encoder_is_the_nearest() -> None:
    table = [max(1, value + 1) for value in Image.open(io.BytesIO(encode(ramp(), "JPEG", quality=80))).quantization[0]]  # type: ignore[attr-defined]
    facts = decode_image(encode(ramp(), "JPEG", qtables=[table, table]))[1]
    assert facts.jpeg_quality is not None
    assert abs(facts.jpeg_quality - 80) <= 3


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for file_format in ("PNG", "TIFF"):
        pixels = np.asarray(decode_image(encode(Image.fromarray(grey), file_format))[0])
        np.testing.assert_array_equal(pixels[..., 0].ravel(), np.arange(256))
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.linspace(0, 1, 16, dtype=np.float32), 1),
        (np.linspace(0, 255, 16, dtype=np.float32), 255),
        (np.linspace(0, 65535, 16).astype(np.int32), 65535),
        (np.linspace(0, 1_000_000, 16).astype(np.int32), 1_000_000),
    ],
)
def test_float_and_wide_integer_grey_keep_their_range(values: np.ndarray, white: int) -> None:
    pixels = np.asarray(decode_image(encode(Image.fromarray(values.reshape(4, 4)), "TIFF"))[0])[..., 0].ravel()
    np.testing.assert_allclose(pixels, values * 255.0 / white, atol=0.51)


def test_not_a_number_is_black() -> None:
    values = np.array([[np.nan, np.inf], [0.5, 1.0]], np.float32)
    pixels = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF"))[0])[..., 0]
    assert pixels.tolist() == [[0, 0], [128, 255]]


def test_transparency_is_laid_on_white() -> None:
    layer = ramp().convert("RGBA")
    layer.putalpha(0)
    assert decode_image(encode(layer, "PNG"))[0].getcolors() == [(48 * 32, (255, 255, 255))]
    layer.putalpha(128)
    half = np.asarray(decode_image(encode(layer, "WEBP", lossless=True))[0], int)
    np.testing.assert_allclose(half, (np.asarray(ramp(), int) + 255) / 2, atol=2)
    grey, alpha = np.indices((256, 256), np.uint8)
    every = Image.fromarray(np.stack([grey, alpha], -1))
    exact = np.rint((grey * 1.0 * alpha + 255.0 * (255 - alpha)) / 255)
    np.testing.assert_array_equal(np.asarray(decode_image(encode(every, "PNG"))[0])[..., 0], exact)


def test_palette_and_its_transparent_colour() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    assert decode_image(encode(image, "PNG"))[0].getpixel((0, 0)) == (200, 0, 0)
    assert decode_image(encode(image, "PNG", transparency=1))[0].getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(Image.new("LA", (2, 2), (0, 0)), "PNG"))[0].getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_is_converted() -> None:
    image, facts = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = np.asarray(image).mean((0, 1))
    assert (image.mode, facts.format) == ("RGB", "JPEG")
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(file_format: str, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = ramp() if orientation == 1 else ramp().transpose(undo[orientation])
    exif = Image.Exif()
    exif[274] = orientation
    image, facts = decode_image(encode(stored, file_format, exif=exif))
    assert (facts.width, facts.height) == image.size == (48, 32)
    assert np.abs(np.asarray(image, int) - np.asarray(ramp(), int)).mean() < 6


@pytest.mark.parametrize(("name", "turn"), [("plain", None), ("turned", Image.Transpose.ROTATE_270)])
def test_heic_of_a_phone_is_read_and_turned_once(name: str, turn: Image.Transpose | None) -> None:
    blobs = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    scene = Image.fromarray(blobs).resize((64, 48), Image.Resampling.BICUBIC)
    upright = scene if turn is None else scene.transpose(turn)
    image, facts = decode_image(HEIC.joinpath(f"{name}.heic").read_bytes())
    assert (facts.format, facts.width, facts.height) == ("HEIF", *upright.size)
    assert np.abs(np.asarray(image, int) - np.asarray(upright, int)).mean() < 8


def test_transparent_heic_is_laid_on_white() -> None:
    image, _ = decode_image(HEIC.joinpath("transparent.heic").read_bytes())
    assert np.asarray(image)[:, :28].min() > 240
    assert np.asarray(image)[:, 36:].min() < 100


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff garbage", b"Exif\0\0this is no TIFF"])
def test_broken_metadata_leave_the_image_readable(exif: bytes) -> None:
    assert decode_image(encode(ramp(), "JPEG", exif=exif))[0].size == (48, 32)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_counts(file_format: str) -> None:
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    image, _ = decode_image(encode(red, file_format, save_all=True, append_images=[blue, blue]))
    r, g, b = np.asarray(image, int).mean((0, 1))
    assert r > 240
    assert max(g, b) < 15


def test_a_phone_photo_with_several_pictures_is_a_jpeg() -> None:
    data = encode(ramp(), "MPO", save_all=True, append_images=[noise(48, 32)])
    image, facts = decode_image(data)
    assert facts.format == "JPEG"
    assert np.abs(np.asarray(image, int) - np.asarray(ramp(), int)).mean() < 6


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.97])
def test_truncated_files_are_unreadable(file_format: str, share: float) -> None:
    data = HEIC.joinpath("plain.heic").read_bytes() if file_format == "HEIF" else encode(noise(64, 64), file_format)
    with pytest.raises(UnreadableImage):
        decode_image(data[: max(1, int(len(data) * share))])


def test_a_damaged_tiff_writes_nothing_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """Libtiff has a handler for errors that prints them, amid a log of JSON."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "TIFF", compression="tiff_lzw")
    data = bytearray(buffer.getvalue())
    data[200:1200] = bytes(1000)
    with pytest.raises(UnreadableImage, match="broken TIFF"):
        decode_image(bytes(data))
    assert capfd.readouterr().err == ""


def test_a_png_that_lacks_only_its_end_mark_has_all_its_pixels() -> None:
    data = encode(noise(64, 64), "PNG")
    np.testing.assert_array_equal(np.asarray(decode_image(data[:-10])[0]), np.asarray(noise(64, 64)))


@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_files_raise_nothing_else(file_format: str) -> None:
    good = HEIC.joinpath("plain.heic").read_bytes() if file_format == "HEIF" else encode(ramp(), file_format)
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = np.frombuffer(good, np.uint8).copy()
        data[rng.integers(0, min(len(data), 200), 4)] = rng.integers(0, 256, 4)
        with contextlib.suppress(UnreadableImage):
            assert decode_image(data.tobytes())[0].mode == "RGB"


def test_empty_and_foreign_bytes_are_told_apart() -> None:
    with pytest.raises(UnreadableImage, match="empty") as caught:
        decode_image(b"")
    assert not isinstance(caught.value, UnsupportedFormat)
    psd = b"8BPS\0\1" + bytes(40)
    for data in (b"hello, I am a text", b"BMW is no bitmap", b"<svg/>", psd, encode(ramp(), "JPEG2000"), b"%PDF-1.7"):
        with pytest.raises(UnsupportedFormat, match="JPEG, PNG"):
            decode_image(data)


def test_a_polyglot_is_what_its_first_bytes_say() -> None:
    png, jpeg = encode(ramp(), "PNG"), encode(noise(10, 10), "JPEG")
    image, facts = decode_image(png + jpeg)
    assert (facts.format, image.size) == ("PNG", (48, 32))
    assert facts.bytes == len(png) + len(jpeg)
    with pytest.raises(UnsupportedFormat):
        decode_image(b"%PDF-1.7\n" + jpeg)


def test_the_size_is_refused_before_any_pixel_is_read() -> None:
    with pytest.raises(ImageTooLarge, match=r"60000x60000.*LINEUP_MAX_PIXELS"):
        decode_image(png_header(60_000, 60_000))  # there are no pixels at all behind this header
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16_382).to_bytes(3, "little") * 2
    with pytest.raises(ImageTooLarge, match="16383x16383"):
        decode_image(b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas)
    with pytest.raises(ImageTooLarge, match=r"64x48.* 3,071 pixels"):
        decode_image(HEIC.joinpath("plain.heic").read_bytes(), max_pixels=3071)
    for file_format in ENCODED:
        data = encode(ramp(40, 50), file_format)
        assert decode_image(data, max_pixels=2000)[0].size == (40, 50)
        with pytest.raises(ImageTooLarge, match=r"40x50.* 1,999 pixels"):
            decode_image(data, max_pixels=1999)


def test_a_jpeg_that_asks_for_endless_passes_is_refused() -> None:
    data = encode(noise(64, 48), "JPEG", progressive=True, exif=b"Exif\0\0" + encode(ramp(), "JPEG", progressive=True))
    last = data[data.rindex(b"\xff\xda") : -2]
    passes = data[:-2].count(b"\xff\xda") // 2
    as_many_as_may_be = data[:-2] + (100 - passes) * last + data[-2:]
    assert decode_image(as_many_as_may_be)[1].width == 64
    assert decode_image(data + 200 * last)[1].width == 64  # behind the end nothing counts
    with pytest.raises(UnreadableImage, match="more than 100 scans"):
        decode_image(data[:-2] + (101 - passes) * last + data[-2:])


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_the_webp_canvas_is_read_from_all_three_headers(options: dict[str, Any]) -> None:
    with pytest.raises(ImageTooLarge, match="image is 37x53;"):
        decode_image(encode(noise(37, 53), "WEBP", **options), max_pixels=100)


def test_a_size_that_the_setting_allows_is_not_refused_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(encode(ramp(), "PNG"))[0].size == (48, 32)


@pytest.mark.parametrize(("size", "expected"), [((800, 400), (256, 128)), ((5000, 2), (256, 1)), ((30, 20), (30, 20))])
def test_thumbnail_is_a_jpeg_within_its_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    small = Image.open(io.BytesIO(thumbnail(noise(*size))))
    assert (small.format, small.size) == ("JPEG", expected)


def naive_crop(image: Image.Image, s: int) -> Image.Image:
    """Resize the whole image, then crop: the slow way that the recipe writes down."""
    shorter, side = min(image.size), round(s * 248 / 224)
    wide, high = (side * length // shorter for length in image.size)
    left, top = round((wide - s) / 2), round((high - s) / 2)
    return image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + s, top + s))


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (37, 90), (500, 130)])
def test_resize_crop_equals_resizing_all_and_cropping(size: tuple[int, int]) -> None:
    image = noise(*size).point(lambda value: 64 + value // 2)  # no clipping between the two passes of the filter
    ours, slow = (np.asarray(i, int) for i in (Preprocess(image_size=64).crop(image), naive_crop(image, 64)))
    assert ours.shape == (64, 64, 3)
    assert np.abs(ours - slow).max() <= 2  # the fixed-point rounding of two filters


def test_center_crop_keeps_pixels_and_pads_with_black() -> None:
    preprocess = Preprocess(mode="center_crop", image_size=32)
    image = noise(101, 64)
    x, y, w, h = preprocess.box(*image.size)
    assert (x, y, w, h) == (34, 16, 32, 32)
    np.testing.assert_array_equal(np.asarray(preprocess.crop(image)), np.asarray(image)[y : y + h, x : x + w])
    small = np.asarray(preprocess.crop(Image.new("RGB", (11, 40), "white")))
    assert preprocess.box(11, 40) == (0, 4, 11, 32)
    assert (small.max((0, 2)) == 255).nonzero()[0].tolist() == list(range(10, 21))


SAMPLINGS = {name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}") for name in (411, 420, 422, 440, 444)}


@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_windows_alone_have_the_pixels_of_the_whole_image(sampling: int, progressive: int) -> None:
    """Congruence with decoding everything, at every turn, of one window and of one more, which lies in a corner."""
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling], cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
    for size, orientation in [((24, 287), turn) for turn in range(1, 9)] + [((255, 45), 1)]:
        data = cv2.imencode(".jpg", np.asarray(noise(*size)), options)[1].tobytes()
        exif = Image.Exif()
        exif[274] = orientation
        segment = b"Exif\0\0" + exif.tobytes()
        data = data[:2] + struct.pack(">HH", 0xFFE1, 2 + len(segment)) + segment + data[2:]
        whole, facts = decode_image(data)
        for windows in (1, 2):
            preprocess = Preprocess(mode="center_crop", image_size=32, windows=windows)
            part, same_facts = decode_image(data, windows_of=preprocess)
            assert same_facts == facts
            for ours, theirs in zip(preprocess.crops(part), preprocess.crops(whole), strict=True):
                assert ours.tobytes() == theirs.tobytes()
            # Of 287 rows 160 hold the window, and three rows of blocks come behind them.
            assert (part.tobytes() != whole.tobytes()) == (size == (24, 287) and windows == 1)


def test_windows_of_unusual_jpegs_have_the_pixels_of_the_whole_image() -> None:
    """Those that the decoder smooths, as they lack scans, or that have restarts, one colour, four, a picture more."""
    preprocess = Preprocess(mode="center_crop", image_size=32)
    progressive = encode(noise(61, 255), "JPEG", progressive=True)
    scans = [match.start() for match in re.finditer(b"\xff\xda", progressive)]
    with_picture = b"Exif\0\0" + encode(ramp(), "JPEG")
    for data in (
        *(progressive[:end] + b"\xff\xd9" for end in scans[1:]),
        encode(noise(61, 255), "JPEG", restart_marker_blocks=3),
        encode(noise(61, 255).convert("L"), "JPEG"),
        encode(noise(61, 255).convert("CMYK"), "JPEG"),
        encode(noise(61, 255), "JPEG", exif=with_picture),
        encode(noise(61, 255), "MPO", save_all=True, append_images=[ramp()]),
    ):
        part, whole = (decode_image(data, windows_of=one)[0] for one in (preprocess, None))
        assert part.tobytes() != whole.tobytes()
        assert preprocess.crop(part).tobytes() == preprocess.crop(whole).tobytes()


def test_a_jpeg_cut_off_below_its_windows_is_unreadable_all_the_same() -> None:
    data = encode(noise(61, 255), "JPEG")
    with pytest.raises(UnreadableImage, match="truncated"):
        decode_image(data[: len(data) * 9 // 10], windows_of=Preprocess(mode="center_crop", image_size=32))


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    s=st.integers(1, 96),
    mode=st.sampled_from(["center_crop", "resize_crop"]),
)
def test_box_lies_inside_and_crop_has_its_side(width: int, height: int, s: int, mode: Any) -> None:
    preprocess = Preprocess(mode=mode, image_size=s)
    x, y, w, h = preprocess.box(width, height)
    assert 0 <= x < x + w <= width
    assert 0 <= y < y + h <= height
    assert preprocess.crop(Image.new("RGB", (width, height))).size == (s, s)


@pytest.mark.parametrize("mode", ["center_crop", "resize_crop"])
@pytest.mark.parametrize("size", [(300, 200), (40, 90), (224, 224), (20, 20)])
def test_only_what_the_box_names_reaches_the_backbone(mode: Any, size: tuple[int, int]) -> None:
    """Congruence of `box` and `__call__`: pixels outside (beyond the filter's reach) change nothing, inside they do."""
    preprocess = Preprocess(mode=mode, image_size=64)
    image = np.asarray(noise(*size))
    x, y, w, h = preprocess.box(*size)
    reach = 0 if mode == "center_crop" else int(2 * max(1.0, min(size) / 71)) + 2
    outside = np.ones(image.shape[:2], bool)
    outside[max(0, y - reach) : y + h + reach, max(0, x - reach) : x + w + reach] = False
    before = preprocess([Image.fromarray(image)])

    def painted(where: np.ndarray) -> np.ndarray:
        return preprocess([Image.fromarray(np.where(where[..., None], 255 - image, image))])

    np.testing.assert_array_equal(painted(outside), before)
    for row, column, height, width in [(y, x, 1, w), (y + h - 1, x, 1, w), (y, x, h, 1), (y, x + w - 1, h, 1)]:
        border = np.zeros_like(outside)
        border[row : row + height, column : column + width] = True
        assert (painted(border) != before).any()


def test_a_line_one_pixel_high_is_cropped_without_a_huge_resize() -> None:
    image = Image.new("RGB", (2_000_000, 1), "white")
    assert Preprocess().crop(image).getpixel((100, 100)) == (255, 255, 255)


def test_pixels_are_normalised_by_channel() -> None:
    preprocess = Preprocess(image_size=8)
    raw = preprocess([Image.new("RGB", (20, 10), (255, 0, 51))] * 2)
    assert raw.dtype == np.uint8
    pixels = preprocess.normalised(raw)
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels.dtype == np.float32
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(pixels[1, :, 3, 3], expected, rtol=1e-5)
    assert preprocess([]).shape == preprocess.normalised(preprocess([])).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="pixels are float32; expected uint8"):
        preprocess.normalised(pixels)


@pytest.mark.parametrize(
    ("windows", "size", "corners"),
    [
        (1, (101, 64), [(34, 16)]),
        (3, (101, 64), [(34, 16), (0, 0), (69, 32)]),
        (5, (101, 64), [(34, 16), (0, 0), (69, 32), (69, 0), (0, 32)]),
        (9, (96, 96), [(32, 32), (0, 0), (64, 64), (64, 0), (0, 64), (32, 0), (32, 64), (0, 32), (64, 32)]),
        (9, (96, 20), [(32, 0), (0, 0), (64, 0)]),
        (9, (32, 32), [(0, 0)]),
        (9, (7, 20), [(0, 0)]),
    ],
)
def test_windows_are_the_centre_the_corners_and_what_lies_between(
    windows: int, size: tuple[int, int], corners: list[tuple[int, int]]
) -> None:
    preprocess = Preprocess(mode="center_crop", image_size=32, windows=windows)
    boxes = preprocess.boxes(*size)
    assert boxes == [(x, y, min(32, size[0]), min(32, size[1])) for x, y in corners]
    image = noise(*size)
    pixels = preprocess([image, image])
    assert len(pixels) == 2 * len(boxes)
    single = Preprocess(mode="center_crop", image_size=32)
    for (x, y, w, h), window, crop in zip(boxes, pixels, preprocess.crops(image), strict=False):
        alone = image.crop((x, y, x + w, y + h))
        np.testing.assert_array_equal(window, single([alone])[0])
        assert crop.tobytes() == single.crop(alone).tobytes()
    assert preprocess.crop(image).tobytes() == single.crop(image).tobytes()


@given(width=st.integers(1, 300), height=st.integers(1, 300), windows=st.integers(1, 30))
def test_the_box_encloses_all_windows(width: int, height: int, windows: int) -> None:
    preprocess = Preprocess(mode="center_crop", image_size=32, windows=windows)
    boxes = preprocess.boxes(width, height)
    assert len(set(boxes)) == len(boxes) <= windows
    if min(width, height) >= 128:  # there is room for all
        assert len(boxes) == windows
    inside = np.zeros((height, width), bool)
    for x, y, w, h in boxes:
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        inside[y : y + h, x : x + w] = True
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    x, y, w, h = preprocess.box(width, height)
    assert (x, y, x + w - 1, y + h - 1) == (columns[0], rows[0], columns[-1], rows[-1])


def test_windows_are_joined_by_the_mean_of_their_directions_and_of_their_lengths() -> None:
    embeddings = np.array([[3, 4], [0, 0.1], [5, 0]], np.float32)
    joined = Preprocess(mode="center_crop", windows=5).joined(embeddings, [2, 1])
    np.testing.assert_allclose(joined[0], 2.55 * np.array([0.3, 0.9]) / 0.9**0.5, rtol=1e-6)
    np.testing.assert_array_equal(joined[1], embeddings[2])  # as the backbone made it
    assert joined.dtype == np.float32
    np.testing.assert_array_equal(Preprocess().joined(embeddings, [1, 1, 1]), embeddings)
    opposite = np.array([[1, 0], [-1, 0]], np.float32)
    np.testing.assert_array_equal(Preprocess(mode="center_crop", windows=2).joined(opposite, [2]), [[0, 0]])


def test_preprocess_survives_json_and_refuses_nonsense() -> None:
    preprocess = Preprocess(mode="center_crop", image_size=32)
    assert Preprocess(**json.loads(json.dumps(asdict(preprocess)))) == preprocess
    with pytest.raises(ValueError, match="mode is 'stretch'"):
        Preprocess(mode="stretch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_size is 0"):
        Preprocess(image_size=0)
    for preprocessing in ({"mode": "center_crop", "windows": 0}, {"mode": "resize_crop", "windows": 2}):
        with pytest.raises(ValueError, match=r"windows is . with .*; expected 1, or to 1,024 with center_crop"):
            Preprocess(**preprocessing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="std"):
        Preprocess(std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="mode is L"):
        preprocess([Image.new("L", (4, 4))])
