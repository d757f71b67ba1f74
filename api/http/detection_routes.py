"""Calls that judge uploads, or search the reference images nearest to them."""

from collections.abc import Sequence
from typing import Annotated, TypeVar, cast

from fastapi import File, Query, UploadFile

from api.http.dependencies import MOST_ROWS, Detecting, Served, read_uploads, v1_router
from api.judge.evidence import SearchQuery
from api.judge.uploads import Question, Upload
from api.schemas import Label, Text
from api.schemas.problems import ApiError, FailedFile, documented
from api.schemas.verdicts import Detections, Explanation, Searches

T = TypeVar("T")
router = v1_router("detection")
Images = Annotated[list[UploadFile], File(min_length=1, description="One or several images.")]


@router.post("/detect", responses=documented("unreadable", "not-an-image"))
async def detect(
    service: Served,
    caller: Detecting,
    image: Images,
    k: Annotated[int | None, Query(ge=1, le=MOST_ROWS, description="Neighbours of each label shown.")] = None,
    max_false_alarm: Annotated[
        float | None, Query(gt=0, lt=1, description="Share of real images that may be called fake.")
    ] = None,
    explain: Annotated[
        str, Query(pattern="^((regions|stability)(,(regions|stability))*)?$", examples=["regions,stability"])
    ] = "",
    record: Annotated[bool, Query(description="Keep the verdict where the service keeps any, and count it.")] = True,
) -> Detections:
    """Judge images: verdict, score, neighbours and heads of each, in the order they were sent."""
    explanations = cast("frozenset[Explanation]", frozenset(explain.split(",")) - {""})
    uploads = await read_uploads(image, service.settings)
    results = await service.detect(uploads, Question(k, max_false_alarm, explanations, record), caller)
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
