"""Which images a checkpoint saw, so that an evaluation leaves them out."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from trainer.model.checkpoint import CheckpointError, check_file, write_file

SEEN_FILE = "seen.safetensors"


@dataclass(frozen=True, slots=True)
class SeenImages:
    """Images that trained, calibrated or chose a checkpoint, as the first 64 bits of hashes: 8 bytes for each."""

    contents: np.ndarray
    """Hashes of their bytes, ascending, shape (n,), int64."""
    groups: np.ndarray
    """Hashes of their groups, ascending, shape (m,), int64; another data set may name its groups alike."""
    complete: bool = True
    """Whether those that trained the backbone are among them; not so for imported weights."""

    @classmethod
    def of(cls, sha256: Iterable[str], groups: Iterable[str], *, complete: bool = True) -> Self:
        """The record of images by hashes of their bytes, in hex, and by their groups."""
        contents = np.array([_first_bits(bytes.fromhex(text)) for text in sha256], np.int64)
        names = np.array([_group_bits(group) for group in groups], np.int64)
        return cls(np.unique(contents), np.unique(names), complete)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Several records in one; complete where one of them is."""
        contents = np.unique(np.concatenate([part.contents for part in parts]))
        groups = np.unique(np.concatenate([part.groups for part in parts]))
        return cls(contents, groups, any(part.complete for part in parts))

    def holds(self, sha256: str) -> bool:
        """Whether the checkpoint saw the image of these bytes, by their hash in hex."""
        return _has(self.contents, _first_bits(bytes.fromhex(sha256)))

    def names(self, group: str) -> bool:
        """Whether the checkpoint saw images of a group of this name, if only in another data set."""
        return _has(self.groups, _group_bits(group))

    @property
    def digest(self) -> str:
        """Hash of the record, 32 hex characters."""
        digest = hashlib.blake2b(self.contents.tobytes(), digest_size=16)
        digest.update(self.groups.tobytes() + bytes([self.complete]))
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write `seen.safetensors` into a checkpoint folder, atomically.

        Raises:
            CheckpointError: The folder holds no checkpoint.
        """
        from safetensors.numpy import save

        arrays = {"contents": self.contents, "groups": self.groups}
        write_file(folder, SEEN_FILE, save(arrays, {"complete": json.dumps(self.complete)}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `seen.safetensors` of a checkpoint folder; of one without it, nothing is known.

        Raises:
            CheckpointError: It is damaged or broken.
        """
        from safetensors import SafetensorError, safe_open

        path, remedy = folder / SEEN_FILE, "restore it, or delete it to evaluate without leaving images out"
        check_file(folder, SEEN_FILE, remedy)
        try:
            with safe_open(path, "numpy") as file:
                complete = bool(json.loads(file.metadata()["complete"]))
                return cls(file.get_tensor("contents"), file.get_tensor("groups"), complete)
        except FileNotFoundError:
            return cls.of([], [], complete=False)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is broken ({error}): {remedy}") from error


@dataclass(slots=True)
class LeftOut:
    """What an evaluation leaves out because the checkpoint saw it."""

    images: int = 0
    complete: bool = True
    """Whether the checkpoint's record tells all that it saw."""

    def __str__(self) -> str:
        """One sentence without its stop; empty where there is nothing to say."""
        count = f"{self.images} images left out: they or their groups trained, calibrated or chose the checkpoint"
        unknown = "the checkpoint keeps no record of what trained its embedding, so such images may be among these"
        return "; ".join([*([count] if self.images else []), *([] if self.complete else [unknown])])


def _first_bits(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


def _group_bits(group: str) -> int:
    return _first_bits(hashlib.blake2b(group.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def _has(ascending: np.ndarray, value: int) -> bool:
    place = int(np.searchsorted(ascending, value))
    return place < len(ascending) and int(ascending[place]) == value
