"""Generators, and the enrolments that brought references of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from indexer.rows import Rows

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")
RESERVED = frozenset({"real", "all", "unknown", "none"})


class BadGeneratorName(ValueError):
    """A generator name that breaks the rule."""


class GeneratorExists(ValueError):
    """Another generator has this name, upper and lower case being the same."""


class UnknownGenerator(LookupError):
    """No generator has this name."""


@dataclass(frozen=True, slots=True)
class Generator:
    """A named source of fakes, and how many references it has."""

    id: int
    name: str
    family: str | None
    vendor: str | None
    version: str | None
    released_on: date | None
    notes: str | None
    created_at: datetime
    references: int = 0


@dataclass(frozen=True, slots=True)
class Enrolment:
    """One addition of references: when, of what, and what it changed (`report`, None while it runs or was killed)."""

    id: int
    at: datetime
    generator: str | None
    source: str | None
    report: dict[str, Any] | None


def check_generator_name(name: str) -> str:
    """The name itself when it is allowed.

    Raises:
        BadGeneratorName: Other characters, too long, or a reserved word.
    """
    if not NAME.fullmatch(name):
        raise BadGeneratorName(
            f"generator name {name!r} may hold 1 to 100 letters, digits, spaces and . _ + -, a letter or digit first"
        )
    if name.lower() in RESERVED:
        raise BadGeneratorName(f"generator name {name!r} is reserved, like {', '.join(sorted(RESERVED))}")
    return name


class Generators(Rows):
    """Generators are unique by name without regard to case."""

    def create_generator(
        self,
        name: str,
        *,
        family: str | None = None,
        vendor: str | None = None,
        version: str | None = None,
        released_on: date | None = None,
        notes: str | None = None,
    ) -> Generator:
        """Make a new generator.

        Raises:
            BadGeneratorName: The name breaks the rule.
            GeneratorExists: It exists already.
        """
        raise NotImplementedError

    def get_generator(self, name: str) -> Generator | None:
        """One generator with its number of references, by name without regard to case."""
        raise NotImplementedError

    def generators(self) -> list[Generator]:
        """All generators with their numbers of references, by name."""
        raise NotImplementedError

    def generator_names(self) -> dict[int, str]:
        """Names by id."""
        raise NotImplementedError

    def update_generator(self, name: str, facts: Mapping[str, Any]) -> Generator:
        """Change name, family, vendor, version, released_on or notes.

        Raises:
            UnknownGenerator: No generator has this name.
            BadGeneratorName: The new name breaks the rule.
            GeneratorExists: The new name is taken.
        """
        raise NotImplementedError

    def open_enrolment(self, generator: str | None, source: str | None) -> int:
        """Begin an enrolment; `generator` is given when all its images are of one, and is created if new."""
        raise NotImplementedError

    def finish_enrolment(self, enrolment_id: int, report: Mapping[str, Any]) -> None:
        """Keep what the enrolment changed."""
        raise NotImplementedError

    def get_enrolment(self, enrolment_id: int) -> Enrolment | None:
        """One enrolment."""
        raise NotImplementedError

    def enrolments(self, *, before: int | None = None, limit: int = 50) -> list[Enrolment]:
        """Enrolments, newest first; `before` is the last id of the page before."""
        raise NotImplementedError
