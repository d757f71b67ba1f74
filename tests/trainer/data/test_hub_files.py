"""Data sets of the hub are read in place; a small server stands in for it."""

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_datasets import picture

from trainer.data import shards
from trainer.data.datasets import read_dataset, read_uri
from trainer.data.entry import DatasetError
from trainer.images import UnreadableImage

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub:
    """One data set, `owner/faces`, with two parquet files; `asked` are the requests, as method, path and range."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, str]] = []

    def answer(self, method: str, path: str, span: str) -> tuple[int, bytes]:
        """Status and body."""
        self.asked.append((method, path, span))
        files = sorted(self.folder.rglob("*"))
        sizes = {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in files if file.is_file()}
        if re.fullmatch(rf"/api/datasets/owner/faces(/revision/(main|{COMMIT}))?", path):
            siblings = [{"rfilename": name} for name in sizes]
            return 200, json.dumps({"id": "owner/faces", "sha": COMMIT, "siblings": siblings}).encode()
        if path == f"/api/datasets/owner/faces/paths-info/{COMMIT}" or path.startswith(
            "/api/datasets/owner/faces/tree/"
        ):
            entries = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()]
            return 200, json.dumps(entries).encode()
        name = path.removeprefix(f"/datasets/owner/faces/resolve/{COMMIT}/")
        if name not in sizes:
            return 404, b"{}"
        first, last = map(int, span.removeprefix("bytes=").split("-"))
        return 206, (self.folder / name).read_bytes()[first : last + 1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Two files of three records in row groups of two, with two generators."""
    one = Hub(tmp_path / "hub")
    for number in range(2):
        rows = range(3 * number, 3 * number + 3)
        columns: dict[str, Any] = {
            "id": [f"r{row}" for row in rows],
            "url": [f"https://example.org/{row}.jpg" for row in rows],
        }
        for generator, name in enumerate(("a/one", "b/two")):
            cells = [{"bytes": picture(10 * row + generator), "path": None} for row in rows]
            columns |= {f"image_gen{generator}": cells, f"model_gen{generator}": [name] * 3}
        path = one.folder / f"data/train-{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=2)
    (one.folder / "README.md").write_text("faces")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, body = one.answer(self.command, self.path.partition("?")[0], self.headers.get("range", ""))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name that http.server asks for

        def log_message(self, *arguments: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for cached in (shards._column, shards._row_group_ends):
        cached.cache_clear()
    yield one
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_data_set_of_the_hub_is_streamed_and_read_again(hub: Hub) -> None:
    local = list(read_dataset(hub.folder / "data"))
    entries = list(read_dataset(Path("hf://datasets/owner/faces")))
    assert len(entries) == 12
    assert [(one.key, one.group, one.generator, one.attributes) for one in entries] == [
        (one.key, one.group, one.generator, one.attributes) for one in local
    ]
    first = entries[0]
    assert (first.source, first.mtime) == ("faces", None)
    assert first.uri == f"hf://datasets/owner/faces@{COMMIT}/data/train-0.parquet#image_gen0/0"
    assert [one.read() for one in entries] == [one.read() for one in local]
    assert read_uri(entries[-1].uri) == local[-1].read()
    assert all(span for _, path, span in hub.asked if "/resolve/" in path)  # read by ranges


def test_files_of_a_data_set_are_chosen_by_name_folder_or_pattern(hub: Hub) -> None:
    for files, count in (("data/train-1.parquet", 6), ("data", 12), ("data/*-0.parquet", 6)):
        assert sum(1 for _ in read_dataset(Path(f"hf://datasets/owner/faces/{files}"))) == count
    assert not any("train-1" in path for _, path, _ in hub.asked[-2:])
    with pytest.raises(DatasetError, match=r"no such parquet files; it has data/train-0.parquet, data/train-1.parquet"):
        read_dataset(Path("hf://datasets/owner/faces/other"))
    with pytest.raises(DatasetError, match="names no data set"):
        read_dataset(Path("hf://owner/faces"))
    with pytest.raises(DatasetError, match="does not give hf://datasets/own er/faces "):
        read_dataset(Path("hf://datasets/own er/faces"))
    with pytest.raises(UnreadableImage, match=r"does not give hf://datasets/own er/faces@main/a\.parquet "):
        read_uri("hf://datasets/own er/faces@main/a.parquet#image_gen0/0")
    with pytest.raises(DatasetError, match="drop --label"):
        read_dataset(Path("hf://datasets/owner/faces"), label="real")


def test_without_the_network_it_says_what_to_fetch(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = list(read_dataset(Path("hf://datasets/owner/faces/data/train-0.parquet")))
    with monkeypatch.context() as away:
        away.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(DatasetError, match="does not give hf://datasets/owner/faces ") as caught:
            read_dataset(Path("hf://datasets/owner/faces"))
    assert "hf download owner/faces --repo-type dataset --include '*/*.parquet' --local-dir faces" in str(caught.value)
    assert "\n" not in str(caught.value)
    shards._column.cache_clear()
    monkeypatch.setattr("huggingface_hub.hf_file_system.http_backoff", refuse)
    with pytest.raises(UnreadableImage, match="the hub does not give"):
        entries[0].read()
    shards._row_group_ends.cache_clear()
    with pytest.raises(UnreadableImage, match="the hub does not give"):
        entries[0].read()


def test_readers_of_one_file_at_once_open_it_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [f"hf://datasets/owner/faces@{COMMIT}/data/train-0.parquet#image_gen0/{row}" for row in (0, 1)]
    together, opened = threading.Barrier(2), []

    def slowly(path: PurePath) -> object:
        opened.append(path)
        time.sleep(0.05)  # the other reader arrives meanwhile
        return open_parquet(path)

    def read(uri: str) -> bytes:
        together.wait()
        return read_uri(uri)

    open_parquet = shards._open_parquet
    monkeypatch.setattr(shards, "_open_parquet", slowly)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(read, uris)) == [picture(0), picture(10)]
    assert len(opened) == 2  # once for the footer, once for the row group


def refuse(*arguments: object, **options: object) -> object:
    """The transport of a machine that lost its network."""
    from httpx2 import ConnectError

    raise ConnectError("no route")
