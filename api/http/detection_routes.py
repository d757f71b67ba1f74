"""Calls that judge uploads, or search the reference images nearest to them."""

from collections.abc import Sequence
from typing import Annotated, TypeVar

from fastapi import File, Query, UploadFile

from api.http.dependencies import MOST_ROWS, Asked, Detecting, Served, read_uploads, v1_router
from api.judge.evidence import SearchQuery
from api.judge.uploads import Upload
from api.schemas import Label, Text
from api.schemas.problems import ApiError, FailedFile, documented
from api.schemas.verdicts import Detections, Searches

T = TypeVar("T")
router = v1_router("detection")
Images = Annotated[list[UploadFile], File(min_length=1, description="One or several images.")]


@router.post("/detect", responses=documented("unreadable", "not-an-image"))
async def detect(
    service: Served,
    caller: Detecting,
    image: Images,
    question: Asked,
) -> Detections:
    """Judge images: verdict, score, neighbours and heads of each, in the order they were sent."""
    uploads = await read_uploads(image, service.settings)
    results = await service.detect(uploads, question, caller)
    return Detections(results=by_file(uploads, results))


@router.post("/search", responses=documented("unreadable", "not-an-image"))
async def search(
    service: Served,
    caller: Detecting,
    image: Images,
    label: Label | None = None,
    generator: Annotated[Text | None, Query(description="Only fakes of this generator.")] = None,
    source: Annotated[Text | None, Query(description="Only references from this source.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    offset: Annotated[int, Query(ge=0, le=MOST_ROWS)] = 0,
) -> Searches:
    """The reference images nearest to each image sent, without a verdict."""
    uploads = await read_uploads(image, service.settings)
    query = SearchQuery(label=label, generator=generator, source=source, limit=limit, offset=offset)
    results = await service.search(uploads, query, caller)
    return Searches(results=by_file(uploads, results))


def by_file(uploads: Sequence[Upload], results: Sequence[T | ApiError]) -> list[T | FailedFile]:
    """The results of a request's files; the failure of its only file is the failure of the request."""
    if len(results) == 1 and isinstance(results[0], ApiError):
        raise results[0]
    return [
        FailedFile(file=upload.file, error=result.problem()) if isinstance(result, ApiError) else result
        for upload, result in zip(uploads, results, strict=True)
    ]
