"""Calls about enrolments."""

from functools import partial
from typing import Annotated

from fastapi import Query

from api.enrolment import remove
from api.http.dependencies import Enrolling, Id, Limit, Loaded, Reading, Served, existing, v1_router
from api.schemas.problems import documented
from api.schemas.resources import Enrolment, Enrolments, Removed

router = v1_router("enrolments")


@router.get("/enrolments", responses=documented())
async def list_enrolments(
    service: Served,
    detector: Loaded,
    caller: Reading,
    after: Annotated[int | None, Query(ge=1, le=2**63 - 1, description="`next` of the page before.")] = None,
    limit: Limit = 50,
) -> Enrolments:
    """What was added when, newest first."""
    rows = await service.run(detector.store.enrolments.list, before=after, limit=limit)
    page = [Enrolment.model_validate(row, from_attributes=True) for row in rows]
    return Enrolments(enrolments=page, next=page[-1].id if len(page) == limit else None)


@router.get("/enrolments/{id}", responses=documented("not-found"))
async def get_enrolment(service: Served, detector: Loaded, caller: Reading, id: Id) -> Enrolment:
    """One enrolment and its report."""
    row = existing(await service.run(detector.store.enrolments.get, id), f"enrolment {id}")
    return Enrolment.model_validate(row, from_attributes=True)


@router.delete("/enrolments/{id}", responses=documented("not-found"))
async def undo_enrolment(service: Served, detector: Loaded, caller: Enrolling, id: Id) -> Removed:
    """Undo an enrolment: remove the references that it added."""
    existing(await service.run(detector.store.enrolments.get, id), f"enrolment {id}")
    return await service.run(remove, detector, partial(detector.store.references.remove, enrolment=id))
