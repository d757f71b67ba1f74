"""Calls about jobs: many images that are judged in the background."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from io import BytesIO
from typing import Annotated, Any
from urllib.parse import urlsplit
from uuid import UUID

from fastapi import File, Form, Header, Query, Response, UploadFile

from api.access import Caller
from api.http.dependencies import Asked, Detecting, Limit, Loaded, Served, v1_router
from api.judge.uploads import file_name
from api.schemas.problems import ApiError, documented
from api.schemas.resources import Job, JobResults, Jobs
from api.service_settings import ServiceSettings
from api.verdict_file import row, write_csv
from indexer.store import Store
from indexer.store.jobs import Job as JobRow
from indexer.store.jobs import NewImage

JOBS_PATH = "/v1/jobs"
MOST_ADDRESS = 2048
"""Characters of an address."""
CSV_PAGE = 500
"""Results in memory while a table is written."""
router = v1_router("jobs")


class Csv(Response):
    media_type = "text/csv; charset=utf-8"


@router.post("/jobs", status_code=202, responses=documented())
async def create_job(
    service: Served,
    detector: Loaded,
    caller: Detecting,
    question: Asked,
    image: Annotated[list[UploadFile] | None, File(description="Images.")] = None,
    urls: Annotated[
        UploadFile | None, File(description="A text file with the https:// address of an image in each line.")
    ] = None,
    webhook: Annotated[
        str | None, Form(max_length=MOST_ADDRESS, description="An https:// address to be told of the end.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=200, description="Of your making: a repeated call makes no other job."),
    ] = None,
) -> Job:
    """Judge many images in the background: those sent, and those at the addresses of a list. They are kept until they
    are judged, and no longer.
    """
    settings = service.settings
    if idempotency_key is not None:
        made = await service.run(detector.store.jobs.made_with, idempotency_key, caller.key_id)
        if made is not None:
            return Job.model_validate(made, from_attributes=True)
    images = [new_image(file, settings) for file in image or ()]
    images += [NewImage(address) for address in await addresses(urls, settings)]
    if not images:
        raise ApiError("bad-field", "a job needs images: files `image`, or a list of addresses as the file `urls`")
    if len(images) > (most := settings.max_job_images):
        raise ApiError("too-large", f"{len(images):,} images; LINEUP_MAX_JOB_IMAGES allows {most:,} in one job")
    if webhook is not None:
        check_webhook(webhook, settings)
    store: Store = detector.store
    await service.run(check_room, store, images, caller, settings)
    asked: dict[str, Any] = asdict(question) | {"explain": sorted(question.explain)}
    job = await service.run(
        store.jobs.add,
        images,
        asked,
        api_key_id=caller.key_id,
        webhook=webhook,
        idempotency_key=idempotency_key,
    )
    return Job.model_validate(job, from_attributes=True)


def new_image(file: UploadFile, settings: ServiceSettings) -> NewImage:
    """An upload as it is kept; of one that is too large nothing is, and its result will say so."""
    size = file.size or 0

    def read() -> bytes:
        file.file.seek(0)
        return file.file.read() if size <= settings.max_upload_bytes else b""

    return NewImage(file_name(file.filename), size, read)


async def addresses(urls: UploadFile | None, settings: ServiceSettings) -> Sequence[str]:
    """The lines of a list that are not empty.

    Raises:
        ApiError: too-large, or bad-field for what is no text or no address.
    """
    if urls is None:
        return []
    if (urls.size or 0) > (most := settings.max_job_images * MOST_ADDRESS):
        rule = f"LINEUP_MAX_JOB_IMAGES allows {settings.max_job_images:,} addresses"
        raise ApiError("too-large", f"urls has {urls.size:,} bytes; {most:,} are read at most, for {rule}")
    try:
        lines = (await urls.read()).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ApiError("bad-field", f"urls is no text in UTF-8: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if len(line) > MOST_ADDRESS or not line.strip().isprintable():
            rule = f"an address of at most {MOST_ADDRESS} printable characters"
            raise ApiError("bad-field", f"line {number} of urls is not {rule}")
    return [line.strip() for line in lines if line.strip()]


def check_webhook(webhook: str, settings: ServiceSettings) -> None:
    """Refuse what cannot be told of the end.

    Raises:
        ApiError: bad-field.
    """
    if settings.webhook_secret is None:
        raise ApiError("bad-field", "webhook: this service has no LINEUP_WEBHOOK_SECRET to sign it with; ask for none")
    try:
        parts = urlsplit(webhook)
        valid = parts.scheme == "https" and bool(parts.hostname) and webhook.isprintable()
    except ValueError:
        valid = False
    if not valid:
        raise ApiError("bad-field", f"webhook: {webhook[:100]!r} is no address like https://a.example/path")


def check_room(store: Store, images: Sequence[NewImage], caller: Caller, settings: ServiceSettings) -> None:
    """Refuse what the jobs that are there leave no room for; a key may fill half of it, that others find some.

    Raises:
        ApiError: not-ready.
    """
    waiting, size = store.jobs.waiting(), sum(image.size or 0 for image in images)
    if caller.key_id is not None:
        same = store.jobs.waiting_of(caller.key_id)
        share = "a key may fill half of LINEUP_MAX_WAITING"
        if same.images and same.images + len(images) > (most := settings.max_waiting_images // 2):
            detail = f"{same.images:,} images of this key wait, {len(images):,} more came, and {share}_IMAGES: {most:,}"
            raise ApiError("not-ready", detail, retry_after=60)
        if same.images and same.bytes + size > (most := settings.max_waiting_bytes // 2):
            detail = f"uploads of this key hold {same.bytes:,} bytes, {size:,} more came, and {share}_BYTES: {most:,}"
            raise ApiError("not-ready", detail, retry_after=60)
    if waiting.images + len(images) > settings.max_waiting_images:
        rule = f"LINEUP_MAX_WAITING_IMAGES allows {settings.max_waiting_images:,}"
        detail = f"{waiting.images:,} images of jobs wait to be judged, {len(images):,} more came, and {rule}"
        raise ApiError("not-ready", detail, retry_after=60)
    if waiting.bytes + size > settings.max_waiting_bytes:
        rule = f"LINEUP_MAX_WAITING_BYTES allows {settings.max_waiting_bytes:,}"
        detail = f"uploads of jobs hold {waiting.bytes:,} bytes, {size:,} more came, and {rule}"
        raise ApiError("not-ready", detail, retry_after=60)


@router.get("/jobs", responses=documented())
async def list_jobs(
    service: Served,
    detector: Loaded,
    caller: Detecting,
    after: Annotated[UUID | None, Query(description="`next` of the page before.")] = None,
    limit: Limit = 50,
) -> Jobs:
    """The jobs of this key, or all for an admin, newest first."""
    everybody = caller.may("admin")
    read = partial(detector.store.jobs.list, api_key_id=caller.key_id, everybody=everybody, before=after, limit=limit)
    page = [Job.model_validate(job, from_attributes=True) for job in await service.run(read)]
    return Jobs(jobs=page, next=page[-1].id if len(page) == limit else None)


def find(store: Store, caller: Caller, job_id: UUID) -> JobRow:
    """A job, for the key that made it or an admin.

    Raises:
        ApiError: not-found, also for a job that is someone else's.
    """
    job = store.jobs.get(job_id)
    if job is None or not (caller.may("admin") or job.api_key_id == caller.key_id):
        raise ApiError("not-found", f"there is no job {job_id}")
    return job


@router.get("/jobs/{id}", responses=documented("not-found"))
async def get_job(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> Job:
    """A job: its state, and how many of its images became what."""
    return Job.model_validate(await service.run(find, detector.store, caller, id), from_attributes=True)


@router.post("/jobs/{id}/cancel", responses=documented("not-found"))
async def cancel_job(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> Job:
    """End a job: what is not judged is dropped, results stay. One that has ended stays as it is."""
    await service.run(find, detector.store, caller, id)
    await service.run(detector.store.jobs.cancel, id)
    return await get_job(service, detector, caller, id)


@router.delete("/jobs/{id}", status_code=204, responses=documented("not-found"))
async def delete_job(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> None:
    """Forget a job with its images and results, whatever its state; its webhook is told nothing."""
    await service.run(find, detector.store, caller, id)
    await service.run(detector.store.jobs.delete, id)


@router.get("/jobs/{id}/results", responses=documented("not-found"))
async def get_results(
    service: Served,
    detector: Loaded,
    caller: Detecting,
    id: UUID,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="`next` of the page before.")] = 0,
    limit: Limit = 100,
) -> JobResults:
    """Results in the order of the images; of a job that has not ended, those before the first that is not judged."""
    job = await service.run(find, detector.store, caller, id)
    rows = await service.run(partial(detector.store.jobs.results, id, after=after, limit=limit))
    last = rows[-1][0] if rows else after
    return JobResults(
        results=[visible(result, caller) for _, result in rows],
        next=None if job.ended_at is not None and len(rows) < limit else last,
    )


@router.get("/jobs/{id}/results.csv", responses=documented("not-found"), response_class=Csv)
async def get_table(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> Response:
    """The results so far as a table for spreadsheets, with the columns of `lineup detect --output verdicts.csv`."""
    await service.run(find, detector.store, caller, id)
    table = await service.run(write_table, detector.store, id)
    return Csv(table, headers={"content-disposition": f'attachment; filename="{id}.csv"'})


def write_table(store: Store, job_id: UUID) -> bytes:
    """A row of each result that there is."""

    def rows() -> Iterator[dict[str, Any]]:
        after = 0
        while True:
            page = store.jobs.results(job_id, after=after, limit=CSV_PAGE)
            yield from (row(result) for _, result in page)
            if len(page) < CSV_PAGE:
                return
            after = page[-1][0]

    file = BytesIO()
    write_csv(rows(), file)
    return file.getvalue()


def visible(result: dict[str, Any], caller: Caller) -> dict[str, Any]:
    """A result as this caller may see it."""
    if neighbours := result.get("neighbours"):
        result["neighbours"] = [near | {"uri": caller.visible(near.get("uri"))} for near in neighbours]
    return result
