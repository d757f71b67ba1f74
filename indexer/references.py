"""Reading reference images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from indexer.rows import Rows

LABELS = ("real", "fake")


@dataclass(frozen=True, slots=True)
class Reference:
    """A known image, without its thumbnail. `label` is 0 for real and 1 for fake; `sha256` is hexadecimal."""

    id: int
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
    fingerprint: int | None
    attributes: dict[str, str]
    enrolment_id: int | None
    added_at: datetime


@dataclass(frozen=True, slots=True)
class Known:
    """What decides whether a file has to be read: its row, and whether this checkpoint has embedded it."""

    id: int
    sha256: str
    label: int
    generator: str | None
    embedded: bool


class References(Rows):
    """Look-ups by id, hash and filter."""

    def get(self, image_id: int) -> Reference | None:
        """One reference."""
        return self.get_many([image_id]).get(image_id)

    def get_many(self, image_ids: Iterable[int]) -> dict[int, Reference]:
        """References by id; unknown ids are left out."""
        raise NotImplementedError

    def find(self, sha256: str) -> Reference | None:
        """The reference with exactly these bytes (hexadecimal hash)."""
        raise NotImplementedError

    def list(
        self,
        *,
        label: int | None = None,
        generator: str | None = None,
        source: str | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> Sequence[Reference]:
        """References with ids above `after`, in order of id."""
        raise NotImplementedError

    def thumbnail(self, image_id: int) -> bytes | None:
        """WebP bytes, longest side at most 256."""
        raise NotImplementedError

    def file(self, image_id: int) -> bytes | None:
        """The bytes of an image that came over HTTP, where they were kept."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """How many references there are: {"real": n, "fake": n}."""
        raise NotImplementedError

    def sources(self) -> dict[str, int]:
        """How many references each source has."""
        raise NotImplementedError

    def known_files(self, uris: Sequence[str], checkpoint_id: str) -> dict[tuple[str, int | None, float | None], Known]:
        """Rows of these uris, by (uri, size in bytes, mtime)."""
        raise NotImplementedError

    def known_hashes(self, hashes: Sequence[str], checkpoint_id: str) -> dict[str, Known]:
        """Rows of these hashes (hexadecimal)."""
        raise NotImplementedError
