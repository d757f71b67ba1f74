"""What an image file asks of its readers, counted before any library reads it.

Readers spend Python's time, or memory, on every segment, chunk, block, strip and number of a file, however few pixels
it has: a few megabytes of them would take minutes. The bounds are far above what cameras, editors and encoders write.
"""

import re
from collections import Counter, deque
from collections.abc import Callable
from io import BytesIO
from struct import Struct, unpack_from
from typing import Literal

MOST_PARTS = 1_000
"""Segments, chunks, boxes or pages that hold no pixels; a large profile or manifest comes in some hundreds."""
MOST_PIXEL_PARTS = 50_000
"""Chunks of pixels and frames; libpng writes one for each 8 kB."""
MOST_METADATA = 8 * 2**20
"""Bytes beside the pixels."""
MOST_FILL = 1_000
"""Bytes that belong to nothing."""
MOST_SCANS = 100
"""A JPEG has at most so many; encoders write about ten, and hardly any wastes as many on a large image."""
MOST_FULL_SCANS = 12
"""A JPEG with as many pixels as are allowed has at most so many; one with fewer may have more, for the same work."""
MOST_TABLE_BYTES = 2**16
"""A JPEG's quantisation tables have at most so many together; one has 65 or 129."""
MOST_EXIF = 2**18
"""A JPEG's EXIF has at most so many bytes; one segment of 64 kB is usual."""
MOST_RESOURCE_BYTES = 2**20
"""Photoshop's resources in a JPEG, which hold a preview, have at most so many."""
MOST_BLOCKS = 5_000
"""A GIF's extensions have at most so many, of 255 bytes: one for each frame, and more for comments and metadata."""
LEAST_BLOCK = 150
"""A GIF's blocks of pixels have in the mean at least so many bytes, but for the last ones; encoders write 255."""
MOST_COMPRESSED = 100
"""Compressed texts of a PNG, each of which may swell to a megabyte."""
MOST_STRIPS = 2_500
"""A TIFF has at most so many: as 64 kB of each, which is usual, make of 50 million pixels."""
MOST_IPTC = 2**16
"""A TIFF's IPTC fields have at most so many bytes, as a JPEG's segment can have."""
MOST_TAGS = 5_000
"""A TIFF has at most so many with all of its pages."""
MOST_NUMBERS = 50_000
"""The tags of one page, or of EXIF, hold at most so many values that are neither bytes nor text."""
MOST_ITEMS = 2**16
"""An AVIF's or HEIF's list of items has at most so many bytes."""
MOST_WORK = 2
"""A slow codec may take as long as so many opaque images of all pixels that are allowed, but of no bytes."""
BYTE_WORK = {"AVIF": 6, "HEIF": 6}
"""Pixels that take such a codec as long as a byte, some 0.1 µs; transparency is a picture of its own."""
LEAST_BYTES = 2**20
"""So many such an image may have, however many pixels."""

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""What may follow in a JPEG: not the bytes that stand for 255 in a scan, restarts and fillers, which have no length."""
_COMMON_FRAMES = (0xC0, 0xC1, 0xC2)
"""JPEG's frames with Huffman codes: sequential, extended, progressive."""
_BEFORE_SCANS = {*_COMMON_FRAMES, 0xC4, 0xDA, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}
"""And tables, intervals, comments and what applications add: readers disagree about how to skip all others."""
_PNG_CHUNK, _WEBP_CHUNK, _BOX = Struct(">I4s"), Struct("<4sI"), Struct(">I4s")
_WIDTHS = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
"""Bytes of a TIFF's value by its type; of the others one."""
_BYTES = (1, 2, 6, 7)
"""TIFF's types that are bytes or text."""
_POINTERS = (330, 34665, 34853)
"""Tags that lead to further directories: those of a page, of EXIF and of GPS."""
_TILES, _STRIPS, _IPTC = (322, 323, 324, 325), (273, 279), 33723
_COMMON_VALUES = {259: (1, 5, 8, 32773, 32946), 266: (1,)}
"""Of a TIFF's compression, which is none, LZW, deflate, run lengths of bytes or deflate by its older number, and of
the order of bits."""


class CostlyFile(ValueError):
    """The file asks for more than any ordinary image does, or is of a kind that nobody uploads."""


def check_structure(data: bytes, format: str, max_pixels: int) -> None:
    """Refuse a file that would cost far more than its pixels do. Linear in its bytes, and ends at the first excess.

    What is cut short or broken is left to the decoder to refuse.

    Args:
        data: The file.
        format: Its format, by its signature.
        max_pixels: Width times height that are allowed, by which the work of a JPEG's scans is measured.

    Raises:
        CostlyFile: It has too many parts of a kind, or is of a kind that is not read.
    """
    if format == "JPEG":
        _check_jpeg(data, max_pixels)
    elif check := _CHECKS.get(format):
        check(data)


def check_work(format: str, pixels: int, transparent: bool, size: int, max_pixels: int) -> None:
    """Refuse an image whose pixels and bytes together would take its decoder longer than any other image takes.

    Args:
        format: Its format.
        pixels: Width times height.
        transparent: Whether it has transparency.
        size: Bytes of the file.
        max_pixels: Width times height that are allowed.

    Raises:
        CostlyFile: It has too many bytes for its pixels.
    """
    if format in BYTE_WORK:
        most = max(LEAST_BYTES, (MOST_WORK * max_pixels - (1 + transparent) * pixels) // BYTE_WORK[format])
        if size > most:
            kind = f"{'transparent ' if transparent else ''}{format} of {pixels:,} pixels"
            rule = f"{most:,} are allowed where LINEUP_MAX_PIXELS is {max_pixels:,}"
            raise CostlyFile(f"{kind} with {size:,} bytes; {rule}: save it smaller, or as JPEG")


def check_exif(data: bytes) -> None:
    """Refuse EXIF, with or without its six bytes of introduction, that would take long to read.

    Raises:
        CostlyFile: It has too many tags, or too many numbers in them.
    """
    _first_directory(data.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0"), "EXIF")


def with_height(data: bytes, rows: int) -> BytesIO:
    """A JPEG that `check_structure` has passed, as if it ended after so many rows, to be read from its start."""
    file, at = BytesIO(data), 2
    while marker := _MARKER.search(data, at):
        if marker[0][1] in _COMMON_FRAMES:
            file.seek(marker.end() + 3)
            file.write(rows.to_bytes(2, "big"))
            file.seek(0)
            break
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return file


def _at_most(count: int, most: int, parts: str) -> None:
    if count > most:
        raise CostlyFile(f"more than {most:,} {parts}, which no ordinary image has")


def _check_jpeg(data: bytes, max_pixels: int) -> None:
    at, parts, scans, fill, exif, pixels = 2, 0, 0, 0, 0, 0
    size: Counter[int] = Counter()
    while scans or fill <= MOST_FILL:
        # Only behind the first scan are there bytes without a marker; before, no more are looked at than may be.
        marker = _MARKER.search(data, at, len(data) if scans else at + MOST_FILL + 3)
        if marker is None:
            _at_most(0 if scans else len(data) - at, MOST_FILL, "fill bytes in a JPEG")
            return
        kind, length = marker[0][1], int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        if not scans:
            fill += marker.start() - at
            if kind not in _BEFORE_SCANS:
                raise CostlyFile(f"a JPEG of a kind that is not read (segment {kind:x}); save it as a common one")
        if kind == 0xD9:
            return
        at = marker.end() + length  # over the segment's bytes
        parts += kind != 0xDA
        scans += kind == 0xDA
        size[kind] += length
        exif += length if data[marker.end() + 2 : marker.end() + 6] == b"Exif" else 0
        if kind in _COMMON_FRAMES:
            height, width = unpack_from(">HH", data.ljust(marker.end() + 7, b"\0"), marker.end() + 3)
            pixels = max(pixels, width * height)
        _at_most(parts, MOST_PARTS, "segments in a JPEG")
        _at_most(scans, MOST_SCANS, "scans in a JPEG, each of which is work on all of its pixels")
        _at_most(size[0xDB], MOST_TABLE_BYTES, "bytes of quantisation tables in a JPEG")
        _at_most(size[0xED], MOST_RESOURCE_BYTES, "bytes of Photoshop's resources in a JPEG")
        _at_most(exif, MOST_EXIF, "bytes of EXIF in a JPEG")
        _at_most(size.total(), MOST_METADATA, "bytes beside the pixels of a JPEG")
        if scans * pixels > MOST_FULL_SCANS * max_pixels:
            most = MOST_FULL_SCANS * max_pixels // pixels
            raise CostlyFile(
                f"more than {most} scans in a JPEG of {pixels:,} pixels; save it with fewer, or as baseline"
            )
    raise CostlyFile(f"more than {MOST_FILL:,} fill bytes in a JPEG, which no ordinary image has")


def _check_png(data: bytes) -> None:
    at, pixels, size = 8, 0, 0
    count: Counter[bytes] = Counter()
    while at + 8 <= len(data):
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        at += 12 + length
        if kind in (b"IDAT", b"fdAT", b"fcTL"):
            pixels += 1
            if pixels > MOST_PIXEL_PARTS:
                break
            continue
        if kind == b"IEND":
            break
        count[kind] += 1
        size += length
        _at_most(count.total(), MOST_PARTS, "chunks beside the pixels of a PNG")
        _at_most(count[b"iCCP"], 1, "colour profile in a PNG")
        _at_most(count[b"zTXt"] + count[b"iTXt"], MOST_COMPRESSED, "compressed texts in a PNG")
        _at_most(size, MOST_METADATA, "bytes beside the pixels of a PNG")
    _at_most(pixels, MOST_PIXEL_PARTS, "chunks of pixels in a PNG")


def _check_gif(data: bytes) -> None:
    at, frames, parts, blocks, pixels, fill = 13 + _colours(data[10:11]), 0, 0, 0, 0, 0
    most_pixels = MOST_PIXEL_PARTS + len(data) // LEAST_BLOCK
    while at < len(data) and data[at] != 0x3B:
        introducer = data[at]
        if introducer == 0x2C:
            at += 11 + _colours(data[at + 9 : at + 10])
            frames += 1
        elif introducer == 0x21:
            parts += data[at + 1 : at + 2] != b"\xf9"  # all but a frame's own
            at += 2
        else:
            at += 1
            fill += 1
            _at_most(fill, MOST_FILL, "fill bytes in a GIF")
            continue
        while at < len(data) and (length := data[at]):
            at += length + 1
            if introducer == 0x21:
                blocks += 1
                _at_most(blocks, MOST_BLOCKS, "blocks of comments and metadata in a GIF")
            else:
                pixels += 1
                _at_most(pixels, most_pixels, "blocks of pixels in a GIF of its size")
        at += 1
        _at_most(parts, MOST_PARTS, "extensions in a GIF")
        _at_most(frames, MOST_PIXEL_PARTS, "frames in a GIF")


def _colours(flags: bytes) -> int:
    """Bytes of the colour table that these flags of a GIF announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _check_bmp(data: bytes) -> None:
    if data[14:18] >= b"\x28" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        raise CostlyFile("a BMP of run lengths is not read; save it without compression, or as PNG")


def _check_webp(data: bytes) -> None:
    at, parts, frames, size = 12, 0, 0, 0
    while at + 8 <= len(data):
        kind, length = _WEBP_CHUNK.unpack_from(data, at)
        at += 8 + length + length % 2
        if kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF"):
            frames += 1
        else:
            parts += 1
            size += length
        _at_most(parts, MOST_PARTS, "chunks beside the pixels of a WebP")
        _at_most(frames, MOST_PIXEL_PARTS, "frames in a WebP")
        _at_most(size, MOST_METADATA, "bytes beside the pixels of a WebP")


def _check_items(data: bytes) -> None:
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"meta":
            boxes = _boxes(data, start + 4, end)
            size = sum(stop - first for inner, first, stop in boxes if inner != b"idat")
            _at_most(size, MOST_ITEMS, "bytes in the list of a container's items")
            for inner, first, stop in boxes:
                if inner == b"iinf":
                    _check_item_types(data, first, stop)


def _check_item_types(data: bytes, start: int, end: int) -> None:
    """Refuse items whose types and names are no text (ISO/IEC 14496-12, 8.11.6): the reader of HEIF crashes at them."""
    for _, item, stop in _boxes(data, start + (8 if data[start : start + 1] != b"\0" else 6), end):
        text = data[item + (10 if data[item : item + 1] == b"\3" else 8) : stop]
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise CostlyFile("a container with an item whose type is no text is not read; save it anew") from error


def _boxes(data: bytes, at: int, end: int) -> list[tuple[bytes, int, int]]:
    """Kind, first byte and end of the boxes of an AVIF or HEIF between two places."""
    boxes: list[tuple[bytes, int, int]] = []
    while at + 8 <= end:
        length, kind = _BOX.unpack_from(data, at)
        head = 8
        if length == 1 and at + 16 <= end:
            head, length = 16, int.from_bytes(data[at + 8 : at + 16], "big")
        length = min(length or end - at, end - at)
        boxes.append((kind, at + head, at + length))
        _at_most(len(boxes), MOST_PARTS, "boxes in an AVIF or HEIF")
        at += max(length, head)
    return boxes


def _check_tiff(data: bytes) -> None:
    for tag, count, value in _first_directory(data, "TIFF"):
        if tag in _TILES:
            raise CostlyFile("a TIFF of tiles is not read; save it in strips, or as PNG")
        if value not in _COMMON_VALUES.get(tag, (value,)):
            raise CostlyFile(f"a TIFF of this kind (tag {tag} is {value}) is not read; save it with LZW, or as PNG")
        _at_most(count if tag in _STRIPS else 0, MOST_STRIPS, "strips in a TIFF")
        _at_most(count if tag == _IPTC else 0, MOST_IPTC, "bytes of IPTC fields in a TIFF")


def _first_directory(data: bytes, format: str) -> list[tuple[int, int, int]]:
    """Count what all directories hold that a TIFF, or EXIF, leads to.

    Returns:
        Of the first one the tags, each with how many values it has, and the first where that is a whole number.
    """
    if data[:4] not in (b"II*\0", b"MM\0*"):
        raise CostlyFile(f"{format} of an unknown kind")
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    entry = Struct("<HHII" if order == "little" else ">HHII")

    def number(at: int, width: int) -> int:
        return int.from_bytes(data[at : at + width], order)

    first: list[tuple[int, int, int]] = []
    pointers, seen, tags, size = deque([4]), set[int](), 0, 0
    while pointers:
        at = number(pointers.popleft(), 4)
        if at in seen or not 0 < at < len(data):
            continue
        seen.add(at)
        entries, at, numbers = number(at, 2), at + 2, 0
        tags += entries
        _at_most(len(seen), MOST_PARTS, f"pages in {format}")
        _at_most(tags, MOST_TAGS, f"tags in {format}")
        end = at + entries * entry.size
        for start in range(at, min(end, len(data) - entry.size + 1), entry.size):
            tag, kind, count, place = entry.unpack_from(data, start)
            width = _WIDTHS.get(kind, 1)
            if count * width <= 4:
                place = start + 8
            size += count * width
            numbers += 0 if kind in _BYTES else count
            if len(seen) == 1:
                first.append((tag, count, number(place, width)))
            if tag in _POINTERS:
                _at_most(len(seen) + len(pointers) + count, MOST_PARTS, f"pages in {format}")
                pointers.extend(range(place, place + 4 * count, 4))
            _at_most(numbers, MOST_NUMBERS, f"numbers in tags of {format}")
            # Where several tags share their bytes they may hold more than the file.
            _at_most(size, len(data) + 2**20, f"bytes in tags of {format}")
        pointers.append(end)
    return first


_CHECKS: dict[str, Callable[[bytes], None]] = {
    "PNG": _check_png,
    "GIF": _check_gif,
    "BMP": _check_bmp,
    "WEBP": _check_webp,
    "AVIF": _check_items,
    "HEIF": _check_items,
    "TIFF": _check_tiff,
}
