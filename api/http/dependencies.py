"""What several routes share: who calls, what serves, the ranges of parameters, and how uploads are read."""

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar, cast

from fastapi import APIRouter, Depends, Path, Query, Request, Response, UploadFile
from fastapi.security import HTTPBearer

from api.access import Caller
from api.judge.detector import Detector
from api.judge.uploads import Question, Upload, file_name
from api.schemas import Scope
from api.schemas.problems import ApiError
from api.schemas.verdicts import Explanation
from api.service import Service
from api.service_settings import ServiceSettings

T = TypeVar("T")
MOST_ROWS = 1000
Id = Annotated[int, Path(ge=1, le=2**63 - 1)]
Limit = Annotated[int, Query(ge=1, le=MOST_ROWS)]
bearer = HTTPBearer(auto_error=False, description="An API key, or the token of the start while there is none.")
DOCUMENTED_BEARER = Depends(bearer)
"""For OpenAPI alone: `Guard` has decided already who may call."""


# Dependencies are coroutines though they wait for nothing: FastAPI runs plain functions in threads of its own.


async def service_of(request: Request) -> Service:
    """The application's service."""
    return cast(Service, request.app.state.service)


Served = Annotated[Service, Depends(service_of)]


async def detector_of(service: Served) -> Detector:
    """The loaded detector; not-ready before."""
    return service.detector


def caller_with(*scopes: Scope) -> Callable[[Request], Awaitable[Caller]]:
    """A dependency: the caller, who holds one of these scopes."""

    async def caller_of(request: Request) -> Caller:
        caller: Caller = request.state.caller
        if not any(caller.may(scope) for scope in scopes):
            raise ApiError("forbidden", f"this key needs the scope {' or '.join(scopes)}")
        return caller

    return caller_of


Loaded = Annotated[Detector, Depends(detector_of)]
Detecting = Annotated[Caller, Depends(caller_with("detect"))]
Reading = Annotated[Caller, Depends(caller_with("detect", "enrol"))]
Enrolling = Annotated[Caller, Depends(caller_with("enrol"))]
Admin = Annotated[Caller, Depends(caller_with("admin"))]


class Jpeg(Response):
    media_type = "image/jpeg"


async def question_of(
    k: Annotated[int | None, Query(ge=1, le=MOST_ROWS, description="Neighbours of each label shown.")] = None,
    max_false_alarm: Annotated[
        float | None, Query(gt=0, lt=1, description="Share of real images that may be called fake.")
    ] = None,
    explain: Annotated[
        str, Query(pattern="^((regions|stability)(,(regions|stability))*)?$", examples=["regions,stability"])
    ] = "",
    record: Annotated[bool, Query(description="Keep the verdict where the service keeps any, and count it.")] = True,
) -> Question:
    """What is asked of each image."""
    explanations = cast("frozenset[Explanation]", frozenset(explain.split(",")) - {""})
    return Question(k, max_false_alarm, explanations, record)


Asked = Annotated[Question, Depends(question_of)]


def v1_router(tag: str) -> APIRouter:
    """A router for the calls of one noun."""
    return APIRouter(prefix="/v1", tags=[tag], dependencies=[DOCUMENTED_BEARER])


async def read_uploads(files: list[UploadFile], settings: ServiceSettings) -> list[Upload]:
    """The files of a request. One that is larger than allowed is not read into memory, only its first excess byte."""
    limit = settings.max_upload_bytes + 1
    return [Upload(file_name(file.filename), await file.read(limit), file.size) for file in files]


def existing(value: T | None, name: str) -> T:
    """What a look-up gave.

    Raises:
        ApiError: not-found.
    """
    if value is None:
        raise ApiError("not-found", f"there is no {name}")
    return value
