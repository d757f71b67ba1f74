"""`lineup` in the terminal: verdicts, keys, serving until told to stop, and one line for what goes wrong."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httpx2
import pytest
import typer
from conftest import small_image
from rich.console import Console
from sqlalchemy.exc import OperationalError
from threadpoolctl import threadpool_info
from typer.testing import CliRunner, Result

from api.__main__ import app, expected_failures
from api.http import server
from api.judge.detector import Detector
from api.schemas.problems import FailedFile
from api.schemas.verdicts import EXAMPLE_VERDICT, Verdict
from api.service_settings import ServiceSettings
from api.verdict_printer import show
from indexer.index.milvus import EngineAway
from indexer.store.keys import ApiKeys

Call = Callable[..., Result]


def environment(settings: ServiceSettings) -> dict[str, str]:
    values = {name: getattr(settings, name) for name in ("home", "database_url", "checkpoint", "device", "k")}
    return {f"LINEUP_{name.upper()}": str(value) for name, value in values.items()}


@pytest.fixture
def call(populated: ServiceSettings) -> Call:
    """Runs the command line on the populated store."""

    def run(*arguments: object, **variables: str) -> Result:
        env = environment(populated) | {"COLUMNS": "200"} | variables
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)

    return run


@pytest.fixture
def own(settings: ServiceSettings, tiny_checkpoint: Path) -> Call:
    """Runs the command line on an empty store."""
    settings = settings.model_copy(update={"checkpoint": tiny_checkpoint, "device": "cpu"})

    def run(*arguments: object, **variables: str) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], env=environment(settings) | variables)

    return run


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    folder = tmp_path / "queries"
    (folder / "deep").mkdir(parents=True)
    small_image(70_001, True, 64).save(folder / "b.png")
    small_image(70_002, False, 64).save(folder / "deep" / "a.jpg")
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "notes.txt").write_text("no image, and not asked for")
    return folder


def test_detect_shows_verdict_heads_and_neighbours(call: Call, queries: Path, image_folder: Path) -> None:
    done = call("detect", queries / "b.png", image_folder / "fake" / "gen-a" / "001.png", "--details")
    assert done.exit_code == 0, done.stderr
    first, second = done.stdout.split(str(image_folder))
    assert any(word in first for word in ("Probably generated.", "Probably a real photograph.", "Cannot tell."))
    for word in ("knn", "nn1", "linear", "svm", "gen-a", "similarity", "weight", "score"):
        assert word in first
    assert "Known generated image." in second
    assert "in the reference set as a generated image by gen-a." in " ".join(second.split())
    assert "its bytes are reference image" in second
    assert done.stderr.startswith("2 images: ")


def test_piped_sentences_are_not_wrapped() -> None:
    command = "run `lineup train heads --data IMAGES` with --checkpoint and the folder of checkpoint a-long-name"
    values = {"file": f"{'folder/' * 20}a.png", "score": None, "reason": f"nothing is calibrated: {command}"}
    generators = [{"name": f"generator-of-a-long-name-{number}", "share": 0.25} for number in range(4)]
    verdict = Verdict.model_validate(EXAMPLE_VERDICT | values | {"generators": generators})
    written = StringIO()
    show(verdict, Console(file=written, width=80))
    lines = written.getvalue().splitlines()
    assert lines[0] == values["file"]
    assert lines[1].endswith(f"{command}.")
    assert any(line.startswith("  closest generators: ") and line.count("long-name") == 4 for line in lines)


def test_detect_json_is_one_line_per_image_and_folders_are_walked(call: Call, queries: Path) -> None:
    done = call("detect", queries, queries / "missing.png", "--json", "--k", 2)
    assert done.exit_code == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    names = [Path(line["file"]).name for line in lines]
    assert names == ["b.png", "broken.png", "a.jpg", "missing.png"]
    verdicts = [Verdict.model_validate(line) for line in lines if "verdict" in line]
    failures = [FailedFile.model_validate(line) for line in lines if "error" in line]
    assert [len(verdict.neighbours) for verdict in verdicts] == [4, 4]
    assert [failure.error.status for failure in failures] == [415, 400]
    assert "2 rejected" in next(line for line in done.stderr.splitlines() if line.startswith("4 images: "))
    assert "Traceback" not in done.stderr


def test_detect_says_why_there_is_no_verdict(call: Call, tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    small_image(70_003, True, 64).crop((0, 0, 64, 12)).save(small)
    reason = "oo small to judge: 64x12 pixels, where 16 a side are needed"
    assert f"Cannot tell. T{reason}. Lineup says nothing rather than guess." in call("detect", small).stdout
    verdict = json.loads(call("detect", small, "--json").stdout)
    assert (verdict["verdict"], verdict["score"], verdict["reason"]) == ("uncertain", None, f"t{reason}")


def test_detect_explains(call: Call, queries: Path) -> None:
    done = call("detect", queries / "b.png", "--explain", "regions,stability")
    assert "4 regions" in done.stdout
    assert "under re-encoding" in done.stdout
    assert call("detect", queries / "b.png", "--explain", "everything").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "message"),
    [
        (["detect", "{folder}/broken.png"], {}, 1, "rejected: "),
        (["detect", "{folder}/empty"], {}, 1, "error: no image files in"),
        (["detect"], {}, 2, "Missing argument"),
        (["detect", "x.png", "--k", "0"], {}, 2, "--k"),
        (["detect", "x.png", "--checkpoint", "{folder}"], {}, 1, "error: no checkpoint at"),
        (["detect", "x.png"], {"LINEUP_K": "none"}, 1, "error: LINEUP_K is 'none'"),
        (["detect", "x.png"], {"LINEUP_DATABASE_URL": "postgresql://127.0.0.1:1/x"}, 1, "error: no database at"),
        (["detect", "x.png"], {"LINEUP_DATABASE_URL": "postgresql://h:port/x"}, 1, "error: LINEUP_DATABASE_URL is"),
        (["serve", "--host", "0.0.0.0"], {}, 1, "error: LINEUP_HOST is 0.0.0.0, which needs an API key"),
        (["keys", "revoke", "nobody"], {}, 1, "error: no key in force is called 'nobody'"),
        (["keys", "create", "a", "--scope", "all"], {}, 2, "--scope"),
    ],
)
def test_what_goes_wrong_is_one_line(
    call: Call, queries: Path, arguments: list[str], variables: dict[str, str], code: int, message: str
) -> None:
    (queries / "empty").mkdir()
    done = call(*(argument.format(folder=queries) for argument in arguments), **variables)
    assert done.exit_code == code
    assert message in done.stderr
    if code == 1:
        assert len(done.stderr.strip().splitlines()) <= 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_search_engine_that_is_away_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), expected_failures():
        raise EngineAway("the search engine at http://host does not answer")
    assert capsys.readouterr().err == "error: the search engine at http://host does not answer\n"


def test_without_a_checkpoint_no_database_is_made(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["detect", "x.png"], env={"LINEUP_HOME": str(tmp_path / "home")})
    assert (done.exit_code, done.stderr.startswith("error: no checkpoint at")) == (1, True)
    assert not (tmp_path / "home").exists()


def test_serving_to_others_ends_in_one_line_when_no_key_can_be_looked_up(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(keys: ApiKeys) -> None:
        raise OperationalError("select", {}, Exception("connection refused"))

    monkeypatch.setattr(ApiKeys, "list", away)
    done = call("serve", "--host", "0.0.0.0")
    assert (done.exit_code, done.stderr) == (1, "error: the database does not answer\n")


def test_keys_are_made_listed_and_revoked(own: Call) -> None:
    assert json.loads(own("keys", "list", "--json").stdout) == {"keys": []}
    made = own("keys", "create", "partner", "--scope", "detect", "--scope", "enrol", "--days", "30")
    secret = made.stdout.strip()
    assert secret.startswith("lineup_")
    assert "cannot be shown again" in made.stderr
    assert own("keys", "create", "partner").exit_code == 1
    again = own("keys", "create", "partner", "--unless-exists")
    assert (again.exit_code, again.stdout) == (0, "")
    other = json.loads(own("keys", "create", "other", "--json").stdout)
    assert (other["name"], other["scopes"], other["expires_at"]) == ("other", ["detect"], None)
    revoked = own("keys", "revoke", "partner")
    assert (revoked.exit_code, revoked.stdout, revoked.stderr) == (0, "revoked partner\n", "")
    first, second = json.loads(own("keys", "list", "--json").stdout)["keys"]
    assert (first["name"], first["scopes"], first["revoked_at"] is None) == ("partner", ["detect", "enrol"], False)
    assert (second["name"], second["revoked_at"]) == ("other", None)
    last = own("keys", "revoke", "other")
    assert (last.exit_code, len(last.stderr.splitlines())) == (0, 1)
    assert "without one nobody may call, this machine included" in last.stderr
    table = own("keys", "list")
    assert "partner" in table.stdout
    assert secret not in table.stdout


def begin_request(port: int, token: str) -> socket.socket:
    """A connection on which the server has begun to read the body of a detection, and waits for more."""
    head = (
        "POST /v1/detect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        "Authorization: Bearer {token}\r\nContent-Length: {length}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    part = '--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(head.format(token=token, length=len(part) + len("Real\r\n--b--\r\n")).encode())
    assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
    connection.sendall(part.encode())
    return connection


def test_a_port_that_is_taken_is_one_line(own: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = own("serve", "--port", str(port))
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: cannot listen on LINEUP_HOST 127.0.0.1, LINEUP_PORT {port} (")
    assert len(done.stderr.splitlines()) == 1


def test_serve_answers_finishes_and_stops(
    settings: ServiceSettings, tiny_checkpoint: Path, queries: Path, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"checkpoint": tiny_checkpoint, "device": "cpu"})
    log, shown = tmp_path / "log", tmp_path / "shown"
    with log.open("w") as stderr, shown.open("w") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-m", "api", "serve", "--port", "0"],
            env=os.environ | environment(settings) | {"LINEUP_REQUEST_SECONDS": "20"},
            cwd=Path(__file__).parents[2],
            stdout=stdout,
            stderr=stderr,
        )
    try:
        deadline = time.monotonic() + 120
        while "http://127.0.0.1:" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        address = next(line["address"] for line in lines if "address" in line)
        token = shown.read_text().removeprefix(f"The page: {address}/?token=").rstrip()
        own = {"authorization": f"Bearer {token}"}
        with httpx2.Client(base_url=address, timeout=60, headers=own) as client:
            assert client.get("/health/ready").json() == {"status": "ready"}
            with (queries / "b.png").open("rb") as image:
                answer = client.post("/v1/detect", files={"image": image}).json()
            assert Verdict.model_validate(answer["results"][0]).file == "b.png"
        begun = begin_request(urlsplit(address).port or 0, token)
        process.send_signal(signal.SIGTERM)
        begun.sendall(b"Real\r\n--b--\r\n")
        answer = b"".join(iter(partial(begun.recv, 65536), b""))
        begun.close()
        assert b" 415 " in answer.splitlines()[0], answer
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code in (0, -signal.SIGTERM)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["route"] for line in lines if line["logger"] == "lineup.request"] == [
        "/health/ready",
        "/v1/detect",
        "/v1/detect",
    ]
    assert not [line for line in lines if line["level"] in ("warning", "error")]
    assert token not in log.read_text()


def test_serving_freezes_what_is_loaded_and_keeps_the_blas_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, set[int]]] = []

    class Ready:
        def run(self) -> None:
            threads = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
            seen.append((gc.get_freeze_count() > 1000, threads))

    monkeypatch.setattr(server, "server", lambda detector, token: Ready())
    try:
        server.run(lambda: (cast(Detector, None), None))
    finally:
        gc.unfreeze()
    assert seen == [(True, {1})]
