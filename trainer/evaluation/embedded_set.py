"""Embeddings of a data set with what its images are: the input of head fitting, calibration and evaluation."""

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from trainer.cores import usable_cores
from trainer.data.entry import Entry
from trainer.evaluation.transforms import Transform
from trainer.files import write_atomically
from trainer.heads.calibration_set import CalibrationSet
from trainer.images import FileFacts, Preprocess, UnreadableImage, decode_image
from trainer.model.embedder import Embedder

FORWARD_BATCH = 32
"""Images per forward pass; twice as many are prepared ahead."""
DECODING_THREADS = max(4, usable_cores())
"""Threads that decode and transform images."""
LISTS = ("generators", "sources", "groups", "splits", "facts")
"""Columns of an `EmbeddedSet` that are lists."""
Prepared = tuple[Entry, FileFacts | str, dict[str, np.ndarray]]
"""An entry, its facts or why it could not be read, and its windows (w, 3, s, s) by transform."""


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

    def take(self, rows: np.ndarray) -> Self:
        """Some rows, by mask or number, shape (n,) or (m,)."""
        numbers = np.flatnonzero(rows) if rows.dtype == bool else rows
        columns = {name: [getattr(self, name)[i] for i in numbers] for name in LISTS}
        return replace(self, embeddings=self.embeddings[numbers], labels=self.labels[numbers], **columns)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Several sets in one, in order."""
        columns = {name: [value for part in parts for value in getattr(part, name)] for name in LISTS}
        return cls(
            embeddings=np.concatenate([part.embeddings for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            **columns,
        )

    def calibration_set(self) -> CalibrationSet:
        """The same images as a checkpoint stores them."""
        return CalibrationSet(
            embeddings=self.embeddings,
            labels=self.labels,
            generators=self.generators,
            sources=self.sources,
            sha256=[facts.sha256 for facts in self.facts],
            groups=self.groups,
        )

    def save(self, path: Path, origin: str) -> None:
        """Write to a safetensors file, atomically.

        Args:
            path: The file.
            origin: What the embeddings depend on (checkpoint, data, settings), compared by `load`.
        """
        from safetensors.numpy import save

        texts = {name: getattr(self, name) for name in LISTS} | {"facts": [asdict(facts) for facts in self.facts]}
        arrays: dict[str, np.ndarray] = {"embeddings": self.embeddings, "labels": self.labels}
        write_atomically(path, save(arrays, {"origin": origin, "texts": json.dumps(texts)}))

    @classmethod
    def load(cls, path: Path, origin: str) -> Self | None:
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
    decode: Callable[[Entry], tuple[Image.Image, FileFacts]] = lambda entry: decode_image(entry.read()),
    leave_out: Callable[[FileFacts], bool] = lambda _: False,
    on_image: Callable[[], None] = lambda: None,
) -> tuple[dict[str, EmbeddedSet], list[Rejected]]:
    """Embed entries under transforms, reading and decoding each once.

    Args:
        embedder: Makes the embeddings.
        work: Entries, each with its transforms; read as a stream.
        seed: Of the transforms.
        decode: Gives the image of an entry.
        leave_out: Says of each image that was read whether to pass it over.
        on_image: Called after each image, read or not, for a progress bar.

    Returns:
        One set for each transform by name (rows in the order of the entries), and what could not be read.
    """
    rows: dict[str, list[tuple[Entry, FileFacts]]] = defaultdict(list)
    waiting: dict[str, list[np.ndarray]] = defaultdict(list)
    embeddings: dict[str, list[np.ndarray]] = defaultdict(list)
    rejected = []

    def prepare(entry: Entry, transforms: Sequence[Transform]) -> Prepared:
        try:
            image, facts = decode(entry)
        except (UnreadableImage, OSError) as error:
            return entry, str(error), {}
        return entry, facts, {t.name: _pixels(embedder.preprocess, t, t(image, seed, facts.sha256)) for t in transforms}

    def embed(name: str) -> None:
        embeddings[name].append(embedder.embed_windows(waiting.pop(name), FORWARD_BATCH))  # (n, d)

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        for entry, facts, pixels in _results(pool.submit(prepare, *item) for item in work):
            on_image()
            if isinstance(facts, str):
                rejected.append(Rejected(entry.uri, facts))
                continue
            if leave_out(facts):
                continue
            for name, values in pixels.items():
                rows[name].append((entry, facts))
                waiting[name].append(values)
                if len(waiting[name]) == FORWARD_BATCH:
                    embed(name)
    for name in list(waiting):
        embed(name)
    return {name: _embedded_set(rows[name], np.concatenate(embeddings[name])) for name in rows}, rejected


def _pixels(preprocess: Preprocess, transform: Transform, image: Image.Image) -> np.ndarray:
    """The windows that are embedded, shape (w, 3, s, s), uint8."""
    if transform.finished:
        preprocess = replace(preprocess, mode="center_crop")  # leaves an image of size s as it is
    return preprocess([image])


def _results(futures: Iterator[Future[Prepared]]) -> Iterator[Prepared]:
    """Results in the order of the futures, of which at most two batches are in work."""
    ahead = deque(islice(futures, 2 * FORWARD_BATCH))
    while ahead:
        yield ahead.popleft().result()
        ahead.extend(islice(futures, 1))


def _embedded_set(rows: Sequence[tuple[Entry, FileFacts]], embeddings: np.ndarray) -> EmbeddedSet:
    return EmbeddedSet(
        embeddings=embeddings,
        labels=np.array([entry.label for entry, _ in rows], np.uint8),
        generators=[entry.generator or "" for entry, _ in rows],
        sources=[entry.source for entry, _ in rows],
        groups=[entry.group for entry, _ in rows],
        splits=[entry.split or "" for entry, _ in rows],
        facts=[facts for _, facts in rows],
    )
