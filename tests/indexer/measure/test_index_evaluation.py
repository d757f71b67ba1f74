"""The index's heads on a data set: the trainer's rows, without references that are the images themselves."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from indexer.__main__ import app
from indexer.database.connection import connect
from indexer.follower import Follower
from indexer.measure import NothingToMeasure
from indexer.measure.calibrate import recalibrate
from indexer.measure.index_evaluation import evaluate, evaluation_question, index_scores, verdict_shares
from indexer.settings import Settings
from indexer.store import Store
from trainer.data.datasets import read_dataset
from trainer.evaluation.embedded_set import EmbeddedSet
from trainer.heads.heads import Heads
from trainer.model.embedder import Embedder
from trainer.model.seen_images import LeftOut, SeenImages

BOTH = "train,test"


@pytest.fixture
def embedder(populated: Settings) -> Embedder:
    return Embedder.load(populated.checkpoint_folder, device="cpu")


@pytest.fixture
def follower(populated: Settings, embedder: Embedder) -> Iterator[Follower]:
    store = Store(connect(populated))
    follower = Follower(populated, store, embedder.id, embedder.dim)
    follower.load()
    yield follower
    store.engine.dispose()


def test_rows_are_the_trainers(populated: Settings, follower: Follower, embedder: Embedder, image_folder: Path) -> None:
    found = evaluate(populated, follower, embedder, image_folder, split=BOTH, resamples=5)
    assert {row["head"] for row in found.rows} == {"knn", "nn1", "linear", "svm", "combined"}
    assert {row["transform"] for row in found.rows} == {"none", "transformed", "equalised"}
    counts = Counter((entry.split, entry.generator or "real") for entry in read_dataset(image_folder, split=BOTH))
    plain = {(row["split"], row["generator"]): row["images"] for row in found.rows if row["head"] == "nn1"}
    assert {key: n for key, n in plain.items() if key[1] != "all"} == counts
    assert plain["test", "all"] + plain["train", "all"] == counts.total() == 120
    assert found.revision == follower.revision
    assert {row["generator"] for row in found.verdicts} == {"real", "gen-a", "gen-b"}
    for row in found.verdicts:
        assert row["fake"] + row["real"] + row["uncertain"] == pytest.approx(1)
        assert row["coverage"] == pytest.approx(row["fake"] + row["real"], abs=2e-6)  # each is rounded


def test_images_that_the_checkpoint_saw_are_left_out_and_counted(
    populated: Settings, follower: Follower, embedder: Embedder, image_folder: Path, tmp_path: Path
) -> None:
    assert not evaluate(populated, follower, embedder, image_folder, split="test", resamples=5).left_out.complete
    copied = shutil.copytree(populated.checkpoint_folder, tmp_path / "checkpoint")
    train, test = (list(read_dataset(image_folder, split=split)) for split in ("train", "test"))
    saw = [*train, test[0]]
    SeenImages.of((sha256(entry.read()).hexdigest() for entry in saw), (entry.group for entry in saw)).save(copied)
    other = replace(embedder, folder=copied)
    found = evaluate(populated, follower, other, image_folder, split=BOTH, resamples=5)
    assert found.left_out == LeftOut(len(train) + 1)
    plain = {row["split"]: row["images"] for row in found.rows if (row["head"], row["generator"]) == ("nn1", "all")}
    assert plain == {"test": len(test) - 1}
    questions = [evaluation_question(populated, follower, by, image_folder, "test", 0) for by in (embedder, other)]
    assert questions[0] != questions[1]


def test_an_image_does_not_answer_for_itself(populated: Settings, follower: Follower) -> None:
    """Every image is a reference: with itself excluded its nearest is another."""
    held = follower.copy.contents()
    ids, vectors, labels = held.ids, held.vectors, held.labels
    heads = Heads.load(populated.checkpoint_folder)
    queries = vectors.astype(np.float32)
    own = index_scores(queries, [np.empty(0, np.int64)] * len(ids), follower, heads, None, 5)
    others = index_scores(queries, [np.array([number]) for number in ids], follower, heads, None, 5)
    assert ((own["nn1"] > 0) == (labels == 1)).all()
    assert not np.allclose(own["nn1"], others["nn1"])
    assert "combined" not in own
    with_maps = index_scores(
        queries, [np.array([n]) for n in ids], follower, heads, recalibrate(populated, follower), 5
    )
    assert ((with_maps["combined"] >= 0) & (with_maps["combined"] <= 1)).all()


def test_shares_of_verdicts() -> None:
    images = EmbeddedSet(
        embeddings=np.zeros((5, 2), np.float32),
        labels=np.array([0, 0, 1, 1, 1], np.uint8),
        generators=["", "", "a", "a", "b"],
        sources=[""] * 5,
        groups=[""] * 5,
        splits=[""] * 5,
        facts=[],
    )
    scores = np.array([0.1, 0.5, 0.9, 0.5, np.nan])
    real, a, b = verdict_shares(images, scores, 0.8, 0.3)
    assert real == {"generator": "real", "images": 2, "fake": 0, "real": 0.5, "uncertain": 0.5, "coverage": 0.5}
    assert a == {"generator": "a", "images": 2, "fake": 0.5, "real": 0, "uncertain": 0.5, "coverage": 0.5}
    assert b["uncertain"] == 1
    assert all(row["uncertain"] == 1 for row in verdict_shares(images, scores, None, None))


def test_nothing_to_evaluate(settings: Settings, populated: Settings, embedder: Embedder, image_folder: Path) -> None:
    store = Store(connect(settings))
    store.checkpoints.register(embedder.id, "tiny", embedder.dim, {})
    empty = Follower(settings, store, embedder.id, embedder.dim)
    empty.load()
    with pytest.raises(NothingToMeasure, match="the index is empty"):
        evaluate(populated, empty, embedder, image_folder)
    store.engine.dispose()


def test_a_kept_evaluation_answers_its_own_question_only(
    populated: Settings, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("home", "database_url", "checkpoint"):
        monkeypatch.setenv(f"LINEUP_{name.upper()}", str(getattr(populated, name)))
    data, file = tmp_path / "images", tmp_path / "new" / "evaluation.json"
    shutil.copytree(image_folder, data)
    command = ["evaluate", "--data", str(data), "--split", "test", "--output", str(file)]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    written = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("indexer.measure.index_evaluation.evaluate", lambda *_, **__: pytest.fail("measured again"))
        again = CliRunner().invoke(app, command)
        assert again.exit_code == 0, again.output
        assert again.stdout == first.stdout
        assert f"reused {file}" in again.stderr.replace("\n", "")
    for change in (["--seed", "1"], []):
        file.write_text(written if change else "{broken")
        other = CliRunner().invoke(app, [*command, *change])
        assert other.exit_code == 0, other.output
        assert "reused" not in other.stderr
        assert file.read_text() != written if change else file.read_text() == written


def test_a_question_changes_with_images_engine_and_method(
    populated: Settings,
    follower: Follower,
    embedder: Embedder,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "images"
    shutil.copytree(image_folder, data)

    def asked(by: Embedder = embedder) -> dict[str, Any]:
        return evaluation_question(populated, follower, by, data, "test", 0)

    first = asked()
    assert asked() == first
    seen = [first, asked(Embedder.load(embedder.folder, device="cpu", engine="torch"))]
    changed = data / "real" / "000.jpg"
    os.utime(changed, (1, 1))
    seen.append(asked())
    changed.unlink()
    seen.append(asked())
    monkeypatch.setattr("indexer.measure.index_evaluation.METHOD", -1)
    seen.append(asked())
    assert len({json.dumps(one) for one in seen}) == len(seen) == 5


def test_commands(populated: Settings, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("home", "database_url", "checkpoint"):
        monkeypatch.setenv(f"LINEUP_{name.upper()}", str(getattr(populated, name)))
    monkeypatch.setenv("LINEUP_K", "5")
    monkeypatch.setattr("trainer.evaluation.file_facts.file_fact_scores", lambda facts, *_: np.full(len(facts), 0.5))
    audited = CliRunner().invoke(app, ["audit", "--json"])
    assert audited.exit_code == 0, audited.output
    assert json.loads(audited.stdout)["images"] == 120
    shown = CliRunner().invoke(app, ["audit"], env={"COLUMNS": "200"})
    assert "near duplicates across labels" in shown.stdout
    shown = CliRunner().invoke(
        app, ["evaluate", "--data", str(image_folder), "--split", "test"], env={"COLUMNS": "200"}
    )
    assert shown.exit_code == 0, shown.output
    assert "thresholds of the combined score: fake 0." in shown.stdout
    assert all(name in shown.stdout for name in ("gen-a", "gen-b", "both labels recompressed alike", "uncertain"))
    measured = CliRunner().invoke(app, ["evaluate", "--data", str(image_folder), "--split", "none"])
    assert measured.exit_code == 1
    assert "error: " in measured.stderr
    assert "has no images of split none" in measured.stderr
