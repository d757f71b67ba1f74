"""The client has a method for every call, and reads what the service answers."""

import io
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import small_image
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api import client as api_client
from api import job_worker
from api.client import Client, ServiceError
from api.http.app import create_app
from api.judge.loader import load_detector
from api.schemas.problems import FailedFile
from api.schemas.verdicts import Hits, Verdict
from api.service_settings import ServiceSettings

BASE = "http://127.0.0.1:8000"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    small_image(90_000 + seed, True, 64).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def calls() -> list[tuple[str, str]]:
    """Method and path of every request."""
    return []


@pytest.fixture
def lineup(
    populated: ServiceSettings, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Client]:
    monkeypatch.setattr(job_worker, "POLL", 0.02)
    detector = load_detector(populated)
    detector.calibrator.refresh()
    app = create_app(populated, detector)
    with TestClient(app, base_url=BASE, client=("127.0.0.1", 50000)) as http:
        http.event_hooks = {"request": [lambda request: calls.append((request.method, request.url.path))]}
        yield Client(BASE, populated.token, http=http)


def test_every_call_of_the_interface_has_a_method(
    lineup: Client, calls: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_client, "PAGE", 2)
    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    verdict, failed = lineup.detect(path, b"broken", k=3, explain=["regions"])
    assert isinstance(verdict, Verdict)
    assert (verdict.file, len(verdict.neighbours)) == ("a.png", 6)
    assert isinstance(failed, FailedFile)
    assert (failed.file, failed.error.status) == ("image-1", 415)
    [hits] = lineup.search(("b.png", png(2)), label="fake", limit=3)
    assert isinstance(hits, Hits)
    assert [near.label for near in hits.neighbours] == ["fake"] * 3

    added = lineup.add(*map(png, range(3, 8)), label="fake", generator="gen-new", source="client")
    assert added.added == 5
    assert added.effect
    assert [row["generator"] for row in added.effect["verdicts"]] == ["gen-new", "real calibration images"]
    references = list(lineup.references(generator="gen-new"))
    assert len({reference.id for reference in references}) == 5  # three pages
    assert lineup.reference(references[0].id) == references[0]
    assert lineup.thumbnail(references[0].id).startswith(b"\xff\xd8")
    assert [one.id for one in lineup.references(generator="gen-new", newest=True)] == [
        one.id for one in reversed(references)
    ]
    assert {one.id for one in lineup.references(source="client", sort="generator")} == {one.id for one in references}
    while (drawn := lineup.map()).revision < added.revision:
        time.sleep(0.05)
    assert {one.id for one in references} < set(drawn.id)
    near = lineup.neighbours(references[0].id, generator="gen-new")
    assert {one.id for one in near} == {one.id for one in references[1:]}
    assert [one.similarity for one in near] == sorted((one.similarity for one in near), reverse=True)
    relabelled = lineup.relabel(references[0].id, "fake", "gen-newer")
    assert (relabelled.generator, relabelled.attributes["former_generator"]) == ("gen-newer", "gen-new")
    assert lineup.remove(relabelled.id).references == 1
    assert lineup.create_generator("Gen-Made", vendor="somebody").vendor == "somebody"
    assert lineup.change_generator("gen-made", version="2", name_="gen-called").name == "gen-called"
    assert lineup.generator("GEN-NEW").references == 4
    assert {"gen-new", "gen-called"} <= {generator.name for generator in lineup.generators()}
    assert lineup.delete_generator("gen-called").references == 0
    newest = next(lineup.enrolments())
    assert lineup.enrolment(newest.id) == newest
    assert lineup.undo(newest.id).references == 4

    kept = next(lineup.detections())
    assert kept.id == verdict.id
    assert lineup.overlay(kept.id).startswith(b"\x89PNG")
    assert lineup.feedback(kept.id, "real", "mine").feedback is not None
    assert lineup.detection(kept.id).result["file"] == "a.png"
    with pytest.raises(ServiceError, match="there is no thumbnail"):
        lineup.judged_thumbnail(kept.id)
    assert lineup.candidates().images == 0  # the only verdict was disputed as real
    with pytest.raises(ServiceError, match="no candidate is called 'none'"):
        lineup.enrol_candidate("none", "gen-new")
    assert lineup.replay(kept.id).after.id == kept.id
    corrected = lineup.enrol_detection(kept.id, "fake", "gen-new", image=path)
    assert (corrected.added, corrected.reference.generator, corrected.readable) == (1, "gen-new", True)
    assert lineup.undo(corrected.enrolment or 0).references == 1

    asked: dict[str, Any] = {"urls": ["https://127.0.0.1/a.png"], "k": 3, "idempotency_key": "mine"}
    job = lineup.start_job(path, png(2), **asked)
    assert lineup.start_job(path, png(2), **asked).id == job.id
    while not (ended := lineup.job(job.id)).ended_at:
        time.sleep(0.02)
    assert (ended.state, ended.images, ended.failed) == ("done", 3, 1)
    first, _, last = lineup.job_results(job.id)
    assert isinstance(first, Verdict)
    assert (first.file, len(first.neighbours)) == ("a.png", 6)
    assert isinstance(last, FailedFile)
    assert len(lineup.job_table(job.id).splitlines()) == 4
    assert lineup.cancel_job(job.id) == ended == next(lineup.jobs())
    lineup.delete_job(job.id)
    with pytest.raises(ServiceError, match="there is no job"):
        lineup.job(job.id)
    assert lineup.status().references.fake > 0
    assert lineup.calibration().max_false_alarm == 0.05

    assert isinstance(lineup.http, TestClient)
    assert isinstance(lineup.http.app, FastAPI)
    paths = lineup.http.app.openapi()["paths"]
    operations = {
        (method.upper(), path) for path, methods in paths.items() if path.startswith("/v1/") for method in methods
    }
    made = {
        (method, template)
        for method, template in operations
        if any(m == method and re.fullmatch(re.sub(r"{[^}]+}", "[^/]+", template), path) for m, path in calls)
    }
    assert operations - made == set()


def answering(*responses: httpx2.Response) -> tuple[Client, list[httpx2.Request]]:
    requests: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return responses[len(requests) - 1]

    return Client(BASE + "/", "secret", http=httpx2.Client(transport=httpx2.MockTransport(handler))), requests


def test_a_busy_service_is_called_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    busy = httpx2.Response(503, headers={"retry-after": "7"})
    newer = {"generators": [], "more": 1}
    lineup, requests = answering(busy, httpx2.Response(429), httpx2.Response(200, json=newer))
    assert lineup.generators() == []
    assert waits == [7.0, 2.0]
    assert {request.headers["authorization"] for request in requests} == {"Bearer secret"}
    assert requests[0].url.path == "/v1/generators"


@pytest.mark.parametrize(
    ("response", "status", "message"),
    [
        (httpx2.Response(502, text="<html>proxy</html>"), 502, "HTTP 502: <html>proxy</html>"),
        (
            httpx2.Response(404, json={"type": "x", "title": "t", "status": 404, "detail": "there is no reference 1"}),
            404,
            "there is no reference 1",
        ),
    ],
)
def test_refusals_are_told_in_the_words_of_the_service(response: httpx2.Response, status: int, message: str) -> None:
    lineup, requests = answering(response)
    with pytest.raises(ServiceError, match=re.escape(message)) as caught:
        lineup.reference(1)
    assert caught.value.status == status
    assert len(requests) == 1
    elsewhere = pickle.loads(pickle.dumps(caught.value))  # of a process pool
    assert (elsewhere.status, str(elsewhere)) == (status, message)


@pytest.mark.parametrize("attempts", [1, 2])
def test_attempts_are_bounded(attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    requests: list[httpx2.Request] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(503)

    lineup = Client(BASE, attempts=attempts, http=httpx2.Client(transport=httpx2.MockTransport(handler)))
    with pytest.raises(ServiceError):
        lineup.status()
    assert len(requests) == attempts


def test_names_stay_within_their_part_of_a_path() -> None:
    lineup, requests = answering(*[httpx2.Response(200, json={"references": 0, "revision": 1})] * 3)
    for name in ("../references/5", "SD#2", "SD?x y"):
        lineup.delete_generator(name)
    paths = [request.url.raw_path for request in requests]
    assert paths == [b"/v1/generators/..%2Freferences%2F5", b"/v1/generators/SD%232", b"/v1/generators/SD%3Fx%20y"]


def test_a_job_is_sent_once_unless_its_key_keeps_it_from_being_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    lineup, requests = answering(*[httpx2.Response(503)] * 4)
    for key, sent in ((None, 1), ("one", 4)):
        with pytest.raises(ServiceError):
            lineup.start_job(urls=["https://example.org/a.jpg"], idempotency_key=key)
        assert len(requests) == sent
    assert [request.headers.get("idempotency-key") for request in requests] == [None, "one", "one", "one"]
