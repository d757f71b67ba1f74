"""A reference set moves between databases as one checksummed file."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from conftest import new_database
from numbered import CHECKPOINT, new, opened, vector
from sqlalchemy import URL

from indexer.exchange import BadExport, export_references, import_references
from indexer.settings import Settings
from indexer.store import Additions, Store

OTHER = "d" * 32


@pytest.fixture
def source(settings: Settings) -> Iterator[Store]:
    """300 references of two checkpoints, one of them an upload that was kept."""
    store = opened(settings)
    store.register_checkpoint(OTHER, "wide", 2, {"image_size": 8})
    store.create_generator("SD-XL", vendor="Stability AI", released_on=date(2023, 7, 26))
    upload = new(1, "SD-XL", data=b"the file", attributes={"prompt": "a cat"}, fingerprint=-5, jpeg_quality=90)
    store.add([upload, *(new(n, "SD-XL" if n % 3 else None) for n in range(2, 300))], CHECKPOINT)
    store.add([new(n, "SD-XL" if n % 3 else None, vector=vector(n)[:2]) for n in range(290, 301)], OTHER)
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
    found = store.list(limit=1000)
    return {
        row.sha256: {key: value for key, value in asdict(row).items() if key not in own}
        | {"thumbnail": store.thumbnail(row.id), "file": store.file(row.id)}
        for row in found
    }


def vectors(store: Store, checkpoint: str) -> dict[str, list[float]]:
    """Every embedding by the hash of its image."""
    hashes = {row.id: row.sha256 for row in store.list(limit=1000)}
    pages = [page for page in store.changes(checkpoint, 0, store.revision(checkpoint)) if isinstance(page, Additions)]
    return {
        hashes[image_id]: one
        for page in pages
        for image_id, one in zip(page.ids.tolist(), page.vectors.tolist(), strict=True)
    }


def test_a_set_arrives_as_it_was(source: Store, target: Store, tmp_path: Path) -> None:
    path = tmp_path / "out/set.lineup"
    exported = export_references(source, path)
    assert exported == {"file": str(path), "references": 300, "checkpoints": [CHECKPOINT, OTHER]}
    imported = import_references(target, path)
    assert (imported["references"], imported["added"], imported["embeddings"]) == (300, 300, 310)
    assert (imported["conflicts"], imported["blocked"]) == ([], [])
    assert rows(target) == rows(source)
    for checkpoint in (CHECKPOINT, OTHER):
        assert vectors(target, checkpoint) == vectors(source, checkpoint)
    generator = target.get_generator("SD-XL")
    assert generator is not None
    assert (generator.vendor, generator.released_on) == ("Stability AI", date(2023, 7, 26))
    assert [row.file_bytes for row in target.list(limit=1)] == [100]
    enrolment = target.get_enrolment(imported["enrolment"])
    assert enrolment is not None
    assert enrolment.report == imported
    again = import_references(target, path)
    assert (again["added"], again["embeddings"]) == (0, 0)
    assert target.revision(CHECKPOINT) == 2  # two pages


def test_conflicts_and_blocked_images_are_told(source: Store, target: Store, tmp_path: Path) -> None:
    target.add([new(2), new(3)], CHECKPOINT)
    target.remove(ids=[row.id for row in target.list() if row.sha256 == new(3).sha256], forget=True)
    export_references(source, tmp_path / "set")
    report = import_references(target, tmp_path / "set")
    assert (report["added"], report["blocked"]) == (298, [new(3).sha256])
    assert report["conflicts"] == [{"sha256": new(2).sha256, "has": "real", "wants": "fake (SD-XL)"}]


def test_damage_is_noticed_before_anything_is_added(source: Store, target: Store, tmp_path: Path) -> None:
    path = tmp_path / "set"
    export_references(source, path)
    good = path.read_bytes()
    at = good.index(b"webpwebp")
    for bad in (good[:at] + b"x" + good[at + 1 :], good[: len(good) // 2], b"something else", b""):
        path.write_bytes(bad)
        with pytest.raises(BadExport, match="damaged") as caught:
            import_references(target, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadExport, match="does not exist"):
        import_references(target, tmp_path / "none")
    path.write_bytes(good.replace(b"lineup references 1", b"lineup references 9"))
    with pytest.raises(BadExport):
        import_references(target, path)
    assert target.counts() == {"real": 0, "fake": 0}
