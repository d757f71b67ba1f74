"""Rows and a real Milvus say the same, whichever leader and engine are killed while references come and go.

It needs pymilvus, and the server of `pip install milvus` in an environment of its own, whose executable
LINEUP_MILVUS_SERVER names; it listens on all interfaces. `make soak PART=engine` kills `LINEUP_SOAK_LEADERS` (100)
leaders, and the engine `LINEUP_SOAK_ENGINES` (3) times.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from numbered import CHECKPOINT, DIM, add, opened
from served import short_folder

from indexer.database.connection import connect
from indexer.index.milvus import EngineAway, Milvus
from indexer.measure.check import compare
from indexer.milvus_copy import MilvusCopy
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.relabelling import Kind

Record = Callable[[str, object], None]
LEADERS = int(os.environ.get("LINEUP_SOAK_LEADERS", "100"))
ENGINES = int(os.environ.get("LINEUP_SOAK_ENGINES", "3"))
SERVER = os.environ.get("LINEUP_MILVUS_SERVER")
POLL = 0.2
PATIENCE = 900.0
"""Seconds that an engine may take to start, or what is written to be published, on a busy machine."""


class Server:
    """A Milvus that can be killed, and started again on what it has written.

    Attributes:
        url: As LINEUP_INDEX.
    """

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"milvus+http://127.0.0.1:{port}"
        self._command = [str(SERVER), "--data", str(folder), "--proxy-port", str(port)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return Milvus(self.url).ping()
            except EngineAway:
                assert time.monotonic() < deadline, "the engine did not start"
                time.sleep(1)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("pymilvus")
    if SERVER is None:
        pytest.skip("LINEUP_MILVUS_SERVER names no executable")
    with short_folder() as folder:
        server = Server(folder)
        try:
            server.start()
            yield server
        finally:
            server.kill()


def ship(settings: Settings) -> None:
    """What each of several processes does."""
    assert settings.index is not None
    store = Store(connect(settings))
    MilvusCopy(settings.index, store, CHECKPOINT, DIM).keep(threading.Event(), POLL)


@contextlib.contextmanager
def writing(store: Store) -> Iterator[None]:
    """References come and go meanwhile."""
    ended, moments = threading.Event(), random.Random(1)

    def write() -> None:
        ids: list[int] = []
        number = 0
        while not ended.wait(moments.uniform(0, 0.2)):
            numbers = range(number, number + moments.randrange(1, 6))
            number = numbers.stop
            ids += add(store, *numbers, generator=moments.choice([None, "gen-a"]))
            if moments.random() < 0.4:
                store.references.remove(ids=[ids.pop(moments.randrange(len(ids)))])
            if ids and moments.random() < 0.1:
                former = ids.pop(moments.randrange(len(ids)))
                ids += store.references.relabel(Kind(1, "gen-b"), ids=[former]).ids.values()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def caught_up(store: Store) -> bool:
    """Whether everything is published in time."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        latest = store.shipments.latest(CHECKPOINT)
        if latest and store.changes.position(CHECKPOINT, latest.position) == (latest.position, True):
            return True
        time.sleep(0.1)
    return False


def until_published(store: Store, published: set[int]) -> None:
    """Wait for a revision that is not among those published before, and note it."""
    deadline = time.monotonic() + PATIENCE  # an engine that was killed loads everything first
    while True:
        latest = store.shipments.latest(CHECKPOINT)
        if latest and latest.position.revision not in published:
            return published.add(latest.position.revision)
        assert time.monotonic() < deadline, "nobody ships"
        time.sleep(0.05)


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_kills_of_leaders_and_engines_lose_nothing(server: Server, record_property: Record) -> None:
    moments, published, start = random.Random(0), set[int](), multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["pymilvus", "indexer.milvus_copy"])
    with short_folder() as home:
        settings = Settings(home=home, database_url=None, index=server.url)
        store = opened(settings)
        processes = [start.Process(target=ship, args=(settings,), daemon=True) for _ in range(2)]
        for process in processes:
            process.start()
        engines = set(moments.sample(range(LEADERS), ENGINES))
        with writing(store):
            until_published(store, published)
            for kill in range(LEADERS):
                if kill % 2:  # every other one gets on before it is killed, the rest hardly start
                    until_published(store, published)
                time.sleep(moments.uniform(0, 1))
                if kill in engines:
                    server.kill()
                    server.start()
                processes[0].kill()  # the older one leads
                processes[0].join()
                processes = [processes[1], start.Process(target=ship, args=(settings,), daemon=True)]
                processes[1].start()
        assert caught_up(store)
        for process in processes:
            process.kill()
            process.join()
        agreement = compare(settings, store, store.checkpoints.require(CHECKPOINT))
        store.engine.dispose()
    assert agreement.problems == []
    assert agreement.rows == agreement.index > 0
    assert len(published) >= LEADERS // 2
    tried = f"{LEADERS} kills of the leader, {ENGINES} of the engine, {agreement.revision} revisions"
    record_property("tried", f"{tried}, {agreement.rows} rows")
    record_property("failed", 0)
