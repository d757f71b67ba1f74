"""References for tests of the index: numbers as images, with a direction of its own for each.

Run as a program with a database, a place of object storage and a seed, it enrols, removes and judges some until it is
killed.
"""

import hashlib
import random
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import numpy as np

from indexer.database.connection import connect
from indexer.follower import Follower
from indexer.memory_copy import MemoryCopy
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.detections import Detection
from indexer.store.reference_facts import NewReference

DIM = 6
CHECKPOINT = "c" * 32


def sha256(number: int) -> str:
    """Of the bytes of image `number`."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def vector(number: int) -> np.ndarray:
    """Shape (DIM,), float32, not of unit length."""
    return np.random.default_rng(number).standard_normal(DIM).astype(np.float32)


def new(number: int, generator: str | None = None, source: str = "tests", **others: Any) -> NewReference:
    """Reference number `number`; with a generator it is fake."""
    values: dict[str, Any] = {
        "sha256": sha256(number),
        "label": int(generator is not None),
        "generator": generator,
        "source": source,
        "group": f"group {number}",
        "uri": None,
        "file_bytes": 100,
        "mtime": None,
        "width": 64,
        "height": 48,
        "format": "PNG",
        "jpeg_quality": None,
        "thumbnail": b"jpeg",
        "attributes": {},
        "vector": vector(number),
    }
    return NewReference(**(values | others))


def verdict(number: int, thumbnail: bytes | None) -> Detection:
    """A verdict on image `number`."""
    return Detection(uuid4(), sha256(number), 100, 64, 48, vector(number), {}, CHECKPOINT, None, 0, thumbnail=thumbnail)


def add(store: Store, *numbers: int, generator: str | None = None, source: str = "tests") -> list[int]:
    """Add references in one transaction; their ids."""
    return add_all(store, [new(number, generator, source) for number in numbers])


def add_all(store: Store, batch: Sequence[NewReference]) -> list[int]:
    """Add a batch; its ids."""
    return [number for number in store.references.add(batch, CHECKPOINT).ids if number is not None]


def opened(settings: Settings) -> Store:
    """The store, which knows the tests' checkpoint."""
    store = Store(connect(settings))
    store.checkpoints.register(CHECKPOINT, "tiny", DIM, {})
    return store


def following(store: Store, settings: Settings) -> Follower:
    """A follower of the tests' checkpoint, not loaded."""
    return Follower(settings, store, CHECKPOINT, DIM)


def in_memory(follower: Follower) -> MemoryCopy:
    """The copy of a follower whose index is in memory."""
    assert isinstance(follower.copy, MemoryCopy)
    return follower.copy


CHURNED = range(12)


def pictures(number: int) -> dict[str, Any]:
    """Thumbnail and file of an image that `churn` adds; two images have one thumbnail."""
    return {"thumbnail": b"thumbnail %d" % (number // 2), "data": b"file %d" % number}


def churn(url: str, place: str, seed: str) -> None:
    """Enrol, remove what anybody added, undo, judge, forget and drain, over and over."""
    store, choice = Store(connect(Settings(database_url=url)), place), random.Random(seed)
    print("ready", flush=True)
    while True:
        enrolment = store.enrolments.open(None, "tests")
        batch = [new(number, **pictures(number)) for number in choice.sample(CHURNED, 6)]
        store.references.add(batch, CHECKPOINT, enrolment)
        hashes = [sha256(number) for number in choice.sample(CHURNED, 6)]
        store.references.remove(ids=store.references.get_many((), hashes))
        if choice.random() < 0.5:
            store.references.remove(enrolment=enrolment)
        judged = [verdict(number, pictures(number)["thumbnail"]) for number in choice.sample(CHURNED, 3)]
        store.detections.add(judged)
        store.detections.move_thumbnails()
        if choice.random() < 0.5:
            store.detections.delete(datetime.now(UTC))
        store.blobs.drain()


if __name__ == "__main__":
    churn(*sys.argv[1:])
