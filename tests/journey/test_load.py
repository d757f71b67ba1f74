"""`make soak PART=load`: the largest uploads at once, and mixed load while references and the database come and go.

A small form of the first runs with the other tests. `LINEUP_SOAK_MINUTES` (20) is how long the second takes,
`LINEUP_SOAK_REPORT` a CSV file for its curve of memory.
"""

import csv
import io
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest
from conftest import small_image
from served import Load, Served, served, short_folder, stored, wait_until_back

from indexer.database.embedded import EmbeddedServer

MINUTES = float(os.environ.get("LINEUP_SOAK_MINUTES", "20"))
SIDE = 2640
"""Pixels a side of a bitmap that is just within LINEUP_MAX_UPLOAD_BYTES."""
MEMORY_BYTES = 800 * 2**20
"""That the service may need for it: LINEUP_MAX_INFLIGHT_BYTES, and what it works on."""
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
    memory: list[tuple[float, float, int]] = []
    start = time.monotonic()
    with load.working(range(CLIENTS)):
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [4, pytest.param(64, marks=pytest.mark.soak)])
def test_uploads_of_the_largest_size_at_once_are_judged_or_refused(
    server: Served, count: int, record_property: Callable[[str, object], None]
) -> None:
    process, bitmap = psutil.Process(server.process.pid), io.BytesIO()
    small_image(1, True).resize((SIDE, SIDE)).save(bitmap, "BMP")

    def upload(number: int) -> httpx2.Response:
        files = {"image": (f"{number}.bmp", bitmap.getvalue(), "image/bmp")}
        return httpx2.post(f"{server.address}/v1/detect", files=files, timeout=300)

    def peak() -> int:
        """Bytes that the service had resident at most, see proc(5)."""
        status = Path(f"/proc/{process.pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    def settle() -> tuple[int, int]:
        """Open files and threads once nothing is in work."""
        idle = "lineup_queue_images 0.0"
        deadline = time.monotonic() + 60
        while idle not in httpx2.get(f"{server.address}/metrics").text or len(process.net_connections()) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return process.num_fds(), process.num_threads()

    assert upload(0).status_code == 200
    least, settled, answers = peak(), [], []
    with ThreadPoolExecutor(count) as clients:
        for _ in range(2):
            answers += list(clients.map(upload, range(count)))
            settled.append(settle())
    statuses = Counter(answer.status_code for answer in answers)
    wrong = [
        f"{answer.status_code} {answer.text}"
        for answer in answers
        if answer.status_code != 200 and not (answer.status_code in (429, 503) and "retry-after" in answer.headers)
    ]
    record_property(
        "tried", f"twice {count} uploads of {len(bitmap.getvalue()):,} bytes at once, answers {dict(statuses)}"
    )
    record_property("failed", len(wrong))
    assert wrong == []
    assert statuses[200] >= min(count, 4)
    (files, threads), (files_later, threads_later) = settled
    assert files_later <= files + 4
    assert threads_later <= threads + 40  # of pools that grow with work
    assert peak() < least + MEMORY_BYTES
    assert upload(0).status_code == 200
