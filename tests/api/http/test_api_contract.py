"""Generated requests against the whole interface: no server error, and every answer is one that OpenAPI promises."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.app import create_app
from api.judge.loader import load_detector
from api.service_settings import ServiceSettings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def from_here(app: ASGIApp) -> ASGIApp:
    """The same application, already started, called from this machine; the generator's own client has no address."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                await send({"type": f"{(await receive())['type']}.complete"})
            return
        if scope["type"] == "http":
            headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope = dict(scope) | {"client": ("127.0.0.1", 1), "headers": [*headers, (b"host", b"localhost")]}
        await app(scope, receive, send)

    return call


@pytest.fixture(scope="module")
def api_schema(populated: ServiceSettings) -> Iterator[Any]:
    limited = populated.model_copy(update={"max_upload_bytes": 100_000})
    detector = load_detector(limited)
    detector.calibrator.refresh()
    app = create_app(limited, detector)
    with TestClient(app):
        yield schemathesis.openapi.from_asgi("/openapi.json", from_here(app))


def operations() -> list[tuple[str, str]]:
    """Path and method of every call."""
    paths = create_app(ServiceSettings()).openapi()["paths"]
    return [(path, method.upper()) for path, methods in paths.items() for method in methods]


@pytest.mark.parametrize(("path", "method"), operations())
def test_generated_requests(api_schema: Any, path: str, method: str) -> None:
    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=api_schema[path][method].as_strategy())
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    check()
