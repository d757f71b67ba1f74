"""The index against a plain dictionary and brute force, its guards, its snapshot, and its threads."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from indexer.index import flat, growing, inverted, label_index, vector_index
from indexer.index.index import Neighbours
from indexer.index.inverted import Inverted
from indexer.index.snapshot import BadSnapshot, write_snapshot
from indexer.index.vector_checks import BadVectors
from indexer.index.vector_index import IndexChanged, VectorIndex

DIM = 8
HALF = 2e-3  # two halves round each of 8 products


def unit(seed: int, n: int = 1, dim: int = DIM) -> np.ndarray:
    """Directions that differ clearly from each other, shape (n, dim), float32."""
    x = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    rows: np.ndarray = x / np.linalg.norm(x, axis=1, keepdims=True)
    return rows


def filled(n: int = 300, seed: int = 0) -> tuple[VectorIndex, dict[int, tuple[np.ndarray, int, int, int]]]:
    """An index of n references with ids in no order, and the same as a dictionary."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10 * n)[:n]
    labels = rng.integers(0, 2, n)
    generators = np.where(labels == 1, rng.integers(1, 4, n), -1)
    sources = rng.integers(0, 3, n)
    vectors = unit(seed, n)
    index = VectorIndex(DIM)
    index.add(ids, 7 * vectors, labels, generators, sources)
    rows = zip(ids.tolist(), vectors, labels.tolist(), generators.tolist(), sources.tolist(), strict=True)
    return index, {i: (vector, label, generator, source) for i, vector, label, generator, source in rows}


def agrees(found: Neighbours, k: int, query: np.ndarray, allowed: dict[int, tuple[np.ndarray, int, int, int]]) -> None:
    """One query's answer is the k best of `allowed` by brute force, with their metadata, then padding."""
    expected = sorted((float(query @ vector) for vector, *_ in allowed.values()), reverse=True)[:k]
    n = len(expected)
    np.testing.assert_allclose(found.similarities[0, :n], expected, atol=HALF)
    assert np.isnan(found.similarities[0, n:]).all()
    assert found.ids.shape == (1, k)
    assert len(set(found.ids[0, :n].tolist())) == n
    for rank, number in enumerate(found.ids[0, :n].tolist()):
        vector, label, generator, source = allowed[number]
        assert found.similarities[0, rank] == pytest.approx(float(query @ vector), abs=HALF)
        assert (found.labels[0, rank], found.generators[0, rank], found.sources[0, rank]) == (label, generator, source)
    for column in (found.ids, found.labels, found.generators, found.sources):
        assert (column[0, n:] == -1).all()


@pytest.mark.parametrize("k", [1, 7, 400])
@pytest.mark.parametrize("label", [None, 0, 1])
@pytest.mark.parametrize("generator", [None, 2, 99])
@pytest.mark.parametrize("source", [None, 0])
def test_filters_are_exact_and_give_k_whenever_k_exist(
    k: int, label: int | None, generator: int | None, source: int | None
) -> None:
    index, plain = filled()
    query = unit(1)
    found = index.search(3 * query, k, label=label, generator=generator, source=source)
    allowed = {
        i: entry
        for i, entry in plain.items()
        if (label is None or entry[1] == label)
        and (generator is None or entry[2] == generator)
        and (source is None or entry[3] == source)
    }
    agrees(found, k, query[0], allowed)


@pytest.mark.parametrize("k", [1, 7, 400])
def test_both_labels_in_one_call(k: int) -> None:
    index, plain = filled()
    query = unit(1)
    for exclude in (None, np.array(list(plain)[::2]), np.array([-1, 10**12])):
        for label, found in enumerate(index.search_both(3 * query, (k, k), exclude_ids=exclude)):
            allowed = {
                i: entry for i, entry in plain.items() if entry[1] == label and (exclude is None or i not in exclude)
            }
            agrees(found, k, query[0], allowed)


@pytest.mark.parametrize("many", [3, 250])
def test_each_query_leaves_out_its_own(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.index.label_index.FETCH", 50)  # 250 ids take the other path
    index, plain = filled()
    queries = unit(1, 4)
    ids = list(plain)
    excluded = [np.array(ids[:many]), np.array([], np.int64), np.array(ids[-many:]), np.array([-1, 10**12])]
    hidden = np.array(ids[::3])  # from all of them
    both = index.search_both(queries, (9, 7), exclude_ids=hidden, exclude_each=excluded)
    for label, found in enumerate(both):
        for number, query in enumerate(queries):
            one = Neighbours(*(getattr(found, name)[number : number + 1] for name in Neighbours.__slots__))
            allowed = {
                i: entry
                for i, entry in plain.items()
                if entry[1] == label and i not in hidden and i not in excluded[number]
            }
            agrees(one, (9, 7)[label], query, allowed)


def test_an_empty_index_answers_with_padding() -> None:
    found = VectorIndex(DIM).search(unit(0, 2), 3)
    assert (found.ids == -1).all()
    assert found.ids.shape == (2, 3)
    assert np.isnan(found.similarities).all()
    assert VectorIndex(DIM).search_both(unit(0), (3, 3), exclude_each=[np.array([1])])[1].ids.tolist() == [[-1, -1, -1]]


def test_metadata_of_ids() -> None:
    index, plain = filled()
    ids = np.array([*list(plain)[:5], 10**9])
    labels, generators, sources = index.metadata(ids)
    expected = [plain[i][1:] for i in list(plain)[:5]] + [(-1, -1, -1)]
    assert list(zip(labels.tolist(), generators.tolist(), sources.tolist(), strict=True)) == expected
    fakes = sum(entry[1] for entry in plain.values())
    assert index.counts() == (300 - fakes, fakes)
    less = sum(label for label, *_ in expected[:5])
    assert index.counts(ids) == (300 - fakes - (5 - less), fakes - less)


def test_similarities_stay_within_one() -> None:
    index = VectorIndex(192)
    vectors = unit(3, 500, 192)
    index.add(np.arange(500), vectors, np.zeros(500, int), np.full(500, -1), np.zeros(500, int))
    assert index.search(vectors, 1).similarities.max() <= 1


GOOD = {
    "ids": np.array([1, 2]),
    "vectors": unit(0, 2),
    "labels": np.array([0, 1]),
    "generators": np.array([-1, 3]),
    "sources": np.array([0, 0]),
}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("ids", np.array([1, 1]), "id 1 comes twice"),
        ("ids", np.array([1, 77]), "id 77 is in the index already"),
        ("ids", np.array([-1, 2]), "integers from 0 up"),
        ("ids", np.array([1.0, 2.0]), "integers from 0 up"),
        ("ids", np.array([1]), "another number"),
        ("labels", np.array([0, 2]), "must be 0"),
        ("labels", np.array([0]), "another number"),
        ("sources", np.array([[0, 0]]), "another number"),
        ("vectors", np.array([[1] * DIM, [0] * DIM]), "vector 1 is zero"),
        ("vectors", np.array([[np.nan] * DIM, [1] * DIM]), "vector 0 is zero or not finite"),
        ("vectors", np.array([[1] * DIM, [1] * (DIM - 1) + [np.inf]]), "vector 1 is zero or not finite"),
        ("vectors", np.array([[1e38] * DIM, [1] * DIM]), "vector 0 is zero or not finite"),
        ("vectors", unit(0, 2, DIM + 1), "another checkpoint"),
        ("vectors", unit(0)[0], "another checkpoint"),
    ],
)
def test_what_is_refused_changes_nothing(column: str, value: np.ndarray, message: str) -> None:
    index = VectorIndex(DIM)
    index.add(np.array([77]), unit(5), np.array([0]), np.array([-1]), np.array([0]))
    with pytest.raises(BadVectors, match=message):
        index.add(**(GOOD | {column: value}))
    assert index.ids().tolist() == [77]
    index.add(**GOOD)
    assert index.ids().tolist() == [1, 2, 77]


@pytest.mark.parametrize("query", [np.zeros((1, DIM)), np.full((1, DIM), np.nan), np.ones((1, DIM + 1)), np.ones(DIM)])
def test_bad_queries_are_refused(query: np.ndarray) -> None:
    with pytest.raises(BadVectors):
        filled()[0].search(query, 1)


def test_a_k_below_one_is_refused() -> None:
    with pytest.raises(BadVectors, match="k is 0"):
        filled()[0].search(unit(0), 0)


def test_a_snapshot_gives_back_the_same_index(tmp_path: Path) -> None:
    index, plain = filled()
    index.remove(np.array(list(plain)[:10]))
    index.save(tmp_path / "deep" / "snapshot", {"revision": 5})
    again, header = VectorIndex.load(tmp_path / "deep" / "snapshot")
    assert header == {"revision": 5}
    assert again.counts() == index.counts()
    found, expected = again.search(unit(1, 5), 20), index.search(unit(1, 5), 20)
    for name in Neighbours.__slots__:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert {path.name for path in (tmp_path / "deep").iterdir()} <= {"snapshot", "snapshot.lock"}


def test_a_snapshot_of_another_version_is_refused(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "snapshot", {"dim": 4, "counts": [0, 0], "header": {}}, [])
    with pytest.raises(BadSnapshot, match="another version"):
        VectorIndex.load(tmp_path / "snapshot")


def test_a_snapshot_of_the_first_format_is_refused() -> None:
    with pytest.raises(BadSnapshot, match="not a zip file"):
        VectorIndex.load(Path(__file__).parents[2] / "old" / "snapshot")


def test_no_flipped_bit_gives_another_index(tmp_path: Path) -> None:
    """A bit of what is stored is always noticed; one that says when or where the zip was made changes nothing."""
    index, _ = filled(20)
    path = tmp_path / "snapshot"
    index.save(path, {"revision": 5})
    good = path.read_bytes()
    with ZipFile(path) as archive:
        members = [archive.read(name) for name in archive.namelist()]
    stored = {good.index(member) + offset for member in members for offset in range(len(member))}
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            again, header = VectorIndex.load(path)
        except BadSnapshot:
            continue
        assert position not in stored
        assert header == {"revision": 5}
        for one, other in zip(again._labels, index._labels, strict=True):
            for column, expected in zip(one.state()[1], other.state()[1], strict=True):
                np.testing.assert_array_equal(column, expected)
        for vectors, expected in zip(again.vectors(), index.vectors(), strict=True):
            np.testing.assert_array_equal(vectors, expected)
    for length in (0, 10, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(BadSnapshot):
            VectorIndex.load(path)
    path.unlink()
    with pytest.raises(BadSnapshot, match="does not exist"):
        VectorIndex.load(path)


def test_a_failed_snapshot_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, plain = filled()
    index.save(tmp_path / "snapshot", {"revision": 1})

    def change_meanwhile(path: Path, header: dict[str, Any], arrays: Iterator[np.ndarray]) -> None:
        def changed() -> Iterator[np.ndarray]:
            yield next(arrays)
            index.remove(np.array(list(plain)[:1]))
            yield from arrays

        write_snapshot(path, header, changed())

    monkeypatch.setattr("indexer.index.vector_index.write_snapshot", change_meanwhile)
    with pytest.raises(IndexChanged):
        index.save(tmp_path / "snapshot", {"revision": 2})
    assert VectorIndex.load(tmp_path / "snapshot")[1] == {"revision": 1}
    assert {path.name for path in tmp_path.iterdir()} <= {"snapshot", "snapshot.lock"}


def test_searches_beside_changes_see_whole_rows() -> None:
    """Each reference's source says which vector it has: a search that met rows half moved would not agree."""
    vectors = unit(0, 50)
    index = VectorIndex(DIM)
    fixed = np.arange(50)
    index.add(fixed, vectors, np.zeros(50, int), np.full(50, -1), fixed)
    done = threading.Event()

    def change() -> None:
        for turn in range(400):
            ids = 1_000 + 50 * turn + fixed
            index.add(ids, vectors, fixed % 2, np.full(50, -1), fixed)
            index.remove(ids[::3])
        done.set()

    def look() -> int:
        looked = 0
        while not done.is_set() or not looked:
            for found in index.search_both(vectors, (3, 3), exclude_ids=fixed[:5]):
                there = found.ids >= 0
                own = np.einsum("qkd,qd->qk", vectors[found.sources], vectors)
                np.testing.assert_allclose(found.similarities[there], own[there], atol=HALF)
            looked += 1
        return looked

    with ThreadPoolExecutor(4) as pool:
        lookers = [pool.submit(look) for _ in range(3)]
        pool.submit(change).result()
        assert all(looker.result() for looker in lookers)
    assert len(index) == 50 + 400 * 33


def clustered(n: int = 4_000, seed: int = 0) -> np.ndarray:
    """Directions in 40 clusters, shape (n, 32), float32."""
    centres = unit(99, 40, 32)
    return centres[np.random.default_rng(seed).integers(0, 40, n)] + 0.5 * unit(seed, n, 32)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> VectorIndex:
    """An index whose fakes are too many for flat search; 5 of them are of source 1, ids are their numbers."""
    monkeypatch.setattr(growing, "LARGE", 3_000)
    index = VectorIndex(32)
    n = 4_000
    labels = np.ones(n, int)
    labels[::40] = 0
    sources = np.zeros(n, int)
    sources[1:400:80] = 1
    index.add(np.arange(n), clustered(), labels, np.where(labels, 7, -1), sources)
    assert index.kind == "flat-fp16"
    assert index.grow()
    return index


def exact(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k nearest by brute force, shape (q, k)."""
    similarity = queries @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    order: np.ndarray = np.argsort(-similarity, axis=1)[:, :k]
    return order


def test_a_large_label_is_searched_through_lists(large: VectorIndex) -> None:
    assert (large.kind, large.device) == ("ivf-fp16", "cpu")
    assert [one.engine.kind for one in large._labels] == ["flat-fp16", "ivf-fp16"]
    engine = large._labels[1].engine
    assert isinstance(engine, Inverted)
    assert engine.device == "cpu"
    assert engine.nprobe <= len(engine.centroids) / 2
    assert 0.99 <= large.recall <= 1
    queries = clustered(200, seed=5)
    found = large.search(queries, 20).ids
    hits = [len(set(one) & set(other)) for one, other in zip(found, exact(clustered(), queries, 20), strict=True)]
    assert np.mean(hits) / 20 >= 0.97
    assert not large.grow()  # nothing more to do


def test_lists_filter_exactly(large: VectorIndex) -> None:
    """There are k results whenever k exist, wherever they lie."""
    rare = np.arange(1, 400, 80)
    for query in clustered(20, seed=6):
        found = large.search(query[None], 5, source=1)
        assert sorted(found.ids[0].tolist()) == rare.tolist()
        assert large.search(query[None], 9, source=1).ids[0, 5:].tolist() == [-1] * 4
        _, others = large.search_both(query[None], (1, 3_000), exclude_ids=rare)
        assert not set(others.ids[0].tolist()) & set(rare.tolist())
        assert (large.search(query[None], 3_900, label=1).ids >= 0).all()


def test_a_rare_filter_over_lists_is_exact_through_changes(large: VectorIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Congruence with brute force among its rows, which are compared without looking through lists."""
    vectors = np.concatenate([clustered(), clustered(200, seed=1)])
    rare, queries = list(range(1, 400, 80)), clustered(8, seed=6)
    large.search(queries, 3, source=1)
    large.add(np.arange(4_000, 4_100), vectors[4_000:4_100], np.ones(100, int), np.full(100, 8), np.ones(100, int))
    rare += range(4_000, 4_100)
    large.search(queries, 3, source=1)
    assert large.remove(np.arange(0, 200)) == 200
    rare = [number for number in rare if number >= 200]
    found = large.search(queries, 20, source=1)
    monkeypatch.setattr(Inverted, "search", None)  # nobody calls it from here on
    again, of_both = large.search(queries, 20, source=1), large.search(queries, 20, generator=8, source=1)
    expected = np.array(rare)[exact(vectors[rare], queries, 20)]
    for ids in (found.ids, again.ids):
        assert [set(row) for row in ids.tolist()] == [set(row) for row in expected.tolist()]
    np.testing.assert_array_equal(found.similarities, again.similarities)
    assert (of_both.ids[:, :20] >= 4_000).all()
    assert (large.search(queries, 20, generator=99).ids == -1).all()


def test_copies_of_rare_filters_stay_few(large: VectorIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_index, "RARE", 2)
    label = large._labels[1]
    query, n = clustered(1, seed=6), len(label)
    label.sources = np.arange(n, dtype=np.int32) % 10
    for source in range(10):
        assert (large.search(query, 5, source=source).sources == source).all()
    assert [source for _, source in label._rare] == [0, 1]
    assert 0.2 * n - 2 <= sum(len(vectors) for _, vectors in label._rare.values()) <= n / label_index.COPIES


def test_lists_grow_shrink_and_come_back(large: VectorIndex, tmp_path: Path) -> None:
    vectors = np.concatenate([clustered(), clustered(3_000, seed=1)])
    large.add(np.arange(4_000, 7_000), vectors[4_000:], np.ones(3_000, int), np.ones(3_000, int), np.zeros(3_000, int))
    gone = np.random.default_rng(3).permutation(7_000)[:2_000]
    assert large.remove(gone) == 2_000
    large.save(tmp_path / "snapshot", {})
    again, _ = VectorIndex.load(tmp_path / "snapshot")
    assert (again.kind, again.recall, again.counts()) == (large.kind, large.recall, large.counts())
    left = np.setdiff1d(np.arange(7_000), gone)
    queries = clustered(100, seed=7)
    expected = left[exact(vectors[left], queries, 10)]
    for index in (large, again):
        found = index.search(queries, 10)
        assert np.mean([len(set(one) & set(other)) for one, other in zip(found.ids, expected, strict=True)]) >= 9.5
        ids, stored = index.vectors()
        assert sorted(ids.tolist()) == left.tolist()
        length = np.linalg.norm(vectors[ids], axis=1, keepdims=True)
        np.testing.assert_allclose(stored, vectors[ids] / length, atol=HALF)


def test_lists_are_tuned_again_after_growth(large: VectorIndex) -> None:
    engine = large._labels[1].engine
    assert isinstance(engine, Inverted)
    engine.nprobe, engine.recall = 1, 0.5
    assert not large.grow()
    large.add(
        np.arange(4_000, 8_000), clustered(4_000, 9), np.ones(4_000, int), np.ones(4_000, int), np.zeros(4_000, int)
    )
    assert large.grow()
    assert engine.recall >= inverted.TARGET_RECALL
    assert engine.nprobe > 1


def test_replicas_that_make_lists_at_other_moments_answer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "LARGE", 2_000)
    vectors, ones = clustered(), np.ones(4_000, int)
    answers = []
    for sizes in ((2_100, 2_400, 4_000), (2_950, 3_700, 4_000)):  # 3,000 is the next milestone
        index, start = VectorIndex(32), 0
        for size in sizes:
            rows = np.arange(start, size)
            index.add(rows, vectors[rows], ones[rows], ones[rows], ones[rows])
            index.grow()
            start = size
        engine = index._labels[1].engine
        assert isinstance(engine, Inverted)
        answers.append((index.search(clustered(200, seed=5), 20), engine.nprobe, engine.recall))
    (first, *first_lists), (second, *second_lists) = answers
    assert first_lists == second_lists
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.similarities, second.similarities)


def test_lists_that_win_nothing_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "LARGE", 100)
    index = VectorIndex(64)
    index.add(np.arange(400), unit(0, 400, 64), np.ones(400, int), np.ones(400, int), np.zeros(400, int))
    assert not index.grow()  # evenly spread: the nearest lie in all lists
    assert (index.kind, index.recall) == ("flat-fp16", 1)
    monkeypatch.setattr(Inverted, "trained", lambda *arguments: pytest.fail("tried again before it has grown"))
    assert not index.grow()


@pytest.mark.parametrize("step", ["trained", "tune"])
def test_a_removal_while_lists_are_made_ends_it(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(growing, "LARGE", 100)
    index = VectorIndex(32)
    index.add(np.arange(4_000), clustered(), np.ones(4_000, int), np.ones(4_000, int), np.zeros(4_000, int))
    done = getattr(Inverted, step)

    def remove_meanwhile(*arguments: Any) -> Any:
        index.remove(np.array([17]))
        return done(*arguments)

    monkeypatch.setattr(Inverted, step, remove_meanwhile)
    assert not index.grow()
    assert (index.kind, len(index)) == ("flat-fp16", 3_999)
    monkeypatch.undo()
    monkeypatch.setattr(growing, "LARGE", 100)
    assert index.grow()
    assert index.search(clustered()[17:18], 1).ids[0, 0] != 17


def test_making_lists_is_left_whenever_it_is_asked_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "LARGE", 100)
    monkeypatch.setattr(growing, "ROWS_PER_BLOCK", 500)
    index = VectorIndex(32)
    index.add(np.arange(4_000), clustered(), np.ones(4_000, int), np.ones(4_000, int), np.zeros(4_000, int))
    asked = 0

    def ended(after: float) -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    for after in (0, 5, 10, 60, 130, np.inf):
        asked = 0
        assert index.grow(partial(ended, after)) == (after == np.inf)
        assert index.kind == ("ivf-fp16" if after == np.inf else "flat-fp16")
        assert after == np.inf or asked == after + 1
    assert asked > inverted.ROUNDS + 4_000 / 500 + inverted.lists_for(4_000)  # at each round, block and list


def test_additions_while_lists_are_made_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "LARGE", 100)
    index = VectorIndex(32)
    ones = np.ones(2_000, int)
    index.add(np.arange(2_000), clustered()[:2_000], ones, ones, ones)
    tune = Inverted.tune

    def add_meanwhile(*arguments: Any) -> None:
        index.add(np.arange(2_000, 4_000), clustered()[2_000:], ones, ones, ones)
        tune(*arguments)

    monkeypatch.setattr(Inverted, "tune", add_meanwhile)
    assert index.grow()
    assert (index.kind, len(index)) == ("ivf-fp16", 4_000)
    assert index.search(clustered()[3_000:3_001], 1).ids.tolist() == [[3_000]]


def test_cuda_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(vector_index, "has_gpu", lambda: False)
    assert VectorIndex(DIM, "auto").device == "cpu"
    assert not caplog.records
    assert VectorIndex(DIM, "cuda").device == "cpu"
    assert "sees no GPU" in caplog.text


def test_memory_per_reference_is_under_500_bytes() -> None:
    index = VectorIndex(192, "cpu")
    n = 2_000
    index.add(np.arange(n)[::-1], unit(0, n, 192), np.ones(n, int), np.ones(n, int), np.zeros(n, int))
    fakes = index._labels[1]
    assert fakes._order is not None  # the dearer case
    assert isinstance(fakes.engine, flat.Flat)
    arrays = (fakes.engine.vectors(), fakes.ids, fakes.generators, fakes.sources, fakes._order)
    assert 400 < sum(array.nbytes for array in arrays) / n <= 500


class Comparison(RuleBasedStateMachine):
    """Random sequences of add, remove, search, save and load, against a dictionary."""

    @initialize()
    def start(self) -> None:
        self.index = VectorIndex(DIM)
        self.plain: dict[int, tuple[np.ndarray, int, int, int]] = {}

    @rule(ids=st.sets(st.integers(0, 60), max_size=20), seed=st.integers(0, 1_000))
    def add(self, ids: set[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        fresh = rng.permutation(sorted(ids - self.plain.keys())).astype(np.int64)
        n = len(fresh)
        labels = rng.integers(0, 2, n)
        generators = np.where(labels == 1, rng.integers(-1, 3, n), -1)
        sources = rng.integers(0, 2, n)
        vectors = unit(seed, n)
        self.index.add(fresh, vectors * rng.uniform(0.1, 10, (n, 1)), labels, generators, sources)
        for row in zip(fresh.tolist(), vectors, labels.tolist(), generators.tolist(), sources.tolist(), strict=True):
            self.plain[row[0]] = row[1:]

    @rule(ids=st.sets(st.integers(0, 60), max_size=30))
    def remove(self, ids: set[int]) -> None:
        known = ids & self.plain.keys()
        assert self.index.remove(np.array(sorted(ids), np.int64)) == len(known)
        for number in known:
            del self.plain[number]

    @rule(
        seed=st.integers(0, 1_000),
        k=st.integers(1, 70),
        label=st.none() | st.integers(0, 1),
        generator=st.none() | st.integers(0, 3),
        source=st.none() | st.integers(0, 2),
    )
    def search(self, seed: int, k: int, label: int | None, generator: int | None, source: int | None) -> None:
        query = unit(seed)
        found = self.index.search(query, k, label=label, generator=generator, source=source)
        allowed = {
            i: entry
            for i, entry in self.plain.items()
            if (label is None or entry[1] == label)
            and (generator is None or entry[2] == generator)
            and (source is None or entry[3] == source)
        }
        agrees(found, k, query[0], allowed)

    @rule(
        seed=st.integers(0, 1_000),
        k=st.integers(1, 70),
        exclude=st.none() | st.sets(st.integers(0, 60)),
        exclude_own=st.none() | st.sets(st.integers(0, 60)),
    )
    def search_both(self, seed: int, k: int, exclude: set[int] | None, exclude_own: set[int] | None) -> None:
        query = unit(seed)
        ids, own = (None if one is None else np.array(sorted(one), np.int64) for one in (exclude, exclude_own))
        both = self.index.search_both(query, (k, k), exclude_ids=ids, exclude_each=None if own is None else [own])
        hidden = (exclude or set()) | (exclude_own or set())
        for label, found in enumerate(both):
            allowed = {i: entry for i, entry in self.plain.items() if entry[1] == label and i not in hidden}
            agrees(found, k, query[0], allowed)

    @rule()
    def grow(self) -> None:
        """Into inverted lists, all of which are searched here: then they are exact."""
        self.index.grow()
        for one in self.index._labels:
            if isinstance(one.engine, Inverted):
                one.engine.nprobe = len(one.engine.centroids)

    @rule()
    def restart(self) -> None:
        path = Path(self.folder) / "snapshot"
        self.index.save(path, {"size": len(self.plain)})
        self.index, header = VectorIndex.load(path)
        assert header == {"size": len(self.plain)}

    @invariant()
    def the_same_ids(self) -> None:
        if hasattr(self, "index"):
            assert self.index.ids().tolist() == sorted(self.plain)
            labels, _, _ = self.index.metadata(np.array(sorted(self.plain), np.int64))
            assert labels.tolist() == [self.plain[i][1] for i in sorted(self.plain)]

    folder: str


def test_index_equals_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "LARGE", 8)
    monkeypatch.setattr(inverted, "VECTORS_PER_LIST", 4)
    Comparison.folder = str(tmp_path)
    run_state_machine_as_test(
        Comparison,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not vector_index.has_gpu(), reason="needs a GPU")
def test_gpu_and_cpu_agree() -> None:
    cpu, gpu = VectorIndex(DIM, "cpu"), VectorIndex(DIM, "cuda")
    assert (cpu.device, gpu.device) == ("cpu", "cuda")
    vectors = unit(0, 3_000)
    labels = np.arange(3_000) % 2
    for index in (cpu, gpu):
        index.add(np.arange(3_000), vectors, labels, np.where(labels, np.arange(3_000) % 5, -1), labels)
        index.remove(np.arange(0, 3_000, 7))
    for filters in ({}, {"label": 1}, {"generator": 3}):
        one, other = (index.search(unit(1, 40), 20, **filters) for index in (cpu, gpu))
        np.testing.assert_allclose(one.similarities, other.similarities, atol=HALF)
    both = (index.search_both(unit(1, 40), (20, 20), exclude_ids=np.arange(1_000)) for index in (cpu, gpu))
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one.similarities, other.similarities, atol=HALF)
