"""Verdicts that were given: shown again, recomputed at today's revision, and drawn.

They are read as they were written, never checked against today's `Verdict`: fields come and go, records stay.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from uuid import UUID

from api.access import Caller, hide_paths
from api.judge.detector import FLIPS, Case, Detector
from api.judge.regions import overlay
from api.judge.uploads import Prepared, Question, shown_windows
from api.schemas.problems import ApiError
from api.schemas.resources import Asked, Change, Detection, DetectionPage, DetectionSummary, Feedback, Replay
from api.schemas.verdicts import ImageFacts, Region, Verdict
from indexer.store.detections import Detection as DetectionRow
from indexer.store.detections import ListedDetection

COMPARED = (
    "verdict",
    "basis",
    "score",
    "thresholds.fake",
    "thresholds.real",
    "false_alarm",
    "heads.knn.score",
    "heads.knn.label",
    "heads.nn1.id",
    "heads.nn1.label",
    "heads.linear.score",
    "heads.svm.score",
    "generators.0.name",
    "unknown_generator",
    "novelty",
    "known.id",
    "model.heads",
    "index.revision",
    "index.size",
    "calibration.revision",
)
"""What a replay reports, as paths into the verdict's JSON."""


def find(detector: Detector, caller: Caller, detection_id: UUID) -> DetectionRow:
    """A record, for who made it or holds the scope admin.

    Raises:
        ApiError: not-found, also for a record that is someone else's.
    """
    row = detector.store.detections.get(detection_id)
    if row is None or not (caller.may("admin") or row.api_key_id == caller.key_id):
        raise ApiError("not-found", f"there is no detection {detection_id}")
    return row


def detection(row: DetectionRow, caller: Caller) -> Detection:
    """A record with its whole verdict, as this caller may see it."""
    assert row.at is not None  # the database sets it
    result = dict(row.result)
    version = result.pop("version", 0)
    question = Asked.model_validate(result.pop("question", {}), extra="ignore")
    if neighbours := result.get("neighbours"):
        result["neighbours"] = [near | {"uri": caller.visible(near.get("uri"))} for near in neighbours]
    return Detection(
        id=str(row.id), at=row.at, version=version, result=result, question=question, feedback=row.feedback
    )


def page(rows: Sequence[ListedDetection], limit: int) -> DetectionPage:
    """A page of records, newest first."""
    summaries = [DetectionSummary(**asdict(row) | {"id": str(row.id)}) for row in rows]
    return DetectionPage(detections=summaries, next=summaries[-1].id if len(rows) == limit else None)


def regions_png(row: DetectionRow) -> bytes:
    """The regions of a record as a transparent PNG.

    Raises:
        ApiError: not-found, for a verdict without regions.
    """
    regions = row.result.get("regions")
    if regions is None:
        detail = f"detection {row.id} has no regions; detect with explain=regions, which leaves flat ones out"
        raise ApiError("not-found", detail)
    return overlay(row.width, row.height, [Region.model_validate(region, extra="ignore") for region in regions])


def replay(detector: Detector, row: DetectionRow, caller: Caller) -> Replay:
    """Vote and heads again on the embedding that was kept, against the index and the calibration of now.

    The question is the one that was asked then. Regions and stability would need the image, which was not kept; where
    a flip made the verdict uncertain, it does so still, and what was too little to judge is that still.

    Raises:
        ApiError: conflict, when another checkpoint made the embedding.
    """
    if row.checkpoint_id != detector.embedder.id:
        detail = f"detection {row.id} was embedded by checkpoint {row.checkpoint_id}; serving {detector.embedder.id}"
        raise ApiError("conflict", detail)
    record, preprocess = detection(row, caller), detector.embedder.preprocess
    before, question = record.result, record.question
    image = ImageFacts(
        sha256=row.sha256,
        width=row.width,
        height=row.height,
        format=_at(before, "image.format") or "unknown",
        crop=preprocess.box(row.width, row.height),
        windows=shown_windows(preprocess, row.width, row.height),
        shortfall=_at(before, "image.shortfall"),
    )
    prepared = Prepared(
        file=before.get("file", "unnamed"),
        file_bytes=row.file_bytes,
        image=image,
    )
    case = Case(prepared, row.vector[None], Question(question.k, question.max_false_alarm))  # (1, d)
    [after] = detector.judge([case])
    after.id = record.id
    hide_paths(after.neighbours, caller)
    if detector.settings.flip_uncertain and before.get("reason") == FLIPS and after.basis == "score":
        after.verdict, after.reason, after.unknown_generator = "uncertain", FLIPS, False
    return Replay(before=before, after=after, changed=changes(before, after))


def changes(before: Mapping[str, Any], after: Verdict) -> list[Change]:
    """Where a verdict differs from an earlier one on the same image, which is given as JSON."""
    new = after.model_dump(mode="json")
    pairs = [(path, _at(before, path), _at(new, path)) for path in COMPARED]
    return [Change(field=path, before=was, after=now) for path, was, now in pairs if not _same(was, now)]


def dispute(detector: Detector, row: DetectionRow, feedback: Feedback, caller: Caller) -> Detection:
    """Keep what a person says of a verdict; a second time replaces the first."""
    detector.store.detections.set_feedback(row.id, feedback.model_dump(mode="json") | {"by": caller.name})
    return detection(find(detector, caller, row.id), caller)


def _same(was: Any, now: Any) -> bool:
    """Equal, but for what sums in another order may differ by."""
    if isinstance(was, float) and isinstance(now, float):
        return math.isclose(was, now, rel_tol=1e-6, abs_tol=1e-9)
    return bool(was == now)


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(value, list):
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value
