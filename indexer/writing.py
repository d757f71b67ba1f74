"""Adding and removing references: one short transaction each, revisions in the order of their commits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from indexer.rows import Rows


class BadVector(ValueError):
    """An embedding that may not be stored: wrong length, not finite, or zero."""


@dataclass(frozen=True, slots=True)
class NewReference:
    """An image with its embedding, ready to be stored.

    Attributes:
        sha256: Of the file's bytes, hexadecimal.
        label: 0 real, 1 fake.
        generator: Name, None for real images (and for fakes of which it is not known); created if new.
        source: The data set or feed it came from.
        group: Images that must not be split apart share it.
        uri: Where the bytes can be read again; None for uploads.
        file_bytes: Size of the file.
        mtime: Modification time of the file in seconds, for skipping it next time.
        width: Of the upright image, pixels.
        height: Of the upright image, pixels.
        format: As Pillow names it.
        jpeg_quality: Estimate 1..100, None for other formats.
        thumbnail: WebP.
        attributes: Anything else that is known.
        vector: Raw embedding, shape (d,), float32.
        data: The file itself, to be kept (uploads).
        fingerprint: 64-bit difference hash of the pixels as a signed integer; near duplicates differ in few bits.
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
    thumbnail: bytes
    attributes: dict[str, str]
    vector: np.ndarray
    data: bytes | None = None
    fingerprint: int | None = None


@dataclass(frozen=True, slots=True)
class Conflict:
    """The same bytes are stored with another label or generator; `position` counts from 0 in the batch."""

    position: int
    sha256: str
    id: int
    has: str
    wants: str


@dataclass(frozen=True, slots=True)
class Added:
    """What one `add` did.

    Attributes:
        ids: Row of each item of the batch, None where its hash is blocked; of a conflict the row that stands.
        added: Rows that are new.
        known: Rows that were there, embedded by this checkpoint already.
        embedded: Rows that were there, but not embedded by this checkpoint until now.
        conflicts: Same bytes, other label or generator; nothing was changed.
        blocked: Hashes that were removed for good.
        revision: Of the checkpoint's index after this.
    """

    ids: list[int | None]
    added: int
    known: int
    embedded: int
    conflicts: list[Conflict]
    blocked: list[str]
    revision: int


@dataclass(frozen=True, slots=True)
class Removed:
    """What one `remove` did: rows gone (thumbnails and vectors with them), and the revision each index has now."""

    references: int = 0
    revisions: dict[str, int] = field(default_factory=dict)


class Writing(Rows):
    """The only code that changes references, embeddings and removals."""

    def add(self, batch: Sequence[NewReference], checkpoint_id: str, enrolment: int | None = None) -> Added:
        """Store images with their embeddings; the same bytes twice change nothing.

        Raises:
            BadVector: A vector is not finite, zero, or not of the checkpoint's dimension.
            BadGeneratorName: A new generator's name breaks the rule.
            UnknownCheckpoint: The checkpoint was never registered.
            ValueError: More than 1,000 images.
        """
        raise NotImplementedError

    def remove(
        self,
        *,
        ids: Iterable[int] | None = None,
        generator: str | None = None,
        source: str | None = None,
        enrolment: int | None = None,
        forget: bool = False,
    ) -> Removed:
        """Remove references by exactly one criterion, 1,000 per transaction.

        Args:
            ids: These rows; unknown ones are passed over.
            generator: All of this generator.
            source: All from this source.
            enrolment: All that this enrolment added.
            forget: Also block their hashes from being added again.

        Raises:
            UnknownGenerator: No generator has this name.
            ValueError: No criterion, or more than one.
        """
        raise NotImplementedError

    def delete_generator(self, name: str, *, forget: bool = False) -> Removed:
        """Remove a generator's references, then the generator itself.

        Raises:
            UnknownGenerator: No generator has this name.
        """
        raise NotImplementedError
