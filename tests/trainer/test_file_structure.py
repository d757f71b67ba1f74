"""Files that are small but would cost minutes or gigabytes are refused at once, and ordinary ones are not."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.file_structure import CostlyFile, check_exif, check_structure, check_work
from trainer.images import ImageTooLarge, UnreadableImage, decode_image, read_exif

MB = 1_000_000
HEIC = Path(__file__).parents[1] / "heic/turned.heic"


def encode(format: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(*chunks: bytes) -> bytes:
    data = encode("PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def segments(kind: int, body: bytes, count: int) -> bytes:
    """A JPEG with so many more segments."""
    data = encode("JPEG")
    return data[:2] + (bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body) * count + data[2:]


def gif(blocks: bytes) -> bytes:
    data = encode("GIF")
    start = 13 + 768
    return data[:start] + blocks + data[start:]


def tiff(tags: dict[int, tuple[int, int, bytes]], size: tuple[int, int] = (64, 48)) -> bytes:
    """A little-endian TIFF of a grey image: of each tag its type, how many values, and these."""
    tags = {
        256: (4, 1, struct.pack("<I", size[0])),
        257: (4, 1, struct.pack("<I", size[1])),
        258: (3, 1, struct.pack("<I", 8)),
        259: (3, 1, struct.pack("<I", 1)),
        262: (3, 1, struct.pack("<I", 1)),
        277: (3, 1, struct.pack("<I", 1)),
    } | tags
    place = 8 + 2 + 12 * len(tags) + 4
    entries, rest = b"", b""
    for tag, (kind, count, values) in sorted(tags.items()):
        value = values.ljust(4, b"\0") if len(values) <= 4 else struct.pack("<I", place + len(rest))
        rest += values if len(values) > 4 else b""
        entries += struct.pack("<HHI", tag, kind, count) + value
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + rest


def pointers(tags: int, count: int) -> bytes:
    """A TIFF with so many tags, each of which says that so many further pages follow behind them."""
    entry = struct.pack("<HHII", 330, 1, count, 14 + 12 * tags)
    return b"II*\0" + struct.pack("<IH", 8, tags) + entry * tags + bytes(4)


def strips(count: int, **others: int) -> bytes:
    numbers = np.full(count, 8, "<u4").tobytes()
    fill_order = {266: (3, 1, struct.pack("<I", others["fill_order"]))} if others else {}
    rows = {278: (4, 1, struct.pack("<I", 1))}
    return tiff({273: (4, count, numbers), 279: (4, count, numbers)} | rows | fill_order, size=(64, count))


def run_lengths() -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 7_000, 1_000, 1, 8, 1, 0, 0, 0, 256, 0)
    body = b"\1\x80\1\x40" * 3_500_000
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + head + bytes(1024) + body


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG with so many scans, whose head says that it is a square of this side."""
    data = encode("JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    data = data[:-2] + (count - data.count(b"\xff\xda")) * last + data[-2:]
    frame = data.index(b"\xff\xc2") + 5
    return data[:frame] + struct.pack(">HH", side, side) + data[frame + 4 :]


PROFILE = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(1_000_000)))
RATIONALS = {37_386: (5, 2_000_000, bytes(16 * MB))}
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a PNG of many colour profiles": lambda: png(PROFILE * 2_000),
    "a PNG of many small chunks": lambda: png(chunk(b"teSt") * (10 * MB // 12)),
    "a PNG of many empty chunks of pixels": lambda: png(chunk(b"IDAT") * (10 * MB // 12)),
    "a PNG of many texts that swell and break": lambda: png(
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MB))[:-4] + b"oops") * 800
    ),
    "a PNG of one column": lambda: png_of_size(1, 50 * MB),
    "a TIFF of two million strips, fill order 2": lambda: strips(2 * MB, fill_order=2),
    "a TIFF of ten thousand strips": lambda: strips(10_000),
    "a TIFF of one huge tile": lambda: tiff(
        {tag: (4, 1, struct.pack("<I", 26_704)) for tag in (322, 323)} | {324: (4, 1, bytes(4)), 325: (4, 1, bytes(4))}
    ),
    "a TIFF of two million rationals": lambda: tiff(RATIONALS | {273: (4, 1, bytes(4)), 279: (4, 1, bytes(4))}),
    "a TIFF whose tags share their bytes": lambda: tiff(
        {40_000 + number: (7, 15 * MB, bytes(4 if number else 15 * MB)) for number in range(500)}
    ),
    "a TIFF of many pages in each tag": lambda: pointers(4_990, count=1_000) + bytes(5 * MB),
    "a JPEG of many APP segments": lambda: segments(0xE5, b"", 2 * MB),
    "a JPEG of many comments": lambda: segments(0xFE, b"a", 2 * MB),
    "a JPEG of many quantisation tables": lambda: segments(0xDB, (b"\0" + bytes([1] * 64)) * 1_000, 100),
    "a JPEG of many tables hidden from the count": lambda: segments(0xF0, b"\xff\xdb\0\2" * 16_000, 100),
    "a JPEG of many resources": lambda: segments(0xED, b"Photoshop 3.0\0" + b"8BIM\4\1\0\0\0\0\0\0" * 5_000, 300),
    "a JPEG of fill bytes": lambda: b"\xff\xd8" + b"\xff" * (20 * MB) + encode("JPEG")[2:],
    "a JPEG of a hundred scans": lambda: scans(100, 7_000),
    "a GIF of many comments": lambda: gif(b"\x21\xfe\1a\0" * (2 * MB)),
    "a GIF of a long comment": lambda: gif(b"\x21\xfe" + b"\1a" * (10 * MB) + b"\0"),
    "a GIF of many frames": lambda: gif(b"\x2c\0\0\0\0\1\0\1\0\0\2\1\x44\0" * MB),
    "a GIF of pixels a byte each": lambda: gif(b"\x2c\0\0\0\0\x40\0\x30\0\0\2" + b"\1a" * (5 * MB) + b"\0"),
    "a GIF of fill bytes": lambda: gif(bytes(20 * MB)),
    "a BMP of run lengths": run_lengths,
    "a WebP of many chunks": lambda: webp(b"teSt\0\0\0\0" * (2 * MB)),
    "an AVIF of many boxes": lambda: encode("AVIF") + b"\0\0\0\x08free" * (2 * MB),
    "a HEIF with an item of no type": lambda: HEIC.read_bytes().replace(b"Exif", b"\xf8xif", 1),
    "an AVIF of many items": lambda: avif_with_items(b"\0\0\0\x08free" * 100_000),
}


def png_of_size(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT") + chunk(b"IEND")


def webp(chunks: bytes) -> bytes:
    data = encode("WEBP", lossless=True, exif=b"Exif\0\0II*\0")
    assert data[12:16] == b"VP8X"
    return data[:30] + chunks + data[30:]


def avif_with_items(boxes: bytes) -> bytes:
    data = encode("AVIF")
    start = data.index(b"meta") - 4
    [size] = struct.unpack(">I", data[start : start + 4])
    return data[:start] + struct.pack(">I", size + len(boxes)) + data[start + 4 : start + size] + boxes


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_cost_too_much_is_refused_at_once(name: str) -> None:
    data = HOSTILE[name]()
    start = time.process_time()
    with pytest.raises(UnreadableImage, match=r"more than|not read|a side may have"):
        decode_image(data)
    assert time.process_time() - start < 0.1


ORDINARY: dict[str, Callable[[], bytes]] = {
    "a JPEG with a profile in parts and a preview": lambda: encode("JPEG", icc_profile=bytes(3 * MB), comment=b"a"),
    "a progressive JPEG": lambda: encode("JPEG", (1000, 800), progressive=True, exif=exif()),
    "a photograph of a megapixel in twenty scans": lambda: scans(20, 1_000),
    "a PNG with texts, a profile and EXIF": lambda: encode("PNG", pnginfo=texts(), icc_profile=bytes(MB), exif=exif()),
    "an animated PNG": lambda: encode("PNG", save_all=True, append_images=frames(20)),
    "an animated GIF with a comment": lambda: encode(
        "GIF", save_all=True, append_images=frames(20), comment=b"a" * 999
    ),
    "an animated WebP with EXIF": lambda: encode("WEBP", save_all=True, append_images=frames(5), exif=exif()),
    "a TIFF of 2,000 strips": lambda: encode("TIFF", (64, 2_000), strip_size=1, exif=exif()),
    "a TIFF of ten pages": lambda: encode("TIFF", save_all=True, append_images=frames(9)),
    "a TIFF with LZW": lambda: encode("TIFF", compression="tiff_lzw"),
    "a TIFF with deflate": lambda: encode("TIFF", compression="tiff_adobe_deflate"),
    "an AVIF with EXIF": lambda: encode("AVIF", exif=exif()),
    "a BMP": lambda: encode("BMP"),
}


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x010E], tags[0x011A] = "a description", 72.0
    tags.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a comment"
    return tags


def texts() -> PngInfo:
    info = PngInfo()
    for number in range(50):
        info.add_text(f"name {number}", "text" * 1000, zip=True)
    return info


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (64, 48), (number, 0, 0)) for number in range(count)]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_files_pass_in_a_millisecond(name: str) -> None:
    data = ORDINARY[name]()
    _, facts = decode_image(data)
    start = time.process_time()
    for _ in range(10):
        check_structure(data, facts.format, 50 * MB)
    assert time.process_time() - start < 0.05  # ten times, with room for a busy machine


def test_exif_of_many_numbers_is_not_read() -> None:
    numbers = tiff({37_386: (5, 60_000, bytes(480_000))})
    with pytest.raises(CostlyFile, match="50,000 numbers in tags of EXIF"):
        check_exif(b"Exif\0\0" + numbers)
    with pytest.raises(CostlyFile, match="unknown kind"):
        check_exif(b"Exif\0\0" + b"II+" + numbers[3:])
    start = time.process_time()
    with pytest.raises(CostlyFile, match="1,000 pages in EXIF"):
        check_exif(pointers(1_100, count=999))
    assert time.process_time() - start < 0.01
    image = Image.open(io.BytesIO(encode("PNG", exif=b"Exif\0\0" + numbers)))
    with pytest.raises(CostlyFile):
        read_exif(image)
    assert decode_image(encode("PNG", exif=b"Exif\0\0" + numbers))[1].width == 64  # the pixels are as good as ever


def test_the_more_pixels_are_allowed_the_more_scans() -> None:
    data = scans(40, 512)
    with pytest.raises(CostlyFile, match="more than 12 scans in a JPEG of 262,144 pixels"):
        check_structure(data, "JPEG", 512 * 512)
    check_structure(data, "JPEG", 4 * 512 * 512)


@pytest.mark.parametrize(
    ("kind", "pixels", "transparent", "most"),
    [
        ("AVIF", 49 * MB, False, 8_500_000),  # (2 x 50 - 49) / 6
        ("transparent AVIF", 33 * MB, True, 5_666_666),
        ("AVIF", 12 * MB, False, 14_666_666),
        ("transparent AVIF", 50 * MB, True, 2**20),
        ("HEIF", 48 * MB, False, 8_666_666),
    ],
)
def test_the_more_pixels_an_image_of_a_slow_codec_has_the_fewer_bytes(
    kind: str, pixels: int, transparent: bool, most: int
) -> None:
    check_work(kind[-4:], pixels, transparent, most, 50 * MB)
    with pytest.raises(CostlyFile, match=f"^{kind} of {pixels:,} pixels with {most + 1:,} bytes; {most:,} are"):
        check_work(kind[-4:], pixels, transparent, most + 1, 50 * MB)
    check_work("JPEG", pixels, transparent, 20 * MB, 50 * MB)


def test_transparency_is_a_picture_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an image as large as may be an opaque one may have a byte for each six pixels, a transparent one none."""
    monkeypatch.setattr("trainer.file_structure.LEAST_BYTES", 0)
    files = [io.BytesIO(), io.BytesIO()]
    for file, mode in zip(files, ("RGB", "RGBA"), strict=True):
        Image.new(mode, (100, 90), (200, 0, 0, 99)[: len(mode)]).save(file, "AVIF")
    opaque, transparent = (file.getvalue() for file in files)
    assert decode_image(opaque, max_pixels=9_000)[1].width == 100
    with pytest.raises(ImageTooLarge, match=r"^transparent AVIF of 9,000 pixels .* 0 are allowed"):
        decode_image(transparent, max_pixels=9_000)


@pytest.mark.parametrize("name", ORDINARY)
def test_a_file_that_is_cut_or_damaged_anywhere_breaks_nothing(name: str) -> None:
    data, random = ORDINARY[name](), np.random.default_rng(0)
    format = decode_image(data)[1].format
    for place in random.integers(4, min(len(data), 3_000), 100):
        damaged = data[:place] + random.bytes(4) + data[place + 4 :]
        for broken in (data[:place], damaged):
            with suppress(CostlyFile):
                check_structure(broken, format, 50 * MB)
