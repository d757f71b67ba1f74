"""Calls about generators."""

from functools import partial
from typing import Annotated

from fastapi import Path

from api.enrolment import remove
from api.http.dependencies import Enrolling, Loaded, Reading, Served, existing, v1_router
from api.schemas.problems import documented
from api.schemas.resources import Generator, GeneratorChange, Generators, NewGenerator, Removed
from indexer.store.generators import Generator as GeneratorRow

router = v1_router("generators")
Name = Annotated[str, Path(min_length=1, max_length=100, pattern=r"^[^\x00]*$")]


def generator_of(row: GeneratorRow) -> Generator:
    """One generator with its number of references."""
    return Generator.model_validate(row, from_attributes=True)


@router.get("/generators", responses=documented())
async def list_generators(service: Served, detector: Loaded, caller: Reading) -> Generators:
    """All generators with their numbers of references, by name."""
    rows = await service.run(detector.store.generators.list)
    return Generators(generators=[generator_of(row) for row in rows])


@router.post("/generators", status_code=201, responses=documented("conflict"))
async def create_generator(service: Served, detector: Loaded, caller: Enrolling, facts: NewGenerator) -> Generator:
    """Make a generator known before it has references."""
    return generator_of(await service.run(detector.store.generators.create, **facts.model_dump()))


@router.get("/generators/{name}", responses=documented("not-found"))
async def get_generator(service: Served, detector: Loaded, caller: Reading, name: Name) -> Generator:
    """One generator, whatever the case of its name."""
    return generator_of(existing(await service.run(detector.store.generators.get, name), f"generator {name!r}"))


@router.patch("/generators/{name}", responses=documented("not-found", "conflict"))
async def change_generator(
    service: Served, detector: Loaded, caller: Enrolling, name: Name, change: GeneratorChange
) -> Generator:
    """Change what is known of a generator, its name included."""

    def update() -> Generator:
        row = detector.store.generators.update(name, change.model_dump(exclude_unset=True))
        detector.follower.catch_up()  # this process's neighbours carry the name
        return generator_of(row)

    return await service.run(update)


@router.delete("/generators/{name}", responses=documented("not-found"))
async def delete_generator(service: Served, detector: Loaded, caller: Enrolling, name: Name) -> Removed:
    """Remove a generator and all its references."""
    return await service.run(remove, detector, partial(detector.store.generators.delete, name))
