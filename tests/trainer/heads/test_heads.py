"""Heads: numpy agrees with scikit-learn, stored arrays come back, and what does not fit is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import OneClassSVM

from trainer.data.datasets import read_dataset
from trainer.data.entry import role
from trainer.evaluation.transforms import Transform, unchanged
from trainer.fit import fit_heads as refit
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import (
    WEAKER,
    C,
    Heads,
    HeadsError,
    NearestHead,
    OneClassHead,
    fit_heads,
    nearest_similarities,
    unit_length,
)
from trainer.heads.logistic import sigmoid
from trainer.images import Preprocess
from trainer.model.checkpoint import CheckpointError

DIM = 16


def embeddings(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw embeddings with a shift between the labels, and the labels; two thirds are fake."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 3 > 0).astype(np.uint8)
    x = rng.normal(size=(n, DIM)) + labels[:, None] * np.linspace(0, 1, DIM)
    return x.astype(np.float32), labels


def calibration_set(n: int, seed: int) -> CalibrationSet:
    x, labels = embeddings(n, seed)
    return CalibrationSet(
        embeddings=x,
        labels=labels,
        generators=["gen-a" if label else "" for label in labels],
        sources=["test"] * n,
        sha256=[f"{i:064x}" for i in range(n)],
        groups=[str(i) for i in range(n)],
    )


@pytest.fixture(scope="module")
def heads() -> Heads:
    return fit_heads(*embeddings(300, 0), calibration=calibration_set(90, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"name": "kept", "dim": DIM}))
    return tmp_path


def test_linear_head_equals_scikit_learn(heads: Heads) -> None:
    x, labels = embeddings(300, 0)
    queries = embeddings(50, 2)[0].astype(np.float64)
    options: dict[str, Any] = {"class_weight": "balanced", "solver": "newton-cg", "tol": 1e-10, "max_iter": 10_000}
    oracle = LogisticRegression(C=heads.settings["C"], **options)
    oracle.fit(x.astype(np.float64), labels)
    np.testing.assert_allclose(heads.linear.logit(queries), oracle.decision_function(queries), rtol=1e-5)
    np.testing.assert_allclose(sigmoid(heads.linear.logit(queries)), oracle.predict_proba(queries)[:, 1], rtol=1e-5)


def test_the_linear_head_is_as_regular_as_calibration_images_want_it() -> None:
    """Training images have marks of their own beside a trace that the calibration images share."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 60)
    marks = 0.7 * rng.normal(size=(6, DIM))[np.arange(120) // 20]
    x, judged = (0.3 * rng.normal(size=(120, DIM)) + 0.2 * labels[:, None] + part for part in (marks, 0))
    held = replace(calibration_set(120, 0), embeddings=judged.astype(np.float32), labels=labels)
    aurocs = {}
    for c in WEAKER:
        oracle = LogisticRegression(C=c, class_weight="balanced", solver="newton-cholesky", tol=1e-10)
        aurocs[c] = roc_auc_score(labels, oracle.fit(x, labels).decision_function(judged))
    best = max(aurocs, key=lambda c: (aurocs[c], c))
    assert best != C
    assert fit_heads(x, labels, calibration=held).settings["C"] == best
    assert fit_heads(x, labels, calibration=held.take(range(51, 69))).settings["C"] == C  # nine of each label
    assert fit_heads(x, labels).settings["C"] == C


def test_one_class_head_equals_minus_scikit_learns_decision(heads: Heads) -> None:
    x, labels = embeddings(300, 0)
    queries = embeddings(50, 2)[0].astype(np.float64)
    oracle = OneClassSVM(kernel="poly", degree=3, gamma="auto", nu=0.1).fit(x[labels == 0].astype(np.float64))
    assert heads.svm is not None
    np.testing.assert_allclose(heads.svm.score(queries), -oracle.decision_function(queries), rtol=1e-5)


def test_heads_of_images_whose_windows_are_alike_are_those_of_one_window() -> None:
    x, labels = embeddings(300, 0)
    joined = Preprocess(mode="center_crop", windows=5).joined(np.repeat(x, 5, axis=0), [5] * len(x))
    one, five = fit_heads(x, labels), fit_heads(joined, labels)
    queries = embeddings(50, 2)[0]
    np.testing.assert_allclose(five.linear.logit(queries), one.linear.logit(queries), rtol=1e-3, atol=1e-3)
    assert one.svm is not None
    assert five.svm is not None
    expected = one.svm.score(queries)
    np.testing.assert_allclose(five.svm.score(queries), expected, atol=0.01 * float(expected.std()))


def test_one_class_head_by_hand() -> None:
    head = OneClassHead(np.array([[1, 0]], np.float32), np.array([2.0]), -0.5, gamma=0.5, coef0=1.0, degree=2)
    np.testing.assert_allclose(head.score(np.array([[3.0, 7.0]])), [-(2 * (0.5 * 3 + 1) ** 2 - 0.5)])


def test_one_class_head_scores_in_blocks_alike(heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = embeddings(50, 2)[0]
    assert heads.svm is not None
    whole = heads.svm.score(queries)
    monkeypatch.setattr("trainer.heads.heads.KERNEL_BLOCK", 1)
    np.testing.assert_allclose(heads.svm.score(queries), whole, rtol=1e-12)


def test_nearest_head_equals_scikit_learn(heads: Heads) -> None:
    x, labels = embeddings(300, 0)
    queries = embeddings(50, 2)[0]
    oracle = KNeighborsClassifier(1, metric="cosine").fit(x, labels)
    assert heads.nearest is not None
    similarity = nearest_similarities(unit_length(queries), heads.nearest.embeddings, 1)
    np.testing.assert_allclose(similarity, 1 - oracle.kneighbors(queries)[0], atol=1e-3)
    np.testing.assert_array_equal(heads.nearest.margin(queries) > 0, oracle.predict(queries) == 1)


def test_margin_by_hand() -> None:
    head = NearestHead(np.array([[1, 0], [0, 1]], np.float16), np.array([0, 1], np.uint8))
    np.testing.assert_allclose(head.margin(np.array([[3.0, 4.0]])), [0.8 - 0.6], atol=1e-6)


def test_unit_length_keeps_a_zero_row() -> None:
    x = np.array([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]])
    np.testing.assert_allclose(unit_length(x), [[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_saved_heads_come_back_equal(heads: Heads, folder: Path) -> None:
    heads.save(folder)
    loaded = Heads.load(folder)
    assert loaded.id == heads.id
    assert loaded.maps == heads.maps
    assert loaded.settings == heads.settings
    queries = embeddings(50, 2)[0]
    for name, scores in heads.logits(queries).items():
        np.testing.assert_array_equal(loaded.logits(queries)[name], scores)
    config = json.loads((folder / "config.json").read_text())
    assert config["name"] == "kept"
    shown = {key: config["heads"][key] for key in heads.settings}
    images = {"real": 100, "fake": 200}
    assert shown == {"C": 0.00316, "nu": 0.1, "degree": 3, "gamma": "auto", "seed": 42, "images": images}


def test_heads_without_svm_and_neighbours_come_back(heads: Heads, folder: Path) -> None:
    Heads(heads.linear, None, None, {}, {}).save(folder)
    loaded = Heads.load(folder)
    assert loaded.svm is None
    assert loaded.nearest is None
    assert list(loaded.logits(embeddings(5, 2)[0])) == ["linear"]


def test_id_follows_heads_and_calibration(heads: Heads) -> None:
    x, labels = embeddings(300, 0)
    assert fit_heads(x, labels, calibration=calibration_set(90, 1)).id == heads.id
    assert fit_heads(x, labels, calibration=calibration_set(90, 3)).id != heads.id
    assert heads.nearest is not None
    known = heads.nearest.embeddings
    others = [
        replace(heads, linear=replace(heads.linear, bias=heads.linear.bias + 1)),
        replace(heads, nearest=replace(heads.nearest, embeddings=known.reshape(known.T.shape))),
    ]
    assert len({heads.id, *(other.id for other in others)}) == 3
    assert len(heads.id) == 32


def test_maps_need_ten_of_each_label() -> None:
    x, labels = embeddings(60, 0)
    assert fit_heads(x, labels, calibration=calibration_set(27, 1)).maps == {}
    enough = calibration_set(30, 1)
    for of in (enough, replace(enough, labels=1 - enough.labels)):
        assert set(fit_heads(x, labels, calibration=of).maps) == {"linear", "svm"}


def test_heads_of_another_dimension_are_refused(heads: Heads, folder: Path) -> None:
    heads.save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dim": 192}))
    with pytest.raises(HeadsError, match=r"16-dimensional embeddings, the checkpoint in .* gives 192"):
        Heads.load(folder)
    with pytest.raises(HeadsError, match="192"):
        heads.save(folder)


def test_missing_broken_and_foreign_heads_are_refused(heads: Heads, folder: Path) -> None:
    with pytest.raises(HeadsError, match=r"heads\.safetensors is missing: run `lineup train heads --checkpoint"):
        Heads.load(folder)
    heads.save(folder)
    other = json.loads((folder / "config.json").read_text())
    other["heads"]["id"] = "0" * 32
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(HeadsError, match="do not belong together"):
        Heads.load(folder)
    (folder / "heads.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"heads\.safetensors is damaged .*: run `lineup train heads"):
        Heads.load(folder)
    (folder / "config.json").write_text(json.dumps(other | {"files": {}}))
    with pytest.raises(HeadsError, match=r"heads\.safetensors is broken"):
        Heads.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        Heads.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json missing"):
        Heads.load(folder)


@pytest.mark.parametrize(
    ("labels", "message"), [([1] * 9 + [0], "at least 2 images of each label"), ([0] * 10, "fake")]
)
def test_too_few_images_are_refused(labels: list[int], message: str) -> None:
    with pytest.raises(HeadsError, match=message):
        fit_heads(np.ones((10, DIM)), np.array(labels))


def test_two_images_of_a_label_are_enough() -> None:
    x, _ = embeddings(10, 0)
    assert fit_heads(x, np.array([1] * 8 + [0] * 2)).settings["images"] == {"real": 2, "fake": 8}


def test_embeddings_that_are_not_finite_are_refused() -> None:
    x, labels = embeddings(30, 0)
    x[3, 3] = np.nan
    with pytest.raises(HeadsError, match="not finite"):
        fit_heads(x, labels)


def test_calibration_set_comes_back(folder: Path) -> None:
    held = replace(calibration_set(12, 5), trained=["gen-a", "gen-b"])
    held.save(folder)
    loaded = CalibrationSet.load(folder)
    np.testing.assert_array_equal(loaded.embeddings, held.embeddings)
    np.testing.assert_array_equal(loaded.labels, held.labels)
    assert (loaded.generators, loaded.sources, loaded.trained) == (held.generators, held.sources, held.trained)
    assert (loaded.sha256, loaded.groups, loaded.digest) == (held.sha256, held.groups, held.digest)


def test_missing_and_broken_calibration_sets_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"calibration\.safetensors is missing"):
        CalibrationSet.load(folder)
    (folder / "calibration.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"calibration\.safetensors is broken"):
        CalibrationSet.load(folder)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """100 empty files of each of four generators, and 100 real ones."""
    for folder in ("fake/gen-a", "fake/gen-b", "fake/gen-c", "fake/gen-d", "real"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(100):
            (tmp_path / folder / f"{number:02}.png").touch()
    return tmp_path


def test_heads_are_fitted_on_images_from_all_over_the_data_set(many: Path) -> None:
    """30 of 400 fakes: the first of them are all of one generator."""
    views = [Transform(name, unchanged) for name in ("plain", "augmented")]

    def chosen() -> list[tuple[str, int, int]]:
        work = refit._work(read_dataset(many, split="train"), views, 119)
        return [(entry.key, entry.label, len(copies)) for entry, copies in work if copies[0] in views]

    found = chosen()
    assert found == chosen()
    assert [sum(count for _, of, count in found if of == label) for label in (0, 1)] == [59, 60]
    assert {key.split("/")[1] for key, label, _ in found if label} == {"gen-a", "gen-b", "gen-c", "gen-d"}
    order = [entry.key for entry in read_dataset(many)]
    assert [order.index(key) for key, _, _ in found] == sorted(order.index(key) for key, _, _ in found)


def test_calibration_images_come_from_all_over_the_data_set(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "CALIBRATION_IMAGES", 20)
    entries = [entry for entry, _ in refit._work(read_dataset(many, split="train"), [Transform("plain", unchanged)], 0)]
    assert {role(entry.group) for entry in entries} == {"calibration"}
    assert sum(entry.label for entry in entries) == 10
    assert len({entry.generator for entry in entries if entry.label}) > 2
