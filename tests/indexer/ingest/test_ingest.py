"""Adding data sets: overlapped, resumable, and honest about what was skipped."""

import hashlib
import io
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hashing import HashingEmbedder
from PIL import Image
from sqlalchemy import text

from indexer.database.connection import connect
from indexer.ingest import ingest as module
from indexer.ingest import reembed as reembed_module
from indexer.ingest.decoded import fingerprint, hamming_distance
from indexer.ingest.ingest import ingest
from indexer.ingest.prefetch import map_batches, prefetch
from indexer.ingest.reembed import reembed
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.changes import Additions
from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry
from trainer.images import UnreadableImage, decode_image
from trainer.model.embedder import Embedder
from trainer.process_pool import DeadlinePassed

TOO_SLOW = "it takes more than 1e-05 seconds to read (LINEUP_IMAGE_SECONDS)"


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    engine = connect(settings)
    yield Store(engine)
    engine.dispose()


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    """A copy to break: 12 real, 6 of each of two generators."""
    root = tmp_path / "images"
    for name, count in (("real", 12), ("fake/gen-a", 6), ("fake/gen-b", 6)):
        (root / name).mkdir(parents=True)
        for path in sorted((image_folder / name).iterdir())[:count]:
            shutil.copy2(path, root / name / path.name)
    return root


def spoil(folder: Path) -> dict[str, str]:
    """Add every kind of bad file; gives a word of each expected reason by key."""
    good = next((folder / "real").iterdir()).read_bytes()
    (folder / "real/empty.jpg").write_bytes(b"")
    (folder / "real/cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "real/notes.txt").write_text("not an image")
    Image.new("L", (400, 300)).save(folder / "fake/gen-a/huge.png")
    return {
        "real/empty.jpg": "empty",
        "real/cut.jpg": "truncated",
        "real/notes.txt": "not an image",
        "fake/gen-a/huge.png": "LINEUP_MAX_PIXELS",
    }


def test_a_folder_becomes_rows(store: Store, folder: Path) -> None:
    embedder = HashingEmbedder()
    done = []
    report = ingest(read_dataset(folder), embedder, store, on_image=lambda: done.append(1), batch_size=5)
    assert (report["images"], report["added"], report["known"], report["embedded"]) == (24, 24, 0, 0)
    assert (report["conflicts"], report["rejected"], report["revision"]) == ([], [], 1)
    assert report["generators"] == {"real": 12, "gen-a": 6, "gen-b": 6}
    assert len(done) == embedder.calls == 24
    enrolment = store.enrolments.get(report["enrolment"])
    assert enrolment is not None
    assert enrolment.report == report
    active = store.checkpoints.active()
    assert active is not None
    assert (active.id, active.dim) == (embedder.id, embedder.dim)

    path = folder / "fake/gen-a/000.jpg"
    image, facts = decode_image(path.read_bytes())
    row = store.references.find(facts.sha256)
    assert row is not None
    assert (row.label, row.generator, row.uri) == (1, "gen-a", path.as_uri())
    assert (row.file_bytes, row.mtime, row.jpeg_quality) == (path.stat().st_size, path.stat().st_mtime, 75)
    assert (row.width, row.height, row.format) == (48, 48, "JPEG")
    assert row.enrolment_id == report["enrolment"]
    thumbnail = store.references.thumbnail(row.id)
    assert thumbnail is not None
    assert Image.open(io.BytesIO(thumbnail)).format == "JPEG"
    (page,) = store.changes.between(embedder.id, 0, 1)
    assert isinstance(page, Additions)
    np.testing.assert_array_equal(page.vectors[page.ids == row.id], embedder.embed_pixels(embedder.preprocess([image])))


def test_a_public_address_takes_the_place_of_the_path(store: Store, folder: Path) -> None:
    """Two windows of one public file are two references, and a second run adds neither again."""
    uri = "https://example.org/whole.png"
    entries = [replace(entry, public_uri=uri, size=1, mtime=2.0) for entry in list(read_dataset(folder))[:2]]
    first, second = (ingest(entries, HashingEmbedder(), store) for _ in range(2))
    assert ((first["added"], first["known"]), (second["added"], second["known"])) == ((2, 0), (0, 2))
    assert [row.uri for row in store.references.list()] == [uri, uri]


def test_a_reference_of_several_windows_has_the_embedding_of_everywhere(
    store: Store, folder: Path, windowed: Embedder
) -> None:
    """Congruence of adding and of embedding again with `Embedder.embed`."""
    entries = list(read_dataset(folder))[:7]
    hashes = {hashlib.sha256(entry.read()).hexdigest(): decode_image(entry.read())[0] for entry in entries}
    ingest(entries[:4], windowed, store, batch_size=3)
    ingest(entries[4:], HashingEmbedder(), store)
    slow = reembed(windowed, store, image_seconds=1e-5)
    assert {one["reason"] for one in slow["unreadable"]} == {TOO_SLOW}
    reembed(windowed, store, batch_size=3)
    vectors: dict[int, np.ndarray] = {}
    for page in store.changes.between(windowed.id, 0, store.checkpoints.revision(windowed.id)):
        assert isinstance(page, Additions)
        vectors |= dict(zip(page.ids.tolist(), page.vectors, strict=True))
    assert len(vectors) == 7
    for sha256, image in hashes.items():
        row = store.references.find(sha256)
        assert row is not None
        np.testing.assert_allclose(vectors[row.id], windowed.embed([image])[0], atol=2e-3)  # kept in half precision


def test_embedding_again_asks_no_private_server(
    store: Store, folder: Path, windowed: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless that is allowed. Whoever made a file that is imported chose its addresses."""
    private = [
        f"{host}/a.tar#a;offset=0;size=9" for host in ("https://10.0.0.1", "HTTPS://[::1]", "https:////10.0.0.1")
    ]
    public, broken = "https://140.82.112.3/a.tar#a;offset=0;size=9", "https://[::1/a.tar#a;offset=0;size=9"
    uris = [*private, broken, public]
    entries = list(read_dataset(folder))[: len(uris)]
    given = [replace(entry, public_uri=uri, size=1, mtime=2.0) for entry, uri in zip(entries, uris, strict=True)]
    ingest(given, HashingEmbedder(), store)
    requests: list[str] = []

    def absent(uri: str) -> bytes:
        requests.append(uri)
        raise UnreadableImage("nothing is there")

    monkeypatch.setattr(reembed_module, "read_uri", absent)
    reasons = {one["uri"]: one["reason"] for one in reembed(windowed, store)["unreadable"]}
    assert requests == [public]
    assert "10.0.0.1: not a public server; LINEUP_PRIVATE_ADDRESSES=true" in reasons[private[0]]
    assert "its address cannot be read" in reasons[broken]
    assert len(reasons) == len(uris)
    requests.clear()
    reembed(windowed, store, private_addresses=True)
    assert sorted(requests) == sorted([*private, public])


def test_a_second_run_opens_no_file(store: Store, folder: Path) -> None:
    first = ingest(read_dataset(folder), HashingEmbedder(), store)

    def unopened() -> bytes:
        raise AssertionError("a known file was opened")

    entries = (replace(entry, read=unopened) for entry in read_dataset(folder))
    second = ingest(entries, HashingEmbedder(), store)
    assert (second["added"], second["known"], second["revision"]) == (0, 24, first["revision"])
    assert second["enrolment"] is None


def test_moved_and_touched_files_are_not_decoded(store: Store, folder: Path) -> None:
    ingest(read_dataset(folder), HashingEmbedder(), store)
    moved = folder.rename(folder.with_name("moved"))
    embedder = HashingEmbedder()
    report = ingest(read_dataset(moved, source="images"), embedder, store, max_pixels=1)  # decoding would reject
    assert (report["added"], report["known"], report["rejected"], embedder.calls) == (0, 24, [], 0)


def test_a_changed_file_is_another_image(store: Store, folder: Path) -> None:
    ingest(read_dataset(folder), HashingEmbedder(), store)
    Image.new("RGB", (50, 40), "red").save(folder / "real/000.jpg")
    report = ingest(read_dataset(folder), HashingEmbedder(), store)
    assert (report["added"], report["known"]) == (1, 23)


def test_bad_files_are_named_and_the_rest_goes_on(store: Store, folder: Path) -> None:
    reasons = spoil(folder)
    report = ingest(read_dataset(folder), HashingEmbedder(), store, max_pixels=10_000)
    assert report["added"] == 24
    assert {item["file"] for item in report["rejected"]} == set(reasons)
    for item in report["rejected"]:
        assert reasons[item["file"]] in item["reason"]


def test_a_file_that_vanishes_is_named(store: Store, folder: Path) -> None:
    entries = list(read_dataset(folder))
    (folder / "real/000.jpg").unlink()
    report = ingest(entries, HashingEmbedder(), store)
    assert report["added"] == 23
    assert [item["file"] for item in report["rejected"]] == ["real/000.jpg"]


def test_conflicts_are_reported_before_and_after_reading(store: Store, folder: Path) -> None:
    ingest(read_dataset(folder), HashingEmbedder(), store)
    same = folder / "real/000.jpg"
    shutil.copy2(same, folder / "fake/gen-a/copy.jpg")  # other uri: found by its hash
    entries = [replace(entry, label=1, generator="gen-c") if entry.key == "real/001.png" else entry
               for entry in read_dataset(folder)]  # fmt: skip
    report = ingest(entries, HashingEmbedder(), store)
    assert (report["added"], report["known"]) == (0, 23)
    assert sorted((c["file"], c["has"], c["wants"]) for c in report["conflicts"]) == [
        ("fake/gen-a/copy.jpg", "real", "fake (gen-a)"),
        ("real/001.png", "real", "fake (gen-c)"),
    ]
    assert store.references.counts() == {"real": 12, "fake": 12}


def test_the_same_bytes_twice_in_one_run(store: Store, folder: Path) -> None:
    shutil.copy2(folder / "real/000.jpg", folder / "real/again.jpg")
    report = ingest(read_dataset(folder), HashingEmbedder(), store)
    assert (report["added"], report["known"]) == (24, 1)


def test_a_second_checkpoint_embeds_what_is_known(store: Store, folder: Path) -> None:
    ingest(read_dataset(folder), HashingEmbedder(), store)
    other = HashingEmbedder("other", dim=5)
    report = ingest(read_dataset(folder), other, store)
    assert (report["added"], report["known"], report["embedded"]) == (0, 0, 24)
    assert len(store.changes.embedded_ids(other.id)) == 24


def test_a_dry_run_writes_nothing(store: Store, folder: Path) -> None:
    spoil(folder)
    shutil.copy2(folder / "real/000.jpg", folder / "real/again.jpg")
    embedder = HashingEmbedder()
    report = ingest(read_dataset(folder), embedder, store, max_pixels=10_000, dry_run=True)
    assert (report["added"], report["known"], len(report["rejected"])) == (24, 1, 4)
    assert report["generators"] == {"real": 12, "gen-a": 6, "gen-b": 6}
    assert (embedder.calls, store.references.counts(), store.checkpoints.list()) == (0, {"real": 0, "fake": 0}, [])


def test_forgotten_images_are_named(store: Store, folder: Path) -> None:
    ingest(read_dataset(folder), HashingEmbedder(), store)
    store.references.remove(generator="gen-a", forget=True)
    report = ingest(read_dataset(folder), HashingEmbedder(), store)
    assert (report["added"], report["known"]) == (0, 18)
    assert {item["reason"] for item in report["rejected"]} == {"was removed with --forget"}
    assert len(report["rejected"]) == 6


def test_uploads_keep_their_bytes(store: Store, folder: Path) -> None:
    data = (folder / "real/000.jpg").read_bytes()
    entry = Entry("a.jpg", "g", 0, None, "http", "", None, None, None, {}, lambda: data)
    report = ingest([entry], HashingEmbedder(), store, keep_bytes=True, source="http")
    assert report["added"] == 1
    (row,) = store.references.list()
    assert row.uri is None
    assert store.references.file(row.id) == data
    enrolment = store.enrolments.get(report["enrolment"])
    assert enrolment is not None
    assert enrolment.source == "http"


def test_two_at_once_lose_nothing(store: Store, settings: Settings, folder: Path) -> None:
    reports = []

    def run() -> None:
        engine = connect(settings)
        reports.append(ingest(read_dataset(folder), HashingEmbedder(), Store(engine), batch_size=3))
        engine.dispose()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(report["added"] for report in reports) == 24
    assert [report["added"] + report["known"] for report in reports] == [24, 24]
    assert len(store.changes.embedded_ids(HashingEmbedder().id)) == 24


def test_an_ended_run_is_taken_up_again(store: Store, folder: Path) -> None:
    class Broken(HashingEmbedder):
        def embed_pixels(self, pixels: np.ndarray, batch_size: int = 32) -> np.ndarray:
            if self.calls >= 10:
                raise RuntimeError("the lights went out")
            return super().embed_pixels(pixels, batch_size)

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="the lights went out"):
        ingest(read_dataset(folder), Broken(), store, batch_size=4)
    assert threading.active_count() == before
    report = ingest(read_dataset(folder), HashingEmbedder(), store)
    assert report["added"] + report["known"] == 24
    assert store.references.counts() == {"real": 12, "fake": 12}


def test_a_reference_without_a_picture_gets_that_of_its_file(store: Store, folder: Path) -> None:
    ingest(read_dataset(folder), HashingEmbedder(), store)
    thumbnails = {row.id: store.references.thumbnail(row.id) for row in store.references.list()}
    with store.engine.begin() as connection:
        connection.execute(text("update reference_image set thumbnail = null where label = 0"))
    embedder = HashingEmbedder()
    rehearsed = ingest(read_dataset(folder), embedder, store, dry_run=True)
    assert (rehearsed["added"], rehearsed["known"], rehearsed["embedded"]) == (0, 24, 0)
    assert sum(row.pictured for row in store.references.list()) == 12
    report = ingest(read_dataset(folder), embedder, store)
    assert (report["added"], report["known"], report["embedded"], report["enrolment"]) == (0, 24, 0, None)
    assert {row.id: store.references.thumbnail(row.id) for row in store.references.list()} == thumbnails
    assert embedder.calls == 0
    assert store.checkpoints.revision(embedder.id) == 1


def test_fingerprints_of_near_duplicates_are_near() -> None:
    rng = np.random.default_rng(0)
    big = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((300, 300), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    big.resize((200, 200)).save(out, "JPEG", quality=60)
    near, _ = decode_image(out.getvalue())
    other = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((300, 300), Image.Resampling.BICUBIC)
    assert hamming_distance(fingerprint(big), fingerprint(near)) <= 8
    assert hamming_distance(fingerprint(big), fingerprint(other)) >= 16
    assert fingerprint(Image.new("RGB", (9, 8))) == 0


@pytest.mark.parametrize(
    ("one", "other", "bits"),
    [(0, 0, 0), (-1, -1, 0), (-1, 0, 64), (0, -(2**63), 1), (1 - 2**63, 0, 2), (-2, 1, 64), (5, 6, 2)],
)
def test_bits_of_signed_fingerprints_are_those_of_their_64_bits(one: int, other: int, bits: int) -> None:
    assert hamming_distance(one, other) == hamming_distance(other, one) == bits


def test_prefetch_keeps_order_and_bounds_and_passes_errors() -> None:
    produced: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(50):
            produced.append(number)
            yield number
        raise ValueError("at the end")

    got = []
    stream = prefetch((n for n in numbers()), 3)
    for number in stream:
        got.append(number)
        assert len(produced) <= number + 1 + 3 + 2  # waiting, and one in each hand
        if number == 48:
            break
    assert got == list(range(49))
    with pytest.raises(ValueError, match="at the end"):
        list(stream)


@pytest.mark.parametrize("stage", [partial(prefetch, depth=2), partial(map_batches, len, size=2)])
def test_closing_a_stage_ends_its_threads(stage: Callable[..., Generator[int, None, None]]) -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    items = endless()  # held here, so that nothing but the stage closes it
    stream = stage(items)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert closed.wait(10)


def test_batches_are_worked_on_two_at_a_time_and_come_in_order() -> None:
    produced: list[int] = []
    both = threading.Barrier(2)

    def numbers() -> Iterator[int]:
        for number in range(24):
            produced.append(number)
            yield number

    def double(batch: Sequence[int]) -> list[int]:
        both.wait(10)  # breaks where one is alone
        if batch[0] == 16:
            raise ValueError("the fifth")
        return [2 * number for number in batch]

    stream = map_batches(double, (n for n in numbers()), 4)
    for first in range(0, 16, 4):
        assert next(stream) == [2 * number for number in range(first, first + 4)]
        assert len(produced) <= first + 8
    with pytest.raises(ValueError, match="the fifth"):
        next(stream)


def test_nothing_is_written_for_somebody_who_no_longer_waits(store: Store, folder: Path) -> None:
    with pytest.raises(DeadlinePassed):
        ingest(read_dataset(folder), HashingEmbedder(), store, deadline=time.monotonic())
    report = ingest(read_dataset(folder), HashingEmbedder(), store)
    assert (report["added"], report["known"]) == (24, 0)


@pytest.mark.parametrize(("batch", "added"), [(8, 8), (24, 24)])
def test_what_was_added_before_the_time_passed_is_reported(
    batch: int, added: int, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    past: list[float] = []  # the clock goes on by an hour once the first images are written
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(past[:1]))
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "WRITE_IMAGES", batch)
    with nullcontext() if added == 24 else pytest.raises(DeadlinePassed, match="8 images were added before, as enrol"):
        ingest(
            read_dataset(folder),
            HashingEmbedder(),
            store,
            deadline=time.monotonic() + 600,
            batch_size=batch,
            on_image=lambda: past.append(3600),
        )
    [enrolment] = store.enrolments.list()
    assert enrolment.report
    assert enrolment.references == enrolment.report["added"] == added


def test_an_image_that_takes_too_long_is_rejected(store: Store, folder: Path) -> None:
    report = ingest(read_dataset(folder), HashingEmbedder(), store, image_seconds=1e-5)
    assert report["added"] == 0
    assert {item["reason"] for item in report["rejected"]} == {TOO_SLOW}
