"""Groups of judged images that may be a new generator's, as a caller may see them, and their enrolment."""

from functools import cache, partial
from threading import BoundedSemaphore

import numpy as np

from api.access import Caller
from api.enrolment import measured
from api.inflight import deadline_in_use
from api.judge.detector import Detector
from api.judge.evidence import thumbnail_path
from api.schemas.problems import ApiError
from api.schemas.resources import Added, CandidateEnrolment, Candidates
from indexer.measure.discovery import Discovery, cluster, discover, enrol_candidate
from trainer.process_pool import DeadlinePassed, LimitExceeded, ProcessPool

GROUPINGS = 2
"""Searches for candidates that a service works on at a time: each holds a thread that other calls need."""
_turns = BoundedSemaphore(GROUPINGS)
GROUPING_SECONDS = 60.0
GROUPING_MEMORY = 2**32
"""Bytes that the process which groups may have: all distances between some thousand images, several times."""


def candidates(detector: Detector, caller: Caller) -> Candidates:
    """The candidates among the verdicts that this caller may read: those of its own key, or all for the scope admin.

    Raises:
        ApiError: not-installed, where scikit-learn is not; not-ready, where grouping takes too long.
    """
    report = _discovery(detector, caller).summary()
    images = [image for candidate in report["candidates"] for image in candidate["examples"]]
    references = detector.store.references.get_many({image["nearest"]["id"] for image in images if image["nearest"]})
    for image in images:
        pictured, near = image.pop("pictured"), image["nearest"]
        image["thumbnail"] = f"/v1/detections/{image['detection']}/thumbnail" if pictured else None
        if near and (reference := references.get(near["id"])):
            near["uri"] = caller.visible(reference.uri or None)
            near["thumbnail"] = thumbnail_path(reference, detector.settings.thumbnail_places)
    return Candidates.model_validate(report)


def enrol(detector: Detector, name: str, wanted: CandidateEnrolment, caller: Caller) -> Added:
    """Make references of a candidate's images, bring this process's index up to date, and measure what that changed.

    Raises:
        ApiError: As `candidates`.
        UnknownCandidate: The caller may see none of this name.
        CandidateEnrolled: It was enrolled as another generator.
        CheckpointSwitched: The detector's checkpoint is no longer the active one, though no setting names it.
    """
    search = partial(_discovery, detector, caller)
    report = enrol_candidate(
        detector.follower,
        search,
        name,
        wanted.generator,
        source=wanted.source,
        while_active=not detector.named,
    )
    return measured(detector, Added.model_validate(report))


def _discovery(detector: Detector, caller: Caller) -> Discovery:
    if not _turns.acquire(blocking=False):
        detail = f"{GROUPINGS} searches for candidates are in work; try again"
        raise ApiError("not-ready", detail, retry_after=GROUPING_SECONDS)
    try:
        return _discover(detector, caller)
    finally:
        _turns.release()


def _discover(detector: Detector, caller: Caller) -> Discovery:
    calibration, everybody = detector.calibrator.current.calibration, caller.may("admin")
    try:
        return discover(detector.follower, calibration, owner=caller.key_id, everybody=everybody, group=_grouped)
    except ModuleNotFoundError as error:
        library = (error.name or "a library").partition(".")[0]
        detail = f'finding candidates needs {library}, which is not installed here: pip install "lineup[train]"'
        raise ApiError("not-installed", detail) from error
    except LimitExceeded as error:
        detail = f"grouping takes more than {GROUPING_SECONDS:g} s here; `lineup index discover` may take longer"
        raise ApiError("not-ready", detail, retry_after=GROUPING_SECONDS) from error
    except DeadlinePassed as error:
        raise ApiError("not-ready", f"grouping: {error}; try again", retry_after=GROUPING_SECONDS) from error


@cache
def _grouping_pool() -> ProcessPool:
    """One process of its own: it keeps scikit-learn out of the service, and other calls have the cores beside it."""
    return ProcessPool(1)


def _grouped(vectors: np.ndarray, smallest: int) -> np.ndarray:
    """As `cluster`, which does it in that process."""
    return _grouping_pool().call(
        cluster, vectors, smallest, seconds=GROUPING_SECONDS, memory=GROUPING_MEMORY, deadline=deadline_in_use()
    )
