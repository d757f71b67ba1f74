"""Checkpoint, database, snapshot and export written by version 0.1.0 before its modules moved open as they did then.

`tests/old` holds one of each: a random ViT for 16 pixels, and twelve references of two generators.
"""

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import URL, create_engine, text
from typer.testing import CliRunner

from api.cli import app
from api.http.app import create_app
from api.service_settings import ServiceSettings
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads
from trainer.model.embedder import Embedder

OLD = Path(__file__).parents[1] / "old"
STORE = "4b57d011-a391-479b-9d9b-ac822aeb2511"
CHECKPOINT = "fe4579a4e604e88645ce29a0843eb98f"
HEADS = "fae366850560dfbfd0647f50b5dec0a2"


@pytest.fixture
def database(postgres_server: URL) -> Iterator[str]:
    """An empty database without Lineup's tables."""
    name = f"old_{uuid.uuid4().hex[:12]}"
    admin = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"create database {name} template template0"))
    yield postgres_server.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"drop database {name} with (force)"))
    admin.dispose()


@pytest.fixture
def home(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a home with the old checkpoint."""
    variables = {"HOME": tmp_path, "DATABASE_URL": database, "CHECKPOINT": OLD / "checkpoint", "DEVICE": "cpu"}
    for name, value in variables.items():
        monkeypatch.setenv(f"LINEUP_{name}", str(value))
    monkeypatch.setenv("LINEUP_OPEN", "true")
    return tmp_path


def lineup(*arguments: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    done = CliRunner().invoke(app, ["index", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def restore(database: str) -> None:
    """Bring the dump into the database."""
    engine = create_engine(database.replace("postgresql://", "postgresql+psycopg://"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql((OLD / "database.sql").read_text().replace("%", "%%"))
    engine.dispose()


def test_a_checkpoint_keeps_its_ids_and_its_calibration() -> None:
    folder = OLD / "checkpoint"
    embedder, heads, calibration = Embedder.load(folder, device="cpu"), Heads.load(folder), CalibrationSet.load(folder)
    assert (embedder.id, heads.id, len(calibration)) == (CHECKPOINT, HEADS, 120)
    assert embedder.embed_pixels(np.zeros((1, 3, 16, 16), np.uint8)).shape == (1, 12)


def test_a_database_is_read_with_its_verdicts(home: Path, database: str) -> None:
    restore(database)
    CliRunner().invoke(app, ["index", "migrate"])
    status = lineup("status")
    assert status["references"] == {"real": 6, "fake": 6}
    assert {row["name"]: row["references"] for row in status["generators"]} == {"gen-a": 3, "gen-b": 3}
    client = TestClient(create_app(ServiceSettings()), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000))
    with client:
        while client.get("/health/ready").status_code == 503:
            time.sleep(0.05)
        listed = {row["file"]: row for row in client.get("/v1/detections").json()["detections"]}
        record = client.get(f"/v1/detections/{listed['portrait.jpg']['id']}").json()
    assert {file: row["verdict"] for file, row in listed.items()} == {
        "portrait.jpg": "uncertain",
        "/tmp/images/fake/gen-b/000.png": "fake",
    }
    assert {row["label"] for row in record["result"]["neighbours"]} == {"real", "fake"}
    lineup("check")


def test_a_snapshot_of_another_format_is_made_anew(home: Path, database: str) -> None:
    restore(database)
    CliRunner().invoke(app, ["index", "migrate"])
    snapshot = home / "index" / STORE / CHECKPOINT / "snapshot"
    snapshot.parent.mkdir(parents=True)
    shutil.copy(OLD / "snapshot", snapshot)
    index = lineup("status")["index"]
    assert (index["size"], index["revision"]) == (12, 1)
    lineup("rebuild")
    lineup("check")


def test_an_export_is_imported(home: Path) -> None:
    CliRunner().invoke(app, ["index", "migrate"])
    lineup("import", str(OLD / "references.lineup"))
    assert lineup("status")["references"] == {"real": 6, "fake": 6}
