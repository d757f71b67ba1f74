"""Uploads: checked against the limits, decoded, and turned into what the model reads."""

import time
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from api.inflight import deadline_in_use
from api.judge.provenance import read_provenance
from api.judge.regions import judged_boxes, region_pixels, variant_windows, windows_and_shortfall
from api.schemas.problems import ApiError, Kind
from api.schemas.verdicts import Explanation, ImageFacts, Provenance
from api.service_settings import ServiceSettings
from trainer.images import (
    Box,
    FileFacts,
    ImageTooLarge,
    Preprocess,
    UnreadableImage,
    UnsupportedFormat,
    decode_opened,
    decoding_memory,
    open_image,
    thumbnail,
)
from trainer.process_pool import DeadlinePassed, LimitExceeded, decoding_pool


@dataclass(frozen=True, slots=True)
class Upload:
    """A file as it came.

    Attributes:
        file: Its name.
        data: Its bytes; of one that is too large perhaps only the first.
        size: Bytes in all, where `data` may be fewer.
    """

    file: str
    data: bytes
    size: int | None = None

    def excess(self, settings: ServiceSettings) -> str | None:
        """What is wrong with its size; None where it is allowed."""
        size, most = self.size or len(self.data), settings.max_upload_bytes
        return f"has {size:,} bytes; LINEUP_MAX_UPLOAD_BYTES allows {most:,}" if size > most else None


@dataclass(frozen=True, slots=True)
class Question:
    """What a request wants to know; None means the setting."""

    k: int | None = None
    max_false_alarm: float | None = None
    explain: frozenset[Explanation] = frozenset()
    record: bool = True


@dataclass(frozen=True, slots=True)
class Prepared:
    """A decoded upload: what is needed of it from here on, without its pixels at full size."""

    file: str
    file_bytes: int
    image: ImageFacts
    views: list[np.ndarray] = field(default_factory=list)
    """What is embedded: the windows of the image, of its regions and of its variants, each (w, 3, s, s), uint8."""
    boxes: list[Box] = field(default_factory=list)
    """Of the regions."""
    variants: tuple[str, ...] | None = None
    """Those that hold enough to be judged; None where stability is not in question."""
    provenance: Provenance = field(default_factory=Provenance)
    thumbnail: bytes | None = None
    """A JPEG, where the setting lets it be kept."""
    decode_ms: float = 0.0


def file_name(name: str | None) -> str:
    """What a caller called a file, fit for answers, logs and tables."""
    return "".join(c if c.isprintable() else "?" for c in (name or "")[:255]) or "unnamed"


def decode(
    upload: Upload, max_pixels: int, windows_of: Preprocess | None = None
) -> tuple[Image.Image, FileFacts, Provenance]:
    """The upright RGB image of an upload, and what its file says, which is opened and decoded once for both.

    Args:
        upload: The file.
        max_pixels: As `decode_image` has it.
        windows_of: As `decode_image` has it.

    Raises:
        ApiError: too-large, not-an-image or unreadable.
    """
    try:
        opened, format = open_image(upload.data, max_pixels=max_pixels)
        image, facts = decode_opened(opened, format, upload.data, windows_of=windows_of)
    except UnreadableImage as error:
        kinds: dict[type[UnreadableImage], Kind] = {ImageTooLarge: "too-large", UnsupportedFormat: "not-an-image"}
        raise ApiError(kinds.get(type(error), "unreadable"), f"{upload.file}: {error}") from error
    return image, facts, read_provenance(opened, format, upload.data)


def shown_windows(preprocess: Preprocess, width: int, height: int) -> list[Box] | None:
    """The windows of an image of this size where it has more than one, for a verdict to name."""
    boxes = preprocess.boxes(width, height)
    return boxes if len(boxes) > 1 else None


def prepare(upload: Upload, question: Question, preprocess: Preprocess, settings: ServiceSettings) -> Prepared:
    """Check, decode and preprocess one upload, with the views that the question's explanations need.

    This is done in a process of its own, which ends with the time of the request.

    Raises:
        ApiError: too-large, not-an-image, unreadable, or not-ready where the request has no time left.
    """
    if excess := upload.excess(settings):
        raise ApiError("too-large", f"{upload.file} {excess}")
    try:
        return decoding_pool().call(
            prepare_here,
            *(upload, question, preprocess, settings.max_pixels, settings.keep_thumbnails),
            seconds=settings.image_seconds,
            memory=decoding_memory(settings.max_pixels),
            deadline=deadline_in_use(),
        )
    except LimitExceeded as error:
        raise ApiError("unreadable", f"{upload.file}: {error}") from error
    except DeadlinePassed as error:
        raise ApiError("not-ready", f"{upload.file}: {error}; try again", retry_after=5) from error


def prepare_here(
    upload: Upload, question: Question, preprocess: Preprocess, max_pixels: int, keep_thumbnail: bool = False
) -> Prepared:
    """As `prepare`, but in this process.

    Of an image with too little to judge no variants are made: there is no score that could hold or change.

    Raises:
        ApiError: too-large, not-an-image or unreadable.
    """
    start = time.perf_counter()
    keep_thumbnail &= question.record
    in_whole = keep_thumbnail or bool(question.explain)
    image, facts, provenance = decode(upload, max_pixels, None if in_whole else preprocess)
    windows, shortage = windows_and_shortfall(image, preprocess)
    boxes = judged_boxes(image, preprocess) if "regions" in question.explain else []
    variants = variant_windows(image, preprocess) if "stability" in question.explain and not shortage else None
    views = [windows, *region_pixels(image, boxes, preprocess)[:, None]]  # (w, 3, s, s), (1, 3, s, s) ...
    if variants:
        views += variants.values()
    return Prepared(
        file=upload.file,
        file_bytes=len(upload.data),
        image=ImageFacts(
            sha256=facts.sha256,
            width=facts.width,
            height=facts.height,
            format=facts.format,
            crop=preprocess.box(facts.width, facts.height),
            windows=shown_windows(preprocess, facts.width, facts.height),
            shortfall=shortage,
        ),
        views=views,
        boxes=boxes,
        variants=None if variants is None else tuple(variants),
        provenance=provenance,
        thumbnail=thumbnail(image) if keep_thumbnail else None,
        decode_ms=1000 * (time.perf_counter() - start),
    )
