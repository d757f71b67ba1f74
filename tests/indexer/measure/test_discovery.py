"""New generators among verdicts, on vectors that leave no doubt."""

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from indexer.__main__ import app
from indexer.database.connection import connect
from indexer.follower import Follower
from indexer.measure.discovery import (
    CandidateEnrolled,
    Discovery,
    UnknownCandidate,
    cluster,
    discover,
    enrol_candidate,
)
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.detections import Detection
from indexer.store.reference_facts import NewReference
from trainer.heads.calibration import Calibration

CHECKPOINT = "d" * 32
REAL, OLD, NEW, OTHER = np.eye(8, dtype=np.float32)[:4]
NO_MAPS: dict[str, Any] = {"maps": {}, "real": {}, "fake": {}, "sources": {}, "generators": {}, "nearest_fake": {}}


def near(direction: np.ndarray, number: int) -> np.ndarray:
    return direction + np.random.default_rng(number).normal(scale=0.05, size=8).astype(np.float32)


def sha256(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def reference(number: int, direction: np.ndarray, generator: str | None) -> NewReference:
    return NewReference(
        sha256=sha256(number),
        label=int(generator is not None),
        generator=generator,
        source="tests",
        group=str(number),
        uri=None,
        file_bytes=1,
        mtime=None,
        width=1,
        height=1,
        format="PNG",
        jpeg_quality=None,
        thumbnail=b"",
        attributes={},
        vector=near(direction, number),
    )


def verdict(number: int, direction: np.ndarray, result: Mapping[str, Any] | None = None) -> Detection:
    """An uncertain verdict, unless told otherwise."""
    image = {"format": "PNG", "shortfall": None}
    facts = {"file": f"{number}.png", "verdict": "uncertain", "novelty": 0.5, "image": image, **(result or {})}
    return Detection(uuid.uuid4(), sha256(number), 7, 6, 5, near(direction, number), facts, CHECKPOINT, "h", 1)


@pytest.fixture
def follower(settings: Settings) -> Iterator[Follower]:
    """20 real images and 20 of an old generator; in the order given 8 verdicts on NEW and 6 on OTHER."""
    engine = connect(settings)
    store = Store(engine)
    store.checkpoints.register(CHECKPOINT, "tests", 8, {})
    rows = [reference(n, REAL, None) for n in range(20)] + [reference(n, OLD, "old") for n in range(20, 40)]
    store.references.add(rows, CHECKPOINT)
    new = [verdict(n, NEW + 0.5 * OLD) for n in range(100, 108)]
    store.detections.add(new + [verdict(n, OTHER + 0.5 * REAL) for n in range(200, 206)])
    one = Follower(settings, store, CHECKPOINT, 8)
    one.load()
    yield one
    engine.dispose()


def test_images_of_one_generator_are_one_group() -> None:
    rng = np.random.default_rng(0)
    directions = np.repeat([REAL, OLD, NEW], 20, axis=0)  # (60, 8)
    raw = (directions + rng.normal(scale=0.05, size=(60, 8))) * rng.uniform(0.1, 10, (60, 1))  # length tells nothing
    numbers = cluster(raw.astype(np.float32), 5)
    groups = [set(numbers[start : start + 20].tolist()) - {-1} for start in (0, 20, 40)]
    assert [len(group) for group in groups] == [1, 1, 1]
    assert set.union(*groups) == {0, 1, 2}


def test_groups_are_told_with_what_is_nearest(follower: Follower) -> None:
    # A similarity of about 0.45 to what is nearest: 5 of 99 calibration images are as far.
    calibration = Calibration(**NO_MAPS, nearest=np.array([0.1] * 5 + [0.9] * 94, np.float32), n_real=50, n_fake=49)
    report = discover(follower, calibration).summary()
    assert (report["images"], report["ungrouped"], report["left_out"]) == (14, 0, 0)
    by_name = {one["name"]: one for one in report["candidates"]}
    assert set(by_name) == {sha256(100)[:12], sha256(200)[:12]}
    new = by_name[sha256(100)[:12]]
    assert (new["images"], new["verdicts"], new["novelty"]) == (8, {"uncertain": 8}, 0.06)
    assert new["nearest"] == [{"label": "fake", "generator": "old", "images": 8}]
    assert new["first"] < new["last"]
    first = new["examples"][0]
    assert (first["file"], first["nearest"]["generator"]) == ("100.png", "old")
    # The slow way: compare with every reference.
    vectors = np.stack([near(REAL, n) for n in range(20)] + [near(OLD, n) for n in range(20, 40)])
    query = near(NEW + 0.5 * OLD, 100)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    assert first["nearest"]["similarity"] == pytest.approx(cosines.max(), abs=2e-3)  # the index keeps half precision
    assert by_name[sha256(200)[:12]]["nearest"] == [{"label": "real", "generator": None, "images": 6}]


def test_a_group_keeps_its_name_while_it_grows(follower: Follower) -> None:
    before = discover(follower, None)
    follower.store.detections.add([verdict(n, NEW + 0.5 * OLD) for n in range(300, 310)])
    after = discover(follower, None)
    assert {one.name for one in after.candidates} == {one.name for one in before.candidates}
    assert sorted(len(one.images) for one in after.candidates) == [6, 18]


def test_only_what_no_reference_explains_is_grouped(follower: Follower) -> None:
    detections, sure = follower.store.detections, {"verdict": "fake", "novelty": 0.5}
    given = {
        "sure": verdict(400, NEW, sure),
        "novel": verdict(401, NEW, sure | {"novelty": 0.01}),
        "unknown": verdict(402, NEW, sure | {"unknown_generator": True}),
        "missed": verdict(403, NEW, sure | {"verdict": "real"}),
        "confirmed": verdict(404, NEW, sure),
        "no fake": verdict(405, NEW),
        "too little": verdict(406, NEW, {"image": {"format": "PNG", "shortfall": "flat"}}),
        "reference": verdict(0, NEW),
        "of another checkpoint": replace(verdict(407, NEW), checkpoint_id="e" * 32),
        "decided since": verdict(408, NEW),
    }
    detections.add([*given.values(), verdict(408, NEW, sure)])
    for name, label in (("missed", "fake"), ("confirmed", "fake"), ("no fake", "real")):
        detections.set_feedback(given[name].id, {"label": label})
    images, total = detections.unexplained(CHECKPOINT, novelty=0.05, images=5)
    assert (len(images), total) == (5, 17)
    assert [image.sha256 for image in images[:3]] == [given[name].sha256 for name in ("missed", "unknown", "novel")]
    mine = follower.store.keys.create("mine", b"hash", ["enrol"])
    detections.add([replace(verdict(500, NEW), api_key_id=mine.id)])
    images, total = detections.unexplained(CHECKPOINT, novelty=0.05, images=5, owner=mine.id, everybody=False)
    assert ([image.sha256 for image in images], total) == ([sha256(500)], 1)


def test_a_candidate_is_enrolled_once_and_undone(follower: Follower) -> None:
    store, name = follower.store, sha256(100)[:12]

    def search() -> Discovery:
        return discover(follower, None)

    report = enrol_candidate(follower, search, name, "Newcomer")
    assert (report["added"], report["generators"], report["conflicts"]) == (8, {"Newcomer": 8}, [])
    enrolment = store.enrolments.get(report["enrolment"])
    assert enrolment is not None
    assert (enrolment.generator, enrolment.source, enrolment.references) == ("Newcomer", "verdicts", 8)
    reference = store.references.find(sha256(100))
    assert reference is not None
    assert (reference.label, reference.generator, reference.pictured) == (1, "Newcomer", False)
    assert (reference.file_bytes, reference.width, reference.height) == (7, 6, 5)
    follower.catch_up()
    [[nearest]] = follower.search(near(NEW + 0.5 * OLD, 100)[None], 1)
    assert nearest.generator == "Newcomer"
    assert nearest.similarity == pytest.approx(1, abs=1e-3)
    assert name not in {one.name for one in search().candidates}
    again = enrol_candidate(follower, search, name, "newcomer")
    assert (again["added"], again["known"], again["enrolment"]) == (0, 8, None)
    with pytest.raises(CandidateEnrolled, match=rf"fake \(Newcomer\).*--enrolment {report['enrolment']}$"):
        enrol_candidate(follower, search, name, "Another")
    for unknown in ("0" * 12, "../x", name.upper() + "0"):
        with pytest.raises(UnknownCandidate, match="discover"):
            enrol_candidate(follower, search, unknown, "Another")
    assert len(store.enrolments.list()) == 1
    store.references.remove(enrolment=report["enrolment"])
    assert name in {one.name for one in search().candidates}


def command(follower: Follower, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.setenv("LINEUP_HOME", str(follower.settings.home))
    monkeypatch.setenv("LINEUP_DATABASE_URL", str(follower.settings.database_url))
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the tests' own process keeps its handlers
    return CliRunner().invoke(app, ["discover", *arguments])


def test_the_command_finds_enrols_and_says_how_to_undo_it(follower: Follower, monkeypatch: pytest.MonkeyPatch) -> None:
    told = command(follower, monkeypatch)
    assert told.exit_code == 0, told.stderr
    assert "2 candidates among 14 images that no reference explains, 0 of them in none" in told.stdout
    assert f"--enrol {sha256(100)[:12]} --generator NAME" in told.stdout
    assert "old 8" in told.stdout
    assert f"{sha256(200)[:12]}: 200.png, 201.png, 202.png, 203.png, 204.png and 1 more" in told.stdout
    enrolled = command(follower, monkeypatch, "--enrol", sha256(100)[:12], "--generator", "Newcomer")
    assert enrolled.exit_code == 0, enrolled.stderr
    assert "added 8 of 8 images (8 Newcomer)" in enrolled.stdout
    assert "to undo it: lineup index remove --enrolment 1" in enrolled.stderr
    report = json.loads(command(follower, monkeypatch, "--json").stdout)
    assert [one["images"] for one in report["candidates"]] == [6]
    again = command(follower, monkeypatch, "--enrol", sha256(100)[:12], "--generator", "Newcomer", "--json")
    assert json.loads(again.stdout)["known"] == 8
    lost = command(follower, monkeypatch, "--enrol", "0" * 12, "--generator", "Newcomer")
    assert (lost.exit_code, "no candidate is called '000000000000'" in lost.stderr) == (1, True)
    assert command(follower, monkeypatch, "--enrol", "0" * 12).exit_code == 2
    with follower.store.engine.begin() as connection:
        connection.execute(text("delete from detection"))
    assert "0 candidates among 0 images" in command(follower, monkeypatch).stdout
