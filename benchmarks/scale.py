"""How long writers and replicas of one store wait for each other: a discrete-event simulation.

python -m benchmarks.scale --adders 1,2,4,8 --replicas 3
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean
from typing import Annotated

import simpy
import typer

SLICE = 0.005
"""Seconds of a core that a program takes before others that wait for one have their turn."""

ROWS = 256
"""Of one transaction."""
BEFORE, HELD = 0.097, 0.060
"""Seconds of a core for one transaction of `ROWS` before it needs the lock, and with it until it has committed: those
of one adder alone in the quieter run of "Several adders" in BENCHMARKS.md."""
LOAD = 0.0101
"""Seconds in which a replica reads and applies such a transaction: "Growth" in BENCHMARKS.md, a million references."""


@dataclass(frozen=True, slots=True)
class Waits:
    """What came of a simulation: rows committed per second, and means in seconds.

    `waiting` is for the lock and `held` with it; `lag` is from a commit until a replica has it, `worst_lag` the most.
    """

    rate: float
    waiting: float
    held: float
    lag: float
    worst_lag: float


@dataclass(slots=True)
class Database:
    """What adders and replicas share: cores, the lock on the revision, and the times of the commits so far."""

    world: simpy.Environment
    cores: simpy.Resource
    lock: simpy.Resource
    news: simpy.Event
    commits: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)


def simulate(
    adders: int,
    replicas: int = 0,
    *,
    rows: int = ROWS,
    elsewhere: float = 0.0,
    before: float = BEFORE,
    held: float = HELD,
    load: float = LOAD,
    cores: int = 2,
    together: bool = False,
    seconds: float = 60.0,
) -> Waits:
    """Let adders fill a store, and replicas follow it.

    An adder embeds a batch, copies it to the database, takes the lock on the revision, keeps it until it has committed,
    and begins again. A replica that is told of a commit reads all that came since it read last.

    Args:
        adders: How many, at least 1.
        replicas: How many.
        rows: Of one batch.
        elsewhere: Seconds that an adder takes for a batch without the database: to decode and embed it.
        before: Seconds of one of the database's cores for a batch, until it needs the lock.
        held: The same with the lock.
        load: Seconds of a core in which a replica reads what is new.
        cores: Of the database's machine.
        together: Whether adders and replicas run on that machine; else each has a core of its own.
        seconds: How long, beginning with idle machines.
    """
    world = simpy.Environment()
    database = Database(world, simpy.Resource(world, cores), simpy.Resource(world), world.event())
    for _ in range(adders):
        world.process(_add(database, together, elsewhere, before, held))
    for _ in range(replicas):
        world.process(_follow(database, together, load))
    world.run(until=seconds)
    return Waits(
        rate=rows * len(database.commits) / seconds,
        waiting=mean(database.waiting),
        held=mean(database.held),
        lag=mean(database.lags) if database.lags else 0.0,
        worst_lag=max(database.lags, default=0.0),
    )


def _add(database: Database, together: bool, elsewhere: float, before: float, held: float) -> Iterator[simpy.Event]:
    world = database.world
    while True:
        yield from _work(database, elsewhere) if together else [world.timeout(elsewhere)]
        yield from _work(database, before)
        asked = world.now
        with database.lock.request() as turn:
            yield turn
            locked = world.now
            yield from _work(database, held)
        database.waiting.append(locked - asked)
        database.held.append(world.now - locked)
        database.commits.append(world.now)
        database.news.succeed()
        database.news = world.event()


def _follow(database: Database, together: bool, load: float) -> Iterator[simpy.Event]:
    world, seen = database.world, 0
    while True:
        if seen == len(database.commits):
            yield database.news
        latest = len(database.commits)
        yield from _work(database, load) if together else [world.timeout(load)]
        database.lags += [world.now - commit for commit in database.commits[seen:latest]]
        seen = latest


def _work(database: Database, seconds: float) -> Iterator[simpy.Event]:
    """Use one core of the database's machine for so long, in slices."""
    full, rest = divmod(seconds, SLICE)
    for slice_ in [SLICE] * int(full) + [rest]:
        with database.cores.request() as turn:
            yield turn
            yield database.world.timeout(slice_)


def main(
    adders: Annotated[str, typer.Option(help="How many, a comma list.")] = "1,2,4,8",
    replicas: Annotated[int, typer.Option(help="How many that follow.")] = 3,
    rows: Annotated[int, typer.Option(help="Of one transaction.")] = ROWS,
    elsewhere: Annotated[float, typer.Option(help="Milliseconds to decode and embed them.")] = 0.0,
    before: Annotated[float, typer.Option(help="Milliseconds of a core until the lock is needed.")] = 1e3 * BEFORE,
    held: Annotated[float, typer.Option(help="Milliseconds of a core with the lock.")] = 1e3 * HELD,
    load: Annotated[float, typer.Option(help="Milliseconds in which a replica reads what is new.")] = 1e3 * LOAD,
    cores: Annotated[int, typer.Option(help="Of the database's machine.")] = 2,
    together: Annotated[bool, typer.Option(help="Adders and replicas run on that machine too.")] = False,
) -> None:
    """Print a table: rows per second and waits, a row for each number of adders."""
    print("| adders | rows/s | waiting, ms | held, ms | lag, ms | at worst, ms |\n|---:|---:|---:|---:|---:|---:|")
    for count in map(int, adders.split(",")):
        costs = {"elsewhere": elsewhere / 1e3, "before": before / 1e3, "held": held / 1e3, "load": load / 1e3}
        waits = simulate(count, replicas, rows=rows, cores=cores, together=together, **costs)
        times = [1e3 * seconds for seconds in (waits.waiting, waits.held, waits.lag, waits.worst_lag)]
        print(f"| {count} | {waits.rate:,.0f} | {' | '.join(f'{time:,.0f}' for time in times)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
