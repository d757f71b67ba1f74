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
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, Self

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


class Sample(NamedTuple):
    """What a service has after so many seconds, beside the references that it must have."""

    seconds: float
    resident_mib: float
    references: int
    files: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process, seconds: float, references: int) -> Self:
        resident = process.memory_info().rss / 2**20
        return cls(seconds, resident, references, process.num_fds(), process.num_threads())


def settled(process: psutil.Process, address: str) -> tuple[int, int]:
    """Open files and threads of a service once nothing is in work."""
    deadline = time.monotonic() + 60
    while "lineup_queue_images 0.0" not in httpx2.get(f"{address}/metrics").text or len(process.net_connections()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process.num_fds(), process.num_threads()


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
    samples: list[Sample] = []
    start = time.monotonic()
    with load.working(range(CLIENTS)):
        stopped = None
        while (passed := time.monotonic() - start) < 60 * MINUTES and not load.wrong:
            samples.append(Sample.of(psutil.Process(process.pid), passed, len(load.standing)))
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
            csv.writer(file).writerows([Sample._fields, *samples])
    print(dict(load.answers))
    tried = f"{MINUTES:g} minutes of {CLIENTS} clients, {load.answers.total():,} answers"
    record_property("tried", tried)
    record_property("failed", len(load.wrong))
    assert load.wrong == []
    warm = [sample for sample in samples if sample.seconds > 12 * MINUTES]  # after the first fifth
    first, last = warm[: len(warm) // 4], warm[-len(warm) // 4 :]
    growth = {name: max(map(attrgetter(name), last)) - max(map(attrgetter(name), first)) for name in Sample._fields}
    grown = f"{growth['files']:+} files, {growth['threads']:+} threads, {growth['resident_mib']:+.0f} MiB"
    record_property("tried", f"{tried}; since its second fifth {grown}")
    assert load.answers["degraded"] > 0
    # A busy machine may make the database slow, which is as good as away; that is no habit.
    assert load.answers["degraded, database there"] < 0.01 * load.answers["detect 200"]
    with httpx2.Client(base_url=address, timeout=60) as client:
        assert stored(client) == set(load.standing.values())
        state = client.get("/v1/status").json()
    assert state["index"]["size"] == len(load.standing)
    assert state["index"]["revision"] == state["revision"]
    assert growth["resident_mib"] < 0.15 * max(sample.resident_mib for sample in first) + 20
    assert growth["files"] <= 4
    assert growth["threads"] <= 8
    settled(psutil.Process(process.pid), address)


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

    assert upload(0).status_code == 200
    least, after, answers = peak(), [], []
    with ThreadPoolExecutor(count) as clients:
        for _ in range(2):
            answers += list(clients.map(upload, range(count)))
            after.append(settled(process, server.address))
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
    (files, threads), (files_later, threads_later) = after
    assert files_later <= files + 4
    assert threads_later <= threads + 40  # of pools that grow with work
    assert peak() < least + MEMORY_BYTES
    assert upload(0).status_code == 200
