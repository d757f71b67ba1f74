"""The calibration images of a checkpoint: raw embeddings and what they are, so that any index can calibrate on them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from shlex import quote
from typing import Self

import numpy as np

from trainer.model.checkpoint import CheckpointError, check_file, write_file

CALIBRATION_FILE = "calibration.safetensors"
CALIBRATION_IMAGES = 10_000
"""The most images a set holds."""
TEXTS = ("generators", "sources", "sha256", "groups")
"""Columns of text."""


def refit_command(folder: Path) -> str:
    """The command that fits heads and calibration of a checkpoint anew, as it can be copied into a shell."""
    return f"lineup train heads --checkpoint {quote(str(folder))} --data IMAGES"


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """n images that trained neither backbone nor heads (role "calibration")."""

    embeddings: np.ndarray
    """Raw, shape (n, d), float32."""
    labels: np.ndarray
    """0 real, 1 fake, shape (n,)."""
    generators: list[str]
    """Empty for a real image."""
    sources: list[str]
    sha256: list[str]
    groups: list[str]
    trained: list[str] = field(default_factory=list)
    """Generators whose images trained the checkpoint, whether or not any is here."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def origins(self) -> list[str]:
        """The source of each real image and the generator of each fake."""
        columns = zip(self.labels, self.generators, self.sources, strict=True)
        return [generator if label else source for label, generator, source in columns]

    @property
    def digest(self) -> str:
        """Hash of embeddings, labels, hashes and groups, 32 hex characters."""
        digest = blake2b(json.dumps([self.sha256, self.groups]).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.embeddings, np.float32).tobytes())
        digest.update(np.ascontiguousarray(self.labels, np.uint8).tobytes())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> Self:
        """Those images, in that order."""
        texts = {name: [getattr(self, name)[row] for row in rows] for name in TEXTS}
        places = np.asarray(rows, np.int64)
        return replace(self, embeddings=self.embeddings[places], labels=self.labels[places], **texts)

    def joined(self, other: Self) -> Self:
        """These images, then those."""
        texts = {name: getattr(self, name) + getattr(other, name) for name in TEXTS}
        return replace(
            self,
            embeddings=np.concatenate([self.embeddings, other.embeddings]),  # (n + m, d)
            labels=np.concatenate([self.labels, other.labels]),  # (n + m,)
            **texts,
        )

    def save(self, folder: Path) -> None:
        """Write `calibration.safetensors` into a checkpoint folder, atomically.

        Raises:
            CheckpointError: The folder holds no checkpoint.
        """
        from safetensors.numpy import save

        texts = {key: getattr(self, key) for key in (*TEXTS, "trained")}
        arrays: dict[str, np.ndarray] = {
            "embeddings": np.ascontiguousarray(self.embeddings, np.float32),
            "labels": np.ascontiguousarray(self.labels, np.uint8),
        }
        write_file(folder, CALIBRATION_FILE, save(arrays, {"texts": json.dumps(texts)}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `calibration.safetensors` of a checkpoint folder.

        Raises:
            CheckpointError: It is missing, damaged or broken.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / CALIBRATION_FILE
        check_file(folder, CALIBRATION_FILE, f"run `{refit_command(folder)}`")
        try:
            with safe_open(path, "numpy") as file:
                arrays = {key: file.get_tensor(key) for key in ("embeddings", "labels")}
                texts = json.loads(file.metadata()["texts"])
            images = cls(**arrays, **texts)
            if {len(images.embeddings)} != {len(getattr(images, name)) for name in ("labels", *TEXTS)}:
                raise ValueError("its columns differ in length")
            if images.embeddings.ndim != 2 or not np.isfinite(images.embeddings).all():
                raise ValueError("its embeddings are no rows of finite numbers")
            if not np.isin(images.labels, (0, 1)).all() or images.labels.ndim != 1:
                raise ValueError("its labels are not all 0 or 1")
            if not all(isinstance(text, str) for column in texts.values() for text in column):
                raise ValueError("a generator, source, hash or group is no text")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing: run `{refit_command(folder)}`") from error
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is broken ({error}): run `{refit_command(folder)}`") from error
        return images
