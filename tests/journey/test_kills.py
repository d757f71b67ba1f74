"""Whatever is killed and whenever, running it again ends with the same rows, and rows, index and snapshot agree."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from indexer.database.connection import connect
from indexer.database.embedded import EmbeddedServer
from indexer.measure.check import compare
from indexer.settings import Settings
from indexer.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="lineup-"))
    yield folder
    EmbeddedServer(folder / "home").stop()
    shutil.rmtree(folder, ignore_errors=True)


def start(home: Path, *arguments: object, seconds: float = 0.0) -> "subprocess.Popen[str]":
    """The indexer's command line with the hashing embedder, in a process group of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LINEUP_HOME": str(home / "home"),
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
    """The rows of the whole image folder, in agreement with index and snapshot."""
    settings = Settings(home=home / "home", database_url=None)
    engine = connect(settings)
    store = Store(engine)
    rows = [(row.label, row.generator) for row in store.references.list(limit=10_000)]
    assert {kind: rows.count(kind) for kind in set(rows)} == {(0, None): 60, (1, "gen-a"): 30, (1, "gen-b"): 30}
    (checkpoint,) = store.checkpoints.list()
    agreement = compare(settings, store, checkpoint)
    engine.dispose()
    assert (agreement.problems, agreement.rows, agreement.index) == ([], 120, 120)
    assert agreement.snapshot == agreement.revision


def kill_again_and_again(home: Path, images: Path, times: int, seed: int) -> None:
    """Kill adding, removing, rebuilding, following at random moments, the first start included; then one add runs."""
    moments = random.Random(seed)
    commands: list[list[object]] = [["add", images]] * 3 + [["remove", "--generator", "gen-a"], ["rebuild"]]
    for turn in range(times):
        command = ["add", images] if turn < 3 else moments.choice(commands)
        processes = [start(home, *command, seconds=0.05)]
        if turn % 3 == 2:
            processes.append(start(home, "follow"))  # what the others write meanwhile
        for process in processes:
            assert process.stderr is not None
            assert process.stderr.readline() == "ready\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(moments.uniform(0, 1.5))
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    report = result(start(home, "add", images, "--json"))
    assert report["added"] + report["known"] == 120
    assert report["rejected"] == report["conflicts"] == []
    assert_all_is_there(home)


def test_kills_lose_nothing(home: Path, image_folder: Path) -> None:
    kill_again_and_again(home, image_folder, times=10, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_kills_lose_nothing(home: Path, image_folder: Path, seed: int) -> None:
    kill_again_and_again(home, image_folder, times=12, seed=seed)


def test_two_processes_that_add_at_once_lose_nothing(home: Path, image_folder: Path) -> None:
    """From the very first start, with images in common."""
    processes = [start(home, "add", image_folder, "--json", seconds=0.02) for _ in range(2)]
    reports = [result(process) for process in processes]
    assert sum(report["added"] for report in reports) == 120
    assert [report["added"] + report["known"] for report in reports] == [120, 120]
    assert_all_is_there(home)


def test_termination_leaves_the_server_properly(home: Path, image_folder: Path) -> None:
    process = start(home, "add", image_folder, seconds=10)
    users = home / "home/postgres.users.json"
    for _ in range(600):
        if users.exists() and users.read_text().startswith("[["):
            break
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert users.read_text() == "[]"
    assert not (home / "home/postgres/postmaster.pid").exists()
