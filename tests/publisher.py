"""An https server of this machine that stands for a public one."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PUBLIC = "140.82.112.3"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of localhost, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime(2020, 1, 1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=36500))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key.private_bytes(*form) + builder.sign(key, hashes.SHA256()).public_bytes(form[0]))
    return path


@pytest.fixture
def public_files(certificate: Path) -> Iterator[tuple[str, dict[str, bytes | str], list[str]]]:
    """An https server of this machine: its address, what it serves by path (text redirects), and what was asked."""
    served: dict[str, bytes | str] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = served.get(self.path)
            self.send_response(404 if content is None else 302 if isinstance(content, str) else 200)
            if isinstance(content, str):
                self.send_header("location", content)
            body = content if isinstance(content, bytes) else b""
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Stay silent."""

    with listening(Handler, certificate) as address:
        yield address, served, asked


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler], certificate: Path) -> Iterator[str]:
    """Serve by https on a port of this machine; the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def trust(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Trusts the server, and takes `localhost` for a public name; other names are looked up as ever."""

    def look_up(host: str, *arguments: Any, **options: Any) -> list[tuple[Any, ...]]:
        return [(0, 0, 0, "", (PUBLIC if host == "localhost" else host, 0))]

    monkeypatch.setattr("indexer.ingest.public_files.getaddrinfo", look_up)
    return ssl.create_default_context(cafile=str(certificate))
