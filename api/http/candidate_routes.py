"""Calls about groups of judged images that may be a new generator's."""

from functools import partial
from typing import Annotated

from fastapi import Path

from api.candidates import candidates, enrol
from api.http.dependencies import Enrolling, Loaded, Served, v1_router
from api.schemas.problems import documented
from api.schemas.resources import Added, CandidateEnrolment, Candidates

router = v1_router("candidates")
EXPECTED_IMAGES = 50
"""Of a candidate, for the time that its enrolment is expected to take."""


@router.get("/candidates", responses=documented("not-installed"))
async def list_candidates(service: Served, detector: Loaded, caller: Enrolling) -> Candidates:
    """Groups of judged images that no reference explains; an admin sees those of all keys, others their own."""
    return await service.run(candidates, detector, caller)


@router.post("/candidates/{name}/enrol", responses=documented("not-found", "conflict", "not-installed"))
async def enrol_candidate(
    service: Served,
    caller: Enrolling,
    name: Annotated[str, Path(max_length=200)],
    wanted: CandidateEnrolment,
) -> Added:
    """Make a candidate's images references of a generator; `DELETE /v1/enrolments/{id}` undoes it.

    A candidate that was enrolled as this generator already adds nothing.
    """
    return await service.enrol(partial(enrol, name=name, wanted=wanted, caller=caller), EXPECTED_IMAGES)
