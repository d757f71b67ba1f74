"""The detector for many callers at once: image work in threads, a shared forward pass, nothing on the event loop."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import ParamSpec, TypeVar

from prometheus_client import Gauge

from api.access import Caller, Keys, hide_paths
from api.admission import Admission
from api.breaker import DATABASE_AWAY, public_detail
from api.inflight import deadline_in_use
from api.judge.detector import Detector
from api.judge.evidence import SearchQuery, thumbnail_path
from api.judge.loader import load_detector, load_successor
from api.judge.uploads import Question, Upload
from api.monitoring import Metrics
from api.schemas.problems import ApiError
from api.schemas.resources import Drift, Status
from api.schemas.verdicts import Hits, Verdict
from api.served_checkpoint import Serving, run_admitted, run_in
from api.service_settings import ServiceSettings
from api.service_status import status
from indexer.database.connection import DatabaseBehind
from indexer.ingest.public_files import Refused
from indexer.ingest.thumbnails import make_thumbnail
from indexer.measure.drift import drift
from indexer.measure.reference_map import ReferenceMap, draw_map
from indexer.store.blobs import BlobsAway
from indexer.store.checkpoints import CheckpointSwitched
from indexer.store.detections import MOVED
from indexer.store.reference_facts import Reference
from trainer.cores import usable_cores
from trainer.process_pool import DeadlinePassed, LimitExceeded

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

DATABASE_THREADS = 16
ENROLLING_THREADS = 4
"""Enrolments that are worked on at once, in threads of their own: they take seconds, other calls do not."""
MOST_ENROLLING, ENROL_SECONDS = 16, 0.05
"""Enrolments that may be in work or wait, and what each of their images takes, to begin with."""
THUMBNAILS_AT_ONCE, MOST_THUMBNAILS, THUMBNAIL_SECONDS = 2, 64, 0.2
"""Thumbnails that are made at a time, that may be in work or wait, and what one takes, to begin with."""
FAILURE_SECONDS, MOST_FAILURES = 300.0, 10_000
"""How long a reference whose thumbnail could not be made is not tried again, and how many such are remembered."""
MOST_DECODING = 512
"""Images that may be in work or wait to be read."""
STALE_SECONDS = 120.0
"""After which an index that is not known to be complete, though the database answers, is no longer ready."""
AT_ONCE = 8
"""Images of one request that are in work at the same time."""
EXPLAINED_AT_ONCE = 3
"""Images in work that each have regions and re-encoded copies: at most half of the queue, so that others find room."""
GAP_SECONDS, GAP_LOOK = 1.0, 0.02
"""How long an image of a job waits for a moment without a request's, and between two looks for one."""
RETRY = 2.0
"""Seconds between two attempts to start, or to change the checkpoint, while that fails."""
LOOK = 0.2
"""Seconds between two looks for what another thread tells."""
MAP_PAUSE, MAP_RETRY, MAP_REST = 1.0, 60.0, 20.0
"""Seconds from one look whether the map is old to the next, and after a failure, and how long it rests, in times of
what drawing took."""
HOUSEKEEPING = 3600.0
"""Seconds between two deletions of old records, and two looks for drift."""


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
        self.drift: Drift | None = None
        self.reference_map: ReferenceMap | None = None
        self._detector = detector
        self._ready = False
        self._decoders = ThreadPoolExecutor(usable_cores(), "decode")
        self._askers = ThreadPoolExecutor(2 * usable_cores(), "ask")
        self._workers = ThreadPoolExecutor(DATABASE_THREADS, "work")
        self._enrollers = ThreadPoolExecutor(ENROLLING_THREADS, "enrol")
        self._thumbnailers = ThreadPoolExecutor(THUMBNAILS_AT_ONCE, "thumbnail")
        self._thumbnails = Admission(THUMBNAILS_AT_ONCE, MOST_THUMBNAILS, "thumbnails")
        self._pictureless: dict[int, float] = {}  # until when, by the reference's id
        self._decoding = Admission(usable_cores(), MOST_DECODING, "images")
        self._enrolling = Admission(ENROLLING_THREADS, MOST_ENROLLING, "enrolments")
        self._requested = 0  # images of requests that are in work
        self._between = asyncio.Semaphore(max(1, usable_cores() - 1))
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
        """`start` off the event loop, again and again until database and object storage answer.

        What else goes wrong is kept in `failure`, and readiness tells it: restarting might help, waiting will not.
        """
        while not self._ready:
            try:
                await self.run(self.start)
            except (*DATABASE_AWAY, DatabaseBehind, BlobsAway, ApiError) as error:
                self.failure = public_detail(error)
                what = "object storage" if isinstance(error, BlobsAway) else "the database"
                log.warning(f"waiting for {what}", extra={"reason": " ".join(str(error).split())})
                await asyncio.sleep(RETRY)
            except Exception as error:
                self.failure = public_detail(error)
                log.exception("loading failed")
                return

    def start(self) -> None:
        """Load and calibrate what is not yet, and begin to follow and compute. Blocks; raises what loading raises.

        Where calibrating fails, verdicts say that nothing is calibrated, and the calibrator goes on trying.
        """
        if self._detector is None:
            self._detector = load_detector(self.settings)
        detector = self._detector
        self._keys = Keys(detector.store.keys, detector.breaker)
        self._keys.exist()
        try:
            detector.calibrator.refresh()  # or the first verdicts would be uncertain while it is being fitted
        except Exception:
            log.warning("the first calibration failed; serving without one, and trying again", exc_info=True)
        self._serving = Serving(detector, self._decoders, self._decoding, self.metrics)
        self._watch()
        self._ready = True

    async def follow_active(self) -> None:
        """Serve the active checkpoint whenever another one has become that. Runs until cancelled.

        The new one is loaded beside the old, which answers meanwhile, and which then finishes what it has begun. Where
        it cannot be loaded, or a setting names the old one, that is said, and the old one goes on.
        """
        last_reason: str | None = None
        while True:
            await asyncio.sleep(LOOK)
            if not self._ready or self._serving.detector.inactive is None:
                continue
            old = self._serving
            if not old.detector.named:
                old.detector.hindrance = None
                try:
                    self._detector = await self.run(load_successor, old.detector)
                    self._serving = Serving(self._detector, self._decoders, self._decoding, self.metrics)
                except Exception as error:  # the old one goes on; what hinders may pass, or be put right
                    old.detector.hindrance = " ".join(str(error).split()) or type(error).__name__
                else:
                    log.info("another checkpoint serves", extra={"checkpoint": self.detector.embedder.id})
                    await self._retire(old)
                    last_reason = None
                    continue
            reason = f"{old.detector.inactive} {old.detector.hindrance or ''}".rstrip()
            if reason != last_reason:
                log.warning("the active checkpoint does not serve", extra={"reason": reason})
                last_reason = reason
            await asyncio.sleep(RETRY)

    async def _retire(self, old: Serving) -> None:
        self._retired = old
        while old.users:
            await asyncio.sleep(LOOK)
        try:
            await self.run(old.stop)
        except Exception:  # whatever ends it badly, the active checkpoint is to be followed
            log.exception("the checkpoint that served before did not stop as it should")
        self._retired = None

    async def keep_house(self) -> None:
        """Delete what is older than the settings allow or has lost its row, and look for drift: first, then each hour.

        Runs until cancelled.
        """
        while True:
            if self._ready:
                await self._look_for_drift()
                store = self.detector.store
                await self._delete_old("records", store.detections.delete, self.settings.record_days)
                await self._delete_old("jobs", store.jobs.delete_ended, self.settings.job_days)
                await self._move_thumbnails()
                await self._drain_blobs()
            await asyncio.sleep(HOUSEKEEPING if self._ready else 1)

    async def keep_map(self) -> None:
        """Draw the map of the references anew after each change of the index. Runs until cancelled.

        It has a twentieth of the time at most, so that it slows no long enrolment.
        """
        while True:
            start, pause = time.monotonic(), MAP_PAUSE
            if self._ready:
                detector, drawn = self.detector, self.reference_map
                checkpoint_id, revision = detector.embedder.id, detector.follower.revision
                # A map is of the rows, and may be newer than an index that still follows them.
                if drawn is None or drawn.checkpoint_id != checkpoint_id or drawn.revision < revision:
                    try:
                        self.reference_map = await run_in(
                            self._counters, draw_map, detector.store, checkpoint_id, drawn
                        )
                    except Exception as error:
                        log.warning("no map was drawn", extra={"reason": " ".join(str(error).split())})
                        pause = MAP_RETRY
            await asyncio.sleep(max(pause, MAP_REST * (time.monotonic() - start)))

    async def _delete_old(self, things: str, delete: Callable[[datetime], int], days: int) -> None:
        """Delete what is older than so many days, where there are any."""
        if days:
            try:
                deleted = await self.run(delete, datetime.now(UTC) - timedelta(days=days))
                log.info(f"{things} deleted", extra={things: deleted, "days": days})
            except DATABASE_AWAY:
                log.warning(f"{things} could not be deleted; trying again")

    async def _move_thumbnails(self) -> None:
        """Move the thumbnails of verdicts to object storage, where it is used."""
        await self._in_steps(
            "thumbnails could not be moved", lambda: self.detector.store.detections.move_thumbnails() < MOVED
        )

    async def _drain_blobs(self) -> None:
        """Delete objects of references that were removed."""
        await self._in_steps("objects could not be deleted", lambda: self.detector.store.blobs.drain_some().last)

    async def _in_steps(self, failure: str, step: Callable[[], bool]) -> None:
        """Do a step of work on object storage in each call of a thread, so that closing ends it, up to the last."""
        try:
            while not await self.run(step):
                pass
        except (*DATABASE_AWAY, BlobsAway) as error:
            log.warning(f"{failure}; trying again", extra={"reason": public_detail(error)})

    async def _look_for_drift(self) -> None:
        """Compare the last complete day, for status and metrics; what hinders it hinders nothing else."""
        detector = self.detector
        calibration = detector.calibrator.current.calibration
        try:
            report = await run_in(self._counters, drift, detector.store, detector.embedder.id, calibration)
        except Exception as error:
            log.warning("drift was not looked for", extra={"reason": " ".join(str(error).split())})
            return
        self.drift = Drift.model_validate(report)
        for against, p_value in report["p_values"].items():
            self.metrics.drift.labels(against).set(math.nan if p_value is None else p_value)

    def close(self) -> None:
        """Finish what was begun, then stop every thread."""
        was_ready, self._ready = self._ready, False
        self._decoders.shutdown(cancel_futures=True)
        self._workers.shutdown()
        self._enrollers.shutdown()
        self._thumbnailers.shutdown()
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
        return await run_in(self._workers, work, *args, **kwargs)

    def check_capacity(self) -> None:
        """Whether an image that came now would be judged in time, by an index that is up to date.

        One that is stale for want of the database, or of a search engine that has not caught up, is good enough: all
        replicas share that.

        Raises:
            ApiError: not-ready.
        """
        wait, follower = self._decoding.wait, self.serving.detector.follower
        if self._decoding.full or wait > self.settings.request_seconds / 2:
            detail = f"{self._decoding.inside} images are in work or wait, which takes about {wait:.0f} s"
            raise ApiError("not-ready", detail, retry_after=wait)
        if (lag := follower.lag) > STALE_SECONDS and not follower.away:
            raise ApiError("not-ready", f"the index has not been known to be complete for {lag:.0f} s", retry_after=5)

    async def keys_exist(self, secret: str) -> bool:
        """Whether any key was ever made, see `Keys.exist`."""
        self.detector  # noqa: B018 - not ready before there are keys to ask
        remembered = self._keys.remembered(secret)  # a thread for what is known would cost more than all the rest
        return await run_in(self._askers, self._keys.exist, secret) if remembered is None else remembered

    async def authenticate(self, secret: str, address: str | None) -> Caller:
        """The owner of a key, see `Keys.authenticate`."""
        return await run_in(self._askers, self._keys.authenticate, secret, address)

    async def detect(self, uploads: Sequence[Upload], question: Question, caller: Caller) -> list[Verdict | ApiError]:
        """Judge the images of one request, side by side; answers are in the order of the uploads."""
        with self._request(len(uploads)):
            return await self._judge(uploads, question, caller)

    async def detect_between(self, upload: Upload, question: Question, caller: Caller) -> Verdict | ApiError:
        """Judge an image that nobody waits for, while no request's image is in work, or after a second without that.

        So it goes on under load, slowly. Of such images one core is always free for requests, where there are two.
        """
        async with self._between:
            deadline = time.monotonic() + GAP_SECONDS
            while self._requested and time.monotonic() < deadline:
                await asyncio.sleep(GAP_LOOK)
            [result] = await self._judge([upload], question, caller)
            return result

    @contextmanager
    def _request(self, images: int) -> Iterator[None]:
        """A request with so many images is in work."""
        self._requested += images
        try:
            yield
        finally:
            self._requested -= images

    async def _judge(self, uploads: Sequence[Upload], question: Question, caller: Caller) -> list[Verdict | ApiError]:
        serving = self.serving

        async def one(upload: Upload) -> Verdict:
            verdict = await serving.judge(await serving.embed(upload, question, caller.key_id))
            hide_paths(verdict.neighbours, caller)
            return verdict

        with serving.used():
            results = await _each(uploads, one, EXPLAINED_AT_ONCE if question.explain else AT_ONCE)
        self.metrics.judged(results, final=question.record)
        return results

    async def search(self, uploads: Sequence[Upload], query: SearchQuery, caller: Caller) -> list[Hits | ApiError]:
        """The references nearest to each image of one request."""
        serving = self.serving
        search = serving.detector.neighbourhood.search

        async def one(upload: Upload) -> Hits:
            case = await serving.embed(upload)
            neighbours, following = await run_in(self._askers, search, case.embeddings[0], query)
            hide_paths(neighbours, caller)
            return Hits(file=upload.file, neighbours=neighbours, next=following)

        with serving.used(), self._request(len(uploads)):
            return await _each(uploads, one)

    async def thumbnail(self, id: int) -> bytes | None:
        """The thumbnail of a reference; one that is not kept is made of its file, where that may be read.

        One whose object is lost is also made of the kept upload.

        Raises:
            ApiError: not-ready, where too many are being made.
            BlobsAway: Object storage cannot be used.
        """
        references, places = self.detector.store.references, self.settings.thumbnail_places
        kept = await self.run(references.thumbnail, id)
        if kept is not None:
            return kept
        reference = await self.run(references.get, id)
        failed = time.monotonic() < self._pictureless.get(id, 0.0)
        if reference is None or thumbnail_path(reference, places) is None or failed:
            return None
        return await run_admitted(
            self._thumbnails, THUMBNAIL_SECONDS, self._thumbnailers, self._make_thumbnail, reference
        )

    def _make_thumbnail(self, reference: Reference) -> bytes | None:
        settings = self.settings
        try:
            return make_thumbnail(
                self.detector.store,
                reference,
                settings.thumbnail_places,
                private_addresses=settings.private_addresses,
                max_pixels=settings.max_pixels,
                seconds=settings.image_seconds,
                deadline=deadline_in_use(),
            )
        except DeadlinePassed as error:
            raise ApiError("not-ready", f"a thumbnail: {error}; try again", retry_after=THUMBNAIL_SECONDS) from error
        except (Refused, LimitExceeded) as error:
            log.info("no thumbnail was made", extra={"reference": reference.id, "reason": str(error)})
            if len(self._pictureless) >= MOST_FAILURES:
                self._pictureless.clear()
            self._pictureless[reference.id] = time.monotonic() + FAILURE_SECONDS
            return None

    async def status(self) -> Status:
        """What is loaded, followed and calibrated. In threads of its own: who asks for it may wait, nobody else."""
        return await run_in(self._counters, status, self.detector, self.drift)

    async def enrol(self, work: Callable[[Detector], T], images: int) -> T:
        """Add so many images as references.

        Where the active checkpoint changes meanwhile, this is done with the new one.
        """
        while True:
            serving = self.serving
            try:
                seconds = ENROL_SECONDS * images
                with serving.used():
                    return await run_admitted(self._enrolling, seconds, self._enrollers, work, serving.detector)
            except CheckpointSwitched:
                log.info("waiting for the active checkpoint")
            while self._serving is serving:
                if serving.detector.hindrance:
                    raise ApiError("not-ready", f"nothing can be added: {serving.detector.inactive}", retry_after=60)
                await asyncio.sleep(LOOK)

    def _watch(self) -> None:
        """Let the gauges read what they show when they are asked."""

        def show(gauge: Gauge, value: Callable[[Serving], float]) -> None:
            gauge.set_function(lambda: value(self._serving))

        metrics = self.metrics
        show(metrics.queue, lambda now: now.embedding.waiting + now.judging.waiting)
        show(metrics.revision, lambda now: now.detector.follower.revision)
        show(metrics.lag, lambda now: now.detector.follower.lag)
        show(metrics.engine_away, lambda now: now.detector.follower.engine_away)
        show(metrics.degraded, lambda now: now.detector.follower.degraded)
        show(metrics.inactive, lambda now: now.detector.inactive is not None)
        show(metrics.calibration, lambda now: now.detector.calibrator.current.revision or 0)
        show(metrics.index_size.labels("real"), lambda now: now.detector.follower.index.counts()[0])
        show(metrics.index_size.labels("fake"), lambda now: now.detector.follower.index.counts()[1])


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
