"""Groups of judged images over HTTP: who sees which, their enrolment, and the thumbnails that may be kept."""

import io
import uuid
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from conftest import small_image
from fastapi.testclient import TestClient
from PIL import Image

from api import candidates
from api.access import hash_secret, new_secret
from api.http.app import create_app
from api.judge.detector import Detector
from api.judge.loader import load_detector
from api.service_settings import ServiceSettings
from indexer.ingest.ingest import ingest
from indexer.store.blobs import Blobs, BlobsAway
from indexer.store.detections import Detection
from trainer.data.datasets import read_dataset
from trainer.process_pool import DeadlinePassed, LimitExceeded

BASE = "http://127.0.0.1:8000"


@pytest.fixture
def detector(settings: ServiceSettings, tiny_checkpoint: Path, image_folder: Path) -> Detector:
    """Ten real references, and thumbnails of what is judged."""
    changes = {"checkpoint": tiny_checkpoint, "device": "cpu", "k": 5, "keep_thumbnails": True}
    detector = load_detector(settings.model_copy(update=changes))
    ingest(read_dataset(image_folder / "real", label="real", source="tests"), detector.embedder, detector.store)
    detector.follower.catch_up()
    detector.calibrator.refresh()
    return detector


@pytest.fixture
def client(detector: Detector) -> Iterator[TestClient]:
    with TestClient(create_app(detector.settings, detector), base_url=BASE, client=("127.0.0.1", 50000)) as client:
        yield client


def uncertain(detector: Detector, name: str, direction: int, key: int | None, thumbnail: bytes | None) -> Detection:
    """A verdict on an image of its own near a direction."""
    noise = np.random.default_rng(len(name) + ord(name[-1])).normal(scale=0.02, size=detector.embedder.dim)
    vector = (np.eye(detector.embedder.dim)[direction] + noise).astype(np.float32)
    digest = sha256(name.encode()).hexdigest()
    result = {"file": name, "verdict": "uncertain", "image": {"format": "PNG", "shortfall": None}}
    checkpoint = detector.embedder.id
    return Detection(
        uuid.uuid4(), digest, 9, 40, 30, vector, result, checkpoint, None, 1, api_key_id=key, thumbnail=thumbnail
    )


def test_candidates_are_listed_enrolled_and_undone(client: TestClient, detector: Detector) -> None:
    store = detector.store
    picture = io.BytesIO()
    small_image(1, True).save(picture, "JPEG")
    secrets = {name: new_secret() for name in ("theirs", "mine", "admin")}
    scopes = {"theirs": ["detect", "enrol"], "mine": ["enrol"], "admin": ["admin"]}
    keys = {name: store.keys.create(name, hash_secret(secret), scopes[name]) for name, secret in secrets.items()}
    headers = {name: {"authorization": f"Bearer {secret}"} for name, secret in secrets.items()}
    theirs = [uncertain(detector, f"a{n}", 0, keys["theirs"].id, picture.getvalue()) for n in range(8)]
    store.detections.add(theirs + [uncertain(detector, f"b{n}", 1, keys["mine"].id, None) for n in range(6)])

    everything = client.get("/v1/candidates", headers=headers["admin"]).json()
    assert (everything["images"], everything["ungrouped"], everything["left_out"]) == (14, 0, 0)
    assert sorted(one["images"] for one in everything["candidates"]) == [6, 8]
    mine = client.get("/v1/candidates", headers=headers["mine"]).json()
    assert [one["images"] for one in mine["candidates"]] == [6]
    [candidate] = client.get("/v1/candidates", headers=headers["theirs"]).json()["candidates"]
    assert (candidate["verdicts"], candidate["nearest"][0]["label"]) == ({"uncertain": 8}, "real")
    example = candidate["examples"][0]
    assert (example["file"], example["nearest"]["label"]) == ("a0", "real")
    judged = client.get(example["thumbnail"], headers=headers["theirs"])
    assert (judged.content, judged.headers["content-type"]) == (picture.getvalue(), "image/jpeg")
    assert client.get(example["thumbnail"], headers=headers["mine"]).status_code == 403
    assert client.get(example["nearest"]["thumbnail"], headers=headers["theirs"]).status_code == 200
    assert mine["candidates"][0]["examples"][0]["thumbnail"] is None
    assert example["nearest"]["uri"] is None  # a path of this machine, which is the administrators' to know
    assert all(one["examples"][0]["nearest"]["uri"] for one in everything["candidates"])

    url, wanted = f"/v1/candidates/{candidate['name']}/enrol", {"generator": "Newcomer"}
    assert client.post(url, json=wanted, headers=headers["mine"]).status_code == 404  # not theirs to see
    assert client.post(url, json={"generator": "real"}, headers=headers["theirs"]).status_code == 422
    added = client.post(url, json=wanted, headers=headers["theirs"]).json()
    assert (added["added"], added["generators"]) == (8, {"Newcomer": 8})
    assert added["effect"]["recall"][0]["generator"] == "Newcomer"
    [[nearest]] = detector.follower.search(theirs[0].vector[None], 1)
    assert nearest.generator == "Newcomer"
    assert store.references.thumbnail(nearest.id) == picture.getvalue()
    again = client.post(url, json=wanted, headers=headers["theirs"]).json()
    assert (again["added"], again["known"], again["enrolment"]) == (0, 8, None)
    other = client.post(url, json={"generator": "Another"}, headers=headers["theirs"])
    assert other.status_code == 409
    assert client.get("/v1/candidates", headers=headers["theirs"]).json()["candidates"] == []
    undone = client.delete(f"/v1/enrolments/{added['enrolment']}", headers=headers["theirs"]).json()
    assert undone["references"] == 8
    [back] = client.get("/v1/candidates", headers=headers["theirs"]).json()["candidates"]
    assert back | {"novelty": None} == candidate | {"novelty": None}  # a calibration may have come between


def test_a_disputed_verdict_becomes_a_reference_or_relabels_the_one_it_is(
    client: TestClient, detector: Detector
) -> None:
    references = detector.store.references
    theirs = uncertain(detector, "a0", 0, None, b"a picture")
    detector.store.detections.add([theirs])
    url, wanted = f"/v1/detections/{theirs.id}/enrol", {"label": "fake", "generator": "Newcomer"}
    assert client.post(url, data={"label": "fake"}).status_code == 422
    other = client.post(url, data=wanted, files={"image": ("b.png", b"others", "image/png")})
    assert (other.status_code, other.json()["errors"][0]["field"]) == (422, "image")
    made = client.post(url, data=wanted).json()
    reference = made["reference"]
    assert (made["added"], made["relabelled"], made["readable"]) == (1, False, False)
    assert (reference["generator"], reference["source"]) == ("Newcomer", "verdicts")
    assert reference["attributes"] == {"detection": str(theirs.id)}
    assert references.thumbnail(reference["id"]) == b"a picture"
    assert made["effect"]["recall"][0]["generator"] == "Newcomer"
    [[nearest]] = detector.follower.search(theirs.vector[None], 1)
    assert nearest.id == reference["id"]
    again = client.post(url, data=wanted).json()
    assert (again["added"], again["known"], again["relabelled"]) == (0, 1, False)

    corrected = client.post(url, data={"label": "real"}).json()
    assert (corrected["added"], corrected["relabelled"]) == (0, True)
    now = corrected["reference"]
    assert (now["label"], now["attributes"]["former_generator"]) == ("real", "Newcomer")
    assert corrected["former"] == wanted
    back = client.post(url, data=wanted).json()
    assert (back["former"], back["reference"]["attributes"]) == (
        {"label": "real", "generator": None},
        {"detection": str(theirs.id)},  # which no longer say what it was
    )
    now = client.patch(f"/v1/references/{back['reference']['id']}", json=back["former"]).json()
    assert client.delete(f"/v1/enrolments/{made['enrolment']}").json()["references"] == 1
    assert references.get(now["id"]) is None
    elsewhere = replace(theirs, id=uuid.uuid4(), checkpoint_id="another")
    detector.store.detections.add([elsewhere])
    refused = client.post(f"/v1/detections/{elsewhere.id}/enrol", data={"label": "real"})
    assert (refused.status_code, "send the image as well" in refused.json()["detail"]) == (409, True)


def unreachable(*_: object, **__: object) -> NoReturn:
    raise BlobsAway("it does not answer")


def test_a_judged_image_that_is_sent_once_more_is_kept_and_one_removed_for_good_stays_away(
    client: TestClient, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    small_image(70, True, 64).save(buffer, "PNG")
    image = {"image": ("a.png", buffer.getvalue(), "image/png")}
    [verdict] = client.post("/v1/detect", files=image).json()["results"]
    url, wanted = f"/v1/detections/{verdict['id']}/enrol", {"label": "fake", "generator": "Newcomer", "source": "desk"}
    made = client.post(url, data=wanted, files=image).json()
    assert (made["added"], made["readable"], made["reference"]["source"]) == (1, True, "desk")
    assert detector.store.references.file(made["reference"]["id"]) == buffer.getvalue()
    with monkeypatch.context() as away:
        away.setattr(Blobs, "load", unreachable)  # asked for a picture, and not for whether there is one
        assert client.post(url, data=wanted).json()["readable"]
    detector.store.references.remove(ids=[made["reference"]["id"]])
    for send, again in ((url, image), ("/v1/references", {"images": image["image"]})):
        made = client.post(url, data=wanted).json()  # from the verdict alone
        assert (made["added"], made["readable"]) == (1, False)
        assert client.post(send, data=wanted, files=again).json()["known"] == 1
        assert client.post(url, data=wanted).json()["readable"]
        assert detector.store.references.file(made["reference"]["id"]) == buffer.getvalue()
        detector.store.references.remove(ids=[made["reference"]["id"]], forget=send != url)
    refused = client.post(url, data=wanted, files=image)
    assert (refused.status_code, "removed with --forget" in refused.json()["detail"]) == (409, True)


def test_what_cannot_be_made_a_reference_leaves_no_enrolment(
    client: TestClient, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, verdict = detector.store, uncertain(detector, "a0", 0, None, None)
    store.detections.add([verdict])
    url, wanted = f"/v1/detections/{verdict.id}/enrol", {"label": "fake", "generator": "Newcomer"}
    before = [one.id for one in store.enrolments.list()]
    with monkeypatch.context() as away:
        away.setattr(store.references, "add", unreachable)
        assert client.post(url, data=wanted).status_code == 503
    assert [one.id for one in store.enrolments.list()] == before
    client.post(url, data=wanted)
    before = [one.id for one in store.enrolments.list()]
    monkeypatch.setattr(store.references, "find", lambda _: None)  # somebody else made it one in between
    refused = client.post(url, data={"label": "real"})
    assert (refused.status_code, refused.json()["conflicts"][0]["has"]) == (409, "fake (Newcomer)")
    assert [one.id for one in store.enrolments.list()] == before


def test_thumbnails_of_judged_images_are_kept_where_a_setting_says_so(client: TestClient, detector: Detector) -> None:
    buffer = io.BytesIO()
    small_image(5, True, 400).save(buffer, "PNG")

    def judged(query: str = "") -> int:
        files = {"image": ("a.png", buffer.getvalue(), "image/png")}
        [verdict] = client.post(f"/v1/detect{query}", files=files).json()["results"]
        response = client.get(f"/v1/detections/{verdict['id']}/thumbnail")
        if response.status_code == 200:
            assert max(Image.open(io.BytesIO(response.content)).size) == 256
        return response.status_code

    assert (judged(), judged("?record=false")) == (200, 404)
    detector.settings = detector.settings.model_copy(update={"keep_thumbnails": False})
    assert judged() == 404


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn.cluster"), 501, 'pip install "lineup[train]"'),
        (LimitExceeded("it takes long"), 503, "lineup index discover"),
        (DeadlinePassed("the time for it has passed"), 503, "try again"),
    ],
)
def test_what_keeps_groups_from_being_made_is_said(
    client: TestClient, detector: Detector, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, reason: str
) -> None:
    def fails(*_: object) -> np.ndarray:
        raise error

    detector.store.detections.add([uncertain(detector, f"a{n}", 0, None, None) for n in range(5)])
    monkeypatch.setattr(candidates, "_grouped", fails)
    response = client.get("/v1/candidates")
    assert (response.status_code, reason in response.json()["detail"]) == (status, True)
