"""What the page's tests stand on: a browser, a served application, and images to show it."""

import io
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from conftest import small_image
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, ConsoleMessage, FilePayload, Page, Request, sync_playwright

from api.http.app import create_app
from api.judge.loader import load_detector
from api.service_settings import ServiceSettings

AXE = Path(__file__).parent / "vendor" / "axe-core" / "axe.min.js"
PATIENCE = 30_000
"""Milliseconds that an expectation may take on a busy machine."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's browser, without a window."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail("the page is tested in Chromium, which is not installed: `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def served(settings: ServiceSettings, **changes: object) -> Iterator[str]:
    """The address of an application with these settings, on a port of its own."""
    settings = settings.model_copy(update=changes)
    detector = load_detector(settings)
    detector.calibrator.refresh()
    with serving(uvicorn.Config(create_app(settings, detector), log_config=None, timeout_graceful_shutdown=1)) as url:
        yield url


@contextmanager
def serving(config: uvicorn.Config) -> Iterator[str]:
    """Run a server in a thread, and end it."""
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the server ended before it began"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Watch:
    """What a page did that no page of ours may do."""

    origin: str
    wrong: list[str] = field(default_factory=list)

    def attach(self, page: Page) -> None:
        """Look at everything that this page says and fetches."""
        page.on("console", self.said)
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("request", self.asked)

    def said(self, message: ConsoleMessage) -> None:
        """A refused answer is logged by the browser itself; everything else is ours."""
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.wrong.append(f"{message.type}: {message.text}")

    def asked(self, request: Request) -> None:
        """Only the service may be asked."""
        if not request.url.startswith((self.origin, "blob:", "data:")):
            self.wrong.append(f"fetched {request.url}")


def picture(
    name: str = "photo.png", seed: int = 1, fake: bool = True, size: int = 96, texts: Mapping[str, str] = {}
) -> FilePayload:
    """An image that the reference set does not hold, as a file to choose; `texts` are written into it."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    small_image(70_000 + seed, fake, size).save(buffer, format="PNG", pnginfo=info)
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def other_file(name: str, data: bytes) -> FilePayload:
    """A file that is chosen like an image."""
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


def huge() -> bytes:
    """A small file of very many pixels."""
    buffer = io.BytesIO()
    Image.new("1", (8_000, 7_000)).save(buffer, format="PNG")
    return buffer.getvalue()
