"""`make soak`: mixed load on a real server while references come and go and the database is stopped and started.

`LINEUP_SOAK_MINUTES` (20) is how long it takes, `LINEUP_SOAK_REPORT` a CSV file for the curve of memory.
"""

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from conftest import small_image

from indexer.database.embedded import EmbeddedServer

ROOT = Path(__file__).parents[2]
MINUTES = float(os.environ.get("LINEUP_SOAK_MINUTES", "20"))
CLIENTS = 6
AWAY_SECONDS = 20.0


def png(seed: int, fake: bool) -> bytes:
    buffer = io.BytesIO()
    small_image(seed, fake, 64).save(buffer, format="PNG")
    return buffer.getvalue()


class Load:
    """Clients that detect, search, add and remove, and remember which references have to be there at the end.

    While the database is away (`away`) calls that need it may answer 503; what they wanted is then done again until it
    is acknowledged, so that the books are exact.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.end = threading.Event()
        self.away = threading.Event()
        self.lock = threading.Lock()
        self.standing: dict[int, int] = {}
        """Id of each reference that must stand, by the seed of its image."""
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []

    def work(self, number: int) -> None:
        rng = random.Random(number)
        seeds = iter(range(1_000_000 * (number + 1), 1_000_000 * (number + 2)))
        mine: list[int] = []
        with httpx2.Client(base_url=self.address, timeout=90) as client:
            while not self.end.is_set():
                try:
                    turn = rng.random()
                    if turn < 0.7:
                        self.detect(client, rng)
                    elif turn < 0.8:
                        self.call(client, "search", "/v1/search", {}, self.file(rng.randrange(100), "image"))
                    elif turn < 0.93 or not mine:
                        mine.append(self.add(client, next(seeds)))
                    else:
                        self.remove(client, mine.pop(rng.randrange(len(mine))))
                except Exception as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")

    @staticmethod
    def file(seed: int, field: str) -> dict[str, tuple[str, bytes, str]]:
        return {field: (f"{seed}.png", png(seed, seed % 2 == 1), "image/png")}

    def call(self, client: httpx2.Client, kind: str, path: str, data: dict[str, str], files: Any) -> dict[str, Any]:
        """Post until the answer is no 503; one while the database was not away is wrong."""
        while True:
            was_away = self.away.is_set()
            response = client.post(path, data=data, files=files)
            self.answers[f"{kind} {response.status_code}"] += 1
            if response.status_code == 200:
                answer: dict[str, Any] = response.json()
                return answer
            if response.status_code != 503 or not (was_away or self.away.is_set()):
                raise AssertionError(f"{kind}: {response.status_code} {response.text[:300]}")
            time.sleep(0.2)

    def detect(self, client: httpx2.Client, rng: random.Random) -> None:
        was_away = self.away.is_set()
        verdict = self.call(client, "detect", "/v1/detect", {}, self.file(rng.randrange(100), "image"))["results"][0]
        if verdict["degraded"]:
            self.answers["degraded" if was_away or self.away.is_set() else "degraded, database there"] += 1

    def add(self, client: httpx2.Client, seed: int) -> int:
        data = {"label": "fake", "generator": f"gen-{seed % 5}"} if seed % 2 else {"label": "real"}
        report = self.call(client, "add", "/v1/references", data, self.file(seed, "images"))
        if report["added"] + report["known"] != 1:
            raise AssertionError(f"added {report}")
        verdict = self.call(client, "detect", "/v1/detect", {}, self.file(seed, "image"))["results"][0]
        while verdict["known"] is None:
            if not verdict["degraded"]:
                raise AssertionError("a reference that was added is not known")
            time.sleep(0.2)
            verdict = self.call(client, "detect", "/v1/detect", {}, self.file(seed, "image"))["results"][0]
        with self.lock:
            self.standing[seed] = verdict["known"]["id"]
        return seed

    def remove(self, client: httpx2.Client, seed: int) -> None:
        with self.lock:
            reference = self.standing.pop(seed)
        while True:
            response = client.delete(f"/v1/references/{reference}")
            self.answers[f"remove {response.status_code}"] += 1
            if response.status_code in (200, 404):  # 404: done by a try whose answer was lost
                return
            if response.status_code != 503:
                raise AssertionError(f"remove: {response.status_code} {response.text[:300]}")
            time.sleep(0.2)


@pytest.fixture
def server(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """A server on an embedded database of its own: its process, its address, and its home."""
    home = Path(tempfile.mkdtemp(prefix="lineup-"))
    environment = os.environ | {
        "LINEUP_HOME": str(home),
        "LINEUP_CHECKPOINT": str(tiny_checkpoint),
        "LINEUP_DEVICE": "cpu",
        "LINEUP_OPEN": "true",
    }
    environment.pop("LINEUP_DATABASE_URL", None)
    log = tmp_path / "log"
    with log.open("w") as stderr:
        command = [sys.executable, "-m", "api", "serve", "--port", "0"]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=stderr)
    try:
        deadline = time.monotonic() + 180
        while '"address"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        lines = (json.loads(line) for line in log.read_text().splitlines())
        yield process, next(line["address"] for line in lines if "address" in line), home
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        EmbeddedServer(home).stop()
        shutil.rmtree(home, ignore_errors=True)
    errors = [line for line in log.read_text().splitlines() if json.loads(line)["level"] == "error"]
    assert errors == []


@pytest.mark.soak
@pytest.mark.timeout(60 * MINUTES + 900)
def test_mixed_load_loses_nothing_and_leaks_nothing(server: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    process, address, home = server
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


def stored(client: httpx2.Client) -> set[int]:
    """Ids of all references."""
    found: set[int] = set()
    after: int | None = 0
    while after is not None:
        page = client.get("/v1/references", params={"after": after, "limit": 1000}).json()
        found |= {row["id"] for row in page["references"]}
        after = page["next"]
    return found


def wait_until_back(address: str) -> None:
    deadline = time.monotonic() + 60
    with httpx2.Client(base_url=address, timeout=60) as client:
        while client.get("/v1/status").json()["degraded"] or client.get("/v1/references").status_code != 200:
            assert time.monotonic() < deadline, "the database is back, and the server did not notice"
            time.sleep(0.1)
    time.sleep(3)  # the server may decline for a moment after its last failure
