"""The errors that the API answers with: one kind per line of the table, as RFC 9457 problems."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from api.schemas import Model, absent

Kind = Literal[
    "unreadable",
    "bad-request",
    "unauthorized",
    "forbidden",
    "not-found",
    "method-not-allowed",
    "conflict",
    "too-large",
    "not-an-image",
    "bad-field",
    "too-many-requests",
    "not-ready",
    "not-installed",
    "not-fetched",
    "internal",
]

PROBLEMS: dict[Kind, tuple[int, str]] = {
    "unreadable": (400, "The image cannot be read"),
    "bad-request": (400, "The request cannot be read"),
    "unauthorized": (401, "An API key or the token is needed"),
    "forbidden": (403, "Not allowed"),
    "not-found": (404, "Not found"),
    "method-not-allowed": (405, "Method not allowed"),
    "conflict": (409, "Conflict"),
    "too-large": (413, "Too large"),
    "not-an-image": (415, "Not an image of an accepted format"),
    "bad-field": (422, "A field is not valid"),
    "too-many-requests": (429, "Too many requests"),
    "not-ready": (503, "Not ready"),
    "not-installed": (501, "A library is not installed"),
    "not-fetched": (502, "The image could not be fetched"),
    "internal": (500, "The server failed"),
}
"""Status and title of each kind."""
ANYWHERE: tuple[Kind, ...] = (
    "bad-request",
    "unauthorized",
    "forbidden",
    "too-large",
    "bad-field",
    "too-many-requests",
    "not-ready",
)
"""Kinds that any call may answer with."""


class FieldError(Model):
    field: str
    message: str


class Conflict(Model):
    """The same bytes are known with another label or generator."""

    file: str
    sha256: str
    has: str
    wants: str


class Problem(Model):
    """RFC 9457 problem details."""

    type: str
    """`urn:lineup:` and the kind of problem."""
    title: str
    status: int
    detail: str
    request_id: Annotated[str | None, Field(exclude_if=absent)] = None
    errors: Annotated[list[FieldError] | None, Field(exclude_if=absent)] = None
    conflicts: Annotated[list[Conflict] | None, Field(exclude_if=absent)] = None


class FailedFile(Model):
    """A file of a batch that could not be judged; the others are."""

    file: str
    error: Problem


@dataclass(eq=False)
class ApiError(Exception):
    """A problem on its way to the caller.

    Args:
        kind: A key of `PROBLEMS`.
        detail: What came, what was expected, and what to change.
        retry_after: Seconds after which trying again makes sense.
    """

    kind: Kind
    detail: str
    retry_after: float | None = None
    errors: list[FieldError] | None = None
    conflicts: list[Conflict] | None = None

    def __str__(self) -> str:
        return self.detail

    @property
    def status(self) -> int:
        """The HTTP status."""
        return PROBLEMS[self.kind][0]

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it into the response's head."""
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return headers | ({"www-authenticate": "Bearer"} if self.kind == "unauthorized" else {})

    def problem(self, request_id: str | None = None) -> Problem:
        """The JSON body."""
        status, title = PROBLEMS[self.kind]
        return Problem(
            type=f"urn:lineup:{self.kind}",
            title=title,
            status=status,
            detail=self.detail,
            request_id=request_id,
            errors=self.errors,
            conflicts=self.conflicts,
        )


def documented(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's account of the problems that a call may answer with, beside those that any call may.

    Of two kinds with one status the one that is named here is the example.
    """
    responses: dict[int | str, dict[str, Any]] = {}
    for kind in (*ANYWHERE, *kinds):
        status, title = PROBLEMS[kind]
        example = ApiError(kind, title).problem("4f6c0a2e").model_dump()
        schema = {"$ref": "#/components/schemas/Problem"}
        responses[status] = {
            "description": title,
            "content": {"application/problem+json": {"schema": schema, "example": example}},
        }
    return responses


def from_status(status: int, detail: str) -> ApiError:
    """A problem for a status that the web framework chose."""
    kinds: dict[int, Kind] = {number: kind for kind, (number, _) in PROBLEMS.items() if kind != "unreadable"}
    return ApiError(kinds.get(status, "internal" if status >= 500 else "bad-request"), detail)
