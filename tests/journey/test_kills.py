"""Whatever is killed and whenever, running it again ends with the same rows, and rows, index and snapshot agree.

A small form runs with the other tests; `make soak PART=kills` makes `LINEUP_SOAK_KILLS` (300) runs that are killed.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import short_folder

from indexer.database.connection import connect
from indexer.measure.check import compare
from indexer.settings import Settings
from indexer.store import Store

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LINEUP_SOAK_KILLS", "300"))
RUNS = 12
"""Of commands, between two comparisons."""


@pytest.fixture
def home() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


def start(home: Path, *arguments: object, seconds: float = 0.0) -> "subprocess.Popen[str]":
    """The indexer's command line with the hashing embedder, in a process group of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LINEUP_HOME": str(home),
        "LINEUP_CHECKPOINT": str(home / "hashing"),
        "HASHING_SECONDS": str(seconds),
    }
    environment.pop("LINEUP_DATABASE_URL", None)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/hashing.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    answer: dict[str, Any] = json.loads(out)
    return answer


def assert_all_is_there(home: Path) -> None:
    """The rows of the whole image folder, in agreement with index and snapshot, and nothing half-written."""
    settings = Settings(home=home, database_url=None)
    engine = connect(settings)
    store = Store(engine)
    rows = [(row.label, row.generator) for row in store.references.list(limit=10_000)]
    assert {kind: rows.count(kind) for kind in set(rows)} == {(0, None): 60, (1, "gen-a"): 30, (1, "gen-b"): 30}
    agreements = {checkpoint.active: compare(settings, store, checkpoint) for checkpoint in store.checkpoints.list()}
    engine.dispose()
    assert [problem for agreement in agreements.values() for problem in agreement.problems] == []
    active = agreements[True]
    assert (active.rows, active.index, active.snapshot) == (120, 120, active.revision)
    assert list(home.rglob("*.part")) == []


def kill_again_and_again(home: Path, images: Path, times: int, seed: int) -> Counter[str]:
    """Kill commands, following and the database at random moments, the first start included; then all run to the end.

    Returns:
        How many were killed, by what they were doing.
    """
    moments, archive, killed, longest = random.Random(seed), home / "set", Counter[str](), 1.5
    others: list[list[object]] = [
        ["remove", "--generator", "gen-a"],
        ["rebuild"],
        ["rebuild", "--checkpoint", home / "newer"],
        ["export", archive],
        ["import", archive],
    ]
    for turn in range(times):
        if turn == 3:  # how long a command takes here, so that later kills hit all of it
            begin = time.monotonic()
            result(start(home, "add", images, "--json"))
            longest = time.monotonic() - begin
            result(start(home, "export", archive, "--json"))
        command = ["add", images] if turn < 3 or moments.random() < 0.3 else moments.choice(others)
        processes = [start(home, *command, seconds=0.05)]
        if turn % 3 == 2:
            processes.append(start(home, "follow"))  # what the others write meanwhile
        for process in processes:
            assert process.stderr is not None
            assert process.stderr.readline() == "ready\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(moments.uniform(0, longest))
        database = home / "postgres/postmaster.pid"
        if turn % 4 == 3 and database.exists():
            killed["database"] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(database.read_text().splitlines()[0]), signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[0].wait(60)
        for process in processes:
            if process.poll() is None:
                killed[str(command[0])] += 1
                os.killpg(process.pid, signal.SIGKILL)
            assert "Traceback" not in process.communicate()[1]
    result(start(home, "rebuild", "--checkpoint", home / "hashing", "--json"))
    report = result(start(home, "add", images, "--json"))
    assert report["added"] + report["known"] == 120
    assert report["rejected"] == report["conflicts"] == []
    assert result(start(home, "export", archive, "--json"))["references"] == 120
    assert result(start(home, "import", archive, "--json"))["added"] == 0
    assert_all_is_there(home)
    return killed


def test_kills_lose_nothing(home: Path, image_folder: Path) -> None:
    kill_again_and_again(home, image_folder, times=7, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(8 * 3600)
def test_many_kills_lose_nothing(image_folder: Path, record_property: Callable[[str, object], None]) -> None:
    killed, faults, seed = Counter[str](), [], 2
    while killed.total() < KILLS:
        with short_folder() as folder:
            try:
                killed += kill_again_and_again(folder, image_folder, times=RUNS, seed=seed)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                faults.append(f"seed {seed}: {error}")
        seed += 1
        record_property("tried", f"{killed.total()} kills: {', '.join(f'{n} {name}' for name, n in killed.items())}")
        record_property("failed", len(faults))
        assert len(faults) < 10, faults
    assert faults == []


def test_two_processes_that_add_at_once_lose_nothing(home: Path, image_folder: Path) -> None:
    """From the very first start, with images in common."""
    processes = [start(home, "add", image_folder, "--json", seconds=0.02) for _ in range(2)]
    reports = [result(process) for process in processes]
    assert sum(report["added"] for report in reports) == 120
    assert [report["added"] + report["known"] for report in reports] == [120, 120]
    assert_all_is_there(home)


def test_termination_leaves_the_server_properly(home: Path, image_folder: Path) -> None:
    process = start(home, "add", image_folder, seconds=10)
    users = home / "postgres.users.json"
    for _ in range(600):
        if users.exists() and users.read_text().startswith("[["):
            break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert users.read_text() == "[]"
    assert not (home / "postgres/postmaster.pid").exists()
