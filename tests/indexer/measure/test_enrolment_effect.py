"""What an enrolment changed, on vectors that leave no doubt."""

import hashlib
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest

from indexer.database.connection import connect
from indexer.follower import Follower
from indexer.measure.enrolment_effect import UNMEASURED, Judges, blindness, consequences, effect, shares, wilson
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.reference_facts import NewReference
from trainer.heads.calibration import fit_calibration
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads

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
    assert measured["recall"] == [{"generator": "new", "images": 40, "images_held_back": 11, "knn": sure, "nn1": sure}]
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


def test_what_is_not_in_the_index_yet_is_not_measured(settings: Settings, follower: Follower) -> None:
    enrolment = follower.store.enrolments.open("new", "tests")
    follower.store.references.add([reference(n, NEW, "new") for n in range(100, 140)], CHECKPOINT, enrolment)
    report = consequences(settings, follower, enrolment)
    assert (report["effect"], report["warnings"][:1]) == (None, [UNMEASURED])
    follower.catch_up()
    report = consequences(settings, follower, enrolment)
    assert report["effect"] is not None
    assert UNMEASURED not in report["warnings"]


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
    [row] = measured["recall"]
    assert row == {"generator": "real", "images": 1, "images_held_back": 0, "knn": nothing, "nn1": nothing}
    engine.dispose()


def judges(before: float, after: float, real: float = -3.0) -> Judges:
    """Of votes alone, of calibration images with logits about these: of fakes before and after, and of real ones."""
    noise = np.random.default_rng(0).normal(scale=0.5, size=80)
    labels = np.repeat([0, 1], 40)
    groups = [f"group {n}" for n in range(80)]
    calibrations = [
        fit_calibration(
            {"knn": np.where(labels == 1, fakes, real) + noise},
            nearest=np.zeros(80),
            nearest_fake=np.zeros(80),
            labels=labels,
            groups=groups,
            origins=["tests"] * 80,
            enrolled=np.zeros(80, bool),
        )
        for fakes in (before, after)
    ]

    class Silent:
        """Heads that answer nothing."""

        def logits(self, embeddings: np.ndarray) -> dict[str, np.ndarray]:
            return {}

    return Judges(cast("Heads", Silent()), calibrations[0], calibrations[1], (0.05, 0.05))


def test_verdicts_are_told_before_and_after(follower: Follower) -> None:
    rows = [reference(n, NEW + 0.3 * REAL, "new") for n in range(100, 140)]
    measured = effect(follower, enrol(follower, rows), None, k=5, judges=judges(3.0, 3.0))
    assert measured is not None
    new, real = measured["verdicts"]
    assert (new["generator"], new["auroc"]) == ("new", 1.0)
    assert [new[when]["fake"] for when in ("before", "after", "held_back")] == [0.0, 1.0, 1.0]
    assert new["before"]["images"] == new["after"]["images"] == 40 > new["held_back"]["images"] > 0
    assert new["after"]["interval"] == [round(end, 4) for end in wilson(40, 40)]
    assert real["generator"] == "real calibration images"
    assert (real["after"]["images"], real["held_back"]) == (40, None)
    assert real["after"]["fake"] <= 0.05
    assert all(
        sum(row["after"][kind] for kind in ("fake", "real", "uncertain")) == pytest.approx(1) for row in (new, real)
    )
    assert blindness(measured) == []


def test_a_generator_that_looks_real_is_told_to_need_training(follower: Follower) -> None:
    rows = [reference(n, REAL, "new") for n in range(100, 140)]  # just like the real images
    measured = effect(follower, enrol(follower, rows), None, k=5, judges=judges(3.0, 3.0, real=0.5))
    assert measured is not None
    assert measured["verdicts"][0]["auroc"] < 0.75
    [warning] = blindness(measured)
    assert warning.startswith("the checkpoint hardly tells new from real images (AUROC 0.")
    few = {"verdicts": [measured["verdicts"][0] | {"after": {"images": 9}}]}
    assert blindness(few) == []


def test_shares_and_their_interval() -> None:
    scores = np.array([0.1, 0.2, 0.5, 0.8, 0.8, np.nan])
    told = shares(scores, 0.8, 0.2)
    assert told is not None
    assert (told["images"], told["fake"], told["real"], told["uncertain"]) == (6, 0.3333, 0.1667, 0.5)
    assert shares(scores, None, None) == {"images": 6, "fake": 0, "real": 0, "uncertain": 1, "interval": [0.0, 0.3903]}
    assert shares(scores[:0], 0.8, 0.2) is None
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # as in textbooks
    assert wilson(0, 10)[0] == 0
