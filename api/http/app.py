"""The HTTP interface. Routes only: what they answer is made elsewhere, and nothing else knows the web framework."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar, cast
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, File, Form, Query, Request, Response, UploadFile
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Mount
from starlette.types import Scope as ASGIScope

from api import inventory as catalogue
from api import verdict_log as records
from api.access import Caller, RateLimit
from api.breaker import DATABASE_AWAY
from api.enrolment import Batch
from api.http import docs
from api.http.middleware import Around, Guard
from api.judge.detector import Detector
from api.judge.uploads import Question, Upload, file_name
from api.monitoring import CONTENT_TYPE, Metrics
from api.schemas import LABELS, Label, Scope, Text, resources
from api.schemas import verdicts as schemas
from api.schemas.problems import ApiError, FailedFile, FieldError, Kind, documented, from_status
from api.schemas.resources import Removed
from api.service import Service
from api.service_settings import ServiceSettings
from indexer import store

log = logging.getLogger(__name__)
PAGE = Path(__file__).parents[1] / "page"
T = TypeVar("T")
MOST_SHOWN = 1000
Id = Annotated[int, PathParameter(ge=1, le=2**63 - 1)]
Name = Annotated[str, PathParameter(min_length=1, max_length=100, pattern=r"^[^\x00]*$")]


# Dependencies are coroutines though they wait for nothing: FastAPI runs plain functions in threads of its own.


async def service_of(request: Request) -> Service:
    """The application's service."""
    return cast(Service, request.app.state.service)


async def detector_of(service: Annotated[Service, Depends(service_of)]) -> Detector:
    """The loaded detector; not-ready before."""
    return service.detector


def caller_with(*scopes: Scope) -> Callable[[Request], Awaitable[Caller]]:
    """A dependency: the caller, who holds one of these scopes."""

    async def caller(request: Request) -> Caller:
        found: Caller = request.state.caller
        if not any(found.may(scope) for scope in scopes):
            raise ApiError("forbidden", f"this key needs the scope {' or '.join(scopes)}")
        return found

    return caller


Served = Annotated[Service, Depends(service_of)]
Loaded = Annotated[Detector, Depends(detector_of)]
Detecting = Annotated[Caller, Depends(caller_with("detect"))]
Reading = Annotated[Caller, Depends(caller_with("detect", "enrol"))]
Enrolling = Annotated[Caller, Depends(caller_with("enrol"))]
Admin = Annotated[Caller, Depends(caller_with("admin"))]
Limit = Annotated[int, Query(ge=1, le=MOST_SHOWN)]
bearer = HTTPBearer(auto_error=False, description="An API key, or the token of the start while there is none.")
router = APIRouter(prefix="/v1", dependencies=[Depends(bearer)])  # for OpenAPI: `Guard` has decided already


async def read_uploads(files: list[UploadFile], settings: ServiceSettings) -> list[Upload]:
    """The files of a request. One that is larger than allowed is not read into memory, only its first excess byte."""
    limit = settings.max_upload_bytes + 1
    return [Upload(file_name(file.filename), await file.read(limit), file.size) for file in files]


def by_file(uploads: Sequence[Upload], results: Sequence[T | ApiError]) -> list[T | FailedFile]:
    """The results of a request's files; the failure of its only file is the failure of the request."""
    if len(results) == 1 and isinstance(results[0], ApiError):
        raise results[0]
    return [
        FailedFile(file=upload.file, error=result.problem()) if isinstance(result, ApiError) else result
        for upload, result in zip(uploads, results, strict=True)
    ]


def found(value: T | None, what: str) -> T:
    """What a look-up gave, or the problem not-found."""
    if value is None:
        raise ApiError("not-found", f"there is no {what}")
    return value


class Jpeg(Response):
    media_type = "image/jpeg"


class Png(Response):
    media_type = "image/png"


@router.post("/detect", tags=["detection"], responses=documented("unreadable", "not-an-image"))
async def detect(
    service: Served,
    caller: Detecting,
    image: Annotated[list[UploadFile], File(description="One or several images.")],
    k: Annotated[int | None, Query(ge=1, le=MOST_SHOWN, description="Neighbours of each label shown.")] = None,
    max_false_alarm: Annotated[
        float | None, Query(gt=0, lt=1, description="Share of real images that may be called fake.")
    ] = None,
    explain: Annotated[
        str, Query(pattern="^((regions|stability)(,(regions|stability))*)?$", examples=["regions,stability"])
    ] = "",
    record: Annotated[bool, Query(description="Keep the verdict where the service keeps any, and count it.")] = True,
) -> schemas.Detections:
    """Judge images: verdict, score, neighbours and heads of each, in the order they were sent."""
    asked = cast("frozenset[schemas.Explanation]", frozenset(explain.split(",")) - {""})
    uploads = await read_uploads(image, service.settings)
    results = await service.detect(uploads, Question(k, max_false_alarm, asked, record), caller)
    return schemas.Detections(results=by_file(uploads, results))


@router.post("/search", tags=["detection"], responses=documented("unreadable", "not-an-image"))
async def search(
    service: Served,
    caller: Detecting,
    image: Annotated[list[UploadFile], File(description="One or several images.")],
    label: Label | None = None,
    generator: Annotated[Text | None, Query(description="Only fakes of this generator.")] = None,
    source: Annotated[Text | None, Query(description="Only references from this source.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    offset: Annotated[int, Query(ge=0, le=MOST_SHOWN)] = 0,
) -> schemas.Searches:
    """The reference images nearest to each image sent, without a verdict."""
    uploads = await read_uploads(image, service.settings)
    hits = await service.search(
        uploads, caller, label=label, generator=generator, source=source, limit=limit, offset=offset
    )
    return schemas.Searches(results=by_file(uploads, hits))


@router.post("/references", tags=["references"], responses=documented("unreadable", "not-an-image", "conflict"))
async def add_references(
    service: Served,
    caller: Enrolling,
    images: Annotated[list[UploadFile], File(description="Reference images, all of one label and generator.")],
    label: Annotated[Label, Form()],
    generator: Annotated[Text | None, Form(description="What made them, for fakes only.")] = None,
    source: Annotated[Text, Form(description="Where they came from.")] = "upload",
) -> resources.Added:
    """Add images to the reference set. The same bytes twice change nothing."""
    batch = Batch(label, generator, source)
    return await service.enrol(await read_uploads(images, service.settings), batch)


@router.get("/references", tags=["references"], responses=documented())
async def list_references(
    service: Served,
    detector: Loaded,
    caller: Reading,
    label: Label | None = None,
    generator: Text | None = None,
    source: Text | None = None,
    after: Annotated[int, Query(ge=0, le=2**63 - 1, description="`next` of the page before.")] = 0,
    limit: Limit = 100,
) -> resources.ReferencePage:
    """Reference images in the order they were added."""
    number = None if label is None else LABELS.index(label)
    read = partial(detector.store.list, label=number, generator=generator, source=source, after=after, limit=limit)
    page = [catalogue.reference_image(row, caller) for row in await service.run(read)]
    return resources.ReferencePage(references=page, next=page[-1].id if len(page) == limit else None)


@router.get("/references/{id}", tags=["references"], responses=documented("not-found"))
async def get_reference(service: Served, detector: Loaded, caller: Reading, id: Id) -> resources.ReferenceImage:
    """One reference image."""
    return catalogue.reference_image(found(await service.run(detector.store.get, id), f"reference {id}"), caller)


@router.get("/references/{id}/thumbnail", tags=["references"], responses=documented("not-found"), response_class=Jpeg)
async def get_thumbnail(service: Served, detector: Loaded, caller: Reading, id: Id) -> Response:
    """A reference image, its longest side at most 256 pixels."""
    data = found(await service.run(detector.store.thumbnail, id), f"reference {id}")
    return Jpeg(data, headers={"cache-control": "private, max-age=86400"})


@router.delete("/references/{id}", tags=["references"], responses=documented("not-found"))
async def delete_reference(service: Served, detector: Loaded, caller: Enrolling, id: Id) -> Removed:
    """Remove one reference image; it votes no more."""
    removed = await service.run(catalogue.remove, detector, partial(detector.store.remove, ids=[id]))
    if not removed.references:
        raise ApiError("not-found", f"there is no reference {id}")
    return removed


@router.get("/generators", tags=["generators"], responses=documented())
async def list_generators(service: Served, detector: Loaded, caller: Reading) -> resources.Generators:
    """All generators with their numbers of references, by name."""
    rows = await service.run(detector.store.generators)
    return resources.Generators(generators=[catalogue.generator(row) for row in rows])


@router.post("/generators", tags=["generators"], status_code=201, responses=documented("conflict"))
async def create_generator(
    service: Served, detector: Loaded, caller: Enrolling, facts: resources.NewGenerator
) -> resources.Generator:
    """Make a generator known before it has references."""
    return catalogue.generator(await service.run(detector.store.create_generator, **facts.model_dump()))


@router.get("/generators/{name}", tags=["generators"], responses=documented("not-found"))
async def get_generator(service: Served, detector: Loaded, caller: Reading, name: Name) -> resources.Generator:
    """One generator, whatever the case of its name."""
    return catalogue.generator(found(await service.run(detector.store.get_generator, name), f"generator {name!r}"))


@router.patch("/generators/{name}", tags=["generators"], responses=documented("not-found", "conflict"))
async def change_generator(
    service: Served, detector: Loaded, caller: Enrolling, name: Name, change: resources.GeneratorChange
) -> resources.Generator:
    """Change what is known of a generator, its name included."""
    return await service.run(catalogue.change_generator, detector, name, change.model_dump(exclude_unset=True))


@router.delete("/generators/{name}", tags=["generators"], responses=documented("not-found"))
async def delete_generator(service: Served, detector: Loaded, caller: Enrolling, name: Name) -> Removed:
    """Remove a generator and all its references."""
    return await service.run(catalogue.remove, detector, partial(detector.store.delete_generator, name))


@router.get("/enrolments", tags=["enrolments"], responses=documented())
async def list_enrolments(
    service: Served,
    detector: Loaded,
    caller: Reading,
    after: Annotated[int | None, Query(ge=1, le=2**63 - 1, description="`next` of the page before.")] = None,
    limit: Limit = 50,
) -> resources.Enrolments:
    """What was added when, newest first."""
    rows = await service.run(detector.store.enrolments, before=after, limit=limit)
    page = [catalogue.enrolment(row) for row in rows]
    return resources.Enrolments(enrolments=page, next=page[-1].id if len(page) == limit else None)


@router.get("/enrolments/{id}", tags=["enrolments"], responses=documented("not-found"))
async def get_enrolment(service: Served, detector: Loaded, caller: Reading, id: Id) -> resources.Enrolment:
    """One enrolment and its report."""
    return catalogue.enrolment(found(await service.run(detector.store.get_enrolment, id), f"enrolment {id}"))


@router.delete("/enrolments/{id}", tags=["enrolments"], responses=documented("not-found"))
async def undo_enrolment(service: Served, detector: Loaded, caller: Enrolling, id: Id) -> Removed:
    """Undo an enrolment: remove the references that it added."""
    found(await service.run(detector.store.get_enrolment, id), f"enrolment {id}")
    return await service.run(catalogue.remove, detector, partial(detector.store.remove, enrolment=id))


@router.get("/detections", tags=["records"], responses=documented())
async def list_detections(
    service: Served,
    detector: Loaded,
    caller: Admin,
    after: Annotated[UUID | None, Query(description="`next` of the page before.")] = None,
    limit: Limit = 50,
) -> resources.DetectionPage:
    """All verdicts that were recorded, newest first."""
    rows = await service.run(detector.store.list_detections, before=after, limit=limit)
    return records.page(rows, limit)


@router.get("/detections/{id}", tags=["records"], responses=documented("not-found"))
async def get_detection(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> resources.Detection:
    """A recorded verdict, for the key that asked for it, or an admin."""
    return records.shown(await service.run(records.find, detector, caller, id), caller)


@router.get("/detections/{id}/overlay", tags=["records"], responses=documented("not-found"), response_class=Png)
async def get_overlay(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> Response:
    """The regions of a verdict as a transparent PNG of the image's shape, red where fake and blue where real."""
    row = await service.run(records.find, detector, caller, id)
    return Png(await service.run(records.drawn, row))


@router.post("/detections/{id}/replay", tags=["records"], responses=documented("not-found", "conflict"))
async def replay_detection(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> resources.Replay:
    """Judge the recorded embedding again with the index and calibration of now, and tell what changed."""
    row = await service.run(records.find, detector, caller, id)
    return await service.run(records.replay, detector, row, caller)


@router.post("/detections/{id}/feedback", tags=["records"], responses=documented("not-found"))
async def give_feedback(
    service: Served, detector: Loaded, caller: Detecting, id: UUID, feedback: resources.Feedback
) -> resources.Detection:
    """Dispute or confirm a verdict. It is kept with the record and changes nothing else."""
    row = await service.run(records.find, detector, caller, id)
    return await service.run(records.dispute, detector, row, feedback, caller)


@router.get("/status", tags=["operations"], responses=documented())
async def get_status(service: Served, caller: Reading) -> resources.Status:
    """What is loaded, followed and calibrated."""
    return await service.status()


@router.get("/calibration", tags=["operations"], responses=documented())
async def get_calibration(detector: Loaded, caller: Reading) -> resources.CalibrationState:
    """The calibration in use and what it promises."""
    return catalogue.calibration_state(detector)


async def live() -> resources.Health:
    """The process answers."""
    return resources.Health(status="live")


async def ready(detector: Loaded) -> resources.Health:
    """The checkpoint is loaded, the index followed, even if it is empty, and what can be calibrated is."""
    return resources.Health(status="ready")


async def show_metrics(service: Served, caller: Reading) -> Response:
    """Numbers for Prometheus."""
    return Response(service.metrics.page(), media_type=CONTENT_TYPE)


def problem_response(request: Request, error: ApiError) -> JSONResponse:
    """Problem details as the framework's response."""
    body = error.problem(request.state.request_id).model_dump(mode="json")
    return JSONResponse(body, error.status, headers=error.headers, media_type="application/problem+json")


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """A problem that a route raised."""
    assert isinstance(error, ApiError)
    return problem_response(request, error)


async def on_bad_field(request: Request, error: Exception) -> JSONResponse:
    """A field that the framework refused."""
    assert isinstance(error, RequestValidationError)
    fields = [
        FieldError(field=".".join(str(part) for part in item["loc"][1:]) or "body", message=item["msg"])
        for item in error.errors()
    ]
    detail = "; ".join(f"{item.field}: {item.message}" for item in fields)
    return problem_response(request, ApiError("bad-field", detail, errors=fields))


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself answers: no such path, no such method, a body that does not parse or is too large."""
    assert isinstance(error, HTTPException)
    status, detail = error.status_code, str(error.detail)
    if detail.startswith("Too many"):  # parts of a form
        status = 413
        detail += " LINEUP_MAX_FILES says how many; add larger batches with `lineup index add`."
    response = problem_response(request, from_status(status, detail))
    response.headers.update(error.headers or {})
    return response


async def on_database_away(request: Request, error: Exception) -> JSONResponse:
    """A call that cannot do without the database."""
    log.warning("the database does not answer", extra={"reason": type(error).__name__})
    return problem_response(request, ApiError("not-ready", "the database does not answer", retry_after=2))


async def on_store_error(request: Request, error: Exception) -> JSONResponse:
    """What the store refuses."""
    kinds: dict[type[Exception], Kind] = {store.UnknownGenerator: "not-found", store.GeneratorExists: "conflict"}
    return problem_response(request, ApiError(kinds.get(type(error), "bad-field"), str(error)))


async def show_docs(request: Request) -> HTMLResponse:
    """The interface, for people."""
    return HTMLResponse(docs.page(request.app.openapi()))


async def show_style() -> Response:
    """How that looks."""
    return Response(docs.CSS, media_type="text/css")


class Page(Mount):
    """Static files, matched only where one exists, so that every other path keeps its own 404 and 405."""

    def __init__(self, folder: Path) -> None:
        self.files = StaticFiles(directory=folder, html=True)
        super().__init__("/", self.files, name="page")

    def matches(self, scope: ASGIScope) -> tuple[Match, ASGIScope]:
        """Whether a GET or HEAD asks for one of the files."""
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            path = scope["path"].strip("/") or "index.html"
            if "\0" not in path and self.files.lookup_path(path)[1]:
                return super().matches(scope)
        return Match.NONE, {}


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
            asyncio.create_task(work) for work in (service.load(), service.keep_house(), service.follow_active())
        ]
        if loaded:
            await background[0]
        yield
        for task in background:
            task.cancel()
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="Lineup",
        summary="Was this image generated by a model? A verdict with its evidence.",
        version=catalogue.package_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        form_limits={"max_files": settings.max_files, "max_fields": 20, "max_part_size": 4096},
        responses=documented("internal"),
    )
    app.state.service = service
    app.include_router(router)
    app.add_api_route("/health/live", live, tags=["operations"])
    app.add_api_route("/health/ready", ready, tags=["operations"], responses=documented("not-ready"))
    app.add_api_route("/metrics", show_metrics, tags=["operations"], response_class=Response)
    app.add_api_route("/docs", show_docs, include_in_schema=False)
    app.add_api_route(docs.STYLE, show_style, include_in_schema=False)
    app.router.routes.append(Page(PAGE))
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_bad_field)
    app.add_exception_handler(HTTPException, on_http_error)
    for away in DATABASE_AWAY:
        app.add_exception_handler(away, on_database_away)
    for refusal in (store.UnknownGenerator, store.GeneratorExists, store.BadGeneratorName):
        app.add_exception_handler(refusal, on_store_error)
    app.add_middleware(Guard, service=service, limit=RateLimit(settings.rate_limit))
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(
        Around,
        metrics=metrics,
        settings=settings,
        # The framework hides what reading a body raises, except for its own exception.
        as_raised=lambda error: HTTPException(error.status, error.detail, error.headers),
    )
    return app
