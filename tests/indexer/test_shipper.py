"""What is in the engine equals the rows, whoever ships, whatever is killed."""

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import psycopg
import pytest
from milvus_double import Engine
from numbered import CHECKPOINT, DIM, add, opened, vector
from sqlalchemy import text

from indexer import milvus_copy, shipper
from indexer.follower import Follower
from indexer.index import milvus
from indexer.index.milvus import EngineAway, Milvus
from indexer.measure.check import compare
from indexer.milvus_copy import MilvusCopy
from indexer.settings import Settings
from indexer.shipper import AlreadyRebuilding, Ended, Shipper
from indexer.store import Store
from indexer.store.changes import Additions, Removals

URL = "milvus+http://double:19530"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setitem(sys.modules, "pymilvus", engine.library)
    monkeypatch.setattr(shipper, "GRACE", 0.0)
    monkeypatch.setattr(milvus_copy, "PATIENCE", 0.2)
    return engine


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = opened(settings)
    yield store
    store.engine.dispose()


@pytest.fixture
def start(store: Store, engine: Engine) -> Iterator[Callable[[], Shipper]]:
    """Starts processes that might lead, and ends those that have not been."""
    shippers: list[Shipper] = []

    def start() -> Shipper:
        shippers.append(Shipper(store, Milvus(URL), CHECKPOINT, DIM))
        return shippers[-1]

    yield start
    for one in shippers:
        one.resign()


def followed(store: Store, settings: Settings) -> Follower:
    follower = Follower(settings.model_copy(update={"index": URL}), store, CHECKPOINT, DIM)
    follower.load()
    return follower


def shipping(follower: Follower) -> Shipper:
    """A follower's part in it."""
    assert isinstance(follower.copy, MilvusCopy)
    return follower.copy.shipper


def take_over(shipper: Shipper) -> None:
    """Lead as soon as the server has noticed that the last leader is gone."""
    deadline = time.monotonic() + 20
    while not shipper.lead():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_equal(engine: Engine, store: Store) -> None:
    """The published collection holds exactly the rows, at the latest revision."""
    shipment = store.shipments.latest(CHECKPOINT)
    assert shipment is not None
    assert shipment.position == store.changes.position(CHECKPOINT, shipment.position)[0]
    rows = engine.rows(shipment.collection)
    assert sorted(rows) == store.changes.embedded_ids(CHECKPOINT).tolist()
    assert len(shipment) == len(rows)
    assert list(engine.collections) == [shipment.collection]


def test_revisions_are_shipped_in_order(store: Store, engine: Engine, start: Callable[[], Shipper]) -> None:
    one = start()
    assert one.lead()
    first = add(store, 1, 2)
    one.ship()
    second = add(store, 3, generator="gen-a")
    store.references.remove(ids=first[:1])
    third = add(store, 4, source="elsewhere")
    engine.log.clear()
    one.ship()
    assert (
        [(call, ids) for call, _, ids in engine.log]
        == [
            ("upsert", [-1]),
            ("upsert", third),  # labels apart
            ("upsert", second),
            ("delete", first[:1]),
            ("upsert", [-1]),
        ]
    )
    shipment = store.shipments.latest(CHECKPOINT)
    assert shipment is not None
    assert (shipment.timestamp, shipment.real, shipment.fake) == (engine.clock, 2, 1)
    row = engine.rows(shipment.collection)[third[0]]
    assert (row["label"], row["generator"], row["source"]) == (0, -1, "elsewhere")
    np.testing.assert_allclose(row["vector"], vector(4) / np.linalg.norm(vector(4)), atol=1e-6)
    engine.log.clear()
    one.ship()
    assert not engine.log  # nothing is written twice
    assert_equal(engine, store)


def test_one_leads_and_another_takes_over(store: Store, engine: Engine, start: Callable[[], Shipper]) -> None:
    one, other = start(), start()
    assert one.lead()
    assert one.lead()
    assert not other.lead()
    add(store, 1)
    one.ship()
    one.resign()
    take_over(other)
    assert not one.lead()
    add(store, 2)
    other.ship()
    assert_equal(engine, store)


def test_a_leader_without_its_lock_publishes_nothing(
    store: Store, engine: Engine, start: Callable[[], Shipper]
) -> None:
    one, other = start(), start()
    assert one.lead()
    add(store, 1)
    one.ship()
    before = store.shipments.latest(CHECKPOINT)
    with store.engine.begin() as connection:
        ended = connection.execute(
            text("select pg_terminate_backend(pid) from pg_stat_activity where application_name like '%shipper'")
        )
        assert ended.all()
    take_over(other)
    add(store, 2)
    with pytest.raises(psycopg.OperationalError):
        one.ship()
    assert store.shipments.latest(CHECKPOINT) == before
    other.ship()
    assert_equal(engine, store)


def test_a_leader_that_loses_its_lock_while_it_reads_writes_nothing_more(
    store: Store, engine: Engine, start: Callable[[], Shipper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read a row which the next leader removes before it goes on."""
    one, other = start(), start()
    assert one.lead()
    add(store, 1)
    one.ship()
    ids = add(store, 2)
    between = store.changes.between

    def overtaken(*arguments: Any, page: int) -> Iterator[Additions | Removals]:
        monkeypatch.setattr(store.changes, "between", between)
        pages = list(between(*arguments, page=page))
        with store.engine.begin() as connection:
            connection.execute(
                text("select pg_terminate_backend(pid) from pg_stat_activity where application_name like '%shipper'")
            )
        take_over(other)
        store.references.remove(ids=ids)
        other.ship()
        yield from pages

    monkeypatch.setattr(store.changes, "between", overtaken)
    with pytest.raises(psycopg.OperationalError):
        one.ship()
    assert_equal(engine, store)
    assert not one.leads


def test_a_row_that_comes_after_its_removal_is_deleted_again(
    store: Store, engine: Engine, start: Callable[[], Shipper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine carries out what an earlier leader asked when the next one has removed the row already."""
    one, other = start(), start()
    one.lead()
    ids = add(store, 1, 2, 3)
    one.ship()
    one.resign()
    shipment = store.shipments.latest(CHECKPOINT)
    assert shipment is not None
    rows = dict(engine.rows(shipment.collection))
    store.references.remove(ids=ids[:2])
    monkeypatch.setattr(shipper, "SETTLED", 0.1)
    take_over(other)
    other.ship()
    engine.collections[shipment.collection]["real"] |= {ids[0]: rows[ids[0]]}
    time.sleep(0.1)
    other.ship()
    assert_equal(engine, store)
    engine.log.clear()
    other.ship()
    assert not engine.log  # not for ever


@pytest.mark.parametrize("writes", range(6))
def test_what_was_half_shipped_is_shipped_again(
    store: Store, engine: Engine, start: Callable[[], Shipper], writes: int
) -> None:
    one = start()
    one.lead()
    removed, *_ = add(store, 1, 2)
    one.ship()
    before = store.shipments.latest(CHECKPOINT)
    late, *_ = add(store, 3, generator="gen-a")
    add(store, 4)
    store.references.remove(ids=[removed])
    engine.writes_left = writes
    if writes < 5:
        with pytest.raises(EngineAway):
            one.ship()
        assert store.shipments.latest(CHECKPOINT) == before  # a search still names the time of what is whole
    one.resign()
    engine.down, engine.writes_left = False, None
    store.references.remove(ids=[late])  # what the killed leader may have written
    other = start()
    take_over(other)
    other.ship()
    assert_equal(engine, store)


def test_a_collection_that_is_gone_is_loaded_anew(store: Store, engine: Engine, start: Callable[[], Shipper]) -> None:
    one = start()
    one.lead()
    add(store, 1, 2)
    one.ship()
    engine.collections.clear()
    add(store, 3)
    with pytest.raises(EngineAway):
        one.ship()
    one.ship()
    assert_equal(engine, store)


def test_another_history_is_loaded_anew(store: Store, engine: Engine, start: Callable[[], Shipper]) -> None:
    """A backup that was restored has other rows behind the numbers that the engine's mark names."""
    one = start()
    one.lead()
    add(store, 1)
    one.ship()
    ghosts = add(store, 2, 3)
    before = store.shipments.latest(CHECKPOINT)
    one.ship()
    one.resign()
    with store.engine.begin() as connection:  # as the backup has it: what came after revision 1 never was
        connection.execute(text("delete from embedding where revision > 1"))
        connection.execute(text("delete from reference_image where id = any(:ids)"), {"ids": ghosts})
        connection.execute(text("delete from timeline where revision > 1"))
        connection.execute(text("update index_revision set revision = 1"))
        assert before is not None
        values = {"timestamp": before.timestamp, "revision": 1, "nonce": before.position.nonce}
        connection.execute(text("update shipment set revision=:revision, nonce=:nonce, timestamp=:timestamp"), values)
    add(store, 4)
    other = start()
    take_over(other)
    other.ship()
    assert_equal(engine, store)


def test_a_rebuild_switches_under_a_writer(
    store: Store, engine: Engine, start: Callable[[], Shipper], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come and go while the new collection is loaded, by a process that does not lead."""
    leader, one = start(), start()
    leader.lead()
    first = add(store, *range(1, 6))
    leader.ship()
    old = store.shipments.latest(CHECKPOINT)
    assert old is not None
    leftover = one.engine.create(old.collection.rpartition("_")[0], DIM)
    loaded: list[int] = []

    def write_meanwhile(rows: int) -> None:
        loaded.append(rows)
        if len(loaded) <= 2:
            add(store, 10 + len(loaded), generator="gen-a")
            store.references.remove(ids=first[len(loaded) : len(loaded) + 1])
            leader.ship()

    shipment = one.rebuild(write_meanwhile)
    assert shipment.collection not in (old.collection, leftover)
    assert list(engine.aliases.values()) == [shipment.collection]
    assert sum(loaded) == 7
    assert_equal(engine, store)
    add(store, 20)
    leader.ship()
    assert_equal(engine, store)
    assert store.shipments.latest(CHECKPOINT) != shipment


def test_recall_is_of_the_lists(
    store: Store, engine: Engine, start: Callable[[], Shipper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(Milvus, "recall", lambda *arguments: 0.9 if engine.settled else 1.0)
    engine.pending = [3, 3, 1]
    add(store, 1, 2, 3)
    assert start().rebuild().recall == 0.9
    assert not engine.pending


def test_a_load_ends_between_two_pages(
    store: Store, settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipper, "ROWS", 1)
    follower, over, between = (
        Follower(settings.model_copy(update={"index": URL}), store, CHECKPOINT, DIM),
        threading.Event(),
        store.changes.between,
    )

    def ending(*arguments: Any, page: int) -> Iterator[Additions | Removals]:
        for change in between(*arguments, page=page):
            yield change
            over.set()

    monkeypatch.setattr(store.changes, "between", ending)
    add(store, *range(1, 6))
    follower.copy.keep(over, 0.02)
    assert store.shipments.latest(CHECKPOINT) is None
    assert [len(engine.rows(name)) for name in engine.collections] == [1]
    with pytest.raises(Ended):
        shipping(follower).rebuild()
    shipping(follower).resign()
    monkeypatch.setattr(store.changes, "between", between)
    followed(store, settings)
    assert_equal(engine, store)


def test_a_load_ends_while_lists_are_made(
    store: Store, engine: Engine, start: Callable[[], Shipper], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, 1)
    one, engine.pending = start(), [1]
    monkeypatch.setattr(one, "end", SimpleNamespace(is_set=lambda: False, wait=lambda seconds: True))
    with pytest.raises(Ended, match="made its lists"):
        one.rebuild()
    assert store.shipments.latest(CHECKPOINT) is None


def test_two_rebuilds_do_not_meet(store: Store, engine: Engine, start: Callable[[], Shipper]) -> None:
    add(store, 1)

    def rebuild_too(rows: int) -> None:
        with pytest.raises(AlreadyRebuilding, match="wait until it has ended"):
            start().rebuild()

    start().rebuild(rebuild_too)
    assert_equal(engine, store)


def test_a_follower_asks_the_engine(store: Store, settings: Settings, engine: Engine) -> None:
    (real,) = add(store, 1)
    (fake,) = add(store, 2, generator="Gen-A", source="elsewhere")
    leading, follower = followed(store, settings), followed(store, settings)
    assert follower.revision == 2
    query = vector(2)[None]
    (found,) = follower.search(query, 5)
    assert [tuple(one[:4]) for one in found] == [(fake, 1, "Gen-A", "elsewhere"), (real, 0, None, "tests")]
    other = followed(store, settings)
    assert [one.id for one in other.search(query, 5, source="elsewhere")[0]] == [fake]
    assert other.search(query, 5, source="nowhere") == other.search(query, 5, generator="nobody") == [[]]
    assert [one.ids.tolist() for one in follower.voters(query, 2)] == [[[real]], [[fake]]]
    add(store, 3)
    assert follower.catch_up() == 2  # who leads has not shipped it yet
    assert (follower.degraded, follower.away, follower.engine_away) == (False, True, False)
    assert follower.catch_up() == 2
    assert follower.lag >= 2 * milvus_copy.PATIENCE
    take_over(shipping(leading))
    assert leading.catch_up() == follower.catch_up() == 3
    assert not follower.away
    assert len(follower.index) == 3
    shipping(leading).resign()


@pytest.mark.parametrize("index", [None, URL])
def test_a_load_tells_of_its_rows(store: Store, settings: Settings, engine: Engine, index: str | None) -> None:
    add(store, 1, 2, 3)
    rows: list[int] = []
    Follower(settings.model_copy(update={"index": index}), store, CHECKPOINT, DIM).load(anew=True, on_rows=rows.append)
    assert sum(rows) == 3


def test_the_engine_may_be_away_and_come_back(
    store: Store, settings: Settings, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    add(store, 1)
    engine.down = True
    follower = followed(store, settings)  # a service starts all the same
    with pytest.raises(EngineAway):
        follower.voters(vector(1)[None], 2)
    assert "does not answer" in caplog.text
    assert (follower.degraded, follower.away, follower.engine_away) == (False, True, True)
    engine.down = False
    take_over(shipping(follower))
    assert follower.catch_up() == 1
    assert follower.voters(vector(1)[None], 1)[0].ids.tolist() == [[1]]
    assert caplog.text.count("is back") == 1
    assert (follower.away, follower.engine_away) == (False, False)
    engine.down = True
    assert follower.catch_up() == 1  # though nothing was written or searched
    assert (follower.away, follower.engine_away) == (True, True)
    shipping(follower).resign()


def test_background_work_ships(store: Store, settings: Settings, engine: Engine) -> None:
    follower, over = followed(store, settings), threading.Event()
    thread = threading.Thread(target=follower.copy.keep, args=(over, 0.02))
    thread.start()
    try:
        add(store, 1, 2)
        while follower.catch_up() < 1:
            assert thread.is_alive()
    finally:
        over.set()
        thread.join()
    assert_equal(engine, store)


def test_following_does_not_wait_for_a_load(store: Store, settings: Settings, engine: Engine) -> None:
    follower = followed(store, settings)
    take_over(shipping(follower))
    add(store, 1)
    thread = threading.Thread(target=follower.catch_up)
    with shipping(follower).working:  # as the thread that loads a collection holds it
        thread.start()
        thread.join(3)
        waits = thread.is_alive()
    thread.join()
    assert not waits
    assert follower.catch_up() == 1
    shipping(follower).resign()


def test_check_tells_rows_and_engine_apart(store: Store, settings: Settings, engine: Engine) -> None:
    settings = settings.model_copy(update={"index": URL})
    add(store, *range(1, 6))
    checkpoint = store.checkpoints.require(CHECKPOINT)
    assert compare(settings, store, checkpoint).problems == []
    (partitions,) = engine.collections.values()
    rows = partitions["real"]
    ghost = rows[max(rows)] | {"id": 1000}
    del rows[min(rows)]
    rows[1000] = ghost
    rows[3] = rows[3] | {"source": "another"}
    problems = compare(settings, store, checkpoint).problems
    assert problems == [
        "1 rows are not in the index, 1 for one",
        "1 vectors of the index have no row",
        "1 vectors of the index differ from their rows",
    ]


def test_random_kills_leave_what_the_rows_say(store: Store, engine: Engine, start: Callable[[], Shipper]) -> None:
    """A model of processes that are killed between any two writes, an engine that goes away, and a writer beside."""
    rng, numbers, ids = random.Random(0), iter(range(1, 1000)), list[int]()
    leader = start()
    assert leader.lead()
    leader.ship()  # what follows adds to this collection, and loads no other
    for _ in range(40):
        for _ in range(rng.randrange(3)):
            ids += add(store, *(next(numbers) for _ in range(rng.randrange(1, 4))), generator=rng.choice([None, "g"]))
        if ids and rng.random() < 0.5:
            store.references.remove(ids=[ids.pop(rng.randrange(len(ids)))])
        engine.writes_left = rng.randrange(8)
        try:
            take_over(leader)
            leader.ship()
        except EngineAway:
            pass
        engine.down, engine.writes_left = False, None
        if rng.random() < 0.5:
            leader.resign()
            leader = start()
    take_over(leader)
    leader.ship()
    assert sum(call == "delete" for call, _, _ in engine.log) > 5
    assert_equal(engine, store)
