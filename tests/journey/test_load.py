"""`make soak PART=load`: mixed load on a real service while references come and go and its database goes away.

`LINEUP_SOAK_MINUTES` (20) is how long it takes, `LINEUP_SOAK_REPORT` a CSV file for the curve of memory.
"""

import csv
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from served import Load, Served, served, short_folder, stored, wait_until_back

from indexer.database.embedded import EmbeddedServer

MINUTES = float(os.environ.get("LINEUP_SOAK_MINUTES", "20"))
CLIENTS = 6
AWAY_SECONDS = 20.0


@pytest.fixture
def server(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Served]:
    with short_folder() as home, served(tiny_checkpoint, home, tmp_path / "log") as service:
        yield service


@pytest.mark.soak
@pytest.mark.timeout(60 * MINUTES + 900)
def test_mixed_load_loses_nothing_and_leaks_nothing(
    server: Served, record_property: Callable[[str, object], None]
) -> None:
    process, address, home = server.process, server.address, server.home
    load = Load(address)
    for seed in (1, 2):
        with httpx2.Client(base_url=address, timeout=60) as client:
            load.add(client, seed)
    threads = [threading.Thread(target=load.work, args=(number,)) for number in range(CLIENTS)]
    memory: list[tuple[float, float, int]] = []
    start = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        stopped = None
        while (passed := time.monotonic() - start) < 60 * MINUTES and not load.wrong:
            memory.append((passed, psutil.Process(process.pid).memory_info().rss / 2**20, len(load.standing)))
            if stopped is None and passed > 30 * MINUTES:
                load.away.set()
                EmbeddedServer(home).stop()
                stopped = passed
            elif stopped is not None and load.away.is_set() and passed > stopped + AWAY_SECONDS:
                EmbeddedServer(home).start()
                wait_until_back(address)
                load.away.clear()
            time.sleep(1)
    finally:
        load.end.set()
        for thread in threads:
            thread.join()
    if path := os.environ.get("LINEUP_SOAK_REPORT"):
        with Path(path).open("w", newline="") as file:
            csv.writer(file).writerows([("seconds", "resident MiB", "references"), *memory])
    print(dict(load.answers))
    record_property("tried", f"{MINUTES:g} minutes of {CLIENTS} clients, {load.answers.total():,} answers")
    record_property("failed", len(load.wrong))
    assert load.wrong == []
    assert load.answers["degraded"] > 0
    # A busy machine may make the database slow, which is as good as away; that is no habit.
    assert load.answers["degraded, database there"] < 0.01 * load.answers["detect 200"]
    with httpx2.Client(base_url=address, timeout=60) as client:
        assert stored(client) == set(load.standing.values())
        state = client.get("/v1/status").json()
    assert state["index"]["size"] == len(load.standing)
    assert state["index"]["revision"] == state["revision"]
    warm = [rss for seconds, rss, _ in memory if seconds > 12 * MINUTES]  # after the first fifth
    assert max(warm[-10:]) < 1.15 * max(warm[:10]) + 20, memory
