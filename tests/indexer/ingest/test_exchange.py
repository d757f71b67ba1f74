"""A reference set moves between databases as one checksummed file."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from functools import reduce
from pathlib import Path
from random import Random
from string import ascii_letters
from typing import Any
from unittest.mock import Mock
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
from conftest import new_database
from numbered import CHECKPOINT, DIM, new, opened, vector
from sqlalchemy import URL

from indexer.database.connection import connect
from indexer.ingest import exchange
from indexer.ingest.exchange import BadExport, export_references, import_references
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.changes import Additions
from trainer.data.entry import MOST_SOURCE_BYTES
from trainer.model.checkpoint import CheckpointConfig

OTHER, TRAINED, IMPORTED = "d" * 32, "e" * 32, "f" * 32


@pytest.fixture
def source(settings: Settings) -> Iterator[Store]:
    """300 references of two checkpoints, one of them an upload that was kept, of the longest source."""
    store = opened(settings)
    store.checkpoints.register(OTHER, "wide", 2, {"image_size": 8}, Path("wide"))
    store.generators.create("SD-XL", vendor="Stability AI", released_on=date(2023, 7, 26))
    longest = "".join(Random(0).choices(ascii_letters, k=MOST_SOURCE_BYTES))  # what Postgres cannot compress
    upload = new(1, "SD-XL", longest, data=b"the file", attributes={"prompt": "a cat"}, fingerprint=-5, jpeg_quality=90)
    store.references.add([upload, *(new(n, "SD-XL" if n % 3 else None) for n in range(2, 300))], CHECKPOINT)
    store.references.add([new(n, "SD-XL" if n % 3 else None, vector=vector(n)[:2]) for n in range(290, 301)], OTHER)
    yield store
    store.engine.dispose()


@pytest.fixture
def target(postgres_server: URL, tmp_path: Path) -> Iterator[Store]:
    with new_database(postgres_server) as url:
        store = opened(Settings(home=tmp_path / "target", database_url=url))
        yield store
        store.engine.dispose()


def rows(store: Store) -> dict[str, dict[str, Any]]:
    """Every reference by its hash, without what a database gives."""
    own = ("id", "enrolment_id", "added_at")
    found = store.references.list(limit=1000)
    return {
        row.sha256: {key: value for key, value in asdict(row).items() if key not in own}
        | {"thumbnail": store.references.thumbnail(row.id), "file": store.references.file(row.id)}
        for row in found
    }


def vectors(store: Store, checkpoint: str) -> dict[str, list[float]]:
    """Every embedding by the hash of its image."""
    hashes = {row.id: row.sha256 for row in store.references.list(limit=1000)}
    pages = [
        page
        for page in store.changes.between(checkpoint, 0, store.checkpoints.revision(checkpoint))
        if isinstance(page, Additions)
    ]
    return {
        hashes[image_id]: one
        for page in pages
        for image_id, one in zip(page.ids.tolist(), page.vectors.tolist(), strict=True)
    }


def test_a_set_arrives_as_it_was(source: Store, target: Store, tmp_path: Path) -> None:
    path = tmp_path / "out/set.lineup"
    beside: set[Path] = set()  # what a kill at any of these moments would leave
    exported = export_references(source, path, lambda: beside.update(path.parent.iterdir()))
    assert exported == {"file": str(path), "references": 300, "checkpoints": [CHECKPOINT, OTHER]}
    assert beside == set()
    advance = Mock()
    imported = import_references(target, path, advance)
    assert (imported["references"], imported["added"], imported["embeddings"]) == (300, 300, 310)
    assert advance.call_count == 600  # each is checked and added
    assert (imported["conflicts"], imported["blocked"]) == ([], [])
    assert rows(target) == rows(source)
    for checkpoint in (CHECKPOINT, OTHER):
        assert vectors(target, checkpoint) == vectors(source, checkpoint)
    generator = target.generators.get("SD-XL")
    assert generator is not None
    assert (generator.vendor, generator.released_on) == ("Stability AI", date(2023, 7, 26))
    assert [row.file_bytes for row in target.references.list(limit=1)] == [100]
    enrolment = target.enrolments.get(imported["enrolment"])
    assert enrolment is not None
    assert enrolment.report == imported
    assert target.checkpoints.require(OTHER).config == {"image_size": 8}  # its folder is no other machine's business
    again = import_references(target, path)
    assert (again["added"], again["embeddings"], again["enrolment"]) == (0, 0, None)
    assert len(target.enrolments.list()) == 1
    assert target.checkpoints.revision(CHECKPOINT) == 2  # two pages


def test_the_active_checkpoint_is_that_of_an_empty_store_too(
    source: Store, postgres_server: URL, tmp_path: Path
) -> None:
    assert source.checkpoints.activate(OTHER, without=source.changes.embedded_ids(CHECKPOINT).tolist())
    path = tmp_path / "set.lineup"
    export_references(source, path)
    with new_database(postgres_server) as url:
        empty = Store(connect(Settings(home=tmp_path / "empty", database_url=url)))
        import_references(empty, path)
        active = empty.checkpoints.active()
        empty.engine.dispose()
    assert active is not None
    assert active.id == OTHER


def test_a_set_without_pictures_holds_nothing_but_what_is_public(source: Store, target: Store, tmp_path: Path) -> None:
    public = "https://raw.githubusercontent.com/who/what/c0ffee/a%20b.jpg"
    paths = {"data": "/home/me/photographs", "source": "/home/me/vit"}
    trained = CheckpointConfig(training=paths | {"epochs": 3}, provenance=paths)
    source.checkpoints.register(TRAINED, "trained", 192, trained.to_json())
    source.checkpoints.register(IMPORTED, "imported", 192, CheckpointConfig(provenance={"source": "who/vit"}).to_json())
    source.references.add(
        [
            new(400, uri=public, thumbnail=b"a picture", fingerprint=7, mtime=1.5, attributes={"window": "0,0,64,48"}),
            new(401, uri="file:///home/me/b.png", thumbnail=None, attributes={"mask": "/home/me/b", "licence": "CC0"}),
            new(402, uri="hf://datasets/who/what@c0ffee/a.parquet#image/0"),
        ],
        CHECKPOINT,
    )
    path = tmp_path / "public.lineup"
    assert export_references(source, path, pictures=False)["references"] == 303
    with ZipFile(path) as archive:
        content = b"".join(map(archive.read, archive.namelist()))
    assert not any(word in content for word in (b"a picture", b"the file", b"/home/me"))
    imported = import_references(target, path)
    assert (imported["added"], imported["without_picture"]) == (303, 303)
    without = {"thumbnail": None, "file": None, "pictured": False, "mtime": None}
    expected = {sha256: row | without for sha256, row in rows(source).items()}
    expected[new(401).sha256] |= {"uri": None, "attributes": {"licence": "CC0"}}
    assert rows(target) == expected
    names = {"data": "photographs", "source": "vit"}
    config = target.checkpoints.require(TRAINED).config
    assert (config["training"], config["provenance"]) == (names | {"epochs": 3}, names)
    assert target.checkpoints.require(IMPORTED).config["provenance"] == {"source": "who/vit"}
    rounded, exact = vectors(target, CHECKPOINT), vectors(source, CHECKPOINT)
    assert rounded == {sha256: np.asarray(vector, np.float16).tolist() for sha256, vector in exact.items()}
    # Exported once more, with the pictures that there are: none.
    export_references(target, tmp_path / "again", pictures=True)
    target.references.remove(ids=[row.id for row in target.references.list(limit=1000)])
    assert import_references(target, tmp_path / "again")["added"] == 303
    assert rows(target) == expected


def test_conflicts_and_blocked_images_are_told(source: Store, target: Store, tmp_path: Path) -> None:
    target.references.add([new(2), new(3)], CHECKPOINT)
    target.references.remove(
        ids=[row.id for row in target.references.list() if row.sha256 == new(3).sha256], forget=True
    )
    export_references(source, tmp_path / "set")
    report = import_references(target, tmp_path / "set")
    assert (report["added"], report["blocked"]) == (298, [new(3).sha256])
    assert report["conflicts"] == [{"sha256": new(2).sha256, "has": "real", "wants": "fake (SD-XL)"}]


def test_pictures_of_known_references_come_with_a_later_file(source: Store, target: Store, tmp_path: Path) -> None:
    export_references(source, tmp_path / "public", pictures=False)
    export_references(source, tmp_path / "pictures")
    target.references.add([new(2, thumbnail=None)], CHECKPOINT)  # in the files it is fake
    assert import_references(target, tmp_path / "public")["without_picture"] == 300
    report = import_references(target, tmp_path / "pictures")
    assert (report["added"], report["without_picture"], report["enrolment"]) == (0, 1, None)
    assert {sha256 for sha256, row in rows(target).items() if row["thumbnail"] is None} == {new(2).sha256}
    assert import_references(target, tmp_path / "public")["without_picture"] == 1


def test_pages_end_before_they_hold_too_many_bytes(
    source: Store, target: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "PAGE_BYTES", 400)  # 100 thumbnails of 4 bytes
    export_references(source, tmp_path / "set")
    with ZipFile(tmp_path / "set") as archive:
        pages = [json.loads(archive.read(f"{number}.json")) for number in range(4)]
        assert len(archive.namelist()) == 9
    assert sorted(len(page) for page in pages) == [2, 98, 100, 100]  # 98 with an upload of 8 bytes
    assert import_references(target, tmp_path / "set")["added"] == 300
    monkeypatch.setattr(exchange, "PAGE_BYTES", 1)
    monkeypatch.setattr(exchange, "EXPORT_PAGE", 2)
    source.references.remove(ids=[row.id for row in source.references.list(limit=1000)[3:]])
    assert export_references(source, tmp_path / "set")["references"] == 3
    assert import_references(target, tmp_path / "set")["references"] == 3


def test_every_flipped_bit_of_the_zip_is_noticed_or_does_no_harm(source: Store, tmp_path: Path) -> None:
    """Damage to a zip's own fields must not make it look smaller than it is."""
    path = tmp_path / "set"
    export_references(source, path)
    good = path.read_bytes()
    whole = exchange._verified(path)
    with ZipFile(path) as archive:
        fields = [*range(archive.start_dir, len(good)), *range(archive.infolist()[0].header_offset + 40)]
    noticed = 0
    for at in fields:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        try:
            assert exchange._verified(path) == whole
        except BadExport:
            noticed += 1
    assert noticed > len(fields) / 3


def test_a_failed_export_leaves_nothing(source: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        export_references(source, tmp_path / "set", broken)
    assert list(tmp_path.glob("set*")) == []


def test_damage_is_noticed_before_anything_is_added(source: Store, target: Store, tmp_path: Path) -> None:
    path = tmp_path / "set"
    export_references(source, path)
    good = path.read_bytes()
    at = good.index(b"jpegjpeg")
    for bad in (good[:at] + b"x" + good[at + 1 :], good[: len(good) // 2], b"something else", b""):
        path.write_bytes(bad)
        with pytest.raises(BadExport, match="damaged") as caught:
            import_references(target, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadExport, match="does not exist"):
        import_references(target, tmp_path / "none")
    path.write_bytes(good.replace(b"lineup references 2", b"lineup references 9"))
    with pytest.raises(BadExport):
        import_references(target, path)
    path.write_bytes(good)
    with ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for unknown in (b'"<f8"', b'"float"', b"4", b"null"):
        with ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content.replace(b'"<f4"', unknown) if name == "about.json" else content)
        with pytest.raises(BadExport, match=r"vectors of type .*expected <f4 or <f2"):
            import_references(target, path)
    assert target.references.counts() == {"real": 0, "fake": 0}


ABOUT: list[tuple[str, Any]] = [
    ("pages", 10**9), ("pages", -1), ("pages", "2"), ("pages", None), ("references", 4), ("references", -3),
    ("format", 2), ("checkpoints", {}), ("checkpoints.0", None), ("checkpoints.0.id", "../../elsewhere"),
    ("checkpoints.0.dim", 0), ("checkpoints.0.dim", 10**12), ("checkpoints.0.dim", 5), ("checkpoints.0.name", None),
    ("checkpoints.0.name", "a\0b"), ("checkpoints.0.config", []), ("checkpoints.0.config", {"a": "\0"}),
    ("checkpoints.0.config", {"a": float("nan")}), ("checkpoints.0.config", {"training": 3}), ("generators", None),
    ("generators.0.name", "real"), ("generators.0.name", ["x"]), ("generators.0.released_on", "yesterday"),
    ("generators.0.vendor", "a\0b"),
]  # fmt: skip
ROW: list[tuple[str, Any]] = [
    ("sha256", "ab"), ("sha256", "x" * 64), ("sha256", None), ("label", 2), ("label", -1), ("label", True),
    ("label", 0), ("generator", "a/b"), ("generator", 3), ("source", None), ("source", "s" * 3000), ("group", 1),
    ("file_bytes", -1), ("file_bytes", 2**63), ("mtime", float("inf")), ("mtime", "now"), ("width", 0),
    ("width", 2**31), ("height", -5), ("height", 1.5), ("format", None), ("jpeg_quality", 10**6),
    ("fingerprint", 2**63), ("attributes", []), ("attributes", {"a": {"b": 1}}), ("thumbnail", [5, 2]),
    ("thumbnail", [0, 10**9]), ("thumbnail", [-4, 8]), ("thumbnail", "all"), ("data", [0]), ("vectors", None),
    ("vectors", {CHECKPOINT: [0, 4]}), ("vectors", {"f" * 32: [0, 24]}), ("vectors", {CHECKPOINT: [0, 10**12]}),
]  # fmt: skip


def hostile(good: dict[str, bytes], path: Path) -> Iterator[str]:
    """Write one archive after another with whole checksums and nonsense inside, and say which it is."""

    def write(members: dict[str, bytes], method: int = ZIP_STORED) -> None:
        with ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content, method)

    for name, prefix, changes in (("about.json", "", ABOUT), ("0.json", "0.", ROW)):
        for keys, value in changes:
            document = json.loads(good[name])
            *outer, last = [int(key) if key.isdigit() else key for key in (prefix + keys).split(".")]
            reduce(lambda inside, key: inside[key], outer, document)[last] = value
            write(good | {name: json.dumps(document).encode()})
            yield f"{keys} = {value!r:.40}"
    vectors = json.loads(good["0.json"])[0]["vectors"][CHECKPOINT]
    for value in (float("nan"), float("inf"), 0.0):
        data = bytearray(good["0.bin"])
        data[vectors[0] : vectors[1]] = np.full(DIM, value, "<f4").tobytes()
        write(good | {"0.bin": bytes(data)})
        yield f"a vector of {value}"
    for name, contents in {
        "about.json": (b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"pages": ' + b"9" * 5000 + b"}"),
        "0.json": (b"", b"{}", b"[null]", b"[" * 100_000, b"[" + b",".join([b"{}"] * 100_000) + b"]"),
        "0.bin": (b"",),
    }.items():
        for content in contents:
            write(good | {name: content})
            yield f"{name} is {content[:20]!r}"
        write({member: content for member, content in good.items() if member != name})
        yield f"{name} is missing"
    write(good | {"0.bin": bytes(2**20)}, ZIP_DEFLATED)
    yield "0.bin is packed"
    write(good | {"0.json": b" " * (exchange.FACTS_BYTES + 1)}, ZIP_DEFLATED)
    yield "0.json swells"
    write(good | {"1.json": good["0.json"], "1.bin": good["0.bin"]})
    yield "a page too many"


def test_an_archive_with_whole_checksums_and_nonsense_is_one_line(
    settings: Settings, target: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(settings)
    store.references.add([new(number, "SD-XL") for number in range(3)], CHECKPOINT)
    path = tmp_path / "set"
    export_references(store, path)
    store.engine.dispose()
    with ZipFile(path) as archive:
        good = {name: archive.read(name) for name in archive.namelist()}
    monkeypatch.setattr(exchange, "FACTS_BYTES", 300_000)
    before, tried = time.monotonic(), 0
    for case in hostile(good, path):
        with pytest.raises(BadExport) as caught:
            pytest.fail(f"{case}: {import_references(target, path)}")
        assert "\n" not in str(caught.value), case
        assert len(str(caught.value)) < 500 + len(str(path)), case
        tried += 1
    assert tried > 70
    assert time.monotonic() - before < 0.2 * tried
    assert target.references.counts() == {"real": 0, "fake": 0}
    assert [checkpoint.id for checkpoint in target.checkpoints.list()] == [CHECKPOINT]
    assert target.generators.list() == []
    assert target.enrolments.list() == []
