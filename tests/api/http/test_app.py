"""The HTTP interface, with its real detector and database: every call, and every error of the table."""

import asyncio
import gc
import io
import math
import shutil
import socket
import tarfile
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock
from uuid import uuid4

import numpy as np
import pyarrow
import pytest
from conftest import fill_disk, small_image
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from PIL import Image
from pyarrow import parquet
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from starlette.formparsers import MultiPartParser
from typer.testing import CliRunner

from api import access, service
from api.__main__ import app as api
from api.access import hash_secret, new_secret
from api.http import reference_routes, server
from api.http.app import create_app
from api.inflight import Budget, Reservation, reservation_in_use
from api.judge.calibrator import Calibrator
from api.judge.detector import Detector
from api.judge.loader import load_detector, load_successor
from api.judge.regions import MOST_REGIONS, VARIANTS
from api.judge.uploads import Prepared, Question, Upload
from api.schemas.problems import ApiError
from api.schemas.resources import Added
from api.schemas.verdicts import Verdict
from api.served_checkpoint import CAPACITY_PER_WINDOW, run_in
from api.service import Service
from api.service_settings import ServiceSettings
from indexer.__main__ import app as indexer
from indexer.index.milvus import EngineAway
from indexer.index.vector_index import VectorIndex
from indexer.ingest.reembed import reembed
from indexer.memory_copy import MemoryCopy
from indexer.store import Store
from indexer.store.checkpoints import Calibrations
from indexer.store.keys import ApiKey
from trainer.images import decode_image, thumbnail
from trainer.model.checkpoint import read_id
from trainer.model.embedder import Embedder
from trainer.process_pool import DeadlinePassed

BASE = "http://127.0.0.1:8000"
Files = list[tuple[str, tuple[str, bytes, str]]]


def png(seed: int = 1, fake: bool = True, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    small_image(80_000 + seed, fake, size).save(buffer, format="PNG")
    return buffer.getvalue()


def files(*data: bytes, field: str = "image") -> Files:
    return [(field, (f"{number}.png", one, "image/png")) for number, one in enumerate(data)]


def connected(settings: ServiceSettings, **changes: object) -> TestClient:
    """A client of an application of its own, calling from this machine."""
    settings = settings.model_copy(update=changes)
    detector = load_detector(settings)
    detector.calibrator.refresh()
    return TestClient(create_app(settings, detector), base_url=BASE, client=("127.0.0.1", 50000))


@pytest.fixture(scope="module")
def client(populated: ServiceSettings) -> Iterator[TestClient]:
    with connected(populated, max_files=4, max_upload_bytes=100_000, max_request_bytes=300_000) as client:
        yield client


@pytest.fixture
def own(settings: ServiceSettings, tiny_checkpoint: Path) -> Iterator[TestClient]:
    """Over an empty database of this test's own."""
    with connected(settings, checkpoint=tiny_checkpoint, device="cpu", k=5) as client:
        yield client


def service_of(client: TestClient) -> Service:
    return cast(Service, cast(FastAPI, client.app).state.service)


def detector_of(client: TestClient) -> Detector:
    return service_of(client).detector


def store_of(client: TestClient) -> Store:
    return detector_of(client).store


def problem(response: Response, status: int, kind: str) -> dict[str, Any]:
    """The body of a response that has to be this problem."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["type"] == f"urn:lineup:{kind}"
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


# Detection


def test_detect_one_and_several(client: TestClient) -> None:
    (one,) = client.post("/v1/detect", files=files(png())).json()["results"]
    assert (one["file"], one["basis"]) == ("0.png", "score")
    assert len(one["neighbours"]) == 10
    many = client.post("/v1/detect", files=files(png(1), b"no image", png(2))).json()["results"]
    assert [result["file"] for result in many] == ["0.png", "1.png", "2.png"]
    assert many[0]["neighbours"] == one["neighbours"]
    assert many[1]["error"]["type"] == "urn:lineup:not-an-image"
    assert many[2]["image"]["width"] == 64


def test_detect_with_options(client: TestClient) -> None:
    options: dict[str, Any] = {"k": 2, "max_false_alarm": 0.5, "explain": "regions,stability"}
    (one,) = client.post("/v1/detect", params=options, files=files(png())).json()["results"]
    assert len(one["neighbours"]) == 4
    assert len(one["regions"]) == 4
    assert set(one["stability"]["scores"]) == set(VARIANTS)
    (plain,) = client.post("/v1/detect", files=files(png())).json()["results"]
    assert one["thresholds"]["fake"] < plain["thresholds"]["fake"]
    assert "regions" not in plain


def test_many_at_once_get_the_answers_of_one_at_a_time(client: TestClient) -> None:
    images = [png(seed) for seed in range(12)]
    alone = [client.post("/v1/detect", files=files(image)).json()["results"][0] for image in images]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda image: client.post("/v1/detect", files=files(image)), images))
    for first, response in zip(alone, together, strict=True):
        second = response.json()["results"][0]
        assert second["verdict"] == first["verdict"]
        assert second["score"] == pytest.approx(first["score"], abs=1e-3)
        assert second["neighbours"][0]["id"] == first["neighbours"][0]["id"]


def test_one_request_of_many_explained_images_does_not_fill_the_queue(
    populated: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(populated) as client:
        batcher = service_of(client).serving.embedding
        work, images = batcher._work, files(*[png(1, size=32)] * 12)
        assert service.EXPLAINED_AT_ONCE * (1 + MOST_REGIONS + len(VARIANTS)) <= batcher._capacity / 2
        assert service.EXPLAINED_AT_ONCE * (1 + len(VARIANTS)) <= CAPACITY_PER_WINDOW / 2
        monkeypatch.setattr(batcher, "_capacity", 3 * 9)  # each image is itself, one region, and seven variants

        def slow(stacks: Sequence[Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
            time.sleep(0.1)
            return work(stacks)

        monkeypatch.setattr(batcher, "_work", slow)
        results = client.post("/v1/detect", params={"explain": "regions,stability"}, files=images).json()["results"]
        assert [len(result["stability"]["scores"]) for result in results] == [7] * 12
        monkeypatch.setattr(batcher, "_capacity", 0)
        response = client.post("/v1/detect", files=files(png()))
        assert "images wait already" in problem(response, 503, "not-ready")["detail"]
        assert response.headers["retry-after"] == "1"
        both = client.post("/v1/detect", files=files(png(), b"no image")).json()["results"]
        assert [result["error"]["status"] for result in both] == [503, 415]


def test_search(client: TestClient) -> None:
    options: dict[str, Any] = {"label": "fake", "generator": "gen-a", "limit": 3}
    (first,) = client.post("/v1/search", params=options, files=files(png())).json()["results"]
    assert [n["generator"] for n in first["neighbours"]] == ["gen-a"] * 3
    assert first["next"] == 3
    (second,) = client.post("/v1/search", params=options | {"offset": 3}, files=files(png())).json()["results"]
    assert not {n["id"] for n in first["neighbours"]} & {n["id"] for n in second["neighbours"]}
    problem(client.post("/v1/search", files=files(b"")), 400, "unreadable")


def test_a_search_needs_the_search_engine(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: object, **options: object) -> None:
        raise EngineAway("http://user:secret@engine does not answer")

    monkeypatch.setattr(VectorIndex, "search", away)
    answer = problem(client.post("/v1/search", files=files(png())), 503, "not-ready")
    assert answer["detail"] == "the search engine does not answer"


# References, generators, enrolments


def test_references_are_added_searched_shown_and_removed(own: TestClient) -> None:
    form = {"label": "fake", "generator": "New-1", "source": "feed"}
    added = own.post("/v1/references", data=form, files=files(png(1), png(2), b"broken", field="images")).json()
    assert (added["added"], added["known"], added["embedded"], added["conflicts"]) == (2, 0, 0, [])
    assert [item["file"] for item in added["rejected"]] == ["2.png"]
    assert added["revision"] == 1
    again = own.post("/v1/references", data=form, files=files(png(1), field="images")).json()
    assert (again["added"], again["known"], again["revision"]) == (0, 1, 1)

    listed = own.get("/v1/references", params={"generator": "new-1", "limit": 1}).json()
    (first,) = listed["references"]
    assert (first["label"], first["generator"], first["source"], first["uri"]) == ("fake", "New-1", "feed", None)
    (second,) = own.get("/v1/references", params={"after": listed["next"]}).json()["references"]
    assert own.get(f"/v1/references/{second['id']}").json() == second
    thumbnail = own.get(first["thumbnail"])
    assert thumbnail.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(thumbnail.content)) as image:
        assert image.size == (64, 64)

    verdict = own.post("/v1/detect", files=files(png(1))).json()["results"][0]
    assert verdict["known"] == {"id": first["id"], "label": "fake", "generator": "New-1"}
    assert [n["id"] for n in verdict["neighbours"]] == [second["id"]]
    removed = own.delete(f"/v1/references/{second['id']}").json()
    assert removed == {"references": 1, "revision": 2}
    assert own.post("/v1/detect", files=files(png(3))).json()["results"][0]["neighbours"][0]["id"] == first["id"]
    for call in (own.get, own.delete):
        problem(call(f"/v1/references/{second['id']}"), 404, "not-found")
    problem(own.get(f"/v1/references/{second['id']}/thumbnail"), 404, "not-found")


def test_without_object_storage_images_are_judged_and_none_enrolled(
    settings: ServiceSettings, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder, form = tmp_path / "objects", {"label": "fake", "generator": "New-1"}
    folder.mkdir()
    with connected(settings, checkpoint=tiny_checkpoint, device="cpu", k=5, blobs=folder.as_uri()) as client:
        enrol = partial(client.post, "/v1/references", data=form)
        assert enrol(files=files(png(1), field="images")).json()["added"] == 1
        (row,) = client.get("/v1/references").json()["references"]
        assert client.get(row["thumbnail"]).headers["content-type"] == "image/jpeg"
        folder.rename(tmp_path / "away")
        folder.touch()  # which is no folder
        detail = problem(enrol(files=files(png(2), field="images")), 503, "not-ready")["detail"]
        assert detail == "object storage does not answer"
        problem(client.get(row["thumbnail"]), 503, "not-ready")
        verdict = client.post("/v1/detect", files=files(png(3))).json()["results"][0]
        assert [near["id"] for near in verdict["neighbours"]] == [row["id"]]
        assert not verdict["degraded"]
        folder.unlink()
        (tmp_path / "away").rename(folder)
        assert enrol(files=files(png(2), field="images")).json()["added"] == 1


def test_references_are_relabelled(own: TestClient) -> None:
    form = {"label": "fake", "generator": "New-1"}
    own.post("/v1/references", data=form, files=files(png(1), png(2), field="images"))
    wrong, _ = own.get("/v1/references").json()["references"]
    path = f"/v1/references/{wrong['id']}"
    for change in (
        {},
        {"label": "fake"},
        {"label": "real", "generator": "New-1"},
        {"label": "fake", "generator": "all"},
    ):
        problem(own.patch(path, json=change), 422, "bad-field")
    assert own.patch(path, json=form).json() == wrong  # it is that already
    right = own.patch(path, json={"label": "real"}).json()
    former = {"former_label": "fake", "former_generator": "New-1"}
    assert right["id"] != wrong["id"]
    assert (right["label"], right["generator"], right["attributes"]) == ("real", None, former)
    assert own.get(right["thumbnail"]).status_code == 200
    problem(own.patch(path, json={"label": "real"}), 404, "not-found")
    hits = own.post("/v1/search", params={"label": "real"}, files=files(png(3))).json()["results"][0]["neighbours"]
    assert [near["id"] for near in hits] == [right["id"]]  # at once
    undone = own.patch(f"/v1/references/{right['id']}", json=form).json()
    assert (undone["generator"], undone["attributes"]) == ("New-1", {})
    assert own.get("/v1/status").json()["references"] == {"real": 0, "fake": 2}


def test_a_relabelled_fake_is_one_of_an_unknown_generator_again_if_it_was(own: TestClient) -> None:
    own.post("/v1/references", data={"label": "fake", "generator": "New-1"}, files=files(png(1), field="images"))
    with store_of(own).engine.begin() as connection:
        connection.execute(text("update reference_image set generator_id = null"))
    (unnamed,) = own.get("/v1/references").json()["references"]
    named = own.patch(f"/v1/references/{unnamed['id']}", json={"label": "fake", "generator": "New-2"}).json()
    assert (named["generator"], named["attributes"]) == ("New-2", {"former_label": "fake"})
    undone = own.patch(f"/v1/references/{named['id']}", json={"label": "fake", "generator": None}).json()
    assert (undone["label"], undone["generator"], undone["attributes"]) == ("fake", None, {})


def test_neighbours_of_a_reference(own: TestClient) -> None:
    own.post("/v1/references", data={"label": "real"}, files=files(*map(png, range(1, 5)), field="images"))
    first, *_, last = own.get("/v1/references").json()["references"]
    path = f"/v1/references/{first['id']}/neighbours"
    near = own.get(path, params={"limit": 2}).json()["neighbours"]
    assert len(near) == 2
    assert first["id"] not in {one["id"] for one in near}
    assert near[0]["similarity"] >= near[1]["similarity"]
    assert own.get(path, params={"source": "nowhere"}).json() == {"neighbours": []}
    newest = own.get("/v1/references", params={"newest": True, "limit": 1}).json()
    assert newest["references"] == [last]
    following = own.get("/v1/references", params={"newest": True, "after": newest["next"]}).json()["references"]
    assert [one["id"] for one in following] == sorted((one["id"] for one in following), reverse=True)
    assert (len(following), following[-1]) == (3, first)
    problem(own.get("/v1/references/99/neighbours"), 404, "not-found")
    with store_of(own).engine.begin() as connection:
        connection.execute(text("delete from embedding"))
    assert "no vector" in problem(own.get(path), 409, "conflict")["detail"]


def test_a_reference_without_a_picture_is_shown_by_its_address(own: TestClient, tmp_path: Path) -> None:
    own.post("/v1/references", data={"label": "real"}, files=files(png(1), field="images"))
    store = store_of(own)
    uri = "https://example.org/a.png"
    with store.engine.begin() as connection:
        connection.execute(text("update reference_image set thumbnail = null, uri = :uri"), {"uri": uri})
    (listed,) = own.get("/v1/references").json()["references"]
    (near,) = own.post("/v1/search", files=files(png(2))).json()["results"][0]["neighbours"]
    assert [(one["thumbnail"], one["uri"]) for one in (listed, near)] == [(None, uri)] * 2
    answer = problem(own.get(f"/v1/references/{listed['id']}/thumbnail"), 404, "not-found")
    assert "lineup index thumbnails" in answer["detail"]


def test_a_picture_that_is_not_kept_is_made_of_a_file_that_may_be_read(
    settings: ServiceSettings, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file, a member of an archive, a cell and a file that has changed; then those where nothing is read."""
    names = ["open/a.png", "open/b.tar#b.png", "open/c.parquet#image/0", "open/changed.png"]
    names += ["closed/d.png", "open/../closed/e.png"]
    pictures = [png(number) for number in range(len(names))]
    for folder in ("open", "closed"):
        (tmp_path / folder).mkdir()
    for name, picture in zip(names, pictures, strict=True):
        if "#" not in name:
            (tmp_path / name).write_bytes(png(99) if "changed" in name else picture)
    with tarfile.open(tmp_path / "open/b.tar", "w") as archive:
        member = tarfile.TarInfo("b.png")
        member.size = len(pictures[1])
        archive.addfile(member, io.BytesIO(pictures[1]))
    parquet.write_table(pyarrow.table({"image": [pictures[2]]}), tmp_path / "open/c.parquet")
    uris = [f"{tmp_path.as_uri()}/{name}" for name in names]
    changes = {"checkpoint": tiny_checkpoint, "device": "cpu", "keep_uploads": False}
    with connected(settings, **changes, thumbnails_from=f"s3://bucket/, {tmp_path.as_uri()}/open/") as client:
        client.post("/v1/references", data={"label": "real"}, files=files(*pictures, field="images"))
        with store_of(client).engine.begin() as connection:
            query = text("update reference_image set thumbnail = null, uri = :uri where sha256 = :sha256")
            rows = zip(uris, pictures, strict=True)
            connection.execute(query, [{"uri": uri, "sha256": sha256(picture).digest()} for uri, picture in rows])
        listed = client.get("/v1/references").json()["references"]
        near = client.post("/v1/search", files=files(png(98))).json()["results"][0]["neighbours"]
        for shown in (listed, near):
            assert {one["uri"] for one in shown if one["thumbnail"]} == set(uris[:4])
        ids = {one["uri"]: one["id"] for one in listed}

        def statuses() -> list[int]:
            return [client.get(f"/v1/references/{ids[uri]}/thumbnail").status_code for uri in uris]

        with monkeypatch.context() as patch:
            patch.setattr(service, "make_thumbnail", Mock(side_effect=DeadlinePassed("late")))
            assert statuses() == [503, 503, 503, 503, 404, 404]
        assert statuses() == [200, 200, 200, 404, 404, 404]
        shutil.rmtree(tmp_path / "open")
        with monkeypatch.context() as patch:  # what was made is kept, and what could not be is not tried at once again
            patch.setattr(service, "make_thumbnail", Mock(side_effect=AssertionError))
            assert statuses() == [200, 200, 200, 404, 404, 404]
        made = client.get(f"/v1/references/{ids[uris[1]]}/thumbnail").content
        assert made == thumbnail(decode_image(pictures[1])[0])


def test_conflicts_are_409_only_when_they_are_all_there_was(own: TestClient) -> None:
    own.post("/v1/references", data={"label": "real"}, files=files(png(1), field="images"))
    other = {"label": "fake", "generator": "a"}
    mixed = own.post("/v1/references", data=other, files=files(png(1), png(2), field="images"))
    assert mixed.status_code == 200
    assert [(c["file"], c["has"], c["wants"]) for c in mixed.json()["conflicts"]] == [("0.png", "real", "fake (a)")]
    only = own.post("/v1/references", data=other, files=files(png(1), field="images"))
    assert problem(only, 409, "conflict")["conflicts"][0]["has"] == "real"


def test_what_may_not_come_back_is_rejected_and_no_conflict(own: TestClient) -> None:
    def add(*data: bytes) -> Response:
        return own.post("/v1/references", data={"label": "real"}, files=files(*data, field="images"))

    add(png(1))
    store_of(own).references.remove(source="upload", forget=True)
    for sent in ([png(1)], [png(1), b"no image"], [b"no image", png(1)]):
        response = add(*sent)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert (answer["added"], answer["conflicts"], answer["enrolment"]) == (0, [], None)
        assert [item["file"] for item in answer["rejected"]] == [f"{number}.png" for number in range(len(sent))]
        assert answer["rejected"][sent.index(png(1))]["reason"] == "was removed with --forget"


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"label": "fake", "generator": "none"}, "generator"),
        ({"label": "fake", "generator": "-bad"}, "generator"),
        ({"label": "real", "generator": "a"}, "generator"),
        ({"label": "fake"}, "generator"),
        ({"label": "fake", "generator": ""}, "generator"),
        ({"label": "maybe"}, "label"),
        ({}, "label"),
        ({"label": "real", "source": "a\0b"}, "source"),
    ],
)
def test_bad_fields_of_references_are_422(client: TestClient, form: dict[str, str], field: str) -> None:
    body = problem(client.post("/v1/references", data=form, files=files(png(), field="images")), 422, "bad-field")
    assert [error["field"] for error in body["errors"]] == [field]


def test_a_lone_reference_that_fails_has_its_own_status(own: TestClient) -> None:
    for data, status, kind in ((b"no image", 415, "not-an-image"), (png()[:200], 400, "unreadable")):
        response = own.post("/v1/references", data={"label": "real"}, files=files(data, field="images"))
        problem(response, status, kind)
    assert own.get("/v1/enrolments").json()["enrolments"] == []


def test_generators(own: TestClient) -> None:
    made = own.post("/v1/generators", json={"name": "Alpha 1", "vendor": "Acme", "released_on": "2026-01-31"})
    assert made.status_code == 201
    assert made.json() == {
        "name": "Alpha 1",
        "family": None,
        "vendor": "Acme",
        "version": None,
        "released_on": "2026-01-31",
        "notes": None,
        "references": 0,
    }
    problem(own.post("/v1/generators", json={"name": "ALPHA 1"}), 409, "conflict")
    problem(own.post("/v1/generators", json={"name": "Real"}), 422, "bad-field")
    problem(own.post("/v1/generators", json={"name": "!"}), 422, "bad-field")
    own.post("/v1/references", data={"label": "fake", "generator": "alpha 1"}, files=files(png(), field="images"))
    changed = own.patch("/v1/generators/alpha 1", json={"name": "Beta", "notes": "x"}).json()
    assert (changed["name"], changed["vendor"], changed["notes"], changed["references"]) == ("Beta", "Acme", "x", 1)
    assert own.get("/v1/generators").json() == {"generators": [changed]}
    assert own.get("/v1/generators/BETA").json() == changed
    assert own.post("/v1/detect", files=files(png(2))).json()["results"][0]["neighbours"][0]["generator"] == "Beta"
    assert own.delete("/v1/generators/Beta").json()["references"] == 1
    for call in (own.get, own.delete, lambda url: own.patch(url, json={})):
        problem(call("/v1/generators/Beta"), 404, "not-found")
    assert own.get("/v1/status").json()["index"]["size"] == 0


def test_an_enrolment_is_reported_and_undone(own: TestClient) -> None:
    keep = own.post("/v1/references", data={"label": "real"}, files=files(png(1), field="images")).json()
    form = {"label": "fake", "generator": "a", "source": "feed"}
    made = own.post("/v1/references", data=form, files=files(png(2), png(3), field="images")).json()
    shown = own.get(f"/v1/enrolments/{made['enrolment']}").json()
    assert (shown["generator"], shown["source"], shown["report"]["added"]) == ("a", "feed", 2)
    assert shown["references"] == 2
    assert shown["report"] == made
    assert [(row["generator"], row["images"]) for row in made["effect"]["recall"]] == [("a", 2)]
    assert made["effect"]["recall"][0]["knn"]["before"] is None  # there was no fake to compare with
    assert made["effect"]["false_alarms"]["images"] == 60
    assert own.get("/v1/status").json()["sources"] == [
        {"name": "feed", "references": 2},
        {"name": "upload", "references": 1},
    ]
    page = own.get("/v1/enrolments", params={"limit": 1}).json()
    assert [item["id"] for item in page["enrolments"]] == [made["enrolment"]]
    rest = own.get("/v1/enrolments", params={"after": page["next"]}).json()["enrolments"]
    assert [item["id"] for item in rest] == [keep["enrolment"]]
    assert own.delete(f"/v1/enrolments/{made['enrolment']}").json() == {"references": 2, "revision": 3}
    assert own.get("/v1/status").json()["references"] == {"real": 1, "fake": 0}
    assert own.get(f"/v1/enrolments/{made['enrolment']}").json()["references"] == 0
    for call in (own.get, own.delete):
        problem(call("/v1/enrolments/999999"), 404, "not-found")


# Records


def test_a_detection_is_shown_replayed_disputed_and_drawn(own: TestClient) -> None:
    added = own.post("/v1/references", data={"label": "real"}, files=files(png(1, False), field="images")).json()
    wait_for(lambda: own.get("/v1/status").json()["calibration"]["revision"] == added["revision"])
    given = own.post("/v1/detect", params={"explain": "regions"}, files=files(png(5))).json()["results"][0]
    plain = own.post("/v1/detect", files=files(png(6))).json()["results"][0]
    url = f"/v1/detections/{given['id']}"
    record = own.get(url).json()
    assert record["result"] == given
    assert record["feedback"] is None
    with Image.open(io.BytesIO(own.get(f"{url}/overlay").content)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGBA", (64, 64))
    problem(own.get(f"/v1/detections/{plain['id']}/overlay"), 404, "not-found")

    same = own.post(f"{url}/replay").json()
    assert same["changed"] == []
    own.post("/v1/references", data={"label": "fake", "generator": "a"}, files=files(png(5, size=80), field="images"))
    other = own.post(f"{url}/replay").json()
    assert other["before"] == given
    changed = {item["field"]: (item["before"], item["after"]) for item in other["changed"]}
    assert changed["heads.knn.score"][0] is None
    assert changed["heads.knn.score"][1] == other["after"]["heads"]["knn"]["score"]
    assert changed["index.size"] == (1, 2)
    assert own.get(url).json() == record

    disputed = own.post(f"{url}/feedback", json={"label": "real", "note": "I took it"}).json()
    assert disputed["feedback"] == {"label": "real", "note": "I took it", "by": "loopback"}
    page = own.get("/v1/detections", params={"limit": 1}).json()
    assert [item["id"] for item in page["detections"]] == [plain["id"]]
    (last,) = own.get("/v1/detections", params={"after": page["next"]}).json()["detections"]
    assert (last["id"], last["feedback"]["label"], last["sha256"]) == (given["id"], "real", given["image"]["sha256"])
    for path in ("", "/overlay"):
        problem(own.get(f"/v1/detections/{uuid4()}{path}"), 404, "not-found")
    problem(own.post(f"/v1/detections/{uuid4()}/replay"), 404, "not-found")


def test_a_record_with_the_fields_of_another_version_is_still_read(client: TestClient) -> None:
    given = client.post("/v1/detect", params={"explain": "regions"}, files=files(png(8))).json()["results"][0]
    url = f"/v1/detections/{given['id']}"
    assert client.get(url).json()["version"] == 1
    with store_of(client).engine.begin() as connection:
        older = """update detection set result = '{"retired": {}}' || jsonb_set(
        result - '{version,question,file,novelty,index,image}'::text[], '{regions,0,retired}', '1') where id = :id"""
        connection.execute(text(older), {"id": given["id"]})
    record = client.get(url).json()
    assert (record["version"], record["question"]) == (0, {"k": None, "max_false_alarm": None})
    assert (record["result"]["retired"], record["result"]["score"]) == ({}, given["score"])
    assert "novelty" not in record["result"]
    (listed,) = client.get("/v1/detections", params={"limit": 1}).json()["detections"]
    told = {"file": None} | {name: given[name] for name in ("id", "verdict", "score", "thresholds")}
    assert listed.items() >= told.items()
    assert client.get(f"{url}/overlay").status_code == 200
    replay = client.post(f"{url}/replay").json()
    assert {change["field"] for change in replay["changed"]} == {"novelty", "index.revision", "index.size"}
    assert replay["after"]["image"] == given["image"] | {"format": "unknown"}
    assert client.post(f"{url}/feedback", json={"label": "real"}).json()["feedback"]["label"] == "real"


def test_a_replay_asks_what_was_asked(client: TestClient) -> None:
    options: dict[str, Any] = {"k": 2, "max_false_alarm": 0.5}
    given = client.post("/v1/detect", params=options, files=files(png(7))).json()["results"][0]
    assert client.get(f"/v1/detections/{given['id']}").json()["question"] == options
    again = client.post(f"/v1/detections/{given['id']}/replay").json()
    assert again["changed"] == []
    assert len(again["after"]["neighbours"]) == 4
    assert again["after"]["thresholds"] == given["thresholds"]


def test_too_little_to_judge_is_uncertain_unless_it_is_known(own: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, format="PNG")
    for known, decided in ((False, ("uncertain", "score")), (True, ("real", "known"))):
        if known:
            own.post("/v1/references", data={"label": "real"}, files=files(buffer.getvalue(), field="images"))
        given = own.post("/v1/detect", files=files(buffer.getvalue())).json()["results"][0]
        assert (given["verdict"], given["basis"], given["score"]) == (*decided, None)
        shortfall = given["image"]["shortfall"]
        assert shortfall.startswith("too flat to judge: ")
        assert given["reason"] == (None if known else shortfall)
        again = own.post(f"/v1/detections/{given['id']}/replay").json()["after"]
        assert (again["verdict"], again["basis"], again["reason"]) == (*decided, given["reason"])


def test_a_replay_remembers_that_the_verdict_flipped(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = detector_of(client)
    changes = {"flip_uncertain": True, "unknown": 1.1}  # every fake is of an unknown generator
    monkeypatch.setattr(detector, "settings", detector.settings.model_copy(update=changes))
    asked: dict[str, Any] = {"explain": "stability", "max_false_alarm": 0.15}
    for seed in range(20):
        given = client.post("/v1/detect", params=asked, files=files(png(seed))).json()["results"][0]
        if given["stability"]["flips"] and given["score"] >= given["thresholds"]["fake"]:
            break
    assert given["reason"] == "the verdict flips under re-encoding or rescaling"
    assert client.post(f"/v1/detections/{given['id']}/replay").json()["changed"] == []


def test_a_detection_by_another_checkpoint_is_not_replayed(client: TestClient) -> None:
    given = client.post("/v1/detect", files=files(png())).json()["results"][0]
    row = store_of(client).detections.get(given["id"])
    assert row is not None
    other = uuid4()
    values = {name: getattr(row, name) for name in type(row).__slots__} | {"id": other, "checkpoint_id": "0" * 32}
    store_of(client).detections.add([type(row)(**values)])
    assert "0" * 32 in problem(client.post(f"/v1/detections/{other}/replay"), 409, "conflict")["detail"]


def test_old_records_are_deleted(
    settings: ServiceSettings, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "HOUSEKEEPING", 0.05)
    with connected(settings, checkpoint=tiny_checkpoint, device="cpu", record_days=3) as client:
        old, new = (client.post("/v1/detect", files=files(png(n))).json()["results"][0]["id"] for n in (1, 2))
        with store_of(client).engine.begin() as connection:
            statement = text("update detection set at = at - interval '3 days 1 minute' where id = :id")
            connection.execute(statement, {"id": old})
        wait_for(lambda: client.get(f"/v1/detections/{old}").status_code == 404)
        assert client.get(f"/v1/detections/{new}").status_code == 200


# Limits


def test_too_large(client: TestClient) -> None:
    noise = Image.effect_noise((400, 400), 200)
    buffer = io.BytesIO()
    noise.save(buffer, format="BMP")
    assert 100_000 < len(buffer.getvalue()) < 300_000
    body = problem(client.post("/v1/detect", files=files(buffer.getvalue())), 413, "too-large")
    assert body["detail"] == f"0.png has {len(buffer.getvalue()):,} bytes; LINEUP_MAX_UPLOAD_BYTES allows 100,000"
    body = problem(client.post("/v1/detect", files=files(bytes(400_000))), 413, "too-large")
    assert body["detail"].startswith("the request declares 400,")
    assert "300,000 are allowed (LINEUP_MAX_REQUEST_BYTES" in body["detail"]
    body = problem(client.post("/v1/detect", files=files(*[png()] * 5)), 413, "too-large")
    assert body["detail"].startswith("Too many files. Maximum number of files is 4. LINEUP_MAX_FILES")


def test_an_upload_that_the_temporary_folder_does_not_take_is_no_fault_of_the_caller(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(MultiPartParser, "spool_max_size", 10)
    body = problem(client.post("/v1/detect", files=files(png())), 503, "not-ready")
    assert "temporary folder" in body["detail"]
    assert str(tmp_path) not in body["detail"]


def test_a_full_database_is_told_as_such(own: TestClient) -> None:
    fill_disk(store_of(own))
    answer = own.post("/v1/references", data={"label": "real"}, files=files(png(), field="images"))
    assert problem(answer, 503, "not-ready")["detail"] == "the disk of the database is full"


def test_a_reference_that_is_too_large_is_rejected_with_its_size(
    settings: ServiceSettings, tiny_checkpoint: Path
) -> None:
    with connected(settings, checkpoint=tiny_checkpoint, device="cpu", max_upload_bytes=20_000) as client:
        images = files(png(), bytes(30_000), field="images")
        added = client.post("/v1/references", data={"label": "real"}, files=images).json()
    reason = "has 30,000 bytes; LINEUP_MAX_UPLOAD_BYTES allows 20,000"
    assert (added["added"], added["rejected"]) == (1, [{"file": "1.png", "reason": reason}])


def test_a_large_body_that_is_no_form_with_files(client: TestClient) -> None:
    problem(client.post("/v1/generators", json={"name": "a", "notes": "x" * 250_000}), 422, "bad-field")
    problem(client.post("/v1/generators", json={"name": "a", "notes": "x" * 310_000}), 413, "too-large")


def test_a_body_without_announced_length_is_counted(client: TestClient) -> None:
    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(10):
            yield bytes(50_000)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = problem(client.post("/v1/detect", content=body(), headers=headers), 413, "too-large")
    assert answer["detail"].startswith("the request sent 500,067 bytes; 300,000 are allowed")
    assert "LINEUP_MAX_REQUEST_BYTES" in answer["detail"]


def test_bodies_in_work_share_one_budget(populated: ServiceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    image, begun, going, prepare = png(), threading.Event(), threading.Event(), Detector.prepare

    def slow(detector: Detector, upload: Upload, question: Question) -> Prepared:
        begun.set()
        assert going.wait(60)
        return prepare(detector, upload, question)

    def undeclared() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        yield image + b"\r\n--b--"

    form = {"content-type": "multipart/form-data; boundary=b"}
    monkeypatch.setattr(Detector, "prepare", slow)
    with connected(populated, max_inflight_bytes=int(1.5 * len(image))) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/detect", files=files(image))
        try:
            assert begun.wait(60)
            for response in (
                client.post("/v1/detect", files=files(image)),
                client.post("/v1/search", content=undeclared(), headers=form),
            ):
                assert "LINEUP_MAX_INFLIGHT_BYTES" in problem(response, 503, "not-ready")["detail"]
                assert response.headers["retry-after"] == "1"
            assert client.get("/v1/status").status_code == 200
        finally:
            going.set()
        assert first.result().status_code == 200
        assert client.post("/v1/search", content=undeclared(), headers=form).status_code == 200


@pytest.mark.parametrize(
    ("path", "owner", "name"), [("/v1/references", reference_routes, "enrol"), ("/v1/detect", Detector, "prepare")]
)
def test_bytes_count_until_the_threads_that_hold_them_end(
    populated: ServiceSettings, monkeypatch: pytest.MonkeyPatch, path: str, owner: object, name: str
) -> None:
    image, going, ended, calls = png(), threading.Event(), threading.Event(), count()

    def slow(*args: object, **_: object) -> None:
        assert not next(calls)
        assert going.wait(60)
        ended.set()
        raise RuntimeError("late")

    field = "images" if owner is reference_routes else "image"
    sent: dict[str, Any] = {"data": {"label": "real"}, "files": files(image, field=field)}
    budget = int(1.5 * len(image))
    with connected(populated, max_inflight_bytes=budget, request_seconds=1.0) as client:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, slow)
            try:
                answer = client.post(path, **sent)
                assert "LINEUP_REQUEST_SECONDS" in problem(answer, 503, "not-ready")["detail"]
                for _ in range(3):
                    answer = client.post(path, **sent)
                    assert "LINEUP_MAX_INFLIGHT_BYTES" in problem(answer, 503, "not-ready")["detail"]
                served = service_of(client)
                assert served._enrolling.inside + served._decoding.inside == 1
            finally:
                going.set()
            assert ended.wait(60)
            wait_for(lambda: served._enrolling.inside + served._decoding.inside == 0)
        wait_for(lambda: client.post("/v1/search", files=files(image)).status_code == 200)


def test_a_cancelled_call_lets_its_bytes_go_though_no_thread_is_free() -> None:
    class Payload:
        pass

    async def cancelled(pool: ThreadPoolExecutor, reservation: Reservation) -> None:
        reservation_in_use.set(reservation)
        reservation.grow(10)
        payload = Payload()
        kept, task = weakref.ref(payload), asyncio.create_task(run_in(pool, id, payload))
        await asyncio.sleep(0)
        task.cancel()
        del payload
        await asyncio.wait([task])
        assert task.cancelled()
        del task
        gc.collect()  # of the exception's traceback
        assert kept() is None
        assert budget.held == 10
        reservation.release()

    going, budget = threading.Event(), Budget(15)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(going.wait, 60)
        try:
            asyncio.run(cancelled(pool, Reservation(budget)))
        finally:
            going.set()
    assert budget.held == 0


def test_a_bomb_is_refused_by_its_header(client: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, format="PNG")
    assert len(buffer.getvalue()) < 100_000
    body = problem(client.post("/v1/detect", files=files(buffer.getvalue())), 413, "too-large")
    assert "LINEUP_MAX_PIXELS" in body["detail"]


@pytest.mark.parametrize(
    "query", [{"k": 0}, {"k": 1001}, {"max_false_alarm": 1}, {"max_false_alarm": "nan"}, {"explain": "all"}]
)
def test_bad_queries_are_422(client: TestClient, query: dict[str, Any]) -> None:
    body = problem(client.post("/v1/detect", params=query, files=files(png())), 422, "bad-field")
    assert [error["field"] for error in body["errors"]] == list(query)


def test_bodies_that_are_no_form(client: TestClient) -> None:
    problem(client.post("/v1/detect"), 422, "bad-field")
    problem(client.post("/v1/detect", data={"image": "text"}), 422, "bad-field")
    headers = {"content-type": "multipart/form-data"}
    problem(client.post("/v1/detect", content=b"x", headers=headers), 400, "bad-request")
    problem(client.post("/v1/generators", content=b"{", headers={"content-type": "application/json"}), 422, "bad-field")


def test_unknown_paths_and_methods(client: TestClient) -> None:
    problem(client.get("/v1/nothing"), 404, "not-found")
    problem(client.get("/nothing.html"), 404, "not-found")
    problem(client.get("/%00"), 404, "not-found")
    problem(client.get("/../pyproject.toml"), 404, "not-found")
    problem(client.get(f"/{'a' * 300}"), 404, "not-found")
    for path, methods in (
        ("/v1/detect", "POST"),
        ("/v1/references", "GET, POST"),
        ("/v1/generators/a", "GET, PATCH, DELETE"),
        ("/v1/enrolments/1", "GET, DELETE"),
    ):
        response = client.put(path)
        problem(response, 405, "method-not-allowed")
        assert response.headers["allow"] == methods
    problem(client.get("/v1/references/0"), 422, "bad-field")
    problem(client.get(f"/v1/references/{2**63}"), 422, "bad-field")
    problem(client.get("/v1/detections/no-uuid"), 422, "bad-field")


def test_no_redirect_to_the_host_that_the_caller_names(client: TestClient) -> None:
    for path in ("/docs/", "/openapi.json/"):
        problem(client.get(path, headers={"host": "evil.example"}, follow_redirects=False), 404, "not-found")


def test_methods_that_nobody_knows_are_one_series(client: TestClient) -> None:
    for number in range(5):
        problem(client.request(f"ODD{number}", "/v1/status"), 405, "method-not-allowed")
    metrics = client.get("/metrics").text
    assert 'lineup_requests_total{method="other",route="/v1/status",status="405"} 5.0' in metrics
    assert "ODD" not in metrics


def test_too_many_fields_are_told_as_such(client: TestClient) -> None:
    answer = client.post("/v1/detect", data={f"f{number}": "a" for number in range(30)}, files=files(png()))
    detail = problem(answer, 413, "too-large")["detail"]
    assert detail.startswith("Too many fields")
    assert "LINEUP_MAX_FILES" not in detail


def test_bodies_that_are_not_utf_8(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    problem(client.post("/v1/generators", content=b"\xff", headers=headers), 400, "bad-request")


def test_a_head_that_never_ends_and_who_reads_nothing_are_hung_up_on(
    populated: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    whole = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    smuggling = (
        b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
    )
    monkeypatch.setattr(server.Server, "capture_signals", nullcontext)
    serving = server.server(load_detector(populated.model_copy(update={"port": 0})))
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: serving.started)
        port = serving.servers[0].sockets[0].getsockname()[1]
        proxied = b"GET /v1/status HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"
        for sent, answers in ((b"", 0), (whole[:20], 0), (whole + whole[:20], 1), (smuggling + whole, 0), (proxied, 0)):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(sent)
                got = b"".join(iter(partial(connection.recv, 65536), b""))  # until the server closes
            assert got.count(b"HTTP/1.1 200") == answers
            assert (sent[:4] == b"POST") == (b"HTTP/1.1 400" in got)
            assert (sent == proxied) == (b"no proxy may stand between (HTTP/1.0)" in got)
        monkeypatch.setattr(server, "SEND_SECONDS", 0.5 - math.ceil(populated.request_seconds))
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(whole.replace(b"/health/live", b"/openapi.json") * 200)
            wait_for(lambda: bool(serving.server_state.connections))
            wait_for(lambda: not serving.server_state.connections)  # nothing is read
    finally:
        serving.should_exit = True
        thread.join(20)


def test_a_request_that_takes_too_long_is_ended(populated: ServiceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    with connected(populated, request_seconds=0.3) as client:
        monkeypatch.setattr(store_of(client).generators, "list", lambda: opened.wait(20))
        body = problem(client.get("/v1/generators"), 503, "not-ready")
        opened.set()
    assert "LINEUP_REQUEST_SECONDS" in body["detail"]


# Access


def make_key(client: TestClient, *scopes: str) -> tuple[str, dict[str, str]]:
    """The name of a new key, and the headers that carry it."""
    secret, name = new_secret(), f"key-{uuid4()}"
    store_of(client).keys.create(name, hash_secret(secret), list(scopes))
    return name, {"authorization": f"Bearer {secret}"}


@pytest.fixture
def keyed(own: TestClient, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A service that has a key; answers about keys are forgotten at once."""
    monkeypatch.setattr(access, "FRESH", 0.0)
    make_key(own, "admin")
    return own


def test_with_keys_nobody_comes_in_without(keyed: TestClient) -> None:
    response = keyed.get("/v1/status")
    problem(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    for header in ("Bearer wrong", "Basic abc", "Bearer", "bearer  "):
        problem(keyed.get("/v1/status", headers={"authorization": header}), 401, "unauthorized")
    problem(keyed.get("/metrics"), 401, "unauthorized")
    for path in ("/", "/docs", "/openapi.json", "/health/live", "/health/ready"):
        assert keyed.get(path).status_code == 200, path


def test_the_first_key_opens_only_what_its_scopes_name(own: TestClient) -> None:
    assert own.get("/v1/status").status_code == 200  # from now on it is remembered that there is no key
    _, headers = make_key(own, "detect")
    problem(own.get("/v1/detections", headers=headers), 403, "forbidden")


def test_who_guesses_keys_is_told_to_wait_and_who_has_one_is_not(keyed: TestClient) -> None:
    _, headers = make_key(keyed, "detect")
    assert keyed.get("/v1/status", headers=headers).status_code == 200
    service_of(keyed)._keys.failures.per_minute = 2
    guesses = [keyed.get("/v1/status", headers={"authorization": f"Bearer {guess}"}) for guess in "abc"]
    assert [answer.status_code for answer in guesses] == [401, 401, 429]
    problem(guesses[-1], 429, "too-many-requests")
    assert guesses[-1].headers["retry-after"] == "30"
    assert keyed.get("/v1/status", headers=headers).status_code == 200


def test_scopes_open_what_they_name(keyed: TestClient) -> None:
    _, detecting = make_key(keyed, "detect")
    _, enrolling = make_key(keyed, "enrol")
    _, admin = make_key(keyed, "admin")

    def detect(headers: dict[str, str]) -> Response:
        return keyed.post("/v1/detect", files=files(png()), headers=headers)

    def enrol(headers: dict[str, str]) -> Response:
        return keyed.post(
            "/v1/references", data={"label": "real"}, files=files(png(2), field="images"), headers=headers
        )

    assert [detect(key).status_code for key in (detecting, enrolling, admin)] == [200, 403, 200]
    assert [enrol(key).status_code for key in (detecting, enrolling, admin)] == [403, 200, 200]
    assert [keyed.get("/v1/status", headers=key).status_code for key in (detecting, enrolling)] == [200, 200]
    assert [keyed.get("/v1/detections", headers=key).status_code for key in (detecting, admin)] == [403, 200]
    assert "scope enrol" in problem(enrol(detecting), 403, "forbidden")["detail"]


def test_a_record_is_for_its_own_key_and_admins(keyed: TestClient) -> None:
    _, mine = make_key(keyed, "detect")
    _, other = make_key(keyed, "detect")
    _, admin = make_key(keyed, "admin")
    given = keyed.post("/v1/detect", files=files(png()), headers=mine).json()["results"][0]
    url = f"/v1/detections/{given['id']}"
    assert [keyed.get(url, headers=key).status_code for key in (mine, other, admin)] == [200, 404, 200]


def test_paths_of_the_server_are_for_admins_and_addresses_on_the_web_for_all(keyed: TestClient) -> None:
    _, admin = make_key(keyed, "admin")
    _, other = make_key(keyed, "detect", "enrol")
    for label, generator in (("real", ""), ("fake", "a")):
        form = {"label": label, "generator": generator}
        keyed.post("/v1/references", data=form, files=files(png(len(label + generator)), field="images"), headers=admin)
    public = "https://images.example/1.png"
    uris = {public, "file:///srv/private/2.png"}
    with store_of(keyed).engine.begin() as connection:
        for number, uri in enumerate(sorted(uris)):
            statement = text("update reference_image set uri = :uri where label = :label")
            connection.execute(statement, {"uri": uri, "label": number})

    def shown(headers: dict[str, str]) -> list[set[str | None]]:
        """The addresses in every answer that has any."""
        detections = keyed.post("/v1/detect", files=files(png(9)), headers=headers).json()["results"]
        searches = keyed.post("/v1/search", files=files(png(9)), headers=headers).json()["results"]
        url = f"/v1/detections/{detections[0]['id']}"
        record = keyed.get(url, headers=headers).json()["result"]
        replay = keyed.post(f"{url}/replay", headers=headers).json()
        disputed = keyed.post(f"{url}/feedback", json={"label": "real"}, headers=headers).json()["result"]
        references = keyed.get("/v1/references", headers=headers).json()["references"]
        each = [keyed.get(f"/v1/references/{row['id']}", headers=headers).json() for row in references]
        verdicts = [detections[0], searches[0], record, replay["before"], replay["after"], disputed]
        return [{row["uri"] for row in rows} for rows in (*(one["neighbours"] for one in verdicts), references, each)]

    assert shown(admin) == [uris] * 8
    assert shown(other) == [{public, None}] * 8


def test_a_revoked_key_ends_and_the_door_stays_shut(keyed: TestClient) -> None:
    _, headers = make_key(keyed, "admin")
    assert keyed.get("/v1/status", headers=headers).status_code == 200
    store = store_of(keyed)
    for key in store.keys.list():
        store.keys.revoke(key.name)
    problem(keyed.get("/v1/status", headers=headers), 401, "unauthorized")
    problem(keyed.get("/v1/status"), 401, "unauthorized")


def test_a_key_works_from_elsewhere(keyed: TestClient) -> None:
    _, headers = make_key(keyed, "detect")
    away = {"host": "lineup.example", "x-forwarded-for": "10.0.0.1", "origin": "https://lineup.example"}
    assert keyed.get("/v1/status", headers=headers | away).status_code == 200


def test_the_rate_limit_says_when_to_come_back(
    settings: ServiceSettings, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "FRESH", 0.0)
    with connected(settings, checkpoint=tiny_checkpoint, device="cpu", rate_limit=3) as client:
        _, headers = make_key(client, "detect")
        _, other = make_key(client, "detect")
        statuses = [client.get("/v1/status", headers=headers).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        response = client.get("/v1/status", headers=headers)
        problem(response, 429, "too-many-requests")
        assert 1 <= int(response.headers["retry-after"]) <= 20
        assert client.get("/v1/status", headers=other).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"host": "evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"x-forwarded-for": "127.0.0.1"},
    ],
)
def test_a_malicious_page_cannot_enrol_through_a_browser(own: TestClient, headers: dict[str, str]) -> None:
    response = own.post("/v1/references", data={"label": "real"}, files=files(png(), field="images"), headers=headers)
    problem(response, 403, "forbidden")
    assert "access-control-allow-origin" not in response.headers
    assert own.get("/v1/status").json()["references"] == {"real": 0, "fake": 0}


def test_without_keys_other_machines_are_refused(client: TestClient) -> None:
    away = TestClient(client.app, base_url=BASE, client=("192.168.0.9", 1234))
    problem(away.get("/v1/status"), 403, "forbidden")
    assert away.get("/health/live").status_code == 200


def test_without_keys_a_proxy_that_looks_like_this_machine_needs_the_token(
    settings: ServiceSettings, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain reverse proxy calls from 127.0.0.1 with a loopback Host and no forwarding header, as this client does."""
    caplog.set_level("INFO")
    token = settings.token
    with connected(settings, checkpoint=tiny_checkpoint, device="cpu", open=False) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {token}"}):
            answer = client.post("/v1/references", data={"label": "real"}, headers=headers)
            assert "lineup serve" in problem(answer, 401, "unauthorized")["detail"]
            problem(client.get("/metrics", headers=headers), 401, "unauthorized")
            problem(client.get(f"/v1/status?token={token}", headers=headers), 401, "unauthorized")
        for path in (f"/?token={token}", "/app.js", "/health/live", "/health/ready"):
            assert client.get(path).status_code == 200, path
        own = {"authorization": f"Bearer {token}"}
        assert client.get("/v1/status", headers=own).json()["references"] == {"real": 0, "fake": 0}
        assert token not in client.get("/metrics", headers=own).text
        problem(client.get("/v1/status", headers=own | {"origin": "https://evil.example"}), 403, "forbidden")
        elsewhere = TestClient(client.app, base_url=BASE, client=("192.168.0.9", 1234))
        problem(elsewhere.get("/v1/status", headers=own), 403, "forbidden")
    logged = [str(vars(record)) for record in caplog.records if record.name != "httpx2"]  # the client logs its own
    assert len(logged) >= 10
    assert token not in "".join(logged)


def test_cors_only_for_the_origins_of_the_setting(
    settings: ServiceSettings, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "FRESH", 0.0)
    origins = "https://a.example, https://b.example"
    with connected(settings, checkpoint=tiny_checkpoint, device="cpu", cors_origins=origins) as client:
        _, key = make_key(client, "detect")
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        allowed = client.options("/v1/detect", headers={"origin": "https://b.example"} | asked)
        assert allowed.headers["access-control-allow-origin"] == "https://b.example"
        assert client.options("/v1/detect", headers={"origin": "https://c.example"} | asked).status_code == 400
        answered = client.get("/v1/status", headers=key | {"origin": "https://b.example"})
        assert answered.headers["access-control-allow-origin"] == "https://b.example"


# Operations


def test_status_and_calibration(client: TestClient) -> None:
    status = client.get("/v1/status").json()
    assert status["references"] == {"real": 60, "fake": 60}
    assert status["generators"] == [{"name": "gen-a", "references": 30}, {"name": "gen-b", "references": 30}]
    assert set(status["index"]) == {"kind", "device", "size", "revision"}
    assert (status["index"]["size"], status["index"]["revision"]) == (120, status["revision"])
    assert status["calibration"] == {"revision": status["revision"], "real": 60, "fake": 90, "new_sources": 0}
    assert (status["degraded"], status["reason"]) == (False, None)
    wait_for(lambda: client.get("/v1/status").json()["drift"] is not None)
    drift = client.get("/v1/status").json()["drift"]
    assert (drift["rate"], drift["p_values"]) == (0.001, {"before": None, "calibration": None})  # nothing of yesterday
    assert 'lineup_drift_p_value{against="before"} NaN' in client.get("/metrics").text
    state = client.get("/v1/calibration").json()
    assert state["thresholds"] == client.post("/v1/detect", files=files(png())).json()["results"][0]["thresholds"]
    assert "knn+linear+svm" in state["maps"]
    assert {label: sum(counts) for label, counts in state["histogram"].items()} == {"real": 60, "fake": 90}


def test_a_promise_that_cannot_be_kept_is_told(populated: ServiceSettings) -> None:
    with connected(populated, max_false_alarm=0.001) as client:
        state, status = client.get("/v1/calibration").json(), client.get("/v1/status").json()
    assert state["thresholds"]["fake"] is None
    assert state["reason"] == status["reason"] == "a false alarm rate of 0.001 needs 939 more real calibration images"


def test_the_calibration_follows_the_index(own: TestClient) -> None:
    for seed in range(3):
        form = {"label": "fake", "generator": "a"} if seed else {"label": "real"}
        own.post("/v1/references", data=form, files=files(png(seed), field="images"))
    revision = own.get("/v1/status").json()["revision"]
    wait_for(lambda: own.get("/v1/status").json()["calibration"]["revision"] == revision)
    assert own.post("/v1/detect", files=files(png(9))).json()["results"][0]["heads"]["knn"]["probability"] is not None


def test_metrics_count_what_happened(own: TestClient) -> None:
    own.post("/v1/detect", files=files(png(), b"x"))
    own.get("/v1/nothing")
    page = own.get("/metrics").text
    for line in (
        'lineup_requests_total{method="POST",route="/v1/detect",status="200"} 1.0',
        'lineup_requests_total{method="GET",route="none",status="404"} 1.0',
        'lineup_rejected_total{kind="not-an-image"} 1.0',
        'lineup_stage_seconds_count{stage="embed"} 1.0',
        "lineup_batch_images_count 1.0",
        "lineup_score_count 1.0",
        "lineup_queue_images 0.0",
        'lineup_index_images{label="real"} 0.0',
        "lineup_index_revision 0.0",
        "lineup_degraded 0.0",
        "lineup_engine_away 0.0",
    ):
        assert line in page.splitlines()
    assert "lineup_index_lag_seconds" in page


def test_a_search_engine_that_is_away_is_told(own: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryCopy, "engine_away", True)
    assert "lineup_engine_away 1.0" in own.get("/metrics").text.splitlines()
    assert own.get("/v1/status").json()["degraded"]
    monkeypatch.setattr(MemoryCopy, "catch_up", lambda copy: False)
    monkeypatch.setattr(service, "STALE_SECONDS", 0.0)
    detector_of(own).follower.catch_up()
    assert own.get("/health/ready").status_code == 200  # as good as any other replica


def test_what_is_asked_again_is_counted_once(own: TestClient) -> None:
    own.post("/v1/detect", params={"record": False}, files=files(png(), b"x"))  # as the page asks first
    own.post("/v1/detect", params={"explain": "stability"}, files=files(png()))
    page = own.get("/metrics").text.splitlines()
    assert sum(float(line.split()[1]) for line in page if line.startswith("lineup_verdicts_total")) == 1
    for line in (
        "lineup_score_count 1.0",
        'lineup_stage_seconds_count{stage="embed"} 2.0',
        'lineup_rejected_total{kind="not-an-image"} 1.0',
    ):
        assert line in page


def test_request_ids_and_headers(client: TestClient) -> None:
    response = client.get("/v1/status", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    for bad in ("", "a b", "x" * 65, 'a"b'):
        assert len(client.get("/v1/status", headers={"x-request-id": bad}).headers["x-request-id"]) == 32
    page = client.get("/")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


def test_requests_are_logged_without_what_they_carried(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lineup.request"):
        client.post("/v1/detect", files=[("image", ("secret-name.png", png(), "image/png"))])
    (record,) = [record for record in caplog.records if record.name == "lineup.request"]
    fields = vars(record)
    assert (fields["route"], fields["status"], fields["caller"]) == ("/v1/detect", 200, "loopback")
    assert "secret-name" not in str(fields)


def test_not_ready_until_loaded_and_never_with_a_bad_checkpoint(settings: ServiceSettings, tmp_path: Path) -> None:
    unready = create_app(settings.model_copy(update={"checkpoint": tmp_path / "missing"}))
    with TestClient(unready, base_url=BASE, client=("127.0.0.1", 1)) as client:
        wait_for(lambda: "no checkpoint at" in client.get("/health/ready").text)
        body = problem(client.get("/health/ready"), 503, "not-ready")
        assert "lineup train fit" in body["detail"]
        problem(client.get("/v1/status"), 503, "not-ready")
        assert client.get("/health/live").json() == {"status": "live"}


def test_it_loads_in_the_background(settings: ServiceSettings, tiny_checkpoint: Path) -> None:
    loading = create_app(settings.model_copy(update={"checkpoint": tiny_checkpoint, "device": "cpu"}))
    with TestClient(loading, base_url=BASE, client=("127.0.0.1", 1)) as client:
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        assert client.post("/v1/detect", files=files(png())).status_code == 200


def test_nothing_is_judged_before_the_calibration_is_there(
    populated: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, fitting, refresh = threading.Event(), threading.Event(), Calibrator.refresh

    def slow(calibrator: Calibrator) -> None:
        asked.set()
        assert fitting.wait(60)
        refresh(calibrator)

    monkeypatch.setattr(Calibrator, "refresh", slow)
    with TestClient(create_app(populated), base_url=BASE, client=("127.0.0.1", 1)) as client:
        try:
            assert asked.wait(60)
            for response in (
                client.post("/v1/detect", files=files(png())),
                client.post("/v1/search", files=files(png())),
                client.get("/health/ready"),
            ):
                assert "being" in problem(response, 503, "not-ready")["detail"]
                assert response.headers["retry-after"] == "1"
            assert client.get("/health/live").status_code == 200
        finally:
            fitting.set()
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        assert client.post("/v1/detect", files=files(png())).json()["results"][0]["score"] is not None


def test_a_database_that_fails_while_starting_is_asked_again(
    populated: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load_detector(populated)
    monkeypatch.setattr(service, "RETRY", 0.01)
    monkeypatch.setattr(detector.breaker, "pause", 0.0)
    failures = [OperationalError("select", {}, Exception("connection refused"))]
    list_keys = detector.store.keys.list

    def once_away() -> Sequence[ApiKey]:
        if failures:
            raise failures.pop()
        return list_keys()

    monkeypatch.setattr(detector.store.keys, "list", once_away)
    with TestClient(create_app(populated, detector), base_url=BASE, client=("127.0.0.1", 1)) as client:
        wait_for(lambda: client.get("/health/ready").status_code == 200)
    assert failures == []


def test_a_calibration_that_fails_at_first_keeps_nobody_waiting(
    populated: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    healed, refresh = threading.Event(), Calibrator.refresh

    def failing(calibrator: Calibrator) -> None:
        if not healed.is_set():
            raise ValueError("the fit does not converge")
        refresh(calibrator)

    monkeypatch.setattr(Calibrator, "refresh", failing)
    with TestClient(create_app(populated), base_url=BASE, client=("127.0.0.1", 1)) as client:

        def judged() -> dict[str, Any]:
            return cast(dict[str, Any], client.post("/v1/detect", files=files(png())).json()["results"][0])

        wait_for(lambda: client.get("/health/ready").status_code == 200)
        verdict = judged()
        assert (verdict["verdict"], verdict["score"], verdict["degraded"]) == ("uncertain", None, False)
        assert "nothing is calibrated" in verdict["reason"]
        healed.set()
        wait_for(lambda: judged()["score"] is not None)


def test_a_store_that_keeps_no_calibration_still_serves(
    settings: ServiceSettings, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*row: object) -> None:
        raise ProgrammingError("insert into calibration", {}, Exception("permission denied for table calibration"))

    monkeypatch.setattr(Calibrations, "save", refused)
    app = create_app(settings.model_copy(update={"checkpoint": tiny_checkpoint, "device": "cpu"}))
    with TestClient(app, base_url=BASE, client=("127.0.0.1", 1)) as client:
        wait_for(lambda: client.get("/health/ready").status_code == 200)
        assert client.post("/v1/detect", files=files(png())).json()["results"][0]["score"] is not None


@pytest.mark.parametrize("kind", [ProgrammingError, OperationalError])
def test_what_keeps_it_from_loading_is_told_without_sql(
    populated: ServiceSettings,
    kind: type[DBAPIError],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(settings: ServiceSettings) -> None:
        raise kind("select secret from api_key", {}, Exception("permission denied"))

    monkeypatch.setattr(service, "load_detector", failing)
    with TestClient(create_app(populated), base_url=BASE, client=("127.0.0.1", 1)) as client:
        wait_for(lambda: "being loaded" not in client.get("/health/ready").text)
        detail = problem(client.get("/health/ready"), 503, "not-ready")["detail"]
    assert "database" in detail
    assert "select" not in detail
    assert "permission" not in detail
    assert "select secret" in "".join(str(vars(record)) for record in caplog.records)


# Another checkpoint becomes the active one


@pytest.fixture
def unnamed(
    settings: ServiceSettings, tiny_checkpoint: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    """Over references and a checkpoint of this test's own, which lies in the home and is in no setting."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the tests' own process keeps its handlers
    monkeypatch.setattr(service, "RETRY", 0.1)
    monkeypatch.setattr(service, "LOOK", 0.02)
    for name in ("home", "database_url"):
        monkeypatch.setenv(f"LINEUP_{name.upper()}", str(getattr(settings, name)))
    monkeypatch.setenv("LINEUP_DEVICE", "cpu")
    settings.home.mkdir()
    shutil.copytree(tiny_checkpoint, settings.home / "checkpoint")
    index("add", image_folder)
    with connected(settings, device="cpu") as client:
        yield client


def index(*arguments: object) -> str:
    """What a command of the indexer says on stderr."""
    result = CliRunner().invoke(indexer, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stderr


def serving(client: TestClient) -> str:
    """The checkpoint that a new verdict names."""
    verdict = client.post("/v1/detect", files=files(png())).json()["results"][0]
    return cast(str, verdict["model"]["checkpoint"])


def test_a_service_changes_to_the_active_checkpoint_under_load(
    unnamed: TestClient, other_checkpoint: Path, tmp_path: Path
) -> None:
    before, after = serving(unnamed), read_id(other_checkpoint)
    done, answers = threading.Event(), list[Response]()

    def ask() -> None:
        while not done.is_set():
            answers.append(unnamed.post("/v1/detect", files=files(png(), png(2)), params={"explain": "stability"}))

    def enrol() -> None:
        for seed in count(100):
            if done.is_set():
                break
            form = {"label": "fake", "generator": "late"}
            answers.append(unnamed.post("/v1/references", files=files(png(seed), field="images"), data=form))

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(work) for work in (ask, ask, enrol)]
        try:
            index("rebuild", "--checkpoint", other_checkpoint)
            wait_for(lambda: serving(unnamed) == after)
            last = len(answers)
            wait_for(lambda: len(answers) > last + 5)
        finally:
            done.set()
        for one in asked:
            one.result()
    assert {answer.status_code for answer in answers} == {200}
    verdicts = [verdict for answer in answers for verdict in answer.json().get("results", [])]
    assert {verdict["model"]["checkpoint"] for verdict in verdicts} == {before, after}
    assert not [verdict for verdict in verdicts if verdict["degraded"] or verdict["score"] is None]
    store = store_of(unnamed)
    references = sum(store.references.counts().values())
    assert len(store.changes.embedded_ids(after)) == references  # what came in meanwhile included
    assert len(store.changes.embedded_ids(before)) < references
    small_image(7, True, 64).save(tmp_path / "new.png")
    index("add", tmp_path / "new.png", "--label", "fake", "--generator", "newest")
    search = partial(unnamed.post, "/v1/search", files=files((tmp_path / "new.png").read_bytes()))
    wait_for(lambda: search().json()["results"][0]["neighbours"][0]["generator"] == "newest")
    told = CliRunner().invoke(api, ["detect", "--json", str(tmp_path / "new.png")])
    assert Verdict.model_validate_json(told.stdout).model.checkpoint == after
    status = unnamed.get("/v1/status").json()
    assert (status["checkpoint"], status["active_checkpoint"], status["inactive"]) == (after, after, None)
    assert "lineup_checkpoint_inactive 0.0" in unnamed.get("/metrics").text


def test_an_old_checkpoint_that_does_not_stop_keeps_no_later_one_away(
    unnamed: TestClient, other_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = service_of(unnamed).serving
    stop = old.stop

    def broken() -> None:
        stop()
        raise OSError("no space left for the snapshot")

    before, after = serving(unnamed), read_id(other_checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(old, "stop", broken)
        index("rebuild", "--checkpoint", other_checkpoint)
        wait_for(lambda: serving(unnamed) == after)
        wait_for(lambda: "did not stop" in caplog.text)
    store_of(unnamed).checkpoints.activate(before)
    wait_for(lambda: serving(unnamed) == before)


def test_what_is_added_while_the_next_checkpoint_is_loaded_waits_for_it(
    unnamed: TestClient, other_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()

    def slow(detector: Detector) -> Detector:
        assert opened.wait(60)
        return load_successor(detector)

    monkeypatch.setattr(service, "load_successor", slow)
    index("rebuild", "--checkpoint", other_checkpoint)
    with ThreadPoolExecutor(1) as pool:
        enrol = partial(unnamed.post, "/v1/references", files=files(png(5), field="images"), data={"label": "real"})
        added = pool.submit(enrol)
        assert serving(unnamed) != read_id(other_checkpoint)
        opened.set()
        assert added.result().json()["added"] == 1
    assert serving(unnamed) == read_id(other_checkpoint)
    assert len(store_of(unnamed).changes.embedded_ids(read_id(other_checkpoint))) == 121


def test_where_the_active_checkpoint_is_not_on_this_machine_that_is_told(
    unnamed: TestClient, image_folder: Path, other_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = serving(unnamed)
    folder = Path(shutil.copytree(other_checkpoint, tmp_path / "elsewhere"))
    embedder = Embedder.load(folder, device="cpu")
    away = folder.rename(tmp_path / "away")
    reembed(embedder, store_of(unnamed))
    wait_for(lambda: "cannot be loaded" in str(unnamed.get("/v1/status").json()["inactive"]))
    assert serving(unnamed) == before
    enrol = partial(unnamed.post, "/v1/references", files=files(png(5), field="images"), data={"label": "real"})
    detail = problem(enrol(), 503, "not-ready")["detail"]
    assert "cannot be loaded" in detail
    assert "elsewhere" not in detail  # the log names the server's folders
    assert "lineup_checkpoint_inactive 1.0" in unnamed.get("/metrics").text
    reasons = [vars(record)["reason"] for record in caplog.records if "does not serve" in record.message]
    assert ["elsewhere" in reason for reason in reasons] == [True]
    with pytest.raises(AssertionError, match=r"is not in .*elsewhere"):
        index("add", image_folder)
    away.rename(folder)
    wait_for(lambda: serving(unnamed) == embedder.id)


def test_a_checkpoint_that_is_named_goes_on_serving(
    settings: ServiceSettings, tiny_checkpoint: Path, other_checkpoint: Path
) -> None:
    with connected(settings, checkpoint=tiny_checkpoint, device="cpu") as client:
        embedder, store = Embedder.load(other_checkpoint, device="cpu"), store_of(client)
        reembed(embedder, store)
        wait_for(lambda: client.get("/v1/status").json()["active_checkpoint"] == embedder.id)
        status = client.get("/v1/status").json()
        assert status["checkpoint"] == serving(client) == read_id(tiny_checkpoint)
        assert status["inactive"].endswith("LINEUP_CHECKPOINT names the other")
        assert "lineup_checkpoint_inactive 1.0" in client.get("/metrics").text
        form = {"label": "fake", "generator": "late"}
        assert client.post("/v1/references", files=files(png(5), field="images"), data=form).json()["added"] == 1


def test_a_dead_database_degrades_detection_and_nothing_else(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **options: object) -> None:
        raise OperationalError("select", {}, Exception("connection refused"))

    monkeypatch.setattr(detector_of(client).breaker, "pause", 0.0)
    for name in ("references.get_many", "references.counts", "references.list", "detections.add", "keys.list"):
        part, method = name.split(".")
        monkeypatch.setattr(getattr(store_of(client), part), method, away)
    verdict = client.post("/v1/detect", files=files(png())).json()["results"][0]
    assert verdict["degraded"] is True
    assert len(verdict["neighbours"]) == 10
    status = client.get("/v1/status").json()
    assert status["degraded"] is True
    assert status["references"] == {"real": 60, "fake": 60}
    problem(client.get("/v1/references"), 503, "not-ready")
    assert client.get("/health/ready").status_code == 200
    monkeypatch.undo()
    assert client.post("/v1/detect", files=files(png())).json()["results"][0]["degraded"] is False


def test_a_database_that_hangs_is_as_good_as_away(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    monkeypatch.setattr(detector_of(client).breaker, "seconds", 0.1)
    monkeypatch.setattr(store_of(client).references, "get_many", lambda ids, hashes: opened.wait(60))
    first, second = (client.post("/v1/detect", files=files(png())).json()["results"][0] for _ in range(2))
    opened.set()
    monkeypatch.undo()
    assert first["degraded"] is second["degraded"] is True
    assert first["score"] == pytest.approx(second["score"])
    wait_for(lambda: not client.post("/v1/detect", files=files(png())).json()["results"][0]["degraded"])


def test_a_slow_status_concerns_only_who_asked(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    monkeypatch.setattr(detector_of(client).status_breaker, "seconds", 0.1)
    monkeypatch.setattr(store_of(client).references, "counts", lambda: opened.wait(60))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.get, "/v1/status") for _ in range(4)]
        answers = [answer.result().json() for answer in asked]
        verdict = client.post("/v1/detect", files=files(png())).json()["results"][0]
    opened.set()
    assert {answer["references"]["real"] for answer in answers} == {60}  # from memory
    assert (verdict["degraded"], verdict["recorded"]) == (False, True)
    assert "lineup_degraded 0.0" in client.get("/metrics").text


def test_a_bug_is_a_problem_without_a_traceback(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(store_of(client).generators, "list", broken)
    response = client.get("/v1/generators")
    assert "secret" not in response.text
    problem(response, 500, "internal")


def test_openapi_documents_every_error_with_an_example(client: TestClient) -> None:
    spec = client.get("/openapi.json").json()
    for path, methods in spec["paths"].items():
        if not path.startswith("/v1/"):
            continue
        for call in methods.values():
            assert {"400", "401", "403", "413", "422", "429", "500", "503"} <= set(call["responses"]), path
            for status, answer in call["responses"].items():
                if int(status) >= 400:
                    (content,) = answer["content"].items()
                    assert content[0] == "application/problem+json"
                    assert content[1]["example"]["status"] == int(status)
    for name, field in (("detect", "image"), ("search", "image"), ("add_references", "images")):
        (body,) = (one for title, one in spec["components"]["schemas"].items() if title.startswith(f"Body_{name}_"))
        assert body["properties"][field]["minItems"] == 1
    example = spec["components"]["schemas"]["Verdict"]["examples"][0]
    assert Verdict.model_validate(example).verdict == "fake"
    assert "<code>/v1/detect</code>" in client.get("/docs").text
    assert "<script" not in client.get("/docs").text


# Capacity


def test_readiness_tells_of_saturation_and_an_index_that_is_stale_though_the_database_answers(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise OperationalError("select", {}, Exception("connection refused"))

    served = cast(Service, client.app.state.service)  # type: ignore[attr-defined]
    with ExitStack() as work:
        while not served._decoding.wait:
            work.enter_context(served._decoding.admitted(1000.0, math.inf))
        answer = client.get("/health/ready")
        assert "images are in work or wait" in problem(answer, 503, "not-ready")["detail"]
        assert int(answer.headers["retry-after"]) > 30
        answer = client.post("/v1/detect", files=files(png()))
        assert "images are in work or wait" in problem(answer, 503, "not-ready")["detail"]
    assert client.get("/health/ready").status_code == 200
    monkeypatch.setattr(service, "STALE_SECONDS", -1.0)
    assert "known to be complete" in problem(client.get("/health/ready"), 503, "not-ready")["detail"]
    follower = detector_of(client).follower
    with monkeypatch.context() as outage:
        outage.setattr(follower.store, "id", refuse)
        with pytest.raises(OperationalError):
            follower.catch_up()
        assert client.get("/health/ready").status_code == 200
    follower.catch_up()
    problem(client.get("/health/ready"), 503, "not-ready")


def test_slow_enrolments_hold_up_no_other_call(own: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    going, enrolling = threading.Event(), cast(Service, own.app.state.service)._enrolling  # type: ignore[attr-defined]

    def slow(*args: object, **_: object) -> Added:
        assert going.wait(60)
        raise ApiError("bad-field", "late")

    monkeypatch.setattr(reference_routes, "enrol", slow)
    monkeypatch.setattr(enrolling, "most", service.DATABASE_THREADS)
    sent: dict[str, Any] = {"data": {"label": "real"}, "files": files(png(), field="images")}
    with ThreadPoolExecutor(enrolling.most) as pool:
        enrolments = [pool.submit(own.post, "/v1/references", **sent) for _ in range(enrolling.most)]
        try:
            wait_for(lambda: enrolling.full)
            assert own.get("/v1/generators").status_code == 200
            assert "enrolments are in work" in problem(own.post("/v1/references", **sent), 503, "not-ready")["detail"]
        finally:
            going.set()
    assert {enrolment.result().status_code for enrolment in enrolments} == {422}
