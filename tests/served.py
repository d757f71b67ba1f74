"""A service in a process of its own, and clients that keep books of what they did to it."""

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import httpx2
import psutil
from conftest import small_image

from indexer.database.embedded import EmbeddedServer

MOST_TRIES = 1000
"""Of one call, so that clients end where a database never comes back."""
ROOT = Path(__file__).parents[1]


class Served(NamedTuple):
    """A service on an embedded database of its own."""

    process: "subprocess.Popen[bytes]"
    address: str
    home: Path
    log: Path


@contextmanager
def short_folder(disk: str = "") -> Iterator[Path]:
    """A folder whose path a unix socket can have; the embedded database in it is stopped at the end.

    Args:
        disk: Mount options of a disk in memory that the folder is to be; `Path.is_mount` tells where none can be
            mounted, and it is an ordinary one.
    """
    folder = Path(tempfile.mkdtemp(prefix="lineup-"))
    if disk:
        with suppress(FileNotFoundError):
            subprocess.run(["mount", "-t", "tmpfs", "-o", disk, "tmpfs", folder], stderr=subprocess.DEVNULL)
    try:
        yield folder
    finally:
        if (folder / "postgres").exists():
            EmbeddedServer(folder).stop()
        if folder.is_mount():
            subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def clock_stepped(seconds: float) -> Iterator[None]:
    """As after a step of the clock, by which the system tells when each process was started."""
    create_time = psutil.Process.create_time
    with patch.object(psutil.Process, "create_time", lambda process: create_time(process) + seconds):
        yield


@contextmanager
def served(checkpoint: Path, home: Path, log: Path, request_seconds: int = 60) -> Iterator[Served]:
    """Start a service that writes its log to a file, and stop it; no line may be an error, also where it was killed."""
    environment = os.environ | {
        "LINEUP_HOME": str(home),
        "LINEUP_CHECKPOINT": str(checkpoint),
        "LINEUP_DEVICE": "cpu",
        "LINEUP_OPEN": "true",
        "LINEUP_REQUEST_SECONDS": str(request_seconds),
    }
    environment.pop("LINEUP_DATABASE_URL", None)
    with log.open("w") as stderr:
        command = [sys.executable, "-m", "api", "serve", "--port", "0"]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=stderr, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 180
        while '"address"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        lines = (json.loads(line) for line in log.read_text().splitlines())
        yield Served(process, next(line["address"] for line in lines if "address" in line), home, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    errors = [line for line in log.read_text().splitlines() if json.loads(line)["level"] == "error"]
    assert errors == []


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

    @contextmanager
    def working(self, numbers: Iterable[int]) -> Iterator[None]:
        """Clients of these numbers work until the block ends, however it does."""
        threads = [threading.Thread(target=self.work, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.end.set()
            for thread in threads:
                thread.join()

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
        for _ in range(MOST_TRIES):
            was_away = self.away.is_set()
            response = client.post(path, data=data, files=files)
            self.answers[f"{kind} {response.status_code}"] += 1
            if response.status_code == 200:
                answer: dict[str, Any] = response.json()
                return answer
            if response.status_code != 503 or not (was_away or self.away.is_set()):
                break
            time.sleep(0.2)
        raise AssertionError(f"{kind}: {response.status_code} {response.text[:300]}")

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
        for _ in range(MOST_TRIES):
            response = client.delete(f"/v1/references/{reference}")
            self.answers[f"remove {response.status_code}"] += 1
            if response.status_code in (200, 404):  # 404: done by a try whose answer was lost
                return
            if response.status_code != 503:
                break
            time.sleep(0.2)
        raise AssertionError(f"remove: {response.status_code} {response.text[:300]}")


def stored(client: httpx2.Client) -> set[int]:
    """Ids of all references."""
    ids: set[int] = set()
    after: int | None = 0
    while after is not None:
        page = client.get("/v1/references", params={"after": after, "limit": 1000}).json()
        ids |= {row["id"] for row in page["references"]}
        after = page["next"]
    return ids


def wait_until_back(address: str) -> None:
    deadline = time.monotonic() + 60
    with httpx2.Client(base_url=address, timeout=60) as client:
        while client.get("/v1/status").json()["degraded"] or client.get("/v1/references").status_code != 200:
            assert time.monotonic() < deadline, "the database is back, and the server did not notice"
            time.sleep(0.1)
    time.sleep(3)  # the server may decline for a moment after its last failure
