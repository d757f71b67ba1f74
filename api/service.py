"""The detector for many callers at once: image work in threads, a shared forward pass, nothing on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import ParamSpec, TypeVar

import numpy as np
from prometheus_client import Gauge

from api.access import Caller, Keys, hide_paths
from api.batcher import Batcher, BatcherFull, Item, Result
from api.breaker import DATABASE_AWAY
from api.enrolment import Batch, enrol
from api.judge.detector import Case, Detector
from api.judge.uploads import Question, Upload
from api.monitoring import Metrics
from api.schemas import Label
from api.schemas.problems import ApiError
from api.schemas.resources import Added, Status
from api.schemas.verdicts import Hits, Verdict
from api.service_settings import ServiceSettings
from api.service_status import status
from indexer.database.connection import DatabaseBehind
from indexer.store.checkpoints import CheckpointSwitched
from trainer.cores import usable_cores

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

DATABASE_THREADS = 16
AT_ONCE = 8
"""Images of one request that are in work at the same time."""
EXPLAINED_AT_ONCE = 3
"""Likewise where each has regions and re-encoded copies: at most half of the queue, so that others find room in it."""
RETRY = 2.0
"""Seconds between two attempts to start, or to change the checkpoint, while that fails."""
LOOK = 0.2
"""Seconds between two looks for what another thread tells."""
HOUSEKEEPING = 3600.0
"""Seconds between two deletions of old records."""


class Serving:
    """A detector, and the threads in which its requests share a forward pass and a search. Used on the event loop.

    Attributes:
        detector: A loaded one, started here.
        users: Requests that go on with it.
    """

    def __init__(self, detector: Detector, metrics: Metrics) -> None:
        self.detector, self.users = detector, 0
        self.embedding: Batcher[np.ndarray, np.ndarray]
        self.embedding = Batcher(detector.embedder.embed_stacks, observe=metrics.batch.observe, name="embed")
        self.judging: Batcher[Case, Verdict] = Batcher(detector.answer, max_wait=0, name="judge")
        detector.start()

    @contextmanager
    def used(self) -> Iterator[Detector]:
        """One request's use, from its first step to its last."""
        self.users += 1
        try:
            yield self.detector
        finally:
            self.users -= 1

    def stop(self) -> None:
        """Finish what was begun, then end the threads; a second time changes nothing."""
        self.embedding.close()
        self.judging.close()
        self.detector.stop()


class Service:
    """What the routes call. Until `start` has returned, everything but `ready` answers not-ready.

    Args:
        settings: Of the detector.
        metrics: Told of batches and verdicts.
        detector: A loaded one; without it `start` loads one.
    """

    def __init__(self, settings: ServiceSettings, metrics: Metrics, detector: Detector | None = None) -> None:
        self.settings = settings
        self.metrics = metrics
        self.failure: str | None = None
        self._detector = detector
        self._ready = False
        self._decoders = ThreadPoolExecutor(usable_cores(), "decode")
        self._askers = ThreadPoolExecutor(2 * usable_cores(), "ask")
        self._workers = ThreadPoolExecutor(DATABASE_THREADS, "work")
        self._counters = ThreadPoolExecutor(2, "count")
        self._keys: Keys
        self._serving: Serving
        self._retired: Serving | None = None

    @property
    def detector(self) -> Detector:
        """The loaded detector.

        Raises:
            ApiError: not-ready.
        """
        return self.serving.detector

    @property
    def serving(self) -> Serving:
        """What requests that begin now are answered with. One request takes it once.

        Raises:
            ApiError: not-ready.
        """
        if not self._ready:
            loading = "checkpoint, index and calibration are being loaded"
            raise ApiError("not-ready", self.failure or loading, retry_after=1)
        return self._serving

    async def load(self) -> None:
        """`start` off the event loop, again and again until the database answers.

        What else goes wrong is kept in `failure`, and readiness tells it: restarting might help, waiting will not.
        """
        while not self._ready:
            try:
                await asyncio.get_running_loop().run_in_executor(self._workers, self.start)
            except (*DATABASE_AWAY, DatabaseBehind, ApiError) as error:
                self.failure = " ".join(str(error).split())
                log.warning("waiting for the database", extra={"reason": self.failure})
                await asyncio.sleep(RETRY)
            except Exception as error:
                self.failure = " ".join(str(error).split())
                log.exception("loading failed")
                return

    def start(self) -> None:
        """Load and calibrate what is not yet, and begin to follow and compute. Blocks; raises what loading raises."""
        if self._detector is None:
            self._detector = Detector(self.settings).load()
        detector = self._detector
        self._keys = Keys(detector.store.keys, detector.breaker)
        self._keys.exist()
        detector.calibrate()  # or the first verdicts would be uncertain, and nobody would know why
        self._serving = Serving(detector, self.metrics)
        self._watch()
        self._ready = True

    async def follow_active(self) -> None:
        """Serve the active checkpoint whenever another one has become that. Runs until cancelled.

        The new one is loaded beside the old, which answers meanwhile, and which then finishes what it has begun. Where
        it cannot be loaded, or a setting names the old one, that is said, and the old one goes on.
        """
        told: str | None = None
        while True:
            await asyncio.sleep(LOOK)
            if not self._ready or self._serving.detector.inactive is None:
                continue
            old = self._serving
            if not old.detector.named:
                old.detector.hindrance = None
                try:
                    self._detector = await self.run(old.detector.successor)
                    self._serving = Serving(self._detector, self.metrics)
                except Exception as error:  # the old one goes on; what hinders may pass, or be put right
                    old.detector.hindrance = " ".join(str(error).split()) or type(error).__name__
                else:
                    log.info("another checkpoint serves", extra={"checkpoint": self.detector.embedder.id})
                    await self._retire(old)
                    told = None
                    continue
            reason = f"{old.detector.inactive} {old.detector.hindrance or ''}".rstrip()
            if reason != told:
                log.warning("the active checkpoint does not serve", extra={"reason": reason})
                told = reason
            await asyncio.sleep(RETRY)

    async def _retire(self, old: Serving) -> None:
        self._retired = old
        while old.users:
            await asyncio.sleep(LOOK)
        await self.run(old.stop)
        self._retired = None

    async def keep_house(self) -> None:
        """Delete records that are older than the setting allows: at the start, then each hour. Runs until cancelled."""
        days = self.settings.record_days
        while days:
            if self._ready:
                before = datetime.now(UTC) - timedelta(days=days)
                try:
                    deleted = await self.run(self.detector.store.detections.delete, before)
                    log.info("records deleted", extra={"records": deleted, "days": days})
                except DATABASE_AWAY:
                    log.warning("records could not be deleted; trying again")
            await asyncio.sleep(HOUSEKEEPING if self._ready else 1)

    def close(self) -> None:
        """Finish what was begun, then stop every thread."""
        was_ready, self._ready = self._ready, False
        self._decoders.shutdown(cancel_futures=True)
        self._workers.shutdown()
        if was_ready:
            self._serving.stop()
        if self._retired is not None:
            self._retired.stop()
        self._askers.shutdown()
        self._counters.shutdown()
        if self._detector is not None:
            self._detector.close()

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something that waits for the database, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, lambda: work(*args, **kwargs))

    async def keys_exist(self) -> bool:
        """See `Keys.exist`."""
        self.detector  # noqa: B018 - not ready before there are keys to ask
        remembered = self._keys.remembered()  # a thread for what is known would cost more than all the rest of this
        return await self._ask(self._keys.exist) if remembered is None else remembered

    async def authenticate(self, secret: str) -> Caller:
        """See `Keys.authenticate`."""
        return await self._ask(self._keys.authenticate, secret)

    async def detect(self, uploads: Sequence[Upload], question: Question, caller: Caller) -> list[Verdict | ApiError]:
        """Judge the images of one request, side by side; answers are in the order of the uploads."""
        serving = self.serving

        async def one(upload: Upload) -> Verdict:
            prepared = await self._decode(serving.detector.prepare, upload, question)
            start = time.perf_counter()
            embeddings = await self._join(serving.embedding, prepared.pixels, len(prepared.pixels))
            waited = 1000 * (time.perf_counter() - start)
            case = Case(prepared, embeddings, question, waited, caller.key_id)
            verdict = await self._join(serving.judging, case, len(embeddings))
            hide_paths(verdict.neighbours, caller)
            return verdict

        with serving.used():
            results = await self._each(uploads, one, EXPLAINED_AT_ONCE if question.explain else AT_ONCE)
        self.metrics.judged(results, final=question.record)
        return results

    async def search(
        self,
        uploads: Sequence[Upload],
        caller: Caller,
        *,
        label: Label | None,
        generator: str | None,
        source: str | None,
        limit: int,
        offset: int,
    ) -> list[Hits | ApiError]:
        """The references nearest to each image of one request."""
        serving = self.serving

        async def one(upload: Upload) -> Hits:
            prepared = await self._decode(serving.detector.prepare, upload, Question())
            embedding = (await self._join(serving.embedding, prepared.pixels, len(prepared.pixels)))[0]  # (d,)
            neighbours, following = await self._ask(
                serving.detector.neighbourhood.search,
                embedding,
                label=label,
                generator=generator,
                source=source,
                limit=limit,
                offset=offset,
            )
            hide_paths(neighbours, caller)
            return Hits(file=upload.file, neighbours=neighbours, next=following)

        with serving.used():
            return await self._each(uploads, one)

    async def status(self) -> Status:
        """See `service_status.status`. In threads of its own: who asks for it may wait, nobody else."""
        return await asyncio.get_running_loop().run_in_executor(self._counters, status, self.detector)

    async def enrol(self, uploads: Sequence[Upload], batch: Batch) -> Added:
        """See `enrolment.enrol`. Where the active checkpoint changes meanwhile, this is done with the new one."""
        while True:
            serving = self.serving
            try:
                with serving.used():
                    return await self.run(enrol, serving.detector, uploads, batch)
            except CheckpointSwitched:
                log.info("waiting for the active checkpoint")
            while self._serving is serving:
                if serving.detector.hindrance:
                    raise ApiError("not-ready", f"nothing can be added: {serving.detector.inactive}", retry_after=60)
                await asyncio.sleep(LOOK)

    @staticmethod
    async def _each(
        uploads: Sequence[Upload], work: Callable[[Upload], Awaitable[T]], at_once: int = AT_ONCE
    ) -> list[T | ApiError]:
        """What `work` gives for each upload, or the problem that it raised."""
        turns = asyncio.Semaphore(at_once)

        async def one(upload: Upload) -> T | ApiError:
            async with turns:
                try:
                    return await work(upload)
                except ApiError as error:
                    return error

        return await asyncio.gather(*map(one, uploads))

    async def _decode(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, lambda: work(*args, **kwargs))

    async def _ask(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In threads of their own: these wait for the database only so long, others may hang with it."""
        return await asyncio.get_running_loop().run_in_executor(self._askers, lambda: work(*args, **kwargs))

    @staticmethod
    async def _join(batcher: Batcher[Item, Result], item: Item, weight: int) -> Result:
        try:
            return await asyncio.wrap_future(batcher.submit(item, weight))
        except BatcherFull as error:
            raise ApiError("not-ready", str(error), retry_after=1) from error

    def _watch(self) -> None:
        """Let the gauges read what they show when they are asked."""

        def show(gauge: Gauge, value: Callable[[Serving], float]) -> None:
            gauge.set_function(lambda: value(self._serving))

        metrics = self.metrics
        show(metrics.queue, lambda now: now.embedding.waiting + now.judging.waiting)
        show(metrics.revision, lambda now: now.detector.follower.revision)
        show(metrics.lag, lambda now: now.detector.follower.lag)
        show(metrics.degraded, lambda now: now.detector.follower.degraded)
        show(metrics.inactive, lambda now: now.detector.inactive is not None)
        show(metrics.calibration, lambda now: getattr(now.detector.calibrator.current, "revision", 0))
        show(metrics.index_size.labels("real"), lambda now: now.detector.follower.index.counts()[0])
        show(metrics.index_size.labels("fake"), lambda now: now.detector.follower.index.counts()[1])
