"""Works on jobs between requests: judges their images, fetches those that have an address, and tells webhooks the end.

What it takes is its own for a while; a service that is killed meanwhile leaves it to whichever comes next.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from httpx2 import AsyncClient

from api.access import Caller
from api.breaker import DATABASE_AWAY
from api.judge.uploads import Question, Upload
from api.schemas.problems import ApiError, FailedFile
from api.schemas.resources import Job
from api.schemas.verdicts import Verdict
from api.service import RETRY, Service
from api.webhook import WEBHOOK_SECONDS, deliver
from indexer.ingest.public_files import Refused, download, public_client
from indexer.store.jobs import Job as JobRow
from indexer.store.jobs import JobImage, Jobs, Outcome

log = logging.getLogger(__name__)
T = TypeVar("T")

UPLOADS, ADDRESSES, WEBHOOKS = 4, 8, 8
"""Of each so many are in work at once; slow servers keep only the two latter."""
POLL = 1.0
"""Seconds between two looks for what waits, while nothing is in work."""
COUNT_SECONDS = 5.0
"""Between two counts for the metrics."""
FETCH_SECONDS = 20.0
IMAGE_SECONDS, LEASE_SECONDS = 55.0, 60.0
"""In which an image is judged or left for another time, and after which another service may take it."""
MOST_ATTEMPTS = 3
"""Of judging an image that each time ends the service, outlasts the time, or is judged without all evidence."""
DEGRADED_PAUSE = 30.0
"""Seconds before an image is given back that was judged without all evidence though the database answers."""
LEAVE_SECONDS = 5.0
"""For giving back what is in work when the service stops."""


class JobWorker:
    """One service's work on jobs.

    Args:
        service: Judges, and holds settings, store and metrics.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def _jobs(self) -> Jobs:
        return self._service.detector.store.jobs

    async def run(self) -> None:
        """Take what waits, until cancelled; what is in work then is given back."""
        async with public_client(private=self._service.settings.private_addresses) as client:
            judge, tell = partial(self._judge, client), partial(self._tell, client)
            async with asyncio.TaskGroup() as group:  # none goes on with a client that is closed
                group.create_task(self._work_off(UPLOADS, self._claim_images(fetched=False), judge, Jobs.release))
                group.create_task(self._work_off(ADDRESSES, self._claim_images(fetched=True), judge, Jobs.release))
                group.create_task(self._work_off(WEBHOOKS, self._claim_untold, tell, Jobs.release_untold))
                group.create_task(self._count())

    def _claim_images(self, *, fetched: bool) -> Callable[[int], Sequence[JobImage]]:
        return lambda limit: self._jobs.claim(fetched=fetched, limit=limit, seconds=LEASE_SECONDS)

    def _claim_untold(self, limit: int) -> Sequence[JobRow]:
        signed = self._service.settings.webhook_secret is not None
        return self._jobs.claim_untold(limit=limit, seconds=WEBHOOK_SECONDS) if signed else ()

    async def _work_off(
        self,
        places: int,
        claim: Callable[[int], Sequence[T]],
        work: Callable[[T], Awaitable[None]],
        release: Callable[[Jobs, Sequence[T]], None],
    ) -> None:
        """Work on so many things at once, as they come."""
        tasks: dict[asyncio.Task[None], T] = {}
        try:
            while True:
                taken: Sequence[T] = ()
                try:
                    if len(tasks) < places:
                        taken = await self._service.run(claim, places - len(tasks))
                except (ApiError, *DATABASE_AWAY):  # not ready yet, or the database is away
                    await asyncio.sleep(RETRY)
                except Exception:  # whatever ends it badly, the next look may go well
                    log.exception("looking for work on jobs failed")
                    await asyncio.sleep(RETRY)
                tasks |= {asyncio.ensure_future(work(thing)): thing for thing in taken}
                if not tasks:
                    await asyncio.sleep(POLL)
                    continue
                done, _ = await asyncio.wait(tasks, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del tasks[task]
                    if error := task.exception():  # it stays taken until its time is over
                        log.error("work on a job failed", exc_info=error)
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                async with asyncio.timeout(LEAVE_SECONDS):
                    await asyncio.gather(*tasks, return_exceptions=True)
                    await self._service.run(release, self._jobs, list(tasks.values()))

    async def _judge(self, client: AsyncClient, image: JobImage) -> None:
        """Judge an image and keep the result; while service or database are not ready it is given back.

        A verdict without all evidence is kept in the end where the database is not what hinders: it says so itself.
        """
        try:
            async with asyncio.timeout(IMAGE_SECONDS):
                result = await self._result(client, image)
        except TimeoutError:
            return
        if isinstance(result, ApiError):
            again, counted = result.kind == "not-ready", False
        else:
            counted = not self._service.detector.follower.degraded
            again = result.degraded and not (counted and image.attempts >= MOST_ATTEMPTS)
        if again:
            await asyncio.sleep(DEGRADED_PAUSE if counted else RETRY)
            await self._keep(partial(self._jobs.release, counted=counted), [image])
            return
        outcome: Outcome = "failed" if isinstance(result, ApiError) else result.verdict
        document = FailedFile(file=image.file, error=result.problem()) if isinstance(result, ApiError) else result
        await self._keep(self._jobs.finish, image, outcome, document.model_dump(mode="json"))

    async def _result(self, client: AsyncClient, image: JobImage) -> Verdict | ApiError:
        if image.attempts > MOST_ATTEMPTS:
            return ApiError("internal", f"{image.file}: given up after {MOST_ATTEMPTS} attempts that did not end")
        data, most = image.bytes, self._service.settings.max_upload_bytes
        if data is None:
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    data = await download(client, image.file, most)
            except (Refused, TimeoutError) as error:
                return ApiError("not-fetched", f"{image.file}: {error or 'too slow'}")
        question = Question(**image.question | {"explain": frozenset(image.question["explain"])})
        upload, caller = Upload(image.file, data, image.file_bytes), Caller(image.api_key_id, "job")
        return await self._service.detect_between(upload, question, caller)

    async def _tell(self, client: AsyncClient, row: JobRow) -> None:
        """Tell a job's webhook of its end, and keep whether that came about."""
        secret, reason = self._service.settings.webhook_secret, None
        assert row.webhook is not None
        assert secret is not None
        body = Job.model_validate(row, from_attributes=True).model_dump_json().encode()
        try:
            await deliver(client, row.webhook, body, secret)
        except Refused as error:
            reason = str(error)
        self._service.metrics.webhooks.labels("failed" if reason else "delivered").inc()
        await self._keep(self._jobs.told, row.id, reason)

    async def _keep(self, write: Callable[..., object], *values: object) -> None:
        """Write to the database, again and again until it answers."""
        while True:
            try:
                await self._service.run(write, *values)
            except DATABASE_AWAY:
                await asyncio.sleep(RETRY)
            else:
                return

    async def _count(self) -> None:
        """Show in the metrics what waits."""
        metrics = self._service.metrics
        while True:
            try:
                waiting = await self._service.run(lambda: self._jobs.waiting())
            except (ApiError, *DATABASE_AWAY):
                await asyncio.sleep(RETRY)
                continue
            except Exception:  # jobs are worked on without being counted
                log.exception("counting what waits of jobs failed")
                await asyncio.sleep(COUNT_SECONDS)
                continue
            metrics.jobs.set(waiting.jobs)
            metrics.job_images.set(waiting.images)
            metrics.job_age.set((datetime.now(UTC) - waiting.oldest).total_seconds() if waiting.oldest else 0)
            await asyncio.sleep(COUNT_SECONDS)
