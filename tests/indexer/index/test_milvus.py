"""The index in Milvus gives what the index in memory gives.

With LINEUP_TEST_MILVUS a real engine is asked as well, and with LINEUP_MILVUS_LITE, which names the executable
`milvus-lite` of another environment (its FAISS and ours overwrite each other), Milvus Lite.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from milvus_double import DoubleClient, Engine

from indexer.index import milvus as module
from indexer.index.index import Neighbours
from indexer.index.milvus import EngineAway, EngineUrl, Milvus, MilvusIndex, Stamp, WrongEngine
from indexer.index.vector_checks import BadVectors
from indexer.index.vector_index import VectorIndex

DIM, N = 16, 120
SOURCES = ["plain", 'with "quotes"', "back\\slash", "line\r\nfeed\tü"]
DOUBLE = "milvus+http://double:19530"
LITE = "lite"
SERVERS = [DOUBLE, *filter(None, [os.environ.get("LINEUP_TEST_MILVUS")])]
ENGINES = [*SERVERS, LITE]


def connected(url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Milvus:
    """The engine behind a url."""
    if url.startswith(DOUBLE):
        monkeypatch.setitem(sys.modules, "pymilvus", engine.library)
    return Milvus(url)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a Milvus Lite."""
    program = os.environ.get("LINEUP_MILVUS_LITE")
    if program is None:
        pytest.skip("LINEUP_MILVUS_LITE names no milvus-lite")
    pytest.importorskip("pymilvus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(tmp_path_factory.mktemp("lite"))
    command = [program, "server", "--data-dir", folder, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, deadline = f"milvus+http://127.0.0.1:{port}", time.monotonic() + 180
    try:
        while True:
            try:
                Milvus(url).ping()
                break
            except EngineAway:
                assert time.monotonic() < deadline, "Milvus Lite did not start"
                time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=ENGINES)
def pair(
    request: pytest.FixtureRequest, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[MilvusIndex, VectorIndex]]:
    """The same references in both, which half precision holds exactly, so that both agree on the order."""
    url = request.getfixturevalue("lite") if request.param == LITE else request.param
    milvus = connected(url, engine, monkeypatch)
    collection = milvus.create("lineup_test", DIM)
    rng = np.random.default_rng(0)
    vectors, ids = rng.choice([-1.0, 1.0], (N, DIM)), np.arange(N) * 3
    labels, generators = (np.arange(N) % 3 > 0).astype(int), np.arange(N) % 4
    generators[labels == 0] = -1
    sources = np.arange(N) % len(SOURCES)
    memory = VectorIndex(DIM, "cpu")
    memory.add(ids, vectors, labels, generators, sources)
    for label in (0, 1):
        of = labels == label
        names = [SOURCES[number] for number in sources[of]]
        milvus.upsert(collection, label, ids[of], vectors[of], generators[of], names)
    milvus.settle(collection)
    timestamp = milvus.mark(collection, "1 None", DIM)
    index = MilvusIndex(milvus, DIM)
    index.stamp = Stamp(collection, timestamp, milvus.counts(collection, 0), milvus.counts(collection, 1), 1.0)
    yield index, memory
    milvus.drop(collection)


def assert_same(index: MilvusIndex, ours: Neighbours, theirs: Neighbours) -> None:
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_allclose(ours.similarities, theirs.similarities, atol=2e-3)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_array_equal(ours.generators, theirs.generators)
    names = [index.source_names.get(number) for number in ours.sources.ravel().tolist()]
    assert names == [SOURCES[number] if number >= 0 else None for number in theirs.sources.ravel().tolist()]


def test_it_finds_what_memory_finds(pair: tuple[MilvusIndex, VectorIndex]) -> None:
    index, memory = pair
    queries = np.random.default_rng(1).standard_normal((5, DIM)).astype(np.float32)
    assert index.counts() == memory.counts()
    assert len(index) == len(memory) == N
    for filters in ({}, {"label": 0}, {"label": 1}, {"generator": 2}, {"generator": 99}):
        assert_same(index, index.search(queries, 7, **filters), memory.search(queries, 7, **filters))
    for number, source in enumerate(SOURCES):
        ours = index.search(queries, 7, source=index.number(source), label=1)
        assert_same(index, ours, memory.search(queries, 7, source=number, label=1))
    assert index.number("never seen") == -2
    assert (index.search(queries, 3, source=-2).ids == -1).all()
    # more than there are
    assert_same(index, index.search(queries, N + 5), memory.search(queries, N + 5))


@pytest.mark.parametrize("url", SERVERS)
def test_control_characters_are_escaped(url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Milvus Lite has no way to write them."""
    milvus = connected(url, engine, monkeypatch)
    collection = milvus.create("lineup_test", DIM)
    milvus.upsert(collection, 0, np.array([7]), np.ones((1, DIM)), np.array([-1]), ["\x01"])
    index = MilvusIndex(milvus, DIM)
    index.stamp = Stamp(collection, milvus.mark(collection, "1 None", DIM), 1, 0, 1.0)
    assert index.search(np.ones((1, DIM)), 1, source=index.number("\x01")).ids.tolist() == [[7]]
    milvus.drop(collection)


def test_both_labels_without_what_is_excluded(
    pair: tuple[MilvusIndex, VectorIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, memory = pair
    queries = np.random.default_rng(2).standard_normal((4, DIM)).astype(np.float32)
    nearest = memory.search(queries, 12).ids
    few = [nearest[0, :3], np.empty(0, np.int64), nearest[2, :1], np.array([10_000])]
    many = [nearest[0], nearest[1, :2], np.empty(0, np.int64), nearest[3]]
    options: dict[str, Any]
    for options in (
        {},
        {"exclude_ids": nearest[:, :2].ravel()},
        {"exclude_each": few},
        {"exclude_each": many, "exclude_ids": nearest[0, :1]},
    ):
        for fetch in (module.FETCH, 2):
            monkeypatch.setattr(module, "FETCH", fetch)
            ours = index.search_both(queries, (3, 5), **options)
            theirs = memory.search_both(queries, (3, 5), **options)
            for one, other in zip(ours, theirs, strict=True):
                assert_same(index, one, other)
    excluded = np.unique(nearest[:, :4])
    assert index.counts(excluded) == memory.counts(excluded)


def test_an_index_without_references_finds_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    index = MilvusIndex(connected(DOUBLE, engine, monkeypatch), DIM)
    real, fake = index.search_both(np.ones((2, DIM)), (3, 4))
    assert (real.ids.shape, fake.ids.shape) == ((2, 3), (2, 4))
    assert (real.ids == -1).all()
    assert np.isnan(fake.similarities).all()
    assert (len(index), index.counts(), index.recall) == (0, (0, 0), 1.0)


def test_bad_queries_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    index = MilvusIndex(connected(DOUBLE, engine, monkeypatch), DIM)
    for vectors in (np.ones((1, DIM + 1)), np.zeros((1, DIM)), np.full((1, DIM), np.nan)):
        with pytest.raises(BadVectors):
            index.search(vectors, 3)
    with pytest.raises(BadVectors, match="k is 0"):
        index.search(np.ones((1, DIM)), 0)


def test_rounded_vectors_are_scored_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose similarities are coarse puts the fifth nearest first; more are fetched, and scored exactly."""
    monkeypatch.setattr(DoubleClient, "_distance", lambda self, query, vector: round(float(query @ vector), 1))
    milvus = connected(f"{DOUBLE}?index=IVF_SQ8", engine, monkeypatch)
    collection = milvus.create("lineup_test", 2)
    angles = np.array([0.3, 0.2, 0.1, 0.05, 0.0, 1.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    milvus.upsert(collection, 0, np.arange(6), vectors, np.full(6, -1), ["s"] * 6)
    index = MilvusIndex(milvus, 2)
    index.stamp = Stamp(collection, milvus.mark(collection, "1 None", 2), 6, 0, 1.0)
    nearest = index.search(np.array([[1.0, 0.0]]), 2)
    assert nearest.ids.tolist() == [[4, 3]]
    np.testing.assert_allclose(nearest.similarities, np.cos([[0.0, 0.05]]), atol=1e-6)


def test_rows_that_get_no_lists_are_not_waited_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(module, "LOAD_SECONDS", 0)
    engine.pending = [7, 9, 7]
    milvus = connected(DOUBLE, engine, monkeypatch)
    collection = milvus.create("lineup_test", DIM)
    milvus.settle(collection)
    assert caplog.messages == [f"9 rows of {collection} still have no lists: its searches are slow until they do"]


def test_a_search_names_the_time_of_the_mark(pair: tuple[MilvusIndex, VectorIndex], engine: Engine) -> None:
    index, _ = pair
    if not engine.clock:
        pytest.skip("a real engine does not tell what it was asked")
    engine.guarantees.clear()
    index.search(np.ones((1, DIM)), 1)
    assert index.stamp is not None
    assert engine.guarantees == [index.stamp.timestamp] * 2 == [engine.clock] * 2


def test_an_engine_that_is_away_is_asked_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    milvus = connected(DOUBLE, engine, monkeypatch)
    collection = milvus.create("lineup_test", DIM)
    index = MilvusIndex(milvus, DIM)
    index.stamp = Stamp(collection, 0, 1, 1, 1.0)
    engine.down = True
    with pytest.raises(EngineAway, match=r"http://double:19530 does not answer \(the double is down\).*LINEUP_INDEX"):
        index.search(np.ones((1, DIM)), 1)
    engine.down = False
    with pytest.raises(EngineAway, match="is away"):
        index.search(np.ones((1, DIM)), 1)
    milvus.ping()
    index.search(np.ones((1, DIM)), 1)


def test_an_engine_that_refuses_one_call_is_not_away(pair: tuple[MilvusIndex, VectorIndex]) -> None:
    index, _ = pair
    assert index.stamp is not None
    with pytest.raises(EngineAway, match="refuses"):
        index.engine.search(index.stamp.collection, np.ones((1, DIM)), 1, 0, filter='source == "')
    index.search(np.ones((1, DIM)), 1)


@pytest.mark.parametrize(
    ("url", "address", "token", "index"),
    [
        ("milvus+http://host", "http://host:19530", "", "IVF_FLAT"),
        ("milvus+https://a:b%40c@host:1?index=IVF_SQ8", "https://host:1", "a:b@c", "IVF_SQ8"),
    ],
)
def test_a_url_is_taken_apart(url: str, address: str, token: str, index: str) -> None:
    assert EngineUrl.parse(url) == EngineUrl(address, token, index)


@pytest.mark.parametrize("url", ["milvus+http://h?index=PQ", "milvus+http://h?kind=IVF_FLAT"])
def test_an_unknown_index_is_refused(url: str) -> None:
    with pytest.raises(WrongEngine, match=r"only \?index=IVF_FLAT or"):
        EngineUrl.parse(url)


@pytest.mark.parametrize("url", ["milvus+http://user:secret@h:abc", "milvus+http://h:99999", "milvus+http://:1"])
def test_what_names_no_host_and_port_is_refused(url: str) -> None:
    with pytest.raises(WrongEngine, match=r"^LINEUP_INDEX is wrong: not a URL like .*host:19530$"):
        EngineUrl.parse(url)


@pytest.mark.parametrize("version", ["v2.2.16", "0.9", "weaviate 1.2"])
def test_another_version_is_refused(version: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.version = version
    with pytest.raises(WrongEngine, match=r"is Milvus .*, 2\.3 or later is needed: update it, or unset LINEUP_INDEX"):
        connected(DOUBLE, engine, monkeypatch).check()


def test_the_client_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(WrongEngine, match=r'pip install "lineup\[milvus\]"'):
        Milvus(DOUBLE)


def test_a_collection_of_another_dimension_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    milvus = connected(DOUBLE, engine, monkeypatch)
    collection = milvus.create("lineup_test", DIM)
    assert milvus.holds(collection, DIM)
    assert not milvus.holds("lineup_other", DIM)
    with pytest.raises(
        WrongEngine, match=f"vectors of {DIM} numbers, the checkpoint's have 9: run lineup index rebuild"
    ):
        milvus.holds(collection, 9)
