"""What is kept of a reference image.

A column of `reference_image` is declared three times: in a migration, in `indexer.database.tables.ReferenceRow` and in
`ImageFacts`. What copies, reads and exports references follows from these; `indexer.ingest.ingest` gives the value.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import unquote, urlsplit

import numpy as np

LABEL_NAMES = ("real", "fake")
PUBLIC = ("https://", "hf://")
"""What the uri of an image that anybody can read begins with."""
NEAR_BITS = 4
"""Images whose 64-bit difference hashes differ in at most this many bits are near duplicates."""


def kind(label: int, generator: str | None) -> str:
    """A label in words, with the generator where there is one."""
    return LABEL_NAMES[label] if generator is None else f"{LABEL_NAMES[label]} ({generator})"


def in_places(uri: str | None, places: Sequence[str]) -> bool:
    """Whether a uri lies in one of these places, each the beginning of a uri that ends with a slash."""
    try:
        parts = urlsplit(uri or "")
    except ValueError:
        return False
    path = unquote(parts.path, errors="surrogateescape")  # as `read_uri` has it
    address = f"{parts.scheme}://{parts.netloc}{path}"
    return ".." not in path.split("/") and address.startswith(tuple(map(unquote, places)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What is kept of an image beside its pixels.

    Attributes:
        sha256: Of the file's bytes, hexadecimal.
        label: 0 real, 1 fake.
        generator: Name, None for real images (and for fakes of which it is not known).
        source: The data set or feed it came from.
        group: Images that must not be split apart share it.
        uri: Where the bytes can be read again, by anybody where it is `PUBLIC`; None for uploads.
        file_bytes: Size of the file.
        mtime: Modification time of the file in seconds, for skipping it next time.
        width: Of the upright image, pixels.
        height: Of the upright image, pixels.
        format: As Pillow names it.
        jpeg_quality: Estimate 1..100, None for other formats.
        fingerprint: 64-bit difference hash of the pixels as a signed integer; near duplicates differ in few bits.
        attributes: Anything else that is known; with `window` (x,y,width,height in pixels as stored, not turned) the
            image is that part of what lies at `uri`.
    """

    sha256: str
    label: int
    generator: str | None
    source: str
    group: str
    uri: str | None
    file_bytes: int
    mtime: float | None
    width: int
    height: int
    format: str
    jpeg_quality: int | None
    fingerprint: int | None = None
    attributes: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference(ImageFacts):
    """A known image, without its thumbnail; `pictured` says whether there is one."""

    id: int
    pictured: bool
    enrolment_id: int | None
    added_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class NewReference(ImageFacts):
    """An image with its embedding, ready to be stored; a generator that is new is created.

    Attributes:
        thumbnail: JPEG; None where only the public uri has the picture.
        vector: Raw embedding, shape (d,), float32; empty until there is one.
        data: The file itself, to be kept (uploads).
    """

    thumbnail: bytes | None
    vector: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    data: bytes | None = None
