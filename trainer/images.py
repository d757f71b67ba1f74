"""Image bytes to upright RGB pixels and facts about the file, and pixels to what the backbone reads.

Every image of the project comes through `decode_image`. It refuses with one of three exceptions:

    UnreadableImage        empty, truncated or broken
    ├── ImageTooLarge      the header promises more pixels than allowed, or they would take too long
    └── UnsupportedFormat  no image, or an image of another format
"""

import ctypes
import hashlib
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from typing import Literal

import numpy as np
from pi_heif import options as heif_options
from pi_heif.as_plugin import HeifImageFile
from PIL import Image, ImageFile, _imaging
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile, jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from trainer.file_structure import CostlyFile, check_exif, check_structure, check_work, with_height


class UnreadableImage(ValueError):
    """The bytes are empty, truncated or broken."""


class ImageTooLarge(UnreadableImage):
    """The header promises more pixels than allowed, or more work on them."""


class UnsupportedFormat(UnreadableImage):
    """The bytes are no image, or one of a format outside `FORMATS`."""


# The plugins are called by signature instead of through `Image.open`: that tries every format whose prefix could fit,
# and only warns (process-wide) between its own two size limits.
_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": jpeg_factory,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
    "AVIF": AvifImageFile,
    "HEIF": lambda file: _open_heif(file),
}
FORMATS: tuple[str, ...] = tuple(_PLUGINS)
_SIGNATURES = {
    (b"\xff\xd8\xff",): "JPEG",
    (b"\x89PNG\r\n\x1a\n",): "PNG",
    (b"GIF87a", b"GIF89a"): "GIF",
    (b"II*\0", b"MM\0*"): "TIFF",
}

_BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIF": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"},
}
"""What a container of ISO/IEC 23008-12 says it holds."""
MOST_BRANDS = 512
"""Bytes of a container's brands that are looked at."""

# What EXIF tag 274 asks for; 1 and values outside the standard leave the image as it is.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

JPEG_END = b"\xff\xd9"
"""The marker that a JPEG ends with, if nothing has been appended or cut off."""
MOST_SIDE = 65_535
"""Pixels of the longer side, as many as a JPEG can have: resizing a line of millions would take gigabytes."""

# The luminance table of ITU-T T.81, annex K.1, row by row.
_LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What the file says without its pixels.

    `width` and `height` are those of the upright image. `jpeg_quality` is the setting of the Independent JPEG Group's
    encoder (1-100) whose quantisation table is nearest, null for other formats.
    """

    sha256: str
    bytes: int
    width: int
    height: int
    format: str
    jpeg_quality: int | None


def decoding_memory(max_pixels: int) -> int:
    """Bytes of data that a process may have which decodes and explains images of so many pixels."""
    return PROGRAM_MEMORY + PIXEL_MEMORY * max_pixels


def open_image(data: bytes, *, max_pixels: int = 50_000_000) -> tuple[ImageFile.ImageFile, str]:
    """Read the header of an image and find its format, once its structure and size are known to be bearable.

    Args:
        data: The file.
        max_pixels: Width times height may be so many.

    Raises:
        UnsupportedFormat: Not an image, or of a format outside `FORMATS`.
        ImageTooLarge: Width times height exceed `max_pixels`, or a side `MOST_SIDE`, or its bytes are too many.
        UnreadableImage: Empty, broken, or made of more parts than are read.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    name = _sniff(data)
    if name is None:
        raise UnsupportedFormat(f"not an image of an accepted format ({', '.join(FORMATS)})")
    if name == "WEBP":
        _check_size(_webp_size(data), max_pixels)  # this plugin allocates its canvas on opening
    try:
        check_structure(data, name, max_pixels)
        image = _PLUGINS[name](io.BytesIO(data))
    except CostlyFile as error:
        raise UnreadableImage(str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a GIF frame outside its screen
        raise ImageTooLarge(f"image is too large for {max_pixels:,} pixels ({_reason(error)})") from error
    except Exception as error:  # hostile bytes make the plugins raise nearly anything, SyntaxError included
        raise UnreadableImage(f"broken {name} header ({_reason(error)})") from error
    _check_size(image.size, max_pixels)
    try:
        check_work(name, image.width * image.height, image.has_transparency_data, len(data), max_pixels)
    except CostlyFile as error:
        raise ImageTooLarge(str(error)) from error
    return image, name


def decode_image(
    data: bytes,
    *,
    max_pixels: int = 50_000_000,
    sha256: str | None = None,
    upright: bool = True,
    windows_of: "Preprocess | None" = None,
) -> tuple[Image.Image, FileFacts]:
    """Decode to an upright RGB image, checking the size in the header before any pixel is decompressed.

    Of an animation the first frame counts. Transparency is laid on white, 16 bits are scaled to 8, CMYK is converted
    without its colour profile. Names of files and bytes behind the end of the image mean nothing.

    Args:
        data: The file.
        max_pixels: Width times height may be so many.
        sha256: The hash of `data` in hexadecimal, where the caller knows it.
        upright: Turn the image as its metadata ask; otherwise it and the facts are as the pixels are stored.
        windows_of: Whose windows alone are wanted: other pixels may stay black, which saves the time of decoding them.

    Raises:
        UnsupportedFormat: Not an image, or of a format outside `FORMATS`.
        ImageTooLarge: Width times height exceed `max_pixels`, or a side `MOST_SIDE`, or its bytes are too many.
        UnreadableImage: Empty, truncated, broken, or made of more parts than are read.
    """
    image, name = open_image(data, max_pixels=max_pixels)
    return decode_opened(image, name, data, sha256=sha256, upright=upright, windows_of=windows_of)


def decode_opened(
    image: ImageFile.ImageFile,
    name: str,
    data: bytes,
    *,
    sha256: str | None = None,
    upright: bool = True,
    windows_of: "Preprocess | None" = None,
) -> tuple[Image.Image, FileFacts]:
    """What `decode_image` gives, of an image and its format as `open_image` gives them, for who reads more of it.

    Raises:
        UnreadableImage: Truncated or broken.
    """
    if name == "TIFF":
        _silence_libtiff()
    try:
        if windows_of and isinstance(image, JpegImageFile):
            _leave_rows(image, data, windows_of)
        image.load()
        rgb = _rgb(_upright(image) if upright else image)
    except Exception as error:
        raise UnreadableImage(f"truncated or broken {name} file ({_reason(error)})") from error
    return rgb, FileFacts(
        sha256=sha256 or hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        width=rgb.width,
        height=rgb.height,
        format=name,
        jpeg_quality=_jpeg_quality(getattr(image, "quantization", None)) if name == "JPEG" else None,
    )


def _open_heif(file: io.BytesIO) -> HeifImageFile:
    """The picture of a HEIF file, without the smaller, deeper and masking ones beside it.

    It is turned by the container; what its EXIF says of that is outdated, and reset by the plugin.
    """
    heif_options.THUMBNAILS = heif_options.DEPTH_IMAGES = heif_options.AUX_IMAGES = False
    return HeifImageFile(file)


@cache
def _silence_libtiff() -> None:
    """Keep libtiff from printing to stderr the errors that Pillow raises as well."""
    with suppress(AttributeError, OSError):  # where Pillow has no libtiff, or hides it
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _sniff(data: bytes) -> str | None:
    """The accepted format whose signature opens the file; a file has at most one."""
    for prefixes, name in _SIGNATURES.items():
        if data.startswith(prefixes):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM" and data[6:10] == bytes(4):  # two letters alone would take a text for an image
        return "BMP"
    if data[4:8] == b"ftyp":
        listed = data[8 : min(struct.unpack(">I", data[:4])[0], MOST_BRANDS)]
        brands = {listed[at : at + 4] for at in range(0, len(listed), 4)}
        return next((name for name, own in _BRANDS.items() if brands & own), None)
    return None


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas (RFC 9649); zeros where the header is cut short or unknown."""
    head, body = data[12:16], data[20:30].ljust(10, b"\0")
    if head == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if head == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageTooLarge(f"image is {size[0]}x{size[1]}; LINEUP_MAX_PIXELS allows {max_pixels:,} pixels in all")
    if max(size) > MOST_SIDE:
        raise ImageTooLarge(f"image is {size[0]}x{size[1]}; a side may have {MOST_SIDE:,} pixels")


def read_exif(image: Image.Image) -> Image.Exif:
    """The EXIF of an opened image, empty where it has none.

    Raises:
        CostlyFile: It would take long to read.
    """
    if exif := image.info.get("exif"):
        check_exif(exif)
    return image.getexif()


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = read_exif(image).get(Base.Orientation)
    except Exception:  # metadata that no reader understands do not make the pixels unreadable
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _leave_rows(image: JpegImageFile, data: bytes, preprocess: "Preprocess") -> None:
    """Let an opened JPEG decode no more rows than those from its first one to the end of the windows.

    The decoder is told that the image ends three rows of blocks below them: it interpolates colours from the first and,
    where a progressive file lacks scans, smooths blocks by two more.
    """
    # A resize reads some way beyond its box, and a file that is cut off is to be refused.
    if preprocess.mode != "center_crop" or not data.endswith(JPEG_END):
        return
    _, top, _, height = preprocess.box(*image.size)  # turned on its side too: windows take both sides alike
    last = max(top + height, image.height - top)  # also where a turn puts the last row first
    block = 8 * max(vertical for _, _, vertical, _ in image.layer)
    rows = block * (-(-last // block) + 3)
    if rows < image.height:
        image.fp = with_height(data, rows)
        image.tile = [image.tile[0]._replace(extents=(0, 0, image.width, rows))]


def _rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB without Pillow's silent losses: `convert` clips deep grey at 255 and forgets transparency.

    A strip at a time, as every step between makes another copy.
    """
    white = _white(image) if image.mode.startswith("I") or image.mode == "F" else None
    if white is None and not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size, "white")
    for top, strip in _strips(image):
        layer = strip.convert("RGBA") if white is None else _eight_bit(strip, white)
        rgb.paste(layer, (0, top), layer if white is None else None)
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Rows of an image that have about a million pixels, with the place of the first."""
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _white(image: Image.Image) -> float:
    """The value of deep grey that becomes 255.

    That of sixteen bits is 65535. Wider integers and floats name no range: it is taken as 0..1, 0..255, 0..65535 or
    0..largest value, the first that holds them all.
    """
    grey = (np.asarray(strip) for _, strip in _strips(image))
    first = next(grey)
    if first.dtype.itemsize == 2:
        return 65535.0
    largest = max(float(_numbers(values).max(initial=0.0)) for values in chain([first], grey))
    ranges = (1.0, 255.0, 65535.0) if first.dtype.kind == "f" else (255.0, 65535.0)
    return next((r for r in ranges if largest <= r), largest)


def _numbers(grey: np.ndarray) -> np.ndarray:
    return np.nan_to_num(grey.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _eight_bit(image: Image.Image, white: float) -> Image.Image:
    """Deep grey to eight bits, where `white` becomes 255."""
    grey = np.asarray(image)
    if grey.dtype.itemsize == 2:
        values = (grey.astype(np.uint32) + 128) // 257
    else:
        values = np.rint(_numbers(grey).clip(0) * (255.0 / white))
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


@cache
def _ijg_tables() -> np.ndarray:
    """The luminance tables of qualities 1 to 100, shape (100, 64), by libjpeg's `jpeg_quality_scaling`."""
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return ((np.array(_LUMINANCE) * scale[:, None] + 50) // 100).clip(1, 255)  # (100, 64)


def _jpeg_quality(tables: dict[int, list[int]] | None) -> int | None:
    table = np.array((tables or {}).get(0, ()))
    if table.shape != (64,):
        return None
    return int(np.abs(_ijg_tables() - table).sum(1).argmin()) + 1


def thumbnail(image: Image.Image, size: int = 256) -> bytes:
    """A JPEG whose longest side is at most `size` pixels; smaller images keep their size."""
    scale = min(1.0, size / max(image.size))
    side = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # A gap of 2 is 46 dB from the exact resize, where the encoder itself leaves 33 dB at most; 3 takes twice as long.
    small = image if side == image.size else image.resize(side, Image.Resampling.BICUBIC, reducing_gap=2.0)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=75)  # WebP saves a sixth of the bytes and takes twelve times as long
    return out.getvalue()


_SHORTEST = np.float32(1e-12)
"""Length of an embedding below which it has no direction."""

PIXEL_MEMORY, PROGRAM_MEMORY = 20, 2**28
"""Bytes that decoding takes at most for each pixel (16 for a WebP with alpha), and those of programs and windows."""

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels of the upright image."""


def _offset(length: int, side: int, share: float = 0.5) -> int:
    """Where a window of `side` pixels begins that leaves this share of the room before it.

    One that is longer than the image is centred, and begins before it.
    """
    return round((length - side) * share) if length >= side else -((side - length) // 2)


def _spread(count: int) -> list[tuple[float, float]]:
    """The shares of the room, to the left and above, that so many windows leave: each is followed by its opposite.

    The centre is first, the corners follow, then what grids of 3, 5, 9 and so on a side add.
    """
    shares = {(0.5, 0.5): None}  # a dict keeps the order
    steps = 1
    while len(shares) < count:
        for row, column in product(range(steps + 1), repeat=2):
            x, y = column / steps, row / steps
            shares |= {(x, y): None, (1 - x, 1 - y): None}
        steps *= 2
    return list(shares)[:count]


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How an RGB image becomes the backbone's input. Saved next to the weights.

    `resize_crop` brings the shorter side to round(image_size * 248 / 224) bicubic and takes the centre. `center_crop`
    takes the centre as it is, with black around smaller images. Both round as torchvision does.

    With `windows` above 1 an image is judged by so many windows at native resolution, spread over it: the centre, the
    corners, then ever finer grids. Those that coincide count once, so that an image no larger than a window has one.
    """

    mode: Literal["center_crop", "resize_crop"] = "resize_crop"
    image_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    windows: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("center_crop", "resize_crop"):
            raise ValueError(f"preprocessing mode is {self.mode!r}; expected center_crop or resize_crop")
        if not 1 <= self.image_size <= 4096:
            raise ValueError(f"image_size is {self.image_size}; expected 1 to 4,096 pixels")
        if not 1 <= self.windows <= (1024 if self.mode == "center_crop" else 1):
            raise ValueError(f"windows is {self.windows} with {self.mode}; expected 1, or to 1,024 with center_crop")
        for name in ("mean", "std"):  # JSON gives lists
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
                raise ValueError(f"preprocessing {name} is {values}; expected three finite numbers, std above 0")
            object.__setattr__(self, name, values)

    def _sources(self, width: int, height: int) -> list[tuple[float, float, float, float]]:
        """Left, top, right and bottom of the squares to take, in pixels of the image; may lie outside of it."""
        s = self.image_size
        if self.mode == "center_crop":
            corners = ((_offset(width, s, x), _offset(height, s, y)) for x, y in _spread(self.windows))
            return [(left, top, left + s, top + s) for left, top in dict.fromkeys(corners)]
        shorter, side = min(width, height), round(s * 248 / 224)
        wide, high = side * width // shorter, side * height // shorter  # the size after the resize
        left, top = _offset(wide, s), _offset(high, s)
        x, y = width / wide, height / high
        return [(left * x, top * y, min((left + s) * x, width), min((top + s) * y, height))]

    def boxes(self, width: int, height: int) -> list[Box]:
        """The windows of an image of this size, the centre's first, each at least one pixel wide and high."""
        boxes = []
        for left, top, right, bottom in self._sources(width, height):
            x, y = min(max(0, round(left)), width - 1), min(max(0, round(top)), height - 1)
            boxes.append((x, y, max(1, min(round(right), width) - x), max(1, min(round(bottom), height) - y)))
        return boxes

    def box(self, width: int, height: int) -> Box:
        """The box that encloses all windows of an image of this size."""
        boxes = self.boxes(width, height)
        left, top = min(x for x, *_ in boxes), min(y for _, y, *_ in boxes)
        return left, top, max(x + w for x, _, w, _ in boxes) - left, max(y + h for _, y, _, h in boxes) - top

    def crops(self, image: Image.Image) -> list[Image.Image]:
        """The windows of an image, the centre's first, as images of `image_size` by `image_size` pixels.

        The resize reads only what the crop needs: a picture one pixel high would otherwise swell to gigabytes.
        """
        if image.mode != "RGB":
            raise ValueError(f"image mode is {image.mode}; expected RGB, as decode_image gives it")
        if self.mode == "center_crop":
            return [image.crop((int(a), int(b), int(c), int(d))) for a, b, c, d in self._sources(*image.size)]
        [source], side = self._sources(*image.size), (self.image_size, self.image_size)
        return [image.resize(side, Image.Resampling.BICUBIC, box=source)]

    def crop(self, image: Image.Image) -> Image.Image:
        """The first of `crops`, which trains the embedding."""
        return replace(self, windows=1).crops(image)[0]

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pixels of all windows of the images, one after another, shape (n, 3, s, s), uint8.

        They are a quarter of what `normalised` makes of them, and so go from process to process as they are.
        """
        s, crops = self.image_size, [crop for image in images for crop in self.crops(image)]
        pixels = np.empty((len(crops), 3, s, s), np.uint8)
        for row, crop in zip(pixels, crops, strict=True):
            row[:] = np.asarray(crop).transpose(2, 0, 1)  # (3, s, s)
        return pixels

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """What the backbone reads, of the same shape (n, 3, s, s), float32.

        Raises:
            ValueError: The pixels are not uint8; those that are normalised already are the backbone's alone.
        """
        if pixels.dtype != np.uint8:
            raise ValueError(f"pixels are {pixels.dtype}; expected uint8, as a call of Preprocess gives them")
        std = np.array(self.std, np.float32)[:, None, None]  # (3, 1, 1)
        scale, shift = np.float32(1 / 255) / std, np.array(self.mean, np.float32)[:, None, None] / std
        values = np.empty(pixels.shape, np.float32)
        for row, window in zip(values, pixels, strict=True):  # one by one they stay in a core's cache
            row[:] = window
            row *= scale
            row -= shift
        return values

    def joined(self, embeddings: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """One embedding for each image from those of its windows: the one place where windows become an image.

        Its direction is that of the mean of the windows' unit vectors: images are compared by the cosine, and so each
        window has the same say. Its length is the mean of the windows' lengths: heads read raw embeddings, and know
        those of an image, of one of its regions and of an image of a single window as vectors of one kind. The
        embedding of a single window stays as the backbone made it.

        Args:
            embeddings: Of all windows, one after another, shape (m, d), float32.
            counts: Windows of each image, n numbers above 0 that add up to m.

        Returns:
            Shape (n, d), float32.
        """
        if self.windows == 1:
            return embeddings
        images = np.split(embeddings, np.cumsum(counts)[:-1])
        return np.stack([windows[0] if len(windows) == 1 else _mean(windows) for windows in images])  # (n, d)


def _mean(windows: np.ndarray) -> np.ndarray:
    """The mean direction of embeddings (w, d) with the mean of their lengths, shape (d,)."""
    lengths = np.linalg.norm(windows, axis=1, keepdims=True)  # (w, 1)
    direction = (windows / np.maximum(lengths, _SHORTEST)).mean(0)  # (d,)
    return np.asarray(direction * (lengths.mean() / max(np.linalg.norm(direction), _SHORTEST)))
