"""What an enrolment changed, on vectors that leave no doubt."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest

from indexer.database.connection import connect
from indexer.follower import Follower
from indexer.measure.enrolment_effect import effect
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.reference_facts import NewReference
from trainer.heads.calibration_set import CalibrationSet

CHECKPOINT = "e" * 32
REAL, OLD, NEW = np.eye(3, dtype=np.float32)


def reference(number: int, vector: np.ndarray, generator: str | None, group: str | None = None) -> NewReference:
    """A reference near `vector`."""
    noise = np.random.default_rng(number).normal(scale=0.02, size=3).astype(np.float32)
    return NewReference(
        sha256=hashlib.sha256(str(number).encode()).hexdigest(),
        label=int(generator is not None),
        generator=generator,
        source="tests",
        group=group or f"group {number}",
        uri=None,
        file_bytes=1,
        mtime=None,
        width=1,
        height=1,
        format="PNG",
        jpeg_quality=None,
        thumbnail=b"",
        attributes={},
        vector=vector + noise,
    )


@pytest.fixture
def follower(settings: Settings) -> Iterator[Follower]:
    """40 real images and 40 of an old generator."""
    engine = connect(settings)
    store = Store(engine)
    store.checkpoints.register(CHECKPOINT, "tests", 3, {})
    rows = [reference(n, REAL, None) for n in range(40)] + [reference(n, OLD, "old") for n in range(40, 80)]
    store.references.add(rows, CHECKPOINT)
    yield Follower(settings, store, CHECKPOINT, 3)
    engine.dispose()


def enrol(follower: Follower, rows: list[NewReference]) -> int:
    enrolment = follower.store.enrolments.open(None, None)
    follower.store.references.add(rows, CHECKPOINT, enrolment)
    follower.load()
    return enrolment


def calibration_reals(vector: np.ndarray) -> CalibrationSet:
    """20 real images near `vector`, and a fake that must not count."""
    embeddings = np.stack([vector] * 21)
    labels = np.array([0] * 20 + [1], np.uint8)
    names = [f"calibration {n}" for n in range(21)]
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    return CalibrationSet(embeddings, labels, [""] * 20 + ["old"], ["tests"] * 21, hashes, names)


def test_a_new_generator_is_recognised_after_its_enrolment(follower: Follower) -> None:
    # Nearer to the real images than to the old generator, until it has references of its own.
    rows = [reference(n, NEW + 0.3 * REAL, "new") for n in range(100, 140)]
    enrolment = enrol(follower, rows)
    measured = effect(follower, enrolment, calibration_reals(REAL), k=5)
    assert measured is not None
    sure = {"before": 0.0, "after": 1.0, "held_back": 1.0}
    assert measured["recall"] == [{"generator": "new", "images": 40, "knn": sure, "nn1": sure}]
    none = {"before": 0.0, "after": 0.0}
    assert measured["false_alarms"] == {"images": 20, "knn": none, "nn1": none}


def test_false_alarms_that_an_enrolment_brings_are_told(follower: Follower) -> None:
    rows = [reference(n, NEW, "new") for n in range(100, 140)]
    measured = effect(follower, enrol(follower, rows), calibration_reals(NEW + 0.3 * REAL), k=5)
    assert measured is not None
    assert measured["false_alarms"]["knn"] == {"before": 0.0, "after": 1.0}


def test_an_image_does_not_answer_for_its_group(follower: Follower) -> None:
    scattered = np.random.default_rng(0).normal(scale=0.05, size=(20, 3)).astype(np.float32)
    rows = [reference(100 + n, NEW + 0.3 * REAL + one, "new", group="one scene") for n, one in enumerate(scattered)]
    measured = effect(follower, enrol(follower, rows), None, k=5)
    assert measured is not None
    (row,) = measured["recall"]
    assert (row["knn"]["before"], row["knn"]["after"]) == (0.0, 0.0)
    assert measured["false_alarms"] is None


def test_nothing_is_said_where_nothing_can_be(settings: Settings) -> None:
    engine = connect(settings)
    store = Store(engine)
    store.checkpoints.register(CHECKPOINT, "tests", 3, {})
    follower = Follower(settings, store, CHECKPOINT, 3)
    follower.load()
    assert effect(follower, store.enrolments.open(None, None), None, k=5) is None
    measured = effect(follower, enrol(follower, [reference(1, REAL, None)]), None, k=5)
    assert measured is not None
    nothing = {"before": None, "after": None, "held_back": None}
    assert measured["recall"] == [{"generator": "real", "images": 1, "knn": nothing, "nn1": nothing}]
    engine.dispose()
