"""What happens around every request: an id, a time limit, access, headers, a log line and its numbers. Plain ASGI."""

import asyncio
import logging
import re
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access import Caller, RateLimit, bearer, check_loopback, check_token
from api.inflight import Budget, Reservation, reservation_in_use
from api.monitoring import Metrics
from api.schemas.problems import ApiError
from api.service import Service
from api.service_settings import ServiceSettings

log = logging.getLogger("lineup.request")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
GUARDED = ("/v1/", "/metrics")
"""Paths that need a key, or loopback and the token where there is none. The others hold nothing secret."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""What log and metrics tell apart: a caller may send any word as a method, and each would be a series of its own."""
MOST_JSON = 2**20
"""Bytes of a body that is no form with files."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


def too_large(size: str, most: int) -> ApiError:
    """The problem of a body that is larger than this many bytes; `size` says what it is."""
    rule = f"LINEUP_MAX_REQUEST_BYTES; without files {MOST_JSON:,} at most"
    return ApiError("too-large", f"the request {size} bytes; {most:,} are allowed ({rule})")


def problem_response(error: ApiError, request_id: str) -> JSONResponse:
    """Problem details as a response."""
    body = error.problem(request_id).model_dump(mode="json")
    return JSONResponse(body, error.status, error.headers, "application/problem+json")


def http_exception(error: ApiError) -> HTTPException:
    """A problem as it has to be raised where a body is read: the framework hides everything else."""
    return HTTPException(error.status, error.detail, error.headers)


class Envelope:
    """The outermost layer: request id, limits of time and bytes, security headers, log line, metrics, and a last resort
    for bugs.

    Args:
        app: What it wraps.
        metrics: Where requests are counted.
        settings: How long a request may take, its upload included, and how many bytes it and all of them may have,
            declared or not.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: ServiceSettings) -> None:
        self.app, self.metrics, self.settings = app, metrics, settings
        self.budget = Budget(settings.max_inflight_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, size = time.perf_counter(), 0, 0
        headers = Headers(scope=scope)
        method = scope["method"] if scope["method"] in METHODS else "other"
        framed_twice = "transfer-encoding" in headers and "content-length" in headers  # RFC 9112, 6.1
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        is_form = headers.get("content-type", "").startswith("multipart/")
        limit, seconds = self.settings.max_request_bytes, self.settings.request_seconds
        reservation = Reservation(self.budget, time.monotonic() + seconds)
        most = limit if is_form else min(limit, MOST_JSON)
        length = headers.get("content-length", "")
        declared = int(length) if length.isdecimal() else 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer_headers = MutableHeaders(scope=message)
                for name, value in (SECURITY_HEADERS | {"x-request-id": request_id}).items():
                    answer_headers.setdefault(name, value)
                if framed_twice:
                    answer_headers["connection"] = "close"
            await send(message)

        async def send_problem(error: ApiError) -> None:
            await problem_response(error, request_id)(scope, receive, send_with_headers)

        async def receive_counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise http_exception(too_large(f"sent {size:,}", most))
            try:
                reservation.grow(max(size, declared))
            except ApiError as error:
                raise http_exception(error) from None
            return message

        in_use = reservation_in_use.set(reservation)
        try:
            if framed_twice:
                detail = "the request has Content-Length and Transfer-Encoding, which may differ: send one"
                raise ApiError("bad-request", detail)
            if declared > most:
                raise too_large(f"declares {declared:,}", most)
            async with asyncio.timeout(seconds):
                await self.app(scope, receive_counted, send_with_headers)
        except TimeoutError:
            if not status:
                detail = f"the request took longer than LINEUP_REQUEST_SECONDS allows ({seconds:g})"
                await send_problem(ApiError("not-ready", detail, retry_after=5))
        except ApiError as error:
            if status:
                raise
            await send_problem(error)
        except Exception:
            log.exception("unexpected", extra={"request_id": request_id})
            if status:
                raise
            await send_problem(ApiError("internal", "a bug; the log holds more under this request id"))
        finally:
            reservation_in_use.reset(in_use)
            reservation.release()
            duration = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(method, route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(duration)
            caller: Caller | None = scope["state"].get("caller")
            fields = {"request_id": request_id, "method": method, "route": route, "status": status}
            fields |= {"ms": round(1000 * duration, 1), "caller": caller.name if caller else None}
            log.info("request", extra=fields)


class Guard:
    """Lets a request through to the guarded paths when its caller may come in, and notes who it is.

    Args:
        app: What it wraps.
        service: Holds the keys and the settings.
        limit: Per key.
    """

    def __init__(self, app: ASGIApp, service: Service, limit: RateLimit) -> None:
        self.app, self.service, self.limit = app, service, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["path"].startswith(GUARDED):
            try:
                scope["state"]["caller"] = await self.admit(scope)
            except ApiError as error:
                await problem_response(error, scope["state"]["request_id"])(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def admit(self, scope: Scope) -> Caller:
        """Who this is.

        Raises:
            ApiError: unauthorized, forbidden, too-many-requests or not-ready.
        """
        headers, address = Headers(scope=scope), scope["client"][0] if scope.get("client") else None
        secret = bearer(headers)
        if not await self.service.keys_exist(secret):
            check_loopback(address, headers, scope.get("http_version", "1.1"))
            if not self.service.settings.open:
                check_token(secret, self.service.settings.token)
            return Caller()
        if not secret:
            raise ApiError("unauthorized", "send an API key as `Authorization: Bearer lineup_...`")
        caller = await self.service.authenticate(secret, address)
        if caller.key_id is not None:
            self.limit.spend(caller.key_id, time.monotonic())
        return caller
