"""Generators: the named sources of fake images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from sqlalchemy import BigInteger, Connection, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from indexer.database.tables import GeneratorRow, ReferenceCountRow, ReferenceRow
from indexer.database.transactions import Rows, notify
from indexer.store.removing import Removed, remove_all
from trainer.data.entry import generator_fault

GENERATOR_FACTS = ("name", "family", "vendor", "version", "released_on", "notes")


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


def check_generator_name(name: str) -> str:
    """The name itself when it is allowed.

    Raises:
        BadGeneratorName: Other characters, too long, or a reserved word.
    """
    if fault := generator_fault(name):
        raise BadGeneratorName(fault)
    return name


REFERENCES = (
    select(ReferenceCountRow.generator_id, func.sum(ReferenceCountRow.images).cast(BigInteger).label("references"))
    .where(ReferenceCountRow.label == 1)
    .group_by(ReferenceCountRow.generator_id)
    .subquery()
)
GENERATORS = (
    select(GeneratorRow.__table__, func.coalesce(REFERENCES.c.references, 0).label("references"))
    .outerjoin(REFERENCES, REFERENCES.c.generator_id == GeneratorRow.id)
    .order_by(func.lower(GeneratorRow.name))
)


class Generators(Rows):
    """Generators are unique by name without regard to case."""

    def create(self, name: str, **facts: Any) -> Generator:
        """Make a new generator; its facts are family, vendor, version, released_on and notes.

        Raises:
            BadGeneratorName: The name breaks the rule.
            GeneratorExists: It exists already.
            ValueError: Another fact.
        """
        _check_facts(facts)
        query = insert(GeneratorRow).values(name=check_generator_name(name), **facts).on_conflict_do_nothing()
        created = self.transaction(lambda connection: connection.scalar(query.returning(GeneratorRow.id)))
        if created is None:
            raise GeneratorExists(f"there is a generator {name!r} already")
        return self.require(name)

    def get(self, name: str) -> Generator | None:
        """One generator with its number of references, by name without regard to case."""
        row = self.read_one(GENERATORS.where(func.lower(GeneratorRow.name) == name.lower()))
        return None if row is None else Generator(**row)

    def names(self) -> dict[int, str]:
        """Names by id."""
        return {row["id"]: row["name"] for row in self.read(select(GeneratorRow.id, GeneratorRow.name))}

    def update(self, name: str, facts: Mapping[str, Any]) -> Generator:
        """Change name, family, vendor, version, released_on or notes.

        Raises:
            UnknownGenerator: No generator has this name.
            BadGeneratorName: The new name breaks the rule.
            GeneratorExists: The new name is taken.
            ValueError: Another fact.
        """
        _check_facts(facts)
        new_name = check_generator_name(facts.get("name", name))
        generator = self.require(name)

        def work(connection: Connection) -> None:
            connection.execute(update(GeneratorRow).where(GeneratorRow.id == generator.id).values(**facts))
            notify(connection, "generators")  # followers keep the names

        try:
            if facts:
                self.transaction(work)
        except IntegrityError as error:
            raise GeneratorExists(f"there is a generator {new_name!r} already") from error
        return self.require(new_name)

    def require(self, name: str) -> Generator:
        """One generator with its number of references.

        Raises:
            UnknownGenerator: No generator has this name.
        """
        generator = self.get(name)
        if generator is None:
            raise UnknownGenerator(f"there is no generator {name!r}")
        return generator

    def delete(self, name: str, *, forget: bool = False) -> Removed:
        """Remove a generator's references, then the generator itself; `forget` also blocks the references' hashes.

        Raises:
            UnknownGenerator: No generator has this name.
        """
        generator_id = self.require(name).id
        query = delete(GeneratorRow).where(GeneratorRow.id == generator_id)
        removed = Removed()
        while True:
            removed += remove_all(self, ReferenceRow.generator_id == generator_id, forget)
            try:
                self.transaction(lambda connection: connection.execute(query))
            except IntegrityError:  # someone added one meanwhile
                continue
            return removed

    # Last in its class: below it, `list` would mean this method.
    def list(self) -> Sequence[Generator]:
        """All generators with their numbers of references, by name."""
        return [Generator(**row) for row in self.read(GENERATORS)]


def _check_facts(facts: Mapping[str, Any]) -> None:
    if unknown := facts.keys() - GENERATOR_FACTS:
        names = ", ".join(sorted(GENERATOR_FACTS))
        raise ValueError(f"a generator has no {', '.join(sorted(unknown))}; it has {names}")


def generator_ids(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """Ids by lower-case name, new generators created, none of them deletable until the transaction ends.

    Raises:
        BadGeneratorName: A name breaks the rule.
    """
    names_by_key = {check_generator_name(name).lower(): name for name in names}
    if not names_by_key:
        return {}
    key = func.lower(GeneratorRow.name)
    query = select(key.label("key"), GeneratorRow.id).where(key.in_(list(names_by_key)))
    query = query.with_for_update(read=True, key_share=True)
    ids = {row.key: row.id for row in connection.execute(query)}
    if len(ids) < len(names_by_key):
        rows = [{"name": name} for _, name in sorted(names_by_key.items())]
        connection.execute(insert(GeneratorRow).values(rows).on_conflict_do_nothing())
        ids = {row.key: row.id for row in connection.execute(query)}
    return ids
