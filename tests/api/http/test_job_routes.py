"""Jobs over HTTP: images judged between requests, results in pages and as a table, webhooks, and bad input."""

import csv
import hashlib
import hmac
import io
import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from publisher import listening
from served import png
from tenacity import wait_none

from api import job_worker, service, webhook
from api.access import hash_secret, new_secret
from api.http.app import create_app
from api.judge.detector import Detector
from api.judge.loader import load_detector
from api.judge.uploads import Prepared
from api.schemas.problems import ApiError
from api.schemas.verdicts import Verdict
from api.service import Service
from api.service_settings import ServiceSettings
from api.verdict_file import COLUMNS
from indexer import follower
from indexer.ingest.public_files import public_client
from indexer.store import Store
from indexer.store.jobs import Jobs

SECRET = "a secret of webhooks"
JOBS = "/v1/jobs"
Public = tuple[str, dict[str, bytes | str], list[str]]


@pytest.fixture(scope="module", autouse=True)
def hurried(certificate: Path) -> Iterator[None]:
    """Nothing waits for the next look, and the certificate of these tests is trusted."""
    with pytest.MonkeyPatch.context() as patch:
        trust = ssl.create_default_context(cafile=str(certificate))
        patch.setattr(job_worker, "public_client", partial(public_client, trust))
        patch.setattr(follower, "POLL", 0.05)
        patch.setattr(job_worker, "POLL", 0.02)
        patch.setattr(job_worker, "RETRY", 0.02)
        patch.setattr(job_worker, "COUNT_SECONDS", 0.02)
        patch.setattr(job_worker, "DEGRADED_PAUSE", 0.02)
        patch.setattr(webhook, "PAUSE", wait_none())
        yield


@contextmanager
def connected(settings: ServiceSettings, **changes: object) -> Iterator[TestClient]:
    """A service of its own, called from this machine."""
    settings = settings.model_copy(update={"webhook_secret": SECRET} | changes)
    detector = load_detector(settings)
    detector.calibrator.refresh()
    app = create_app(settings, detector)
    with TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000)) as client:
        yield client


@pytest.fixture(scope="module")
def client(populated: ServiceSettings) -> Iterator[TestClient]:
    with connected(populated, max_upload_bytes=100_000, max_job_images=50) as client:
        yield client


def service_of(client: TestClient) -> Service:
    return cast(Service, cast(FastAPI, client.app).state.service)


def store_of(client: TestClient) -> Store:
    return service_of(client).detector.store


def images(*data: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("image", (f"{number}.png", one, "image/png")) for number, one in enumerate(data)]


def urls(*lines: str) -> dict[str, tuple[str, bytes, str]]:
    return {"urls": ("urls.txt", "\n".join(lines).encode(), "text/plain")}


def detail(response: Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["detail"])


def sent(client: TestClient, **request: Any) -> dict[str, Any]:
    answer = client.post(JOBS, **request)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def until(client: TestClient, job: dict[str, Any], condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The job once it fulfils a condition."""
    deadline = time.monotonic() + 30
    while not condition(now := client.get(f"{JOBS}/{job['id']}").json()):
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return dict(now)


def ended(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    return until(client, job, lambda now: now["ended_at"] is not None)


def results(client: TestClient, job: dict[str, Any], limit: int = 1000) -> list[dict[str, Any]]:
    """All results of an ended job, in pages."""
    every: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = client.get(f"{JOBS}/{job['id']}/results", params={"after": after, "limit": limit}).json()
        assert len(page["results"]) <= limit
        every, after = every + page["results"], page["next"]
    return every


def test_a_call_that_is_repeated_with_its_key_makes_one_job(client: TestClient) -> None:
    request: dict[str, Any] = {"files": images(png(1, True)), "headers": {"idempotency-key": "one"}}
    job = ended(client, sent(client, **request))
    assert sent(client, **request) == job
    assert sent(client, files=images(png(1, True)))["id"] != job["id"]
    detail(client.post(JOBS, files=images(png(1, True)), headers={"idempotency-key": "k" * 201}), 422)


def test_a_job_says_of_each_image_what_detect_says(client: TestClient) -> None:
    data = [png(95_000 + number, number % 2 == 0) for number in range(5)]
    job = sent(client, files=images(*data[:3], b"no image", *data[3:]), params={"k": 3, "explain": "stability"})
    assert (job["state"], job["images"]) == ("queued", 6)
    done = ended(client, job)
    assert (done["state"], done["failed"], done["fake"] + done["real"] + done["uncertain"]) == ("done", 1, 5)
    every = results(client, job, limit=4)
    assert [one["file"] for one in every] == [f"{number}.png" for number in range(6)]
    assert every.pop(3)["error"]["status"] == 415
    answers = [
        client.post("/v1/detect", files=images(one), params={"k": 3, "explain": "stability"}).json()["results"][0]
        for one in data
    ]
    for verdict, answer in zip(every, answers, strict=True):
        assert Verdict.model_validate(verdict).recorded
        assert client.get(f"/v1/detections/{verdict['id']}").status_code == 200
        for changing in ("id", "file", "timings_ms"):
            del verdict[changing], answer[changing]
        assert verdict == answer
    assert job["id"] in [one["id"] for one in client.get(JOBS).json()["jobs"]]
    assert 'lineup_verdicts_total{basis="score"' in client.get("/metrics").text


def test_a_table_has_a_row_of_each_image(client: TestClient) -> None:
    job = ended(client, sent(client, files=[("image", ("=a.png", png(1, True), "")), *images(b"broken")]))
    answer = client.get(f"{JOBS}/{job['id']}/results.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(answer.content.decode("utf-8-sig"))))
    assert list(rows[0]) == list(COLUMNS)
    assert [one["file"] for one in rows] == ["'=a.png", "0.png"]
    first, second = results(client, job)
    assert (rows[0]["verdict"], float(rows[0]["score"])) == (first["verdict"], first["score"])
    assert rows[1]["error"] == second["error"]["detail"]


@pytest.mark.usefixtures("trust")
def test_addresses_are_fetched_within_limits(client: TestClient, public_files: Public) -> None:
    base, served, asked = public_files
    served |= {"/a.png": png(7, True), "/loop": f"{base}/loop", "/inside": "https://127.0.0.1/a.png"}
    served["/large"] = b"x" * 100_001
    served["/notes"] = b"no image"
    lines = [f"{base}/{name}" for name in ("a.png", "loop", "inside", "large", "notes", "none")]
    others = ["https://127.0.0.1/a.png", "http://localhost/a.png", "https://[::1", "a.png", "https://10.0.0.1"]
    job = sent(client, files=urls("", *lines, "", *others))
    assert job["images"] == 11
    done = ended(client, job)
    assert (done["state"], done["failed"]) == ("done", 10)
    every = results(client, job)
    assert [one["file"] for one in every] == [*lines, *others]
    reasons = [one["error"]["detail"].removeprefix(f"{one['file']}: ") for one in every[1:]]
    assert reasons[:3] == ["more than 5 redirects", "not a public server", "more than 100,000 bytes"]
    assert reasons[4:7] == ["HTTP 404", "not a public server", "not https"]
    assert reasons[9] == "not a public server"
    kinds = {one["file"]: one["error"]["type"] for one in every[1:]}
    assert kinds.pop(f"{base}/notes").endswith(":not-an-image")
    assert set(kinds.values()) == {"urn:lineup:not-fetched"}
    assert asked.count("/loop") == 6


def test_private_addresses_are_fetched_where_that_is_allowed(
    client: TestClient, settings: ServiceSettings, tiny_checkpoint: Path, public_files: Public
) -> None:
    base, served, _ = public_files
    served["/a.png"] = png(7, True)
    refused = ended(client, sent(client, files=urls(f"{base}/a.png")))
    assert refused["state"] == "failed"
    assert "not a public server" in results(client, refused)[0]["error"]["detail"]
    with connected(settings, checkpoint=tiny_checkpoint, device="cpu", private_addresses=True) as allowing:
        assert ended(allowing, sent(allowing, files=urls(f"{base}/a.png")))["state"] == "done"


def test_bad_jobs_are_refused_as_a_whole(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"max_job_images": 3, "max_waiting_images": 2, "max_waiting_bytes": 20_000, "webhook_secret": None}
    settings = service_of(client).settings.model_copy(update=limits)
    monkeypatch.setattr(service_of(client), "settings", settings)
    before = client.get(JOBS).json()
    assert "a job needs images" in detail(client.post(JOBS), 422)
    assert "a job needs images" in detail(client.post(JOBS, files=urls(" ", "")), 422)
    too_many = client.post(JOBS, files=[*images(b"a", b"b"), *urls("https://a", "https://b").items()])
    assert detail(too_many, 413) == "4 images; LINEUP_MAX_JOB_IMAGES allows 3 in one job"
    million = client.post(JOBS, files=urls(*["https://a.example/1.png"] * 1_000_000))
    assert "LINEUP_MAX_JOB_IMAGES allows 3 addresses" in detail(million, 413)
    assert "line 2 of urls" in detail(client.post(JOBS, files=urls("https://a", "https://\0")), 422)
    assert "line 1 of urls" in detail(client.post(JOBS, files=urls("https://a.example/" + "a" * 2048)), 422)
    assert "UTF-8" in detail(client.post(JOBS, files={"urls": ("a", b"\xff\xfe", "")}), 422)
    assert "LINEUP_MAX_JOB_IMAGES says" in detail(client.post(JOBS, files=images(*[b"a"] * 52)), 413)
    assert "LINEUP_MAX_WAITING_IMAGES" in detail(client.post(JOBS, files=images(b"a", b"b", b"c")), 503)
    assert "LINEUP_MAX_WAITING_BYTES" in detail(client.post(JOBS, files=images(b"a" * 20_001)), 503)
    assert "LINEUP_WEBHOOK_SECRET" in detail(
        client.post(JOBS, files=images(b"a"), data={"webhook": "https://a.example"}), 422
    )
    assert "k" in detail(client.post(JOBS, files=images(b"a"), params={"k": 0}), 422)
    assert client.get(JOBS).json() == before
    unknown = "00000000-0000-0000-0000-000000000000"
    for call in (client.get, client.delete):
        assert detail(call(f"{JOBS}/{unknown}"), 404) == f"there is no job {unknown}"
    for path in ("results", "results.csv"):
        detail(client.get(f"{JOBS}/{unknown}/{path}"), 404)
    detail(client.post(f"{JOBS}/{unknown}/cancel"), 404)


def test_more_files_than_other_calls_take_are_a_job_and_one_that_is_too_large_is_named(client: TestClient) -> None:
    job = sent(client, files=images(b"x" * 100_001, *[b"no image"] * 40))
    first, *others = results(client, ended(client, job))
    assert (first["error"]["status"], "has 100,001 bytes" in first["error"]["detail"]) == (413, True)
    assert {one["error"]["status"] for one in others} == {415}


@pytest.fixture
def headers(client: TestClient) -> Iterator[dict[str, dict[str, str]]]:
    """What the holders of keys send, for as long as there are keys."""
    keys = {name: new_secret() for name in ("a", "b", "admin", "enrol")}
    for name, secret in keys.items():
        store_of(client).keys.create(name, hash_secret(secret), ["detect" if name in "ab" else name])
    yield {name: {"authorization": f"Bearer {secret}"} for name, secret in keys.items()}
    with store_of(client).engine.begin() as connection:
        connection.exec_driver_sql("delete from api_key")
    service_of(client)._keys._any = None


def test_a_job_is_its_keys_and_admins(client: TestClient, headers: dict[str, dict[str, str]]) -> None:
    answer = client.post(JOBS, files=images(png(3, True)), headers=headers["a"])
    place = f"{JOBS}/{answer.json()['id']}"
    for name, status in (("a", 200), ("b", 404), ("admin", 200), ("enrol", 403)):
        for path in (place, f"{place}/results", f"{place}/results.csv"):
            assert client.get(path, headers=headers[name]).status_code == status
    listed = {name: client.get(JOBS, headers=headers[name]).json()["jobs"] for name in ("a", "b", "admin")}
    assert [job["id"] for job in listed["a"]] == [listed["admin"][0]["id"]] == [answer.json()["id"]]
    assert (listed["b"], len(listed["admin"]) > 1) == ([], True)
    for call in (partial(client.post, f"{place}/cancel"), partial(client.delete, place)):
        assert [call(headers=headers[name]).status_code for name in ("b", "enrol")] == [404, 403]
    while not (found := client.get(f"{place}/results", headers=headers["a"]).json()["results"]):
        time.sleep(0.02)
    assert {near["uri"] for near in found[0]["neighbours"]} == {None}
    seen = client.get(f"{place}/results", headers=headers["admin"]).json()["results"]
    assert all(near["uri"].startswith("file://") for near in seen[0]["neighbours"])
    assert client.delete(place, headers=headers["a"]).status_code == 204
    assert client.get(place, headers=headers["a"]).status_code == 404


def test_a_key_fills_half_of_what_may_wait(
    client: TestClient, headers: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of its own alone may be larger."""
    monkeypatch.setattr(Jobs, "claim", lambda *_, **__: [])  # nothing is taken meanwhile
    limits = {"max_waiting_images": 8, "max_waiting_bytes": 100}
    monkeypatch.setattr(service_of(client), "settings", service_of(client).settings.model_copy(update=limits))

    def post(key: str, *data: bytes) -> Response:
        return client.post(JOBS, files=images(*data), headers=headers[key])

    jobs = [post("a", b"a"), post("a", b"a", b"a", b"a")]
    assert "LINEUP_MAX_WAITING_IMAGES: 4" in detail(post("a", b"a"), 503)
    jobs.append(post("b", b"b" * 51))
    assert "LINEUP_MAX_WAITING_BYTES: 50" in detail(post("b", b"b"), 503)
    for job in jobs:
        assert client.delete(f"{JOBS}/{job.json()['id']}", headers=headers["admin"]).status_code == 204


def test_jobs_wait_for_requests_and_a_cancelled_one_ends(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """And paging a job that runs gives no result twice and skips none."""
    monkeypatch.setattr(service, "GAP_SECONDS", 1000.0)
    served = service_of(client)
    with served._request(1):
        job = sent(client, files=images(*(png(number, True) for number in range(20))))
        until(client, job, lambda now: now["state"] == "running")
        time.sleep(0.2)
        assert client.get(f"{JOBS}/{job['id']}/results").json() == {"results": [], "next": 0}
        assert client.post("/v1/detect", files=images(png(1, False))).status_code == 200
        metrics = client.get("/metrics").text
        assert "lineup_jobs 1.0" in metrics
        assert "lineup_job_images 20.0" in metrics
    until(client, job, lambda now: now["fake"] + now["real"] + now["uncertain"] >= 3)
    with served._request(1):
        cancelled = client.post(f"{JOBS}/{job['id']}/cancel").json()
        assert (cancelled["state"], client.post(f"{JOBS}/{job['id']}/cancel").json()) == ("cancelled", cancelled)
    judged = cancelled["fake"] + cancelled["real"] + cancelled["uncertain"]
    assert 3 <= judged < 20
    names = [one["file"] for one in results(client, job, limit=2)]
    assert len(names) == len(set(names)) == judged


def test_under_requests_without_end_a_job_goes_on(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "GAP_SECONDS", 0.05)
    with service_of(client)._request(1):
        assert ended(client, sent(client, files=images(png(1, True), png(2, False))))["state"] == "done"


def test_what_the_service_cannot_judge_now_is_judged_later(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    prepare = Detector.prepare

    def overloaded(self: Detector, upload: Any, question: Any) -> Prepared:
        tries.append(upload.file)
        if len(tries) < 6:
            raise ApiError("not-ready", "too many wait")
        return prepare(self, upload, question)

    monkeypatch.setattr(Detector, "prepare", overloaded)
    job = ended(client, sent(client, files=images(png(1, True))))
    assert (job["failed"], len(tries)) == (0, 6)


def test_an_image_that_never_ends_is_given_up(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_worker, "LEASE_SECONDS", 0.1)
    monkeypatch.setattr(Detector, "prepare", lambda *_: 1 / 0)
    job = sent(client, files=images(png(1, True)))
    assert ended(client, job)["state"] == "failed"
    assert "given up after 3 attempts" in results(client, job)[0]["error"]["detail"]


def test_an_image_that_always_lacks_evidence_ends_with_a_verdict_that_says_so(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database is away it goes on waiting instead."""
    judge, tries = Detector.judge, 0

    def degraded(self: Detector, cases: Any) -> list[Verdict]:
        nonlocal tries
        tries += len(cases)
        self.follower.degraded = tries < 6
        return [verdict.model_copy(update={"degraded": True}) for verdict in judge(self, cases)]

    monkeypatch.setattr(Detector, "judge", degraded)
    monkeypatch.setattr(service_of(client).detector.follower, "catch_up", lambda: 0)
    job = ended(client, sent(client, files=images(png(1, True))))
    assert (job["failed"], results(client, job)[0]["degraded"], tries) == (0, True, 8)


def test_jobs_are_worked_on_though_counting_them_fails(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Jobs, "waiting", lambda _: 1 / 0)
    deadline = time.monotonic() + 30
    while "counting what waits of jobs failed" not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.02)
    monkeypatch.undo()
    assert ended(client, sent(client, files=images(png(1, True))))["state"] == "done"


def test_a_stopped_service_gives_back_what_it_had(populated: ServiceSettings, client: TestClient) -> None:
    with service_of(client)._request(1), connected(populated) as stopping:
        service_of(stopping)._requested = 1
        job = sent(stopping, files=images(*(png(number, True) for number in range(3))))
        until(client, job, lambda now: now["state"] == "running")
    assert ended(client, job)["failed"] == 0
    assert [one["file"] for one in results(client, job)] == ["0.png", "1.png", "2.png"]


@pytest.fixture
def webhook_server(certificate: Path) -> Iterator[tuple[str, list[Any], list[int]]]:
    """An https server of this machine: its address, what was posted to it, and the answers it is to give.

    Without one, and under `/hangs`, it says nothing.
    """
    told: list[Any] = []
    answers: list[int] = []
    ending = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path == "/hangs":
                ending.wait()
                return
            told.append((self.path, self.headers, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(answers.pop(0))
            self.send_header("location", "https://localhost/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Stay silent."""

    with listening(Handler, certificate) as address:
        yield address, told, answers
        ending.set()


def test_webhooks_that_nobody_could_be_told_by_are_refused(client: TestClient) -> None:
    for address in ("http://a.example", "https://", "a.example", "https://[", "https://a.example/\n"):
        answer = client.post(JOBS, files=images(b"a"), data={"webhook": address})
        assert "is no address like https://" in detail(answer, 422)


@pytest.mark.usefixtures("trust")
def test_a_webhook_is_told_of_the_end_under_a_signature(
    client: TestClient, webhook_server: tuple[str, list[Any], list[int]]
) -> None:
    base, told, answers = webhook_server
    answers += [500, 302, 200]
    job = sent(client, files=images(png(1, True)), data={"webhook": f"{base}/end?token=1"})
    assert job["webhook_state"] == "pending"
    done = until(client, job, lambda now: now["webhook_state"] != "pending")
    assert (done["webhook_state"], done["webhook_error"]) == ("delivered", None)
    assert len(told) == 3
    for path, headers, body in told:
        assert path == "/end?token=1"
        expected = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        assert headers["x-lineup-signature"] == f"sha256={expected}"
        assert json.loads(body) | {"webhook_state": "delivered"} == done
    assert 'lineup_webhooks_total{state="delivered"} 1.0' in client.get("/metrics").text


@pytest.mark.usefixtures("trust")
def test_a_webhook_that_hangs_blocks_nothing_and_is_given_up(
    client: TestClient, webhook_server: tuple[str, list[Any], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, told, answers = webhook_server
    monkeypatch.setattr(webhook, "ANSWER_SECONDS", 0.2)
    hanging = [sent(client, files=images(b"x"), data={"webhook": f"{base}/hangs"}) for _ in range(3)]
    assert ended(client, sent(client, files=images(png(1, True))))["state"] == "done"
    given_up = [until(client, job, lambda now: now["webhook_state"] != "pending") for job in hanging]
    assert {(job["state"], job["webhook_state"], job["webhook_error"]) for job in given_up} == {
        ("failed", "failed", "too slow")
    }
    inside = sent(client, files=images(b"x"), data={"webhook": "https://127.0.0.1/"})
    assert until(client, inside, lambda now: now["webhook_state"] == "failed")["webhook_error"] == "not a public server"
    assert answers == told == []
