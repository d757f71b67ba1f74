"""Embeddings of a data set with what its images are: the input of head fitting, calibration and evaluation."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from trainer.data.entry import Entry
from trainer.evaluation.transforms import Transform
from trainer.files import write_atomically
from trainer.heads.calibration_set import CalibrationSet
from trainer.images import FileFacts, Preprocess, UnreadableImage, decode_image
from trainer.model.embedder import Embedder

BATCH = 32
"""Images per forward pass; twice as many are prepared ahead."""
THREADS = 4
"""That decode and transform."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class EmbeddedSet:
    """n images of a data set under one transform, row by row."""

    embeddings: np.ndarray
    """Raw, shape (n, d), float32."""
    labels: np.ndarray
    """0 real, 1 fake, shape (n,), uint8."""
    generators: list[str]
    """Empty for a real image."""
    sources: list[str]
    groups: list[str]
    splits: list[str]
    """Empty where the data set has none."""
    facts: list[FileFacts] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> EmbeddedSet:
        """Some rows, by mask or number, shape (n,) or (m,)."""
        numbers = np.flatnonzero(rows) if rows.dtype == bool else rows
        return EmbeddedSet(
            embeddings=self.embeddings[numbers],
            labels=self.labels[numbers],
            generators=[self.generators[i] for i in numbers],
            sources=[self.sources[i] for i in numbers],
            groups=[self.groups[i] for i in numbers],
            splits=[self.splits[i] for i in numbers],
            facts=[self.facts[i] for i in numbers],
        )

    @classmethod
    def joined(cls, parts: Sequence[EmbeddedSet]) -> EmbeddedSet:
        """Several sets in one, in order."""
        return cls(
            embeddings=np.concatenate([part.embeddings for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            generators=[name for part in parts for name in part.generators],
            sources=[name for part in parts for name in part.sources],
            groups=[name for part in parts for name in part.groups],
            splits=[name for part in parts for name in part.splits],
            facts=[facts for part in parts for facts in part.facts],
        )

    def calibration_set(self) -> CalibrationSet:
        """The same images as a checkpoint stores them."""
        hashes = [facts.sha256 for facts in self.facts]
        return CalibrationSet(self.embeddings, self.labels, self.generators, self.sources, hashes, self.groups)

    def save(self, path: Path, origin: str) -> None:
        """Write to a safetensors file, atomically.

        Args:
            path: The file.
            origin: What the embeddings depend on (checkpoint, data, settings), compared by `load`.
        """
        from safetensors.numpy import save

        texts = {key: getattr(self, key) for key in ("generators", "sources", "groups", "splits")}
        texts["facts"] = [asdict(facts) for facts in self.facts]
        arrays: dict[str, np.ndarray] = {"embeddings": self.embeddings, "labels": self.labels}
        write_atomically(path, save(arrays, {"origin": origin, "texts": json.dumps(texts)}))

    @classmethod
    def load(cls, path: Path, origin: str) -> EmbeddedSet | None:
        """Read `save` back; None when there is no such file, it is broken, or its origin is another."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                if file.metadata()["origin"] != origin:
                    return None
                arrays = {key: file.get_tensor(key) for key in ("embeddings", "labels")}
                texts = json.loads(file.metadata()["texts"])
            texts["facts"] = [FileFacts(**facts) for facts in texts["facts"]]
            return cls(**arrays, **texts)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class Rejected:
    """An image that could not be read."""

    file: str
    reason: str


def embed_entries(
    embedder: Embedder,
    work: Iterable[tuple[Entry, Sequence[Transform]]],
    *,
    seed: int,
    on_image: Callable[[], None] = lambda: None,
) -> tuple[dict[str, EmbeddedSet], list[Rejected]]:
    """Embed entries under transforms, reading and decoding each once.

    Args:
        embedder: Makes the embeddings.
        work: Entries, each with its transforms; read as a stream.
        seed: Of the transforms.
        on_image: Called after each image, read or not, for a progress bar.

    Returns:
        One set for each transform by name (rows in the order of the entries), and what could not be read.
    """
    sets: dict[str, _Growing] = defaultdict(lambda: _Growing(embedder))
    rejected = []

    def prepare(item: tuple[Entry, Sequence[Transform]]) -> tuple[FileFacts | str, dict[str, np.ndarray]]:
        entry, transforms = item
        try:
            image, facts = decode_image(entry.read())
        except (UnreadableImage, OSError) as error:
            return str(error), {}
        return facts, {t.name: _pixels(embedder.preprocess, t, t(image, seed, facts.sha256)) for t in transforms}

    with ThreadPoolExecutor(THREADS) as pool:
        for (entry, _), (facts, pixels) in _in_order(pool, prepare, work):
            on_image()
            if isinstance(facts, str):
                rejected.append(Rejected(entry.uri, facts))
            else:
                for name, values in pixels.items():
                    sets[name].add(entry, facts, values)
    return {name: growing.finish() for name, growing in sets.items()}, rejected


def _pixels(preprocess: Preprocess, transform: Transform, image: Image.Image) -> np.ndarray:
    """What the backbone reads, shape (3, s, s), float32."""
    if transform.finished:
        preprocess = replace(preprocess, mode="center_crop")  # leaves an image of size s as it is
    pixels: np.ndarray = preprocess([image])[0]
    return pixels


class _Growing:
    """An `EmbeddedSet` in the making: embeds a batch whenever there is one."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.rows: list[tuple[Entry, FileFacts]] = []
        self.waiting: list[np.ndarray] = []
        self.embeddings: list[np.ndarray] = []

    def add(self, entry: Entry, facts: FileFacts, pixels: np.ndarray) -> None:
        self.rows.append((entry, facts))
        self.waiting.append(pixels)
        if len(self.waiting) == BATCH:
            self.embed()

    def embed(self) -> None:
        if self.waiting:
            self.embeddings.append(self.embedder.embed_pixels(np.stack(self.waiting), BATCH))
            self.waiting.clear()

    def finish(self) -> EmbeddedSet:
        self.embed()
        return EmbeddedSet(
            embeddings=np.concatenate(self.embeddings),
            labels=np.array([entry.label for entry, _ in self.rows], np.uint8),
            generators=[entry.generator or "" for entry, _ in self.rows],
            sources=[entry.source for entry, _ in self.rows],
            groups=[entry.group for entry, _ in self.rows],
            splits=[entry.split or "" for entry, _ in self.rows],
            facts=[facts for _, facts in self.rows],
        )


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """(item, result) in the order of the items, computed at most two batches ahead."""
    ahead: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        ahead.append((item, pool.submit(function, item)))
        if len(ahead) >= 2 * BATCH:
            first, future = ahead.popleft()
            yield first, future.result()
    for first, future in ahead:
        yield first, future.result()
