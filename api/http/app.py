"""The HTTP application: routes, the page's files, the answer to each error. Nothing else knows the web framework."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Mount
from starlette.types import Scope

from api.access import RateLimit
from api.breaker import DATABASE_AWAY, public_detail
from api.http import (
    candidate_routes,
    detection_routes,
    docs,
    enrolment_routes,
    generator_routes,
    job_routes,
    operation_routes,
    record_routes,
    reference_routes,
)
from api.http.middleware import METHODS, Envelope, Guard, problem_response
from api.job_worker import JobWorker
from api.judge.detector import Detector
from api.monitoring import Metrics
from api.schemas.problems import ApiError, FieldError, Kind, documented, from_status
from api.service import Service
from api.service_settings import ServiceSettings, listed
from api.service_status import package_version
from indexer.index.milvus import EngineAway
from indexer.measure.discovery import CandidateEnrolled, UnknownCandidate
from indexer.store.blobs import BlobsAway
from indexer.store.generators import BadGeneratorName, GeneratorExists, UnknownGenerator
from indexer.store.references import ReferenceGone

log = logging.getLogger(__name__)
PAGE_FOLDER = Path(__file__).parents[1] / "page"
REFUSALS: dict[type[Exception], Kind] = {
    UnknownGenerator: "not-found",
    ReferenceGone: "not-found",
    GeneratorExists: "conflict",
    BadGeneratorName: "bad-field",
    UnknownCandidate: "not-found",
    CandidateEnrolled: "conflict",
}
"""What the store raises for a request that it cannot carry out."""


async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
    """A problem that a route raised."""
    return problem_response(error, request.state.request_id)


async def on_bad_field(request: Request, error: RequestValidationError) -> JSONResponse:
    """A field that the framework refused."""
    fields = [
        FieldError(field=".".join(str(part) for part in item["loc"][1:]) or "body", message=item["msg"])
        for item in error.errors()
    ]
    detail = "; ".join(f"{item.field}: {item.message}" for item in fields)
    return await on_api_error(request, ApiError("bad-field", detail, errors=fields))


async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """What the framework itself answers: no such path, no such method, a body that does not parse or is too large."""
    status, detail, headers = error.status_code, str(error.detail), dict(error.headers or {})
    if isinstance(error.__cause__, OSError):  # of the temporary file that an upload is kept in
        log.error("an upload cannot be kept", extra={"reason": str(error.__cause__)})
        detail = "the temporary folder of the service takes no upload; the log says why"
        return await on_api_error(request, ApiError("not-ready", detail, retry_after=60))
    if detail.startswith("Too many"):  # parts of a form
        status = 413
    if detail.startswith("Too many files") and request.url.path == job_routes.JOBS_PATH:
        detail += " LINEUP_MAX_JOB_IMAGES says how many: send more in several jobs."
    elif detail.startswith("Too many files"):
        detail += " LINEUP_MAX_FILES says how many; add larger batches with `lineup index add`, judge them as a job."
    if status == 405:  # each route knows only its own method
        headers["allow"] = ", ".join(method for method in METHODS if _answers(request, method))
    response = await on_api_error(request, from_status(status, detail))
    response.headers.update(headers)
    return response


def _answers(request: Request, method: str) -> bool:
    """Whether the path of a request takes a method."""
    scope = {"type": "http", "path": request.scope["path"], "method": method, "headers": []}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


async def on_database_away(request: Request, error: Exception) -> JSONResponse:
    """A call that cannot do without the database."""
    detail = public_detail(error)
    log.warning(detail, extra={"reason": type(getattr(error, "orig", error)).__name__})
    return await on_api_error(request, ApiError("not-ready", detail, retry_after=2))


async def on_engine_away(request: Request, error: EngineAway) -> JSONResponse:
    """A call that cannot do without the search engine; the follower logs that it is away."""
    return await on_api_error(request, ApiError("not-ready", "the search engine does not answer", retry_after=2))


async def on_blobs_away(request: Request, error: BlobsAway) -> JSONResponse:
    """A call that cannot do without object storage: to enrol, or to show a picture."""
    log.warning("object storage cannot be used", extra={"reason": str(error)})
    return await on_api_error(request, ApiError("not-ready", "object storage does not answer", retry_after=10))


async def on_refusal(request: Request, error: Exception) -> JSONResponse:
    """A request that the store refuses."""
    return await on_api_error(request, ApiError(REFUSALS[type(error)], str(error)))


ERROR_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Any]] = {
    ApiError: on_api_error,
    RequestValidationError: on_bad_field,
    HTTPException: on_http_error,
    EngineAway: on_engine_away,
    BlobsAway: on_blobs_away,
    **dict.fromkeys(REFUSALS, on_refusal),
    **dict.fromkeys(DATABASE_AWAY, on_database_away),
}


class Page(Mount):
    """Static files, matched only where one exists, so that every other path keeps its own 404 and 405."""

    def __init__(self, folder: Path) -> None:
        self.names = {file.relative_to(folder).as_posix() for file in folder.rglob("*")}
        super().__init__("/", StaticFiles(directory=folder, html=True), name="page")

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether a GET or HEAD asks for one of the files."""
        asks = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        exists = asks and (scope["path"].removeprefix("/") or "index.html") in self.names
        return super().matches(scope) if exists else (Match.NONE, {})


def create_app(settings: ServiceSettings | None = None, detector: Detector | None = None) -> FastAPI:
    """The application.

    Args:
        settings: Read from the environment when not given.
        detector: A loaded one, which is closed with the application; when not given it is loaded in the background,
            and until then requests are answered not-ready.
    """
    settings = settings or ServiceSettings.read()
    metrics = Metrics()
    service = Service(settings, metrics, detector)
    loaded = detector is not None  # the service alone keeps it, and lets it go when another checkpoint serves

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        background = [
            asyncio.create_task(work)
            for work in (
                service.load(),
                service.keep_house(),
                service.keep_map(),
                service.follow_active(),
                JobWorker(service).run(),
            )
        ]
        if loaded:
            await background[0]
        yield
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)  # what is in work of jobs is given back
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="Lineup",
        summary="Was this image generated by a model? A verdict with its evidence.",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lead to whatever host the caller names
        form_limits={"max_files": settings.max_files, "max_fields": 20, "max_part_size": 4096},
        responses=documented("internal"),
        exception_handlers=ERROR_HANDLERS,
    )
    app.state.service = service
    nouns = (detection_routes, reference_routes, generator_routes, enrolment_routes, candidate_routes, record_routes)
    for noun in nouns:
        app.include_router(noun.router)
    jobs = APIRouter(form_limits={"max_files": settings.max_job_images + 1})  # a list of addresses beside them
    jobs.include_router(job_routes.router)
    app.include_router(jobs)
    app.include_router(operation_routes.router)
    app.include_router(docs.router)
    app.router.routes.append(Page(PAGE_FOLDER))
    app.add_middleware(Guard, service=service, limit=RateLimit(settings.rate_limit))
    if origins := listed(settings.cors_origins):
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Envelope, metrics=metrics, settings=settings)
    return app
