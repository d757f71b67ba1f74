"""Readers of every data layout: one stream of entries with label, generator, group and bytes on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["training", "calibration", "validation"]
FIT_FORBIDDEN_SPLITS = ("test", "unseen")
D3_GENERATORS = ("DF-IF", "SD-1.4", "SD-2.1", "SD-XL")


class DatasetError(ValueError):
    """The path holds no data set that can be read; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a data set; `read()` gives its bytes or raises `UnreadableImage`."""

    key: str
    group: str
    label: int
    generator: str | None
    source: str
    uri: str
    split: str | None
    size: int | None
    mtime: float | None
    attributes: dict[str, str]
    read: Callable[[], bytes]


def read_dataset(
    path: Path,
    *,
    split: str | None = None,
    label: str | None = None,
    generator: str | None = None,
    source: str | None = None,
    generators: Sequence[str] = D3_GENERATORS,
) -> Iterator[Entry]:
    """Every image of `path`, whatever its layout (design section 4); `split` may be a comma list."""
    raise NotImplementedError


def read_uri(uri: str) -> bytes:
    """The bytes an entry's `uri` names."""
    raise NotImplementedError


def role(group: str) -> Role:
    """What the images of a group serve, fixed by its hash: 10 % validation, 10 % calibration, the rest training."""
    raise NotImplementedError
