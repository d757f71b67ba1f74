"""What listens: uvicorn, which finishes what has begun before it stops, and hangs up on heads that never end."""

import asyncio
import gc
import json
import logging
import math
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from socket import AF_INET, AF_INET6, create_server, socket
from typing import Any

import uvicorn
from threadpoolctl import threadpool_limits
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.http.app import create_app
from api.judge.detector import Detector
from indexer.settings import SettingsError

log = logging.getLogger(__name__)
HEAD_SECONDS = 10.0
"""Time for the request line and the headers."""
SEND_SECONDS = 10.0
"""Time for the rest of an answer to be read, once the request has no time left."""
RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
"""What `logging` itself keeps of a record."""


class Protocol(H11Protocol):
    """Closes a connection on which no whole request head arrives, or an answer is not read, in time.

    Uvicorn would wait for ever.
    """

    late: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self.late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """A part of a head, or of a body, whose time `Envelope` limits."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
            if not self.transport.get_write_buffer_size():  # what was answered before has been read
                self._limit_sending()
        elif self.late is None and self.timeout_keep_alive_task is None:
            self.late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop_waiting()
        self._stop_sending()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None

    def _stop_sending(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def _limit_sending(self) -> None:
        self._stop_sending()
        seconds = (self.config.timeout_graceful_shutdown or 0) + SEND_SECONDS
        self.unread = self.loop.call_later(seconds, self._hang_up)

    def _hang_up(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        elif self.cycle is not None and not self.cycle.response_complete:  # of several requests that came at once
            self._limit_sending()


class Server(uvicorn.Server):
    """Tells where it listens once it does, and prints the link that opens the page.

    Args:
        config: What it serves, and where.
        token: What the page needs; None where it needs none, or a key.
    """

    def __init__(self, config: uvicorn.Config, token: str | None = None) -> None:
        super().__init__(config)
        self.token = token

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for listener in (listener for server in getattr(self, "servers", []) for listener in server.sockets):
            host, port = listener.getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            log.info("serving", extra={"address": address})
            print(f"The page: {address}/{f'?token={self.token}' if self.token else ''}", flush=True)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, and what `extra` held, which is never of an image."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in RECORD_FIELDS}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json() -> None:
    """Send every logger's lines to stderr as JSON; called by `lineup serve` only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in ("alembic", "httpx2"):  # the latter would name every address that a job fetches
        logging.getLogger(name).setLevel(logging.WARNING)


def server(detector: Detector, token: str | None = None) -> Server:
    """A server that, told to stop, finishes the requests that have begun, in the time that a request may take."""
    settings = detector.settings
    config = uvicorn.Config(
        create_app(settings, detector),
        host=settings.host,
        port=settings.port,
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a proxy's word about the client's address is not believed
        timeout_graceful_shutdown=math.ceil(settings.request_seconds),
    )
    return Server(config, token)


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on before anything is loaded.

    Raises:
        SettingsError: Another program listens there, or this machine has no such address.
    """
    try:
        create_server((host, port), family=AF_INET6 if ":" in host else AF_INET).close()
    except OSError as error:
        place = f"LINEUP_HOST {host}, LINEUP_PORT {port}"
        raise SettingsError(f"cannot listen on {place} ({error.strerror}): set another port, or 0 for any") from error


def run(load: Callable[[], tuple[Detector, str | None]]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        load: What to serve at first, which nothing here keeps once it is replaced, and the token that the link to the
            page carries.
    """
    ready = server(*load())
    # What is loaded by now stays: to look through all of it for garbage stops every thread for a tenth of a second.
    gc.collect()
    gc.freeze()
    # Between the heads' small products further threads of the BLAS would wait on cores that have images to decode.
    with threadpool_limits(1, "blas"):
        ready.run()
