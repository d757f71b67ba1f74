"""A service whose database, connections or disk fail: what it acknowledged stays, and it recovers by itself.

A small form runs with the other tests, `make soak PART=faults` the full one.
"""

import json
import logging
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from urllib.parse import urlsplit
from zipfile import ZipFile

import httpx2
import psutil
import psycopg
import pytest
import torch
from conftest import new_database
from fastapi.testclient import TestClient
from served import ROOT, Load, Served, clock_stepped, png, served, short_folder, stored, wait_until_back
from sqlalchemy import URL
from tiny import tiny_command
from typer.testing import CliRunner

from api.http.app import create_app
from api.judge.loader import load_detector
from api.service_settings import ServiceSettings
from indexer.database.embedded import EmbeddedFailure, EmbeddedServer
from trainer.__main__ import app as training
from trainer.fit.state import RunState
from trainer.model.checkpoint import read_id

Record = Callable[[str, object], None]
ENDING = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and backend_type = %s"
DISK = "size=256m,mode=755"
REQUEST_SECONDS = 10
RESTORES = 5
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close() reset the connection."""


@pytest.fixture(scope="module")
def service(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    with short_folder(DISK) as home, served(tiny_checkpoint, home, log, REQUEST_SECONDS) as service:
        load = Load(service.address)
        with httpx2.Client(base_url=service.address, timeout=60) as client:
            for seed in (1, 2):
                load.add(client, seed)
        yield service


def stopped(home: Path, seconds: float) -> None:
    """Stop the database, and start it again after so long."""
    EmbeddedServer(home).stop()
    time.sleep(seconds)
    EmbeddedServer(home).start()


def crashed(home: Path, seconds: float) -> None:
    """Kill the database, and start it again after so long."""
    psutil.Process(int((home / "postgres/postmaster.pid").read_text().splitlines()[0])).kill()
    time.sleep(seconds)
    EmbeddedServer(home).start()


def ended(home: Path, seconds: float) -> None:
    """End each second every connection to the database, for so long."""
    url = EmbeddedServer(home).start().set(drivername="postgresql").render_as_string(hide_password=False)
    for _ in range(round(seconds)):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(ENDING, ["client backend"])
        time.sleep(1)


def fill(disk: Path, room: int = 0) -> None:
    """Leave only so many bytes of a disk, beside a file `filling`."""
    with suppress(OSError), (disk / "filling").open("wb", buffering=0) as filling:
        while True:
            filling.write(bytes(2**16))
    os.truncate(disk / "filling", (disk / "filling").stat().st_size - room)


def filled(home: Path, seconds: float) -> None:
    """Leave no room on the disk for so long, not even for the next segment of the database's log."""
    if not home.is_mount():
        pytest.skip("needs the right to mount a disk that it can fill")
    url = EmbeddedServer(home).start().set(drivername="postgresql").render_as_string(hide_password=False)
    fill(home)
    with suppress(EmbeddedFailure):
        EmbeddedServer(home).start()  # as a command that begins now
    with suppress(psycopg.OperationalError), psycopg.connect(url, autocommit=True) as connection:
        while True:
            connection.execute("select pg_switch_wal(), pg_logical_emit_message(false, '', '')")
    time.sleep(seconds)
    (home / "filling").unlink()


def left_by_other_clocks(home: Path, seconds: float) -> None:
    """Let a command come and go each second, by a clock that is an hour before or behind."""
    for turn in range(round(seconds)):
        with clock_stepped(3600 * (-1) ** turn):
            EmbeddedServer(home).start()
            EmbeddedServer(home).leave()
        time.sleep(1)


Fault = Callable[[Path, float], None]
FAULTS: list[Fault] = [stopped, crashed, ended, filled, left_by_other_clocks]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (crashed, 1.0),
        (ended, 1.0),
        (filled, 1.0),
        *(pytest.param(fault, 20.0, marks=pytest.mark.soak) for fault in FAULTS),
    ],
)
def test_a_database_that_fails_under_load_loses_nothing(
    service: Served, fault: Fault, seconds: float, record_property: Record
) -> None:
    load, log_begin = Load(service.address), len(service.log.read_text())
    with httpx2.Client(base_url=service.address, timeout=60) as client:
        before = stored(client)
    number = 100 + 200 * FAULTS.index(fault) + int(seconds)  # images of its own
    with load.working(range(number, number + 3)):
        time.sleep(1)
        load.away.set()
        fault(service.home, seconds)
        wait_until_back(service.address)
        load.away.clear()
        time.sleep(1)
    record_property(
        "tried", f"database {fault.__name__.replace('_', ' ')} for {seconds:g} s, {load.answers.total():,} answers"
    )
    record_property("failed", len(load.wrong))
    assert load.wrong == []
    with httpx2.Client(base_url=service.address, timeout=60) as client:
        assert stored(client) == before | set(load.standing.values())
        state = client.get("/v1/status").json()
    assert state["index"]["size"] == len(before) + len(load.standing)
    assert state["index"]["revision"] == state["revision"]
    lines = [json.loads(line) for line in service.log.read_text()[log_begin:].splitlines()]
    told = Counter(line["message"].partition(",")[0] for line in lines if line["logger"] == "indexer.follower")
    times = told.pop("the database is away", 0)
    assert told.pop("the database is back", 0) == times <= (seconds + 1 if fault is ended else 1)
    assert (times == 0) == (fault is left_by_other_clocks)
    assert told.total() <= (1 if fault is filled else 0), told  # why it does not start again, once
    assert [line for line in lines if "error" in line] == []  # a traceback
    users = json.loads((service.home / "postgres.users.json").read_text())
    assert service.process.pid in [pid for pid, _ in users]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_database_restored_to_an_older_state_is_followed(
    service: Served, tmp_path: Path, record_property: Record
) -> None:
    """Again and again, so that other references come under the ids and revisions of those that are gone."""
    server, files, older = EmbeddedServer(service.home), service.home / "postgres", tmp_path / "older"
    load = Load(service.address)
    load.away.set()  # what a busy machine answers with 503 is asked again

    def replace(target: Path, source: Path) -> None:
        server.stop()
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "--archive", source, target], check=True)
        server.start()
        wait_until_back(service.address)

    replace(older, files)
    with httpx2.Client(base_url=service.address, timeout=60) as client:
        before = stored(client)
        for turn in range(RESTORES):
            for seed in range(5_000 + 4 * turn, 5_004 + 4 * turn):
                load.add(client, seed)
            load.remove(client, 5_000 + 4 * turn)
            assert stored(client) == before | set(load.standing.values())
            replace(files, older)
            deadline = time.monotonic() + 30
            while (state := client.get("/v1/status").json())["index"]["revision"] != state["revision"]:
                assert time.monotonic() < deadline, state
            assert stored(client) == before
            assert state["index"]["size"] == len(before)
            for seed in load.standing:
                [verdict] = load.call(client, "detect", "/v1/detect", {}, Load.file(seed, "image"))["results"]
                assert verdict["known"] is None
                assert {neighbour["id"] for neighbour in verdict["neighbours"]} <= before
            load.standing.clear()
    record_property("tried", f"database restored {RESTORES} times to an older state under a service")
    record_property("failed", 0)


def request(body: bytes, length: int) -> bytes:
    """A detection with this much of its body, which is said to have that length."""
    head = "POST /v1/detect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.soak)])
def test_connections_that_idle_crawl_stall_or_break_leak_nothing(
    service: Served, count: int, record_property: Record
) -> None:
    process, place = psutil.Process(service.process.pid), urlsplit(service.address)
    disposition = b'Content-Disposition: form-data; name="image"; filename="a.png"'
    body = b"--b\r\n" + disposition + b"\r\n\r\n" + png(5, True) + b"\r\n--b--\r\n"
    client = httpx2.Client(base_url=service.address, timeout=60)
    answers = [client.post("/v1/detect", files=Load.file(5, "image")).status_code]
    before = process.num_fds(), process.num_threads(), process.memory_info().rss

    def connect() -> socket.socket:
        return socket.create_connection((place.hostname or "", place.port or 0), timeout=60)

    with ExitStack() as idle:
        idle.enter_context(closing(client))
        for _ in range(2 * count):
            idle.enter_context(connect())
        slow = [idle.enter_context(connect()) for _ in range(count // 4)]
        for connection in slow:
            connection.sendall(request(b"", 10_000))
        stalled = [idle.enter_context(connect()) for _ in range(4)]
        for connection in stalled:
            connection.sendall(request(body[: len(body) // 2] + bytes(2**21), 2**22))
        for number in range(count):
            with connect() as broken, suppress(OSError):
                broken.sendall(request(body[: len(body) // 2] if number % 2 else body, len(body)))
                broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            if number % 10 == 0:
                answers.append(client.post("/v1/detect", files=Load.file(number, "image")).status_code)
                for connection in slow:
                    with suppress(OSError):
                        connection.sendall(b"-")
        parts = client.post("/v1/detect", files=[("image", ("", b""))] * 10_000)
        refusals = [connection.recv(12) for connection in stalled]
    deadline = time.monotonic() + 90
    while (
        process.num_fds() > before[0] + 4
        or "lineup_queue_images 0.0" not in httpx2.get(f"{service.address}/metrics").text
    ):
        assert time.monotonic() < deadline, (process.num_fds(), before)
        time.sleep(0.2)
    wrong = [status for status in answers if status not in (200, 429, 503)]
    record_property(
        "tried", f"{2 * count} idle, {count // 4} slow and {count} broken connections, 4 stalled uploads, 10,000 parts"
    )
    record_property("failed", len(wrong))
    assert wrong == []
    assert answers.count(200) > len(answers) / 2
    assert parts.status_code == 413
    assert refusals == [b"HTTP/1.1 503"] * len(stalled)
    assert process.num_threads() <= before[1] + 40  # of pools that grow with work
    assert process.memory_info().rss < before[2] + 300 * 2**20


@pytest.mark.parametrize("command", [["export", "OUT/set"], ["rebuild"]])
def test_a_full_disk_ends_a_command_in_one_line(
    service: Served, tiny_checkpoint: Path, tmp_path: Path, command: list[str]
) -> None:
    own = {"LINEUP_HOME": str(service.home), "LINEUP_CHECKPOINT": str(tiny_checkpoint), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "indexer", *(part.replace("OUT", str(tmp_path)) for part in command)],
        env={"PATH": "/usr/bin:/bin"} | own,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),  # a stand-in for a full disk
    )
    assert result.returncode == 1, result.stdout
    assert [line for line in result.stderr.splitlines() if "File too large" in line] != [], result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    for snapshot in (service.home / "index").rglob("snapshot"):
        with ZipFile(snapshot) as archive:
            assert archive.testzip() is None


def test_a_training_whose_disk_fills_keeps_its_last_state() -> None:
    with short_folder("size=1m") as folder:
        if not folder.is_mount():
            pytest.skip("needs the right to mount a disk that it can fill")
        RunState({}, steps=1, epoch=1, tensors={"weights": torch.zeros(100_000)}).save(folder)
        files = sorted(folder.iterdir())
        later = RunState({}, steps=1, epoch=2, tensors={"weights": torch.zeros(200_000)})
        with pytest.raises(OSError, match=rf"No space left on device: '{folder}/last.pt'"):
            later.save(folder)
        assert sorted(folder.iterdir()) == files
        state = RunState.load(folder)
        assert state is not None
        assert state.epoch == 1


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_training_on_a_full_disk_ends_in_one_line_and_goes_on(image_folder: Path, record_property: Record) -> None:
    """With room for less than its state, for that and less than the weights, or for so much of the checkpoint."""
    with short_folder("size=64m") as folder:
        if not folder.is_mount():
            pytest.skip("needs the right to mount a disk that it can fill")
        command = tiny_command(image_folder, folder / "checkpoint")
        rooms = [500_000, 1_200_000, *range(0, 300_000, 20_000)]
        for room in rooms:
            fill(folder, room)
            done = CliRunner().invoke(training, command)
            assert done.exit_code == 1, room
            assert f"error: [Errno 28] No space left on device: '{folder}/" in done.stderr
            assert "Traceback" not in done.stderr
            assert {path.name for path in folder.iterdir()} == {"filling", "checkpoint.state"}
        (folder / "filling").unlink()
        done = CliRunner().invoke(training, command)
        assert done.exit_code == 0, done.stderr
        assert [path.name for path in folder.iterdir()] == ["checkpoint"]
        assert read_id(folder / "checkpoint") == json.loads(done.stdout)["checkpoint"]
    record_property("tried", f"a training on a full disk, with {len(rooms)} sizes of what was left of it")
    record_property("failed", 0)


def test_a_service_whose_home_is_read_only_judges_and_adds(
    postgres_server: URL, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with short_folder("ro") as home, new_database(postgres_server) as url:
        if not home.is_mount():
            pytest.skip("needs the right to mount a disk that is read-only")
        settings = ServiceSettings(home=home, database_url=url, checkpoint=tiny_checkpoint, device="cpu", open=True)
        for added in (1, 0):  # the second start finds in the database what the first has added
            app = create_app(settings, load_detector(settings))
            with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
                known = client.post("/v1/detect", files=Load.file(2, "image")).json()["results"][0]["known"]
                report = client.post("/v1/references", data={"label": "real"}, files=Load.file(2, "images")).json()
            assert ((known is None), report["added"], report["known"]) == (added == 1, added, 1 - added)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [warning.partition(",")[0] for warning in warnings] == ["the snapshot was not written"] * 2  # starts
