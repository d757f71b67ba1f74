"""A follower's index equals the rows, through concurrent writers, outages, restored backups and damaged snapshots."""

import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numbered import CHECKPOINT, DIM, add, add_all, following, in_memory, new, opened, vector
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from indexer import follower as module
from indexer import memory_copy
from indexer.database import connection as database
from indexer.database.connection import AnsweringConnection, connect
from indexer.database.embedded import EmbeddedServer
from indexer.follower import Follower
from indexer.index import growing
from indexer.index.inverted import Inverted
from indexer.index.vector_index import VectorIndex
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.changes import Additions


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for a condition; fails after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def assert_equal(follower: Follower, store: Store) -> None:
    """The index holds exactly the rows: ids, vectors, labels, generators and sources."""
    rows: dict[int, tuple[Any, ...]] = {}
    for change in store.changes.between(CHECKPOINT, 0, store.checkpoints.revision(CHECKPOINT)):
        if isinstance(change, Additions):
            columns = (change.ids.tolist(), change.vectors, change.labels.tolist(), change.generators.tolist())
            for number, raw, label, generator, source in zip(*columns, change.sources, strict=True):
                rows[number] = raw / np.linalg.norm(raw), label, generator, source
    held = follower.copy.contents()
    assert held.ids.tolist() == sorted(rows)
    contents = (held.ids.tolist(), held.vectors, held.labels.tolist(), held.generators.tolist(), held.sources)
    for number, unit, *facts in zip(*contents, strict=True):
        np.testing.assert_allclose(unit, rows[number][0], atol=1e-3)
        assert tuple(facts) == rows[number][1:]


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = opened(settings)
    yield store
    store.engine.dispose()


@pytest.fixture
def started(store: Store, settings: Settings) -> Iterator[Follower]:
    """A follower that runs in the background."""
    follower = following(store, settings)
    follower.load()
    follower.start()
    yield follower
    follower.stop()


def test_an_empty_store_is_followed(store: Store, settings: Settings) -> None:
    follower = following(store, settings)
    assert follower.load() == 0
    assert follower.search(vector(0)[None], 3) == [[]]


def test_additions_and_removals_are_applied(store: Store, settings: Settings) -> None:
    follower = following(store, settings)
    first = add(store, 1, 2, 3)
    add(store, 4, generator="gen-a", source="elsewhere")
    assert follower.load() == 2
    assert_equal(follower, store)
    store.references.remove(ids=first[:2])
    add(store, 5, generator="gen-b")
    assert follower.catch_up() == store.checkpoints.revision(CHECKPOINT) == 4
    assert len(follower.index) == 3
    assert_equal(follower, store)


def test_a_search_gives_names(store: Store, settings: Settings) -> None:
    (real,) = add(store, 1)
    (fake,) = add(store, 2, generator="Gen-A", source="elsewhere")
    follower = following(store, settings)
    follower.load()
    query = vector(2)[None]
    (found,) = follower.search(query, 5)
    assert [tuple(one[:4]) for one in found] == [(fake, 1, "Gen-A", "elsewhere"), (real, 0, None, "tests")]
    assert found[0].similarity == pytest.approx(1, abs=1e-3)

    def ids(**filters: Any) -> list[int]:
        return [one.id for one in follower.search(query, 5, **filters)[0]]

    assert ids(generator="gen-a") == ids(source="elsewhere") == ids(label=1) == [fake]
    assert ids(source="ELSEWHERE") == ids(generator="gen") == ids(source="") == []
    both = follower.voters(query, 2)
    assert [one.ids.tolist() for one in both] == [[[real]], [[fake]]]
    (third,) = add(store, 3, generator="gen-a")
    follower.catch_up()
    assert [one.ids.tolist() for one in follower.voters(query, 1)] == [[[real]], [[fake, third]]]  # equally deep
    masked = follower.voters(query, 1, exclude_ids=np.array([fake]))
    assert [one.ids.tolist() for one in masked] == [[[real]], [[third]]]


def test_a_renamed_generator_has_its_new_name(store: Store, settings: Settings) -> None:
    add(store, 1, generator="gen-a")
    follower = following(store, settings)
    follower.load()
    store.generators.update("gen-a", {"name": "gen-z"})
    follower.catch_up()
    assert follower.search(vector(1)[None], 1)[0][0].generator == "gen-z"


def test_no_revision_is_missed_among_concurrent_writers(started: Follower, store: Store) -> None:
    numbers = count()
    lock = threading.Lock()

    def write(seed: int) -> None:
        rng = random.Random(seed)
        own: list[int] = []
        for _ in range(15):
            if own and rng.random() < 0.4:
                gone = rng.sample(own, rng.randint(1, len(own)))
                store.references.remove(ids=gone)
                own = [number for number in own if number not in gone]
            else:
                with lock:
                    fresh = [next(numbers) for _ in range(rng.randint(1, 5))]
                own += add(store, *fresh, generator=rng.choice([None, "gen-a", "gen-b"]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    revision = store.checkpoints.revision(CHECKPOINT)
    assert revision >= 60
    until(lambda: started.revision == revision)
    assert_equal(started, store)


def test_a_late_commit_is_not_skipped(store: Store, settings: Settings) -> None:
    """While one writer holds the revision, another waits; a follower in between sees neither half-way."""
    follower = following(store, settings)
    follower.load()
    held = store.engine.connect()
    held.execute(text("select revision from index_revision where checkpoint_id = :id for update"), {"id": CHECKPOINT})
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(add, store, 1), pool.submit(add, store, 2)]
        until(lambda: _waiting(store.engine) == 2)
        assert follower.catch_up() == 0
        held.rollback()
        for one in waiting:
            one.result()
    held.close()
    assert follower.catch_up() == 2
    assert_equal(follower, store)


def _waiting(engine: Engine) -> int:
    query = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    with engine.connect() as connection:
        return int(connection.scalar(text(query)) or 0)


def test_a_notification_is_enough_and_the_end_needs_none(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL", 3600.0)
    follower = following(store, settings)
    follower.load()
    thread = threading.Thread(target=follower._follow)
    thread.start()
    add(store, 1)
    until(lambda: follower.revision == 1)
    follower._end.set()
    thread.join(20)
    assert not thread.is_alive()


def test_the_poll_is_enough(store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHANNEL", "elsewhere")
    monkeypatch.setattr(module, "POLL", 0.05)
    follower = following(store, settings)
    follower.load()
    follower.start()
    add(store, 1)
    until(lambda: follower.revision == 1)
    until(lambda: follower.lag < 1)
    follower.stop()


def test_options_of_the_database_url_are_followed(settings: Settings) -> None:
    separator = "&" if "?" in str(settings.database_url) else "?"
    url = f"{settings.database_url}{separator}connect_timeout=7&application_name=mine"
    store = opened(settings.model_copy(update={"database_url": url}))
    follower = following(store, settings)
    follower.load()
    follower.start()
    add(store, 1)
    until(lambda: follower.revision == 1)
    assert not follower.degraded
    with store.engine.connect() as connection:
        query = text("select distinct application_name from pg_stat_activity where datname = current_database()")
        assert set(connection.scalars(query)) == {"mine", "mine follower"}
    follower.stop()
    store.engine.dispose()


def test_any_failure_of_following_degrades(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "POLL", 0.05)
    failures = [TypeError("a fault"), TypeError("a fault")]
    mended = threading.Event()

    def broken(engine: Engine, purpose: str) -> AnsweringConnection:
        if failures:
            raise failures.pop()
        mended.wait(20)
        return database.dedicated(engine, purpose)

    monkeypatch.setattr(module, "dedicated", broken)
    follower = following(store, settings)
    follower.load()
    follower.start()
    until(lambda: not failures)
    assert (follower.degraded, follower.away) == (True, False)
    mended.set()
    until(lambda: not follower.degraded)
    follower.stop()
    assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_a_connection_that_may_not_listen_is_closed(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a standby; what is left open brings a warning, and so do warnings of a test."""
    monkeypatch.setattr(module, "CHANNEL", "no name")
    follower = following(store, settings)
    follower.load()
    follower.start()
    until(lambda: follower.degraded)
    follower.stop()
    with store.engine.connect() as connection:
        query = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        assert connection.scalar(text(query)) == 0


@pytest.fixture
def admin(settings: Settings) -> Iterator[Engine]:
    """To close, copy and replace the test's database from another one of the same server."""
    url = make_url(str(settings.database_url)).set(drivername="postgresql+psycopg", database="postgres")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    yield engine
    engine.dispose()


def test_an_outage_is_survived(store: Store, started: Follower, admin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL", 0.05)
    add(store, 1)
    until(lambda: started.revision == 1)
    name = str(store.engine.url.database)
    with admin.connect() as connection:
        connection.execute(text(f"alter database {name} allow_connections false"))
        _disconnect(admin, name)
        until(lambda: started.degraded)
        assert len(started.search(vector(1)[None], 1)[0]) == 1
        with pytest.raises(OperationalError):
            started.catch_up()
        assert started.away
        lag = started.lag
        connection.execute(text(f"alter database {name} allow_connections true"))
    add(store, 2)
    until(lambda: (started.revision, started.degraded, started.away) == (2, False, False))  # one after the other
    assert started.lag < lag + 20
    assert_equal(started, store)


def _disconnect(admin: Engine, database: str) -> None:
    with admin.connect() as connection:
        query = text("select pg_terminate_backend(pid) from pg_stat_activity where datname = :name")
        connection.execute(query, {"name": database})


class Proxy:
    """Stands between a client and the server's socket, and can stop to forward what its connections of then say."""

    def __init__(self, folder: Path, url: str) -> None:
        parts = make_url(url)
        self.url = parts.update_query_dict({"host": str(folder)}).render_as_string(hide_password=False)
        self._target = f"{parts.query['host']}/.s.PGSQL.{parts.query['port']}"
        self._frozen, self._end = threading.Event(), threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{folder}/.s.PGSQL.{parts.query['port']}")
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._frozen.set()
        self._frozen = threading.Event()

    def close(self) -> None:
        self._end.set()
        self._listener.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError), self._listener:
            while not self._end.is_set():
                client, server = self._listener.accept()[0], socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(*pair, self._frozen), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, frozen: threading.Event) -> None:
        with contextlib.suppress(OSError), sink:
            while data := source.recv(65536):
                if frozen.is_set():
                    self._end.wait()
                    return
                sink.sendall(data)


@pytest.fixture
def proxy(settings: Settings) -> Iterator[Proxy]:
    folder = Path(tempfile.mkdtemp(prefix="lineup-"))
    proxy = Proxy(folder, str(settings.database_url))
    yield proxy
    proxy.close()
    shutil.rmtree(folder)


def test_connections_that_freeze_are_given_up(
    store: Store, settings: Settings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for a lock, the idle ones of the pool, and the one that listens; new ones work."""
    monkeypatch.setattr(database, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(AnsweringConnection, "patience", 1)
    engine = connect(settings.model_copy(update={"database_url": proxy.url}), statement_seconds=1)
    served = Store(engine)
    follower = following(served, settings)
    follower.load()
    follower.start()
    held = store.engine.connect()
    held.execute(text("select revision from index_revision for update"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(add, served, 1)
        until(lambda: _waiting(store.engine) == 1)
        proxy.freeze()
        with pytest.raises(OperationalError, match="no answer for 2 seconds"):
            waiting.result(20)
    held.rollback()
    held.close()
    add(store, 2)
    until(lambda: follower.revision == store.checkpoints.revision(CHECKPOINT) and not follower.degraded)
    proxy.freeze()
    start = time.monotonic()
    follower.stop()
    assert time.monotonic() - start < 20
    assert_equal(follower, store)
    engine.dispose()


def test_a_killed_embedded_server_comes_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = Settings(home=tmp_path_factory.mktemp("h"))
    store = opened(settings)
    follower = following(store, settings)
    follower.load()
    follower.start()
    try:
        add(store, 1)
        until(lambda: follower.revision == 1)
        server = EmbeddedServer(settings.home)
        os.kill(int((server.data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        until(lambda: follower.degraded)
        until(lambda: not follower.degraded, 60)
        add(store, 2)
        until(lambda: follower.revision == 2)
        assert_equal(follower, store)
    finally:
        follower.stop()
        store.engine.dispose()
        EmbeddedServer(settings.home).leave()


def test_a_failure_half_way_is_repaired_by_the_next_try(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = following(store, settings)
    follower.load()
    first = add(store, 1, 2)
    follower.catch_up()
    add(store, 3, 4, 5)
    store.references.remove(ids=first[:1])
    break_off(store, monkeypatch, page=2)
    with pytest.raises(OperationalError):
        follower.catch_up()
    assert (follower.degraded, follower.revision) == (True, 1)
    monkeypatch.undo()
    assert follower.catch_up() == 3
    assert (follower.degraded, follower.revision) == (False, 3)
    assert_equal(follower, store)


def break_off(store: Store, monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    """Lose the connection after the first page of changes, until the patches are undone."""
    changes = store.changes.between

    def breaks_off(*place: Any) -> Iterator[Any]:
        yield next(changes(*place, page=page))
        raise OperationalError("select", None, Exception("connection lost"))

    monkeypatch.setattr(store.changes, "between", breaks_off)


class Backup:
    """A copy of a test's database, to be restored over it."""

    def __init__(self, store: Store, admin: Engine) -> None:
        self.database, self.admin = str(store.engine.url.database), admin
        self._copy(self.database, f"{self.database}_copy")

    def restore(self) -> None:
        self._copy(f"{self.database}_copy", self.database)
        with self.admin.connect() as connection:
            connection.execute(text(f"drop database {self.database}_copy"))

    def _copy(self, source: str, target: str) -> None:
        with self.admin.connect() as connection:
            connection.execute(text(f"drop database if exists {target} with (force)"))
            _disconnect(self.admin, source)
            connection.execute(text(f"create database {target} template {source}"))


@pytest.mark.parametrize("later", [0, 1, 2, 3])
def test_a_restored_backup_is_noticed(store: Store, settings: Settings, admin: Engine, later: int) -> None:
    """Also where the restored database was written to since, up to and past the revision that was followed."""
    first = add(store, 1, 2)
    store.engine.dispose()
    backup = Backup(store, admin)
    add(store, 3, 4)
    store.references.remove(ids=first[:1])
    follower = following(store, settings)
    assert follower.load() == 3
    follower.save()
    store.engine.dispose()
    backup.restore()
    for number in range(later):
        add(store, 10 + 2 * number, 11 + 2 * number)
    again = following(store, settings)
    assert again.load() == 1 + later
    assert_equal(again, store)
    assert follower.catch_up() == 1 + later
    assert_equal(follower, store)


def test_two_histories_that_end_with_the_same_removal_are_told_apart(
    store: Store, settings: Settings, admin: Engine
) -> None:
    first = add(store, 1, 2)
    store.engine.dispose()
    backup = Backup(store, admin)
    follower = following(store, settings)
    for number in (3, 4):  # in the one history, then in the other
        add(store, number)
        store.references.remove(ids=first[:1])
        if number == 3:
            assert follower.load() == 3
            follower.save()
            store.engine.dispose()
            backup.restore()
    again = following(store, settings)
    assert again.load() == follower.catch_up() == 3
    assert_equal(again, store)
    assert_equal(follower, store)


def test_half_of_a_revision_does_not_outlive_a_restored_backup(
    store: Store, settings: Settings, admin: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = following(store, settings)
    add(store, 1)
    follower.load()
    store.engine.dispose()
    backup = Backup(store, admin)
    add(store, 2, 3)
    break_off(store, monkeypatch, page=1)
    with pytest.raises(OperationalError):
        follower.catch_up()
    monkeypatch.undo()
    follower.save()
    assert not in_memory(follower).snapshot.exists()
    store.engine.dispose()
    backup.restore()
    assert follower.catch_up() == 1
    assert_equal(follower, store)


def test_rows_removed_since_are_no_other_history(store: Store, settings: Settings) -> None:
    ids = add(store, 1, 2)
    follower = following(store, settings)
    follower.load()
    follower.save()
    store.references.remove(ids=ids)
    seen = _where_reading_begins(store)
    again = following(store, settings)
    assert again.load() == 2
    assert seen == [1]
    assert_equal(again, store)


def _where_reading_begins(store: Store) -> list[int]:
    """Notes from which revision the store is read from now on."""
    seen: list[int] = []
    changes = store.changes.between

    def noting(checkpoint_id: str, revision: int, target: int) -> Iterator[Any]:
        seen.append(revision)
        return changes(checkpoint_id, revision, target)

    store.changes.between = noting  # type: ignore[assignment, method-assign]
    return seen


def test_another_store_is_loaded_anew(store: Store, settings: Settings) -> None:
    add(store, 1)
    follower = following(store, settings)
    follower.load()
    with store.engine.begin() as connection:
        connection.execute(text("update store set id = gen_random_uuid()"))
    seen = _where_reading_begins(store)
    assert follower.catch_up() == 1
    assert seen == [0]
    assert_equal(follower, store)


def test_a_snapshot_saves_reading(store: Store, settings: Settings) -> None:
    add(store, 1, source="one")
    add(store, 2, generator="gen-a", source="two")
    follower = following(store, settings)
    follower.load()
    follower.save()
    add(store, 3, source="three")
    seen = _where_reading_begins(store)
    again = following(store, settings)
    assert again.load() == 3
    assert seen == [2]
    assert_equal(again, store)


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "gone", "dimension", "folder", "first format", "no nonce"])
def test_a_snapshot_that_is_not_good_is_ignored(store: Store, settings: Settings, damage: str) -> None:
    add(store, 1, 2, 3)
    follower = following(store, settings)
    follower.load()
    follower.save()
    path, data = in_memory(follower).snapshot, bytearray(in_memory(follower).snapshot.read_bytes())
    if damage == "byte":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage in ("cut", "empty"):
        path.write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
    elif damage == "first format":
        path.write_bytes((Path(__file__).parents[1] / "old" / "snapshot").read_bytes())
    elif damage == "no nonce":  # as before there were any
        index, header = VectorIndex.load(path)
        del header["nonce"]
        index.save(path, header)
    elif damage == "dimension":
        in_memory(follower).index = VectorIndex(DIM + 1)
        in_memory(follower)._saved = None
        follower.save()
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    seen = _where_reading_begins(store)
    again = following(store, settings)
    assert again.load() == 1
    assert seen == [0]
    assert_equal(again, store)
    if damage != "folder":
        again.save()
        assert _snapshot_size(path) == 3


def test_the_snapshot_is_written_after_changes_and_at_the_end(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL", 0.05)
    monkeypatch.setattr(memory_copy, "QUIET", 0.1)
    follower = following(store, settings)
    follower.load()
    follower.start()
    (first,) = add(store, 1)
    until(lambda: follower.revision == 1 and _snapshot_size(in_memory(follower).snapshot) == 1)
    monkeypatch.setattr(memory_copy, "QUIET", 3600)
    add(store, 2, 3)
    until(lambda: follower.revision == 2)
    store.references.remove(ids=[first])
    until(lambda: follower.revision == 3)
    follower.stop()
    assert _snapshot_size(in_memory(follower).snapshot) == 2
    changed = in_memory(follower).snapshot.stat().st_mtime_ns
    follower.save()
    assert in_memory(follower).snapshot.stat().st_mtime_ns == changed  # nothing to write


def test_snapshots_go_on_where_lists_cannot_be_made(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "POLL", 0.05)
    monkeypatch.setattr(memory_copy, "QUIET", 0.1)
    tried: list[int] = []

    def fails(index: VectorIndex, ended: Callable[[], bool]) -> bool:
        tried.append(len(index))
        raise MemoryError

    monkeypatch.setattr(VectorIndex, "grow", fails)
    follower = following(store, settings)
    follower.load()
    follower.start()
    for number in (1, 2):
        add(store, number)
        until(lambda number=number: follower.saved_revision == number)  # type: ignore[misc]
    follower.stop()
    assert len(tried) == 1
    assert "could not be given inverted lists" in caplog.text


def large(store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Follower:
    """A loaded follower of 500 references in clear clusters, more than flat search is to be used for."""
    monkeypatch.setattr(module, "POLL", 0.05)
    monkeypatch.setattr(memory_copy, "QUIET", 0.1)
    monkeypatch.setattr(growing, "LARGE", 300)
    directions = np.eye(DIM, dtype=np.float32)
    add_all(store, [new(n, "gen-a", vector=20 * directions[n % DIM] + vector(n)) for n in range(500)])
    follower = following(store, settings)
    follower.load()
    return follower


def test_a_large_index_moves_to_lists_by_itself(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = large(store, settings, monkeypatch)
    follower.save()
    follower.start()
    until(lambda: follower.index.kind == "ivf-fp16")
    until(lambda: VectorIndex.load(in_memory(follower).snapshot)[0].kind == "ivf-fp16")
    follower.stop()
    again = following(store, settings)
    again.load()
    assert (again.index.kind, again.index.recall) == ("ivf-fp16", follower.index.recall)
    assert_equal(again, store)


@pytest.mark.parametrize("part", ["trained", "assign", "tune"])
def test_stopping_does_not_wait_for_lists(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The end that is set as a part of the work begins keeps its first step from being done."""
    monkeypatch.setattr(growing, "ROWS_PER_BLOCK", 100)
    follower = large(store, settings, monkeypatch)
    begun, done = [], getattr(Inverted, part)

    def end_meanwhile(*arguments: Any) -> Any:
        begun.append(part)
        follower._end.set()
        return done(*arguments)

    monkeypatch.setattr(Inverted, part, end_meanwhile)
    follower.start()
    until(lambda: bool(begun))
    follower.stop()
    assert begun == [part]
    assert follower.index.kind == "flat-fp16"
    assert_equal(follower, store)


def _snapshot_size(path: Path) -> int:
    return len(VectorIndex.load(path)[0]) if path.exists() else -1


def test_a_home_that_cannot_be_written_to_only_costs_the_snapshot(store: Store, settings: Settings) -> None:
    settings.home.mkdir(parents=True)
    (settings.home / "index").write_text("a file where the folder should be")
    add(store, 1)
    follower = following(store, settings)
    assert follower.load() == 1
    follower.start()
    follower.stop()
    with pytest.raises(OSError, match="index"):
        follower.save()
