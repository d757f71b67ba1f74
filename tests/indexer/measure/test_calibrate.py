"""Calibration on the index: what it asks, what it leaves out, where it is kept."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numbered import CHECKPOINT, DIM, add_all, following, new, opened, sha256
from safetensors.numpy import save_file
from sqlalchemy import event
from sqlalchemy.exc import InternalError

from indexer.database.tables import FINGERPRINT_BANDS
from indexer.measure import calibrate as module
from indexer.measure.calibrate import (
    affordable,
    calibrate,
    newcomers,
    recalibrate,
    saved_calibration,
    shared_calibration,
)
from indexer.measure.near_duplicates import all_fingerprints, near_duplicates, related_references, similar_fingerprints
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.reference_facts import NEAR_BITS
from trainer.heads.calibration import Calibration
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads, LinearHead, unit_length
from trainer.heads.vote import vote
from trainer.model.checkpoint import CheckpointConfig, checkpoint_id, read_config, read_weights, write_config

K = 3
KNOWN = {"gen-0", "gen-1", "gen-2"}


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = opened(settings)
    yield store
    store.engine.dispose()


def direction(number: int, fake: bool) -> np.ndarray:
    """Fakes lie around one direction and reals around its opposite, shape (DIM,), float32."""
    noise = np.random.default_rng(number).standard_normal(DIM)
    return (noise + (1.5 if fake else -1.5)).astype(np.float32)


def reference(number: int, **others: Any) -> Any:
    fake = number % 2 == 1
    values: dict[str, Any] = {
        "vector": direction(number, fake),
        "fingerprint": (number + 1) * 0x9E3779B97F4A7C15 % 2**63,
    }
    return new(number, f"gen-{number % 3}" if fake else None, **(values | others))


def images(numbers: range) -> CalibrationSet:
    """Calibration images with the same numbers, hashes and groups as references would have."""
    return CalibrationSet(
        embeddings=np.array([direction(number, number % 2 == 1) for number in numbers], np.float32).reshape(-1, DIM),
        labels=np.array([number % 2 for number in numbers], np.uint8),
        generators=[f"gen-{number % 3}" if number % 2 else "" for number in numbers],
        sources=["tests" for _ in numbers],
        sha256=[sha256(number) for number in numbers],
        groups=[f"group {number}" for number in numbers],
    )


def heads() -> Heads:
    return Heads(LinearHead(np.ones(DIM), 0.0), svm=None, nearest=None, maps={}, settings={})


def test_the_result_is_kept_under_its_revision(store: Store, settings: Settings) -> None:
    add_all(store, [reference(number) for number in range(100)])
    follower = following(store, settings)
    follower.load()
    fitted = calibrate(follower, heads(), images(range(1000, 1100)), K)
    assert {"knn", "linear", "knn+linear"} == set(fitted.maps)
    assert (fitted.n_real, fitted.n_fake) == (50, 50)
    add_all(store, [reference(200)])
    saved = store.calibrations.load(CHECKPOINT, heads().id)
    assert saved is not None
    assert (saved.revision, saved.params["k"]) == (1, K)
    again = Calibration.from_json(saved.params)
    assert again.maps == fitted.maps
    assert again.thresholds(0.1, 0.1) == fitted.thresholds(0.1, 0.1)


def test_what_cannot_be_kept_is_used_and_told(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*row: object) -> None:
        raise InternalError("insert into calibration", {}, Exception("read-only\ntransaction"))

    add_all(store, [reference(number) for number in range(100)])
    follower = following(store, settings)
    follower.load()
    monkeypatch.setattr(store.calibrations, "save", read_only)
    assert calibrate(follower, heads(), images(range(1000, 1100)), K).maps
    [record] = [record for record in caplog.records if "not kept" in record.message]
    assert record.message.endswith("used and not kept: read-only transaction")


def test_a_new_revision_changes_what_depends_on_the_index(store: Store, settings: Settings) -> None:
    add_all(store, [reference(number) for number in range(100)])
    follower = following(store, settings)
    follower.load()
    held = images(range(1000, 1100))
    before = calibrate(follower, heads(), held, K)
    add_all(store, [reference(number) for number in range(200, 900)])
    follower.catch_up()
    after = calibrate(follower, heads(), held, K)
    assert after.maps["linear"] == before.maps["linear"]  # fixed by the checkpoint
    assert after.maps["knn"] != before.maps["knn"]
    assert np.median(after.nearest) > np.median(before.nearest)
    saved = [store.calibrations.load(CHECKPOINT, heads().id, revision) for revision in (1, 2)]
    assert all(saved)


def test_relatives_are_left_out(store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The votes that are fitted equal brute force over references of other groups, bytes and pictures."""
    held = images(range(40))
    own = [reference(number, group="elsewhere") for number in range(20)]  # the same bytes
    siblings = [reference(100 + number, group=f"group {number}") for number in range(20, 40)]
    near = [
        reference(
            200 + n, fingerprint=own[n].fingerprint ^ 0b1011, vector=own[n].vector + 0.1 * direction(n + 50, True)
        )
        for n in range(20)
    ]
    others = [reference(number) for number in range(300, 340)]
    rows = own + siblings + near + others
    add_all(store, rows)
    follower = following(store, settings)
    follower.load()
    seen: dict[str, Any] = {}

    def fit(logits: dict[str, np.ndarray], nearest: np.ndarray, **kept: Any) -> Calibration:
        seen.update(logits=logits, nearest=nearest, **kept)
        return Calibration({}, {}, {}, {}, {}, {}, np.empty(0), 0, 0)

    monkeypatch.setattr(module, "fit_calibration", fit)
    calibrate(follower, heads(), held, K)

    stored = unit_length(np.stack([row.vector for row in rows])).astype(np.float16).astype(np.float32)
    similarity = unit_length(held.embeddings) @ stored.T  # (q, n)
    for number in range(20):
        similarity[number, [number, 40 + number]] = np.nan  # its bytes, its near duplicate
        similarity[20 + number, 20 + number] = np.nan  # its group
    labels = np.array([row.label for row in rows])
    generators = np.array([int(str(row.generator)[-1]) if row.label else -1 for row in rows])
    nearest = []
    for label in (0, 1):
        there = np.flatnonzero(labels == label)
        order = np.argsort(-similarity[:, there], axis=1)[:, :K]  # NaN last
        nearest.append(there[order])
    real, fake = (np.take_along_axis(similarity, one, 1) for one in nearest)
    expected = vote(real, fake, generators[nearest[1]], K)
    np.testing.assert_allclose(seen["logits"]["knn"], expected.logit, atol=1e-4)
    np.testing.assert_allclose(seen["nearest"], np.fmax(real[:, 0], fake[:, 0]), atol=1e-5)
    np.testing.assert_allclose(seen["nearest_fake"], fake[:, 0], atol=1e-5)
    assert seen["nearest"].max() < 0.999
    assert (seen["groups"], seen["origins"]) == (held.groups, held.origins)


def test_a_new_generator_teaches_the_combination_to_trust_its_neighbours(store: Store, settings: Settings) -> None:
    """The linear head calls it real; only k-NN can tell, and only its references can show that."""
    add_all(store, [reference(number) for number in range(200)])
    follower = following(store, settings)
    follower.load()
    held = images(range(1000, 1100))
    before = calibrate(follower, heads(), held, K)
    corner = np.where(np.arange(DIM) == 0, 6.0, -2.5)
    fresh = [new(n, "Fresh", vector=(corner + direction(n, True) - 1.5).astype(np.float32)) for n in range(300, 340)]
    add_all(store, fresh)
    follower.catch_up()
    after = calibrate(follower, heads(), held, K)
    assert after.maps["linear"] == before.maps["linear"]
    assert (after.n_real, after.n_fake) == (50, 50 + 17)  # as many as gen-0 has among the calibration images
    trust = [one.maps["knn+linear"].weights[0] / one.maps["knn+linear"].weights[1] for one in (before, after)]
    assert trust[1] > 1.4 * trust[0]

    def called_fake(calibration: Calibration) -> float:
        asked = np.stack([corner + direction(n, True) - 1.5 for n in range(400, 440)])
        real, fake = follower.voters(asked, K)
        votes = vote(real.similarities, fake.similarities, fake.generators, K)
        return float((calibration.combine_many({"knn": votes.logit} | heads().logits(asked)) > 0.5).mean())

    assert called_fake(after) > 0.6
    assert called_fake(before) < 0.2


def test_newcomers_are_as_many_as_known_generators_have(store: Store, settings: Settings) -> None:
    rows = [reference(number) for number in range(20)] + [new(number, "Fresh") for number in range(100, 130)]
    add_all(store, rows)
    follower = following(store, settings)
    follower.load()
    found = newcomers(follower, images(range(1000, 1100)), KNOWN)
    assert found.generators == ["Fresh"] * 17
    assert set(found.sha256) <= {sha256(number) for number in range(100, 130)}
    of = {row.sha256: row.vector for row in rows}
    np.testing.assert_array_equal(found.embeddings, np.stack([of[one] for one in found.sha256]))
    assert len(newcomers(follower, images(range(1000, 1012)), KNOWN)) == 10  # the least that calibrates anything
    assert len(newcomers(follower, images(range(1000, 1100)), KNOWN | {"fresh"})) == 0


def test_generators_that_trained_the_checkpoint_are_not_new(store: Store, settings: Settings) -> None:
    add_all(store, [reference(number) for number in range(40)] + [new(number, "Fresh") for number in range(100, 130)])
    follower = following(store, settings)
    follower.load()
    held = images(range(1000, 1100))
    assert calibrate(follower, heads(), held, K).n_fake == 67
    assert calibrate(follower, heads(), replace(held, trained=["fresh"]), K).n_fake == 50


def test_what_another_method_fitted_is_fitted_anew(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_all(store, [reference(number) for number in range(100)])
    follower = following(store, settings)
    follower.load()
    calibrate(follower, heads(), images(range(1000, 1100)), K)
    assert saved_calibration(follower, heads(), 1, K) is not None
    assert saved_calibration(follower, heads(), 1, K + 1) is None
    monkeypatch.setattr(module, "METHOD", -1)
    assert saved_calibration(follower, heads(), 1, K) is None


def test_a_large_index_is_asked_by_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    held = images(range(100))
    assert affordable(held, 10**9) is held
    monkeypatch.setattr(module, "LEAST_IMAGES", 10)
    monkeypatch.setattr(module, "COMPARISONS", 2_000)
    some = affordable(held, 100)
    assert (len(some), int(some.labels.sum())) == (20, 10)
    again = affordable(held, 100)
    assert some.sha256 == again.sha256
    for row, own in enumerate(some.sha256):
        number = held.sha256.index(own)
        np.testing.assert_array_equal(some.embeddings[row], held.embeddings[number])
        assert (some.labels[row], some.groups[row]) == (held.labels[number], held.groups[number])
    assert len(affordable(held, 1_000)) == 10
    assert len(affordable(images(range(0, 100, 2)), 100)) == 20  # one label only: all of them from there


def test_without_references_of_a_label_the_vote_is_left_out(store: Store, settings: Settings) -> None:
    add_all(store, [reference(number) for number in range(0, 100, 2)])  # reals only
    follower = following(store, settings)
    follower.load()
    fitted = calibrate(follower, heads(), images(range(1000, 1100)), K)
    assert set(fitted.maps) == {"linear"}
    assert len(fitted.nearest) == 100
    assert np.isnan(fitted.nearest_fake["linear"]).all()


def test_relatives_of_images_that_are_no_references(store: Store) -> None:
    assert [one.tolist() for one in related_references(store, [sha256(1)], ["group 1"])] == [[]]
    (first, second) = add_all(store, [reference(1), reference(2, group="group 1")])
    found = related_references(store, [sha256(1), sha256(2), sha256(3)], ["group 9", "group 1", "group 8"])
    assert [one.tolist() for one in found] == [[first], [first, second], []]
    assert related_references(store, [], []) == []


@pytest.mark.parametrize("read_per_lookup", [0, 1_000])
def test_near_duplicates_of_references_are_related(
    store: Store, monkeypatch: pytest.MonkeyPatch, read_per_lookup: int
) -> None:
    """Looked up or compared with all, as it costs less."""
    monkeypatch.setattr("indexer.measure.near_duplicates.READ_PER_LOOKUP", read_per_lookup)
    ids = add_all(
        store, [reference(n, fingerprint=value) for n, value in enumerate((0b1, 0b11110, 0b111111, 0, 1 << 62))]
    )
    related = related_references(store, [sha256(0), sha256(3)], ["none", "none"])
    assert [one.tolist() for one in related] == [sorted([ids[0], ids[4]]), [ids[3]]]


def test_all_fingerprints_come_in_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.measure.near_duplicates.FINGERPRINTS_AT_ONCE", 4)
    rows = [reference(number, fingerprint=None if number == 3 else -number) for number in range(9)]
    ids = add_all(store, rows)
    found, fingerprints = all_fingerprints(store)
    expected = {image: -number for number, image in enumerate(ids) if number != 3}
    assert dict(zip(found.tolist(), fingerprints.tolist(), strict=True)) == expected


def test_similar_fingerprints_lack_no_near_duplicate(store: Store) -> None:
    """However the changed bits fall on the bands, the index answers as a comparison with all references does."""
    rng = np.random.default_rng(0)
    images = rng.integers(-(2**63), 2**63, 3)
    bands = [[bit for bit in range(64) if band >> bit & 1] for band in FINGERPRINT_BANDS]
    fingerprints = [*rng.integers(-(2**63), 2**63, 200).tolist(), 0, None]
    for image, *changed in product(images.tolist(), range(6), range(6), range(6)):
        if sum(changed) <= NEAR_BITS + 1:
            bits = [bit for band, count in zip(bands, changed, strict=True) for bit in rng.choice(band, count, False)]
            flips = np.array([1 << int(bit) for bit in bits], np.uint64).view(np.int64)
            fingerprints.append(int(np.bitwise_xor.reduce(flips, initial=image)))
    add_all(store, [reference(number, fingerprint=value) for number, value in enumerate(fingerprints)])

    def pairs(ids: np.ndarray, values: np.ndarray) -> set[tuple[int, int]]:
        return {(int(ids[row]), image) for row, image, _ in near_duplicates(values, images).tolist()}

    similar = similar_fingerprints(store, np.append(images, 0))
    assert pairs(*similar) == pairs(*all_fingerprints(store))
    assert len(pairs(*similar)) == 3 * 35  # ways to put at most four bits into three bands
    assert len(set(similar[0].tolist())) <= 3 * 56
    assert [len(part) for part in similar_fingerprints(store, np.zeros(1, np.int64))] == [0, 0]


@given(st.integers(0, 10_000))
def test_near_duplicates_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one = rng.integers(-(2**63), 2**63, 30)
    other = np.concatenate([rng.integers(-(2**63), 2**63, 10), one[:15]])
    for row in range(10, 25):  # flip 0 to 7 bits of copies
        for bit in rng.choice(64, rng.integers(0, 8), replace=False):
            other[row] ^= np.int64(np.uint64(1) << np.uint64(bit))
    bits = np.array([[bin((int(a) ^ int(b)) & (2**64 - 1)).count("1") for b in other] for a in one])
    expected = [[int(i), int(j), int(bits[i, j])] for i, j in np.argwhere(bits <= NEAR_BITS)]
    assert near_duplicates(one, other).tolist() == sorted(expected)


def test_flat_pictures_are_no_near_duplicates() -> None:
    none = np.empty(0, np.int64)
    one, flat = np.array([0, 1]), np.array([0, 0, 3])
    assert near_duplicates(one, flat).tolist() == [[1, 2, 1]]
    assert len(near_duplicates(none, flat)) == len(near_duplicates(flat, none)) == 0


def test_of_several_processes_one_fits(store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    add_all(store, [reference(number) for number in range(100)])
    followers = [following(store, settings) for _ in range(3)]
    fits: list[int] = []

    def slowly(*arguments: Any) -> Calibration:
        fits.append(1)
        time.sleep(0.3)  # the others have seen by then that none is saved
        return calibrate(*arguments)

    monkeypatch.setattr(module, "calibrate", slowly)
    for follower in followers:
        follower.load()
    held, linear = images(range(1000, 1100)), heads()
    with ThreadPoolExecutor(3) as threads:
        fitted = list(threads.map(lambda one: shared_calibration(one, linear, held, K), followers))
    assert len(fits) == 1
    assert fitted[0].to_json() == fitted[1].to_json() == fitted[2].to_json()


def test_who_holds_the_lock_for_long_is_not_waited_for(store: Store, settings: Settings) -> None:
    add_all(store, [reference(number) for number in range(100)])
    follower = following(store, settings)
    follower.load()
    event.listen(store.engine, "begin", lambda one: one.exec_driver_sql("set local lock_timeout = '50ms'"))
    with store.engine.connect() as stuck:
        stuck.execute(module.FITTING, {"what": f"calibration {CHECKPOINT} {heads().id} {K}"})
        assert shared_calibration(follower, heads(), images(range(1000, 1100)), K).maps


def test_recalibration_needs_the_same_checkpoint(store: Store, settings: Settings, tmp_path: Path) -> None:
    follower = following(store, settings)
    follower.load()
    assert recalibrate(settings, follower) is None  # no checkpoint at all
    folder = settings.checkpoint_folder
    folder.mkdir(parents=True)
    save_file({"weight": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    write_config(folder, CheckpointConfig(dim=DIM).to_json())
    images(range(1000, 1100)).save(folder)
    heads().save(folder)
    assert recalibrate(settings, follower) is None  # another checkpoint's
    follower.checkpoint_id = checkpoint_id(read_weights(folder), read_config(folder).preprocess)
    store.checkpoints.register(follower.checkpoint_id, "same", DIM, {})
    fitted = recalibrate(settings, follower)
    assert fitted is not None
    assert set(fitted.maps) == {"linear"}


@pytest.mark.parametrize("lacking", ["heads.safetensors", "calibration.safetensors", "every image"])
def test_a_checkpoint_that_lacks_something_is_named_with_the_command_for_it(
    lacking: str, store: Store, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "new one"
    folder.mkdir()
    write_config(folder, CheckpointConfig(dim=DIM).to_json())
    images(range(1000, 1000 if lacking == "every image" else 1100)).save(folder)
    heads().save(folder)
    (folder / lacking).unlink(missing_ok=True)
    follower = following(store, settings)
    follower.load()
    assert recalibrate(settings, follower, folder) is None
    assert f"run `lineup train heads --checkpoint '{folder}' --data IMAGES`" in caplog.text
