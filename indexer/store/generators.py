"""Generators, and the enrolments that brought references of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from indexer.database.tables import EnrolmentRow, GeneratorRow, ReferenceRow
from indexer.database.transactions import Rows, notify
from trainer.data.entry import generator_fault

FACTS = ("name", "family", "vendor", "version", "released_on", "notes")


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
    references: int = 0
    """Those that are still there."""


def check_generator_name(name: str) -> str:
    """The name itself when it is allowed.

    Raises:
        BadGeneratorName: Other characters, too long, or a reserved word.
    """
    if fault := generator_fault(name):
        raise BadGeneratorName(fault)
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
        facts = {"family": family, "vendor": vendor, "version": version, "released_on": released_on, "notes": notes}
        query = insert(GeneratorRow).values(name=check_generator_name(name), **facts).on_conflict_do_nothing()
        created = self.transaction(lambda connection: connection.scalar(query.returning(GeneratorRow.id)))
        if created is None:
            raise GeneratorExists(f"there is a generator {name!r} already")
        return self.known_generator(name)

    def get_generator(self, name: str) -> Generator | None:
        """One generator with its number of references, by name without regard to case."""
        with self.engine.connect() as connection:
            row = connection.execute(_generators().where(_named(name))).mappings().first()
        return None if row is None else Generator(**row)

    def generators(self) -> list[Generator]:
        """All generators with their numbers of references, by name."""
        with self.engine.connect() as connection:
            return [Generator(**row) for row in connection.execute(_generators()).mappings()]

    def generator_names(self) -> dict[int, str]:
        """Names by id."""
        with self.engine.connect() as connection:
            return {row.id: row.name for row in connection.execute(select(GeneratorRow.id, GeneratorRow.name))}

    def update_generator(self, name: str, facts: Mapping[str, Any]) -> Generator:
        """Change name, family, vendor, version, released_on or notes.

        Raises:
            UnknownGenerator: No generator has this name.
            BadGeneratorName: The new name breaks the rule.
            GeneratorExists: The new name is taken.
            ValueError: Another fact.
        """
        if odd := facts.keys() - FACTS:
            raise ValueError(f"a generator has no {', '.join(sorted(odd))}; it has {', '.join(sorted(FACTS))}")
        new_name = check_generator_name(facts.get("name", name))
        generator = self.known_generator(name)

        def work(connection: Connection) -> None:
            connection.execute(update(GeneratorRow).where(GeneratorRow.id == generator.id).values(**facts))
            notify(connection, "generators")  # followers keep the names

        try:
            if facts:
                self.transaction(work)
        except IntegrityError as error:
            raise GeneratorExists(f"there is a generator {new_name!r} already") from error
        return self.known_generator(new_name)

    def open_enrolment(self, generator: str | None, source: str | None) -> int:
        """Begin an enrolment; `generator` is given when all its images are of one, and is created if new."""

        def work(connection: Connection) -> int:
            generator_id = None if generator is None else generator_ids(connection, [generator])[generator.lower()]
            query = insert(EnrolmentRow).values(generator_id=generator_id, source=source)
            return connection.execute(query.returning(EnrolmentRow.id)).scalar_one()

        return self.transaction(work)

    def finish_enrolment(self, enrolment_id: int, report: Mapping[str, Any]) -> None:
        """Keep what the enrolment changed."""
        query = update(EnrolmentRow).where(EnrolmentRow.id == enrolment_id).values(report=dict(report))
        self.transaction(lambda connection: connection.execute(query))

    def get_enrolment(self, enrolment_id: int) -> Enrolment | None:
        """One enrolment."""
        with self.engine.connect() as connection:
            row = connection.execute(_enrolments().where(EnrolmentRow.id == enrolment_id)).mappings().first()
        return None if row is None else Enrolment(**row)

    def enrolments(self, *, before: int | None = None, limit: int = 50) -> list[Enrolment]:
        """Enrolments, newest first; `before` is the last id of the page before."""
        query = _enrolments().order_by(EnrolmentRow.id.desc()).limit(limit)
        if before is not None:
            query = query.where(EnrolmentRow.id < before)
        with self.engine.connect() as connection:
            return [Enrolment(**row) for row in connection.execute(query).mappings()]

    def known_generator(self, name: str) -> Generator:
        """One generator with its number of references.

        Raises:
            UnknownGenerator: No generator has this name.
        """
        generator = self.get_generator(name)
        if generator is None:
            raise UnknownGenerator(f"there is no generator {name!r}")
        return generator


def generator_ids(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """Ids by lower-case name, new generators created, none of them deletable until the transaction ends.

    Raises:
        BadGeneratorName: A name breaks the rule.
    """
    wanted = {check_generator_name(name).lower(): name for name in names}
    rows = [{"name": wanted[key]} for key in sorted(wanted)]
    if not rows:
        return {}
    key = func.lower(GeneratorRow.name)
    query = select(key.label("key"), GeneratorRow.id).where(key.in_(list(wanted)))
    query = query.with_for_update(read=True, key_share=True)
    found = {row.key: row.id for row in connection.execute(query)}
    if len(found) < len(wanted):
        connection.execute(insert(GeneratorRow).values(rows).on_conflict_do_nothing())
        found = {row.key: row.id for row in connection.execute(query)}
    return found


def _named(name: str) -> ColumnElement[bool]:
    return func.lower(GeneratorRow.name) == name.lower()


def _generators() -> Select[Any]:
    counted = (
        select(ReferenceRow.generator_id, func.count().label("references"))
        .where(ReferenceRow.label == 1)
        .group_by(ReferenceRow.generator_id)
        .subquery()
    )
    return (
        select(GeneratorRow.__table__, func.coalesce(counted.c.references, 0).label("references"))
        .outerjoin(counted, counted.c.generator_id == GeneratorRow.id)
        .order_by(func.lower(GeneratorRow.name))
    )


def _enrolments() -> Select[Any]:
    left = select(func.count()).where(ReferenceRow.enrolment_id == EnrolmentRow.id)
    return select(
        EnrolmentRow.id,
        EnrolmentRow.at,
        GeneratorRow.name.label("generator"),
        EnrolmentRow.source,
        EnrolmentRow.report,
        left.scalar_subquery().label("references"),
    ).outerjoin(GeneratorRow, GeneratorRow.id == EnrolmentRow.generator_id)
