"""What lies in object storage is what lies on a disk: the same entries, and the same bytes by uri later."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import make_tar
from buckets import Buckets, serve_buckets
from obstore.store import HTTPStore

from trainer.data import object_storage
from trainer.data.datasets import read_dataset, read_uri
from trainer.data.entry import DatasetError, Entry
from trainer.data.parts import DatasetPart
from trainer.images import UnreadableImage


@pytest.fixture
def buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Buckets]:
    """Two shards, a parquet file and images, as S3 and as a web server."""
    for shard, names in (("0", "ab"), ("1 +é#", "cd")):
        members = {}
        for name in names:
            members[f"{name}.caption.txt"] = b"a cat"
            members |= {f"{name}.{kind}.png": f"{name} {kind}".encode() * 9_000 for kind in ("real", "gen_0", "gen_1")}
        make_tar(tmp_path / f"bucket/shards/{shard}.tar", members)
    (tmp_path / "bucket/photos/x").mkdir(parents=True)
    for number in range(3):
        (tmp_path / f"bucket/photos/x/{number} ü.jpg").write_bytes(b"photo %d" % number)
    cells = [{"bytes": b"cell %d" % row, "path": None} for row in range(5)]
    table = pa.table({"id": list("abcde"), "image_gen0": cells, "model_gen0": ["owner/model-x"] * 5})
    pq.write_table(table, tmp_path / "bucket/cells.parquet", row_group_size=2)
    with serve_buckets(tmp_path) as served:
        variables = {"ENDPOINT_URL": served.url, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "s", "ALLOW_HTTP": "true"}
        for name, value in variables.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield served


def without_place(entry: Entry) -> Entry:
    """An entry but for what says where it lies."""
    return replace(entry, uri="", mtime=None, read=bytes)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("name", ["shards", "shards/0.tar", "cells.parquet"])
def test_archives_are_as_on_a_disk_and_are_read_again_by_uri(buckets: Buckets, name: str, hold: bool) -> None:
    local = list(read_dataset(buckets.root / "bucket" / name))
    stored = list(read_dataset(Path(f"s3://bucket/{name}"), hold=hold))
    assert list(map(without_place, stored)) == list(map(without_place, local))
    assert all(entry.uri.startswith("s3://bucket/") for entry in stored)
    for one, other in zip(stored, local, strict=True):
        data = other.read()
        assert one.read() == pickle.loads(pickle.dumps(one)).read() == read_uri(one.uri) == data
    assert buckets.keys == {"key"}


def test_what_is_held_is_transferred_once(buckets: Buckets) -> None:
    for entry in read_dataset(Path("s3://bucket/shards"), hold=True):
        entry.read()
    sizes = sum(path.stat().st_size for path in (buckets.root / "bucket/shards").iterdir())
    assert buckets.sent == sizes


def test_a_member_is_read_by_its_offset_alone(buckets: Buckets) -> None:
    entry = next(read_dataset(Path("s3://bucket/shards/0.tar")))
    assert entry.uri == "s3://bucket/shards/0.tar#a.real.png;offset=1536;size=54000"
    buckets.sent = 0
    assert len(read_uri(entry.uri)) == buckets.sent == 54_000


def test_images_of_one_kind(buckets: Buckets) -> None:
    entries = list(read_dataset(Path("s3://bucket/photos"), label="fake", generator="g"))
    assert [entry.key for entry in entries] == [f"x/{number} ü.jpg" for number in range(3)]
    assert {(entry.label, entry.generator, entry.source) for entry in entries} == {(1, "g", "photos")}
    assert [read_uri(entry.uri) for entry in entries] == [b"photo 0", b"photo 1", b"photo 2"]
    [single] = read_dataset(Path("s3://bucket/photos/x/1 ü.jpg"), label="real")
    assert (single.read(), single.size, single.source) == (b"photo 1", 7, "x")


def test_a_folder_may_have_a_dot_in_its_name(buckets: Buckets) -> None:
    (buckets.root / "bucket/photos").rename(buckets.root / "bucket/photos.v2")
    assert len(list(read_dataset(Path("s3://bucket/photos.v2"), label="real"))) == 3


def test_parts_are_whole_shards(buckets: Buckets) -> None:
    parts = [read_dataset(Path("s3://bucket/shards"), part=DatasetPart(number, 2)) for number in (1, 2)]
    assert [sorted({entry.group for entry in part}) for part in parts] == [["a", "b"], ["c", "d"]]


def test_web_servers_give_shards_too(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    web = HTTPStore.from_url(buckets.url, client_options={"allow_http": True})
    monkeypatch.setattr(object_storage, "_store", lambda scheme, host: web)
    local = read_dataset(buckets.root / "bucket/shards/1 +é#.tar")
    stored = list(read_dataset(Path("https://example.org/bucket/shards/1 +é#.tar")))
    assert stored[0].uri.startswith("https://example.org/bucket/shards/1%20+%C3%A9%23.tar#c.real.png;offset=")
    assert [read_uri(entry.uri) for entry in stored] == [entry.read() for entry in local]


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        ("s3://bucket/none.tar", {}, r"s3://bucket/none\.tar cannot be read \(.*: look at its name, and at"),
        ("s3://nowhere/x", {}, r"s3://nowhere/x cannot be read"),
        ("s3://bucket/empty", {}, r"no objects begin with it"),
        ("s3://bucket/photos", {}, r"no \.tar or \.parquet: give --label real"),
        ("s3://bucket/shards", {"label": "real"}, r"shards/0\.tar says itself what is real and fake"),
        ("s3://bucket/photos", {"label": "fake"}, r"give --generator NAME"),
        ("s3://bucket/closed.tar", {}, r"closed\.tar cannot be read"),
    ],
)
def test_what_cannot_be_is_one_line(buckets: Buckets, place: str, options: dict[str, Any], message: str) -> None:
    (buckets.root / "bucket/closed.tar").touch(0o000)
    with pytest.raises(DatasetError, match=message) as error:
        list(read_dataset(Path(place), **options))
    assert "\n" not in str(error.value)


def test_a_missing_object_or_server_is_told_when_it_is_read(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableImage, match=r"s3://bucket/none\.tar cannot be read"):
        read_uri("s3://bucket/none.tar#a;offset=0;size=5")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(object_storage, "RETRY_LIMIT", timedelta(0))
    object_storage._store.cache_clear()
    with pytest.raises(DatasetError, match=r"s3://bucket/shards cannot be read"):
        read_dataset(Path("s3://bucket/shards"))
