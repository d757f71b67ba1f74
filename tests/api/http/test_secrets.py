"""Planted secrets of callers, webhooks and the database are in no answer, log line, metric or page."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import make_url
from typer.testing import CliRunner

from api import access
from api.__main__ import app as api
from api.access import hash_secret
from api.http.app import create_app
from api.http.server import JsonFormatter
from api.judge.loader import load_detector
from api.service_settings import ServiceSettings
from indexer.__main__ import app as indexer
from indexer.database.connection import connect

PASSWORD, PARAMETER = "planted-password", "planted-parameter"
TOKEN, WEBHOOK = "planted-token-of-the-start", "planted-secret-of-webhooks"
KEY, WRONG_KEY, REVOKED_KEY = "lineup_planted-key", "lineup_planted-wrong-key", "lineup_planted-revoked-key"
PLANTED = (PASSWORD, PARAMETER, TOKEN, WEBHOOK, KEY, WRONG_KEY, REVOKED_KEY)
PATHS = (
    *("/", "/app.js", "/docs", "/openapi.json", "/health/live", "/health/ready", "/metrics", "/nothing"),
    *("/v1/status", "/v1/calibration", "/v1/generators", "/v1/references", "/v1/enrolments", "/v1/detections"),
    *("/v1/jobs", "/v1/candidates"),
)


def with_password(url: str) -> str:
    """The same database, by a URL that holds two passwords, which it does not ask for."""
    planted = make_url(url).set(password=PASSWORD).update_query_dict({"sslpassword": PARAMETER})
    return planted.render_as_string(hide_password=False)


@pytest.fixture
def planted(settings: ServiceSettings, tiny_checkpoint: Path) -> ServiceSettings:
    changes = {"database_url": with_password(str(settings.database_url)), "token": TOKEN, "webhook_secret": WEBHOOK}
    return settings.model_copy(update={**changes, "open": False, "checkpoint": tiny_checkpoint, "device": "cpu"})


def text_of(response: Response) -> str:
    """Everything that a caller sees."""
    return f"{response.headers}{response.text}"


def test_what_is_planted_shows_nowhere(
    planted: ServiceSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(access, "FRESH", 0.0)
    detector = load_detector(planted)
    away = planted.model_copy(update={"database_url": "postgresql://a@127.0.0.1:1/x?password=" + PARAMETER})
    shown: list[str] = [repr(planted)]

    def ask(client: TestClient, *secrets: str) -> None:
        for path in PATHS:
            for secret in secrets:
                headers = {"authorization": f"Bearer {secret}"}
                shown.append(text_of(client.get(path, headers=headers)))
                shown.append(text_of(client.request("ODD", f"{path}?token={secret}", headers=headers)))
                shown.append(text_of(client.post(path, json={"name": "?"}, headers=headers | {"cookie": secret})))

    def fails(error: Callable[[], object]) -> Callable[..., object]:
        return lambda *_, **__: error()

    def bug() -> None:
        raise ZeroDivisionError

    app = create_app(planted, detector)
    with TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 1)) as client:
        ask(client, TOKEN, WRONG_KEY)
        for number, secret in enumerate((KEY, REVOKED_KEY)):
            detector.store.keys.create(f"key-{number}", hash_secret(secret), ["admin"])
        detector.store.keys.revoke("key-1")
        ask(client, KEY, WRONG_KEY, REVOKED_KEY, TOKEN)
        statuses = set()
        for failure in (bug, lambda: connect(away)):
            with monkeypatch.context() as patch:
                patch.setattr(detector.store.generators, "list", fails(failure))
                response = client.get("/v1/generators", headers={"authorization": f"Bearer {KEY}"})
            shown.append(text_of(response))
            statuses.add(response.status_code)
        assert statuses == {500, 503}
        with monkeypatch.context() as patch:
            patch.setattr(detector.store.keys, "find", fails(lambda: connect(away)))
            ask(client, WRONG_KEY)
    with TestClient(create_app(away), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 1)) as client:
        ask(client, TOKEN)
        while "waiting for the database" not in caplog.text:
            client.get("/health/ready")
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name != "httpx2"]
    assert any('"status": 500' in line for line in lines)  # the test sees what it looks at
    assert any("Traceback" in line for line in lines)
    assert any("no database at postgresql" in line for line in lines)
    assert any("lineup_requests_total" in text for text in shown)
    leaks = [(secret, text) for secret in PLANTED for text in (*lines, *shown) if secret in text]
    assert leaks == []


def test_commands_show_no_password(planted: ServiceSettings, tiny_checkpoint: Path) -> None:
    environment = {"LINEUP_HOME": str(planted.home), "LINEUP_CHECKPOINT": str(tiny_checkpoint)}
    for url in (planted.database_url, f"postgresql://a:{PASSWORD}@127.0.0.1:1/x?password={PARAMETER}"):
        for app, arguments in ((indexer, ["status"]), (indexer, ["status", "--json"]), (api, ["keys", "list"])):
            done = CliRunner().invoke(app, arguments, env=environment | {"LINEUP_DATABASE_URL": url})
            assert done.exit_code == (0 if url == planted.database_url else 1), done.output
            assert done.output
            assert not [secret for secret in (PASSWORD, PARAMETER) if secret in done.output]
