"""Calls about verdicts that were recorded."""

from typing import Annotated
from uuid import UUID

from fastapi import Query, Response

from api import verdict_log
from api.http.dependencies import Admin, Detecting, Jpeg, Limit, Loaded, Served, existing, v1_router
from api.schemas.problems import documented
from api.schemas.resources import Detection, DetectionPage, Feedback, Replay

router = v1_router("records")


class Png(Response):
    media_type = "image/png"


@router.get("/detections", responses=documented())
async def list_detections(
    service: Served,
    detector: Loaded,
    caller: Admin,
    after: Annotated[UUID | None, Query(description="`next` of the page before.")] = None,
    limit: Limit = 50,
) -> DetectionPage:
    """All verdicts that were recorded, newest first."""
    return verdict_log.page(await service.run(detector.store.detections.list, before=after, limit=limit), limit)


@router.get("/detections/{id}", responses=documented("not-found"))
async def get_detection(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> Detection:
    """A recorded verdict, for the key that asked for it, or an admin."""
    return verdict_log.detection(await service.run(verdict_log.find, detector, caller, id), caller)


@router.get("/detections/{id}/overlay", responses=documented("not-found"), response_class=Png)
async def get_overlay(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> Response:
    """The regions of a verdict as a transparent PNG of the image's shape, red where fake and blue where real."""
    row = await service.run(verdict_log.find, detector, caller, id)
    return Png(await service.run(verdict_log.regions_png, row))


@router.get("/detections/{id}/thumbnail", responses=documented("not-found"), response_class=Jpeg)
async def get_judged_thumbnail(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> Response:
    """The image that was judged, its longest side at most 256 pixels, where LINEUP_KEEP_THUMBNAILS let it be kept."""
    await service.run(verdict_log.find, detector, caller, id)
    thumbnails = await service.run(detector.store.detections.thumbnails, [id])
    return Jpeg(existing(thumbnails.get(id), f"thumbnail of detection {id}"))


@router.post("/detections/{id}/replay", responses=documented("not-found", "conflict"))
async def replay_detection(service: Served, detector: Loaded, caller: Detecting, id: UUID) -> Replay:
    """Judge the recorded embedding again with the index and calibration of now, and tell what changed."""
    row = await service.run(verdict_log.find, detector, caller, id)
    return await service.run(verdict_log.replay, detector, row, caller)


@router.post("/detections/{id}/feedback", responses=documented("not-found"))
async def give_feedback(
    service: Served, detector: Loaded, caller: Detecting, id: UUID, feedback: Feedback
) -> Detection:
    """Dispute or confirm a verdict. It is kept with the record and changes nothing else."""
    row = await service.run(verdict_log.find, detector, caller, id)
    return await service.run(verdict_log.dispute, detector, row, feedback, caller)
