"""One checkpoint at work: its detector, and the threads in which concurrent requests share what it computes."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import ParamSpec, TypeVar

import numpy as np

from api.admission import Admission
from api.batcher import Batcher, BatcherFull, Item, Result
from api.inflight import deadline_in_use, reservation_in_use
from api.judge.detector import Case, Detector
from api.judge.uploads import Question, Upload
from api.monitoring import Metrics
from api.schemas.problems import ApiError
from api.schemas.verdicts import Verdict

CAPACITY, CAPACITY_PER_WINDOW = 512, 48
"""Windows that may wait to be embedded, and how many more for each window beyond the first of an image.

The explained images of one request, three at a time, fill half of it at most.
"""
DECODE_SECONDS, DECODE_SECONDS_PER_BYTE = 0.01, 5e-8
"""What reading an upload takes, and more for each of its bytes: a JPEG on one core, to begin with."""
P = ParamSpec("P")
T = TypeVar("T")


async def run_in(pool: Executor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns in a thread of the pool, which holds the request's bytes until it has ended."""
    return await asyncio.wrap_future(_submit(pool, work, *args, **kwargs))


async def run_admitted(
    admission: Admission, seconds: float, pool: Executor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """As `run_in`, once it is admitted; it counts as admitted until the thread has ended, as a request may do before.

    Raises:
        ApiError: not-ready, where it is not admitted.
    """
    with ExitStack() as place:
        place.enter_context(admission.admitted(seconds, deadline_in_use()))
        future = _submit(pool, work, *args, **kwargs)
        thread_place = place.pop_all()
    future.add_done_callback(lambda _: thread_place.close())
    return await asyncio.wrap_future(future)


def _submit(pool: Executor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    calls = [partial(copy_context().run, partial(work, *args, **kwargs))]
    future = pool.submit(lambda: calls.pop()())
    future.add_done_callback(lambda _: calls.clear())  # the pool keeps what was cancelled until a thread is free
    if reservation := reservation_in_use.get():
        reservation.hold_until(future)
    return future


class Serving:
    """A detector for many uploads at once. Used on the event loop.

    Attributes:
        users: Requests that go on with it.

    Args:
        detector: A loaded one, started here.
        decoders: The threads in which uploads are decoded.
        admission: To these threads.
        metrics: They count batches.
    """

    def __init__(self, detector: Detector, decoders: Executor, admission: Admission, metrics: Metrics) -> None:
        self.detector, self.users, self._decoders, self._admission = detector, 0, decoders, admission
        self.embedding: Batcher[Sequence[np.ndarray], np.ndarray]
        capacity = CAPACITY + CAPACITY_PER_WINDOW * (detector.embedder.preprocess.windows - 1)
        self.embedding = Batcher(
            detector.embedder.embed_stacks, capacity=capacity, observe=metrics.batch.observe, name="embed"
        )
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

    async def embed(self, upload: Upload, question: Question = Question(), api_key_id: int | None = None) -> Case:
        """An upload as it is judged or searched for.

        Raises:
            ApiError: too-large, not-an-image, unreadable, or not-ready where too many images wait.
        """
        seconds = DECODE_SECONDS + DECODE_SECONDS_PER_BYTE * len(upload.data)
        prepared = await run_admitted(self._admission, seconds, self._decoders, self.detector.prepare, upload, question)
        start = time.perf_counter()
        windows = sum(map(len, prepared.views))  # each weighs: a pass has room for so many, and memory
        embeddings = await _join(self.embedding, prepared.views, windows)
        prepared = replace(prepared, views=[])  # the largest part of a case, which may wait to be judged
        return Case(prepared, embeddings, question, 1000 * (time.perf_counter() - start), api_key_id)

    async def judge(self, case: Case) -> Verdict:
        """The verdict on an image, which is recorded where settings, question and database allow it.

        Raises:
            ApiError: not-ready where too many images wait.
        """
        return await _join(self.judging, case, len(case.embeddings))

    def stop(self) -> None:
        """Finish what was begun, then end the threads; a second time changes nothing."""
        self.embedding.close()
        self.judging.close()
        self.detector.stop()


async def _join(batcher: Batcher[Item, Result], item: Item, weight: int) -> Result:
    """The result of an item that is worked on together with those of other requests."""
    try:
        return await asyncio.wrap_future(batcher.submit(item, weight))
    except BatcherFull as error:
        raise ApiError("not-ready", str(error), retry_after=1) from error
