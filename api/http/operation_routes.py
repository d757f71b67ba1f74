"""Calls of operators: the state of the service, its health, and its numbers."""

from fastapi import APIRouter, Response

from api.http.dependencies import Loaded, Reading, Served, v1_router
from api.monitoring import CONTENT_TYPE
from api.schemas.problems import documented
from api.schemas.resources import CalibrationState, Health, Status
from api.service_status import calibration_state

router = v1_router("operations")
probes = APIRouter(tags=["operations"])


@router.get("/status", responses=documented())
async def get_status(service: Served, caller: Reading) -> Status:
    """What is loaded, followed and calibrated."""
    return await service.status()


@router.get("/calibration", responses=documented())
async def get_calibration(detector: Loaded, caller: Reading) -> CalibrationState:
    """The calibration in use and what it promises."""
    return calibration_state(detector)


@probes.get("/health/live")
async def live() -> Health:
    """The process answers."""
    return Health(status="live")


@probes.get("/health/ready", responses=documented("not-ready"))
async def ready(detector: Loaded) -> Health:
    """The checkpoint is loaded, the index followed, even if it is empty, and what can be calibrated is."""
    return Health(status="ready")


@probes.get("/metrics", response_class=Response)
async def show_metrics(service: Served, caller: Reading) -> Response:
    """Numbers for Prometheus."""
    return Response(service.metrics.page(), media_type=CONTENT_TYPE)
