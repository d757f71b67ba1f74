"""Missing pictures come from where they were published, and from nowhere else."""

import asyncio
import hashlib
import io
import ssl
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from httpx2 import AsyncClient, MockTransport, Request, Response
from numbered import CHECKPOINT, add_all, new, opened
from PIL import Image
from typer.testing import CliRunner

from indexer.__main__ import app
from indexer.ingest import thumbnails
from indexer.ingest.decoded import fingerprint
from indexer.ingest.public_files import Refused, download, refuse_private
from indexer.ingest.thumbnails import fetch_thumbnails
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.reference_facts import in_places
from trainer.images import UnreadableImage

PUBLIC = "140.82.112.3"


def noise(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    blobs = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    one = opened(settings)
    yield one
    one.engine.dispose()


def test_pictures_come_checked_and_a_second_run_fetches_what_failed(
    store: Store, trust: ssl.SSLContext, public_files: tuple[str, dict[str, bytes | str], list[str]]
) -> None:
    base, served, asked = public_files
    whole = noise(1)
    window = whole.crop((16, 8, 64, 40))
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter: windows are of the pixels as stored
    turned = encoded(whole, "JPEG", quality=95, exif=exif.tobytes())
    own, flat = encoded(noise(2)), Image.new("RGB", (96, 64))  # whose difference hash is 0
    part: dict[str, Any] = {"fingerprint": fingerprint(window), "width": 48, "height": 32, "thumbnail": None}
    at = {"window": "16,8,48,32"}
    ids = add_all(
        store,
        [
            new(1, uri=f"{base}/own.png", sha256=hashlib.sha256(own).hexdigest(), thumbnail=None),
            new(2, uri=f"{base}/turned.jpg", attributes=at, **part),
            new(3, uri=f"{base}/moved", attributes=at, **part),
            new(4, uri=f"{base}/other.png", attributes=at, **part),
            new(5, uri=f"{base}/own.png", thumbnail=None),
            new(6, uri=f"{base}/turned.jpg", attributes={"window": "60,8,48,32"}, **part),
            new(7, uri=f"{base}/text", attributes=at, **part),
            new(8, uri=f"{base}/later.png", attributes=at, **part),
            new(9, uri=base.replace("https", "http") + "/own.png", thumbnail=None),
            new(10, uri=None, thumbnail=None),
            new(11, uri=f"{base}/to-http", thumbnail=None),
            new(12, uri=f"{base}/to-private", thumbnail=None),
            new(13, uri=f"{base}/own.png", thumbnail=b"there"),
            new(14, uri=f"{base}/large", thumbnail=None),
            new(15, uri=f"{base}/flat.png", attributes=at, **part | {"fingerprint": fingerprint(flat)}),
            new(16, uri=f"{base}/flat.png", attributes=at, **part | {"fingerprint": -1}),
        ],
    )
    served |= {"/own.png": own, "/turned.jpg": turned, "/other.png": encoded(noise(3)), "/text": b"<html>"}
    served |= {"/moved": "/turned.jpg", "/large": bytes(100_001), "/flat.png": encoded(flat)}
    served |= {"/to-http": "http://localhost/own.png", "/to-private": "https://10.0.0.1/own.png"}
    ticks: list[int] = []
    report = fetch_thumbnails(store, verify=trust, max_bytes=100_000, on_image=lambda: ticks.append(1))
    assert (report["missing"], report["fetched"], len(ticks)) == (15, 3, 15)
    assert {one["id"]: one["reason"] for one in report["failed"]} == {
        ids[3]: "another picture: its difference hash differs",
        ids[4]: "another file: its hash differs",
        ids[5]: "another picture: its window lies outside",
        ids[6]: "no readable image",
        ids[7]: "HTTP 404",
        ids[8]: "not https",
        ids[9]: "no public address",
        ids[10]: "not https",
        ids[11]: "not a public server",
        ids[13]: "more than 100,000 bytes",
        ids[14]: "no difference hash to check it by",
        ids[15]: "another picture: its difference hash differs",
    }
    assert report["reasons"]["not https"] == 2
    kept = store.references.thumbnail(ids[1])
    assert kept is not None
    picture = Image.open(io.BytesIO(kept))
    assert picture.size == (48, 32)
    assert np.abs(np.asarray(picture, int) - np.asarray(window, int)).mean() < 8
    assert store.references.thumbnail(ids[12]) == b"there"
    asked.clear()
    served["/later.png"] = encoded(whole)
    again = fetch_thumbnails(store, verify=trust)
    assert (again["missing"], again["fetched"]) == (12, 1)
    assert "/moved" not in asked


def test_pictures_come_from_the_hub_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    own, files = encoded(noise(2)), "hf://datasets/owner/faces@c0ffee/a.parquet"

    def read_uri(uri: str) -> bytes:
        if not uri.startswith(files):
            raise UnreadableImage("the hub does not give it")
        if uri.endswith("/2"):
            raise ImportError("no pyarrow")
        return own

    monkeypatch.setattr(thumbnails, "read_uri", read_uri)
    right: dict[str, Any] = {"sha256": hashlib.sha256(own).hexdigest(), "thumbnail": None}
    gone = "hf://datasets/owner/gone@c0ffee/a.parquet#image_gen0/0"
    ids = add_all(
        store,
        [
            new(1, uri=f"{files}#image_gen0/0", **right),
            new(2, uri=f"{files}#image_gen0/1", thumbnail=None),
            new(3, uri=f"{files}#image_gen0/2", thumbnail=None),
            new(4, uri=gone, thumbnail=None),
        ],
    )
    report = fetch_thumbnails(store)
    assert {one["id"]: one["reason"] for one in report["failed"]} == {
        ids[1]: "another file: its hash differs",
        ids[2]: "needs the hub's client: pip install 'lineup[train,datasets]'",
        ids[3]: "unreachable",
    }
    assert store.references.thumbnail(ids[0]) is not None
    slow = fetch_thumbnails(store, image_seconds=1e-5)
    assert slow["reasons"]["it takes more than 1e-05 seconds to read (LINEUP_IMAGE_SECONDS)"] == 1
    large = fetch_thumbnails(store, max_bytes=len(own) - 1)
    assert large["reasons"][f"more than {len(own) - 1:,} bytes"] == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://140.82.112.3/a", "not https"),
        ("ftp://140.82.112.3/a", "not https"),
        ("https://127.0.0.1/a", "not a public server"),
        ("https://10.1.2.3/a", "not a public server"),
        ("https://169.254.169.254/latest/meta-data", "not a public server"),
        ("https://[::1]/a", "not a public server"),
        ("https://[::ffff:127.0.0.1]/a", "not a public server"),
        ("https://[fe80::1]/a", "not a public server"),
        ("https://localhost/a", "not a public server"),
        ("https://nowhere.invalid/a", "unreachable"),
        ("https://a..b/a", "unreachable"),
        (f"https://{'a' * 64}.example/a", "unreachable"),
        ("https://[64:ff9b::a9fe:a9fe]/a", "not a public server"),
        ("https://[2002:7f00:1::1]/a", "not a public server"),
    ],
)
def test_only_public_servers_are_asked_and_only_over_https(url: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        refuse_private(Request("GET", url))


@pytest.mark.parametrize("host", [PUBLIC, "[64:ff9b::8c52:7003]", "[2606:4700::1111]"])
def test_a_public_server_may_be_asked(host: str) -> None:
    refuse_private(Request("GET", f"https://{host}/a.png"))
    assert ip_address(PUBLIC).is_global


@pytest.mark.parametrize(
    ("uri", "readable"),
    [
        ("file:///data/images/a.png", True),
        ("file:///data/images/b.tar#%2e%2e/b.png", True),
        ("s3://bucket/set%201/b.tar#b.png;offset=512;size=9", True),
        ("https://host/a.png", True),
        ("HTTPS://host/a.png", True),
        ("file:///data/images.old/a.png", False),
        ("file:///data/images/../secret.png", False),
        ("file:///data/images/%2e%2e%2fsecret.png", False),
        ("file:///data/images/.\t./secret.png", False),
        ("file://host/data/images/a.png", False),
        ("s3://bucket/a.png", False),
        ("s3://buckets/set 1/a.png", False),
        ("https://host@elsewhere/a.png", False),
        ("https://host.elsewhere/a.png", False),
        ("https://[/a.png", False),
        ("", False),
        (None, False),
    ],
)
def test_a_place_holds_what_lies_below_it_and_nothing_else(uri: str | None, readable: bool) -> None:
    assert in_places(uri, ("file:///data/images/", "s3://bucket/set 1/", "https://host/")) is readable
    assert not in_places(uri, ())


@pytest.mark.parametrize("uri", ["https://127.0.0.1/a.png", "https://127.0.0.1/a.tar#a.png;offset=0;size=9"])
def test_a_place_does_not_let_a_server_be_asked_that_is_not_public(uri: str) -> None:
    with pytest.raises(Refused, match="not a public server"):
        thumbnails._thumbnail_of_file({"uri": uri}, None, False, 10_000)


@pytest.mark.parametrize("window", ["1,2,3", "1,2,3,x", "", 7, [1, 2, 3, 4]])
def test_a_window_of_another_form_is_refused(window: object) -> None:
    row: Any = {"attributes": {"window": window}, "width": 96, "height": 64, "fingerprint": 1}
    with pytest.raises(Refused, match="not x,y,width,height"):
        thumbnails._checked_thumbnail(row, encoded(noise(1)), 10_000)


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(0, 0, 0, "", (address, 0)) for address in (PUBLIC, "192.168.0.1")]
    monkeypatch.setattr("indexer.ingest.public_files.getaddrinfo", lambda *arguments, **options: both)
    with pytest.raises(Refused, match="not a public server"):
        refuse_private(Request("GET", "https://both.example/a"))


def test_endless_redirects_and_slow_headers_and_files_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def around(request: Request) -> Response:
        return Response(302, headers={"location": "/again"})

    async def slow_body() -> AsyncIterator[bytes]:
        while True:
            yield b"slow"
            await asyncio.sleep(0.01)

    async def slow_headers(request: Request) -> Response:
        await asyncio.sleep(1)
        return Response(200)

    client = AsyncClient(transport=MockTransport(around), follow_redirects=True, max_redirects=3)
    with pytest.raises(Refused, match="redirects"):
        asyncio.run(download(client, "https://example.org/a"))
    monkeypatch.setattr("indexer.ingest.public_files.FILE_SECONDS", 0.05)
    for handler in (slow_headers, lambda request: Response(200, content=slow_body())):
        with pytest.raises(Refused, match="too slow"):
            asyncio.run(download(AsyncClient(transport=MockTransport(handler)), "https://example.org/a"))


def test_the_command_reports_and_fails_only_where_nothing_came(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.database_url is not None
    monkeypatch.setenv("LINEUP_HOME", str(settings.home))
    monkeypatch.setenv("LINEUP_DATABASE_URL", settings.database_url)
    nothing = CliRunner().invoke(app, ["thumbnails"])
    assert (nothing.exit_code, nothing.stdout) == (0, "fetched 0 of 0 missing pictures\n")
    store.references.add([new(1, uri="https://127.0.0.1/a.png", thumbnail=None)], CHECKPOINT)
    failed = CliRunner().invoke(app, ["thumbnails"])
    assert failed.exit_code == 1
    assert failed.stdout.splitlines()[1] == "  1 failed: not a public server"
    assert "failed 1 https://127.0.0.1/a.png: not a public server" in failed.stderr
