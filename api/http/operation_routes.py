"""Calls of operators: the state of the service, its health, and its numbers."""

import asyncio

from fastapi import APIRouter, Response

from api.http.dependencies import DOCUMENTED_BEARER, Loaded, Reading, Served
from api.monitoring import CONTENT_TYPE
from api.schemas.problems import documented
from api.schemas.resources import CalibrationState, Health, Status
from api.service_status import calibration_state

router = APIRouter(tags=["operations"])


@router.get("/v1/status", dependencies=[DOCUMENTED_BEARER], responses=documented())
async def get_status(service: Served, caller: Reading) -> Status:
    """What is loaded, followed and calibrated."""
    return await service.status()


@router.get("/v1/calibration", dependencies=[DOCUMENTED_BEARER], responses=documented())
async def get_calibration(detector: Loaded, caller: Reading) -> CalibrationState:
    """The calibration in use and what it promises."""
    return calibration_state(detector)


@router.get("/health/live")
async def live() -> Health:
    """The process answers."""
    return Health(status="live")


@router.get("/health/ready", responses=documented("not-ready"))
async def ready(service: Served) -> Health:
    """The checkpoint is loaded, the index followed, even if it is empty, what can be calibrated is, and an image that
    came now would have its turn in time.
    """
    service.check_capacity()
    return Health(status="ready")


@router.get("/metrics", response_class=Response)
async def show_metrics(service: Served, caller: Reading) -> Response:
    """Numbers for Prometheus."""
    page = await asyncio.to_thread(service.metrics.page)  # it counts the index, whose lock an addition may hold
    return Response(page, media_type=CONTENT_TYPE)
