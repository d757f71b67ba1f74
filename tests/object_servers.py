"""A real server of object storage, where this machine has one."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

WEED = os.environ.get("LINEUP_WEED") or shutil.which("weed")
"""The program of SeaweedFS."""
START_SECONDS = 60


@contextmanager
def serve_seaweed(folder: Path) -> Iterator[dict[str, str]]:
    """SeaweedFS over a folder, with S3's protocol: the variables by which a client reaches it."""
    roles = ("master", "volume", "filer", "s3")
    options = [f"-dir={folder}", "-ip=127.0.0.1", "-s3", f"-s3.config={folder / 's3.json'}"]
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    ports = free_ports(2 * len(roles))
    for role in roles:
        options += [f"-{role}.port={ports.pop()}", f"-{role}.port.grpc={ports.pop()}"]
    url = f"http://127.0.0.1:{options[-2].partition('=')[2]}"
    identity = {"name": "tests", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [str(WEED), "server", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(url)
            keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
            yield keys | {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}
        finally:
            server.terminate()


def wait_for(url: str) -> None:
    """Until something answers there."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(httpx2.TransportError):
            if httpx2.get(url).status_code < 500:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing answers at {url}")


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
