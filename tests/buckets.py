"""A small server of object storage: a folder whose subfolders are buckets, read by S3's protocol or by plain https."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from trainer.data import object_storage


@dataclass(slots=True)
class Buckets:
    """What is served, and what was asked."""

    root: Path
    url: str = ""
    sent: int = 0
    """Bytes of objects."""
    keys: set[str] = field(default_factory=set)
    """Names of the keys that signed requests."""


@contextmanager
def serve_buckets(root: Path) -> Iterator[Buckets]:
    """Serve a folder until the end, to clients that are made meanwhile."""
    buckets = Buckets(root)
    forget_clients = object_storage._store.cache_clear
    forget_clients()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if signature := self.headers.get("Authorization"):
                buckets.keys.add(signature.partition("Credential=")[2].partition("/")[0])
            path = root / unquote(url.path).strip("/")
            if "list-type" in url.query and path.is_dir():
                self.answer(200, listing(path, parse_qs(url.query).get("prefix", [""])[0]))
            elif not path.is_file():
                self.answer(404)
            elif path.stat().st_mode & 0o400 == 0:
                self.answer(403)
            else:
                data, dated = path.read_bytes(), formatdate(path.stat().st_mtime, usegmt=True)
                if self.command == "HEAD":
                    self.answer(200, data, Last_Modified=dated)
                    return
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                part = data[first : last + 1]
                buckets.sent += len(part)
                place = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
                self.answer(206, part, Content_Range=place, Last_Modified=dated)

        do_HEAD = do_GET  # noqa: N815 - as the base class names it

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    buckets.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield buckets
    forget_clients()
    server.shutdown()
    server.server_close()
    thread.join()


def listing(bucket: Path, prefix: str) -> bytes:
    """What S3 answers when it is asked for the objects of a bucket."""
    keys = sorted(path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file())
    rows = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{(bucket / key).stat().st_size}</Size>"
        "<LastModified>2026-11-01T00:00:00.000Z</LastModified></Contents>"
        for key in keys
        if key.startswith(prefix)
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
