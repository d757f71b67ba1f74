"""How long writers and replicas of one store wait for each other: a discrete-event simulation.

python -m benchmarks.scale waits --adders 1,2,4,8 --replicas 3
"""

import math
from dataclasses import dataclass, field
from statistics import mean
from typing import Annotated

import simpy
import typer
from simpy.events import ProcessGenerator

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

GIB = 2**30
REFERENCES = (10_000_000, 100_000_000, 1_000_000_000)
VERDICTS = (10, 100, 1_000)
"""Each second."""

# Measured per item; the names are those of sections of BENCHMARKS.md.
COPY_BYTES = 407
"""Of a replica's memory for each reference ("Growth", 5 million)."""
PROCESS_BYTES = 695 * 2**20
"""Of a replica beside its references ("Serving", 64 clients)."""
ROW_BYTES = 1_455
"""On Postgres's disk for each reference, without its thumbnail ("Growth", 5 million)."""
THUMBNAIL_BYTES = 9_800
"""For each reference, in Postgres or object storage ("Adding")."""
SCATTERED_BYTES = 310
"""For each reference, of indexes in which an addition touches a page anywhere: by hash, group and fingerprint
("Growth", 2 million rows)."""
VERDICT_BYTES = 3_386
"""On Postgres's disk for each verdict that is recorded ("Serving")."""
VERDICT_SECONDS = 0.024
"""Of a core for a verdict: an image of 517 kB, one window through a ViT-Tiny at 224 pixels ("Serving", its profile)."""
BUSY = 0.5
"""Share of what replicas can do at most that is asked of them; their 99th percentile was 105 ms there ("Serving")."""
ADDING_SECONDS = 2 / 167
"""Of a core to read, decode, shrink and embed a reference ("Adding": two cores, 167 images per second)."""
WRITING_RATE = 1_684
"""References per second that eight adders stored on two cores ("Several adders", parts)."""
START_SECONDS, SNAPSHOT_SECONDS = 27.8 / 5e6, 3.8 / 5e6
"""For each reference, from Postgres and from a snapshot with lists ("Growth", 5 million)."""
MAKING_SECONDS = {1e6: 10.1, 5e6: 68.5}
"""To make lists of so many references, and the next: "Growth"; beyond, the same power of the references."""
SEARCH_SECONDS = {1e6: 0.00010, 5e6: 0.00035}
"""To search lists for both labels' nearest, for one of 32 images."""
LONGEST_MAKING = 600
"""Seconds to make lists, beyond which Milvus keeps the references here."""

# Worked out, or cited in docs/scale.md.
ENGINE_BYTES = 192 * 4 + 3 * 8
"""Of Milvus's memory for each reference, IVF_FLAT: its vector, id, generator and source."""
SMALL_ENGINE_BYTES = 192 + 3 * 8
"""The same, IVF_SQ8."""
CORE_DOLLARS, CORE_GIB = 63.07 / 2, 4
"""A month of a virtual core of a general-purpose machine in a public cloud, and the memory that comes with it."""
DISK_DOLLARS = 0.08
"""A month of a gigabyte on solid-state disks there."""
MONTH = 30 * 86_400
RECORD_DAYS = 30
REPLICAS = 3
"""At least, so that one may fail or be updated."""
CORES = 16
"""Of the largest machine that a replica gets."""
DATABASE_CORES = 4
"""At least."""

SLICE = 0.005
"""Seconds of a core that a program takes before others that wait for one have their turn."""
ROWS = 256
"""Of one transaction."""
BEFORE, HELD = 0.097, 0.060
"""Seconds of a core for one transaction of `ROWS` before it needs the lock, and with it until it has committed: those
of one adder alone in the quieter run of "Several adders"."""
LOAD = 0.0101
"""Seconds in which a replica reads and applies such a transaction ("Growth", a million references)."""


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


def _add(database: Database, together: bool, elsewhere: float, before: float, held: float) -> ProcessGenerator:
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


def _follow(database: Database, together: bool, load: float) -> ProcessGenerator:
    world, seen = database.world, 0
    while True:
        if seen == len(database.commits):
            yield database.news
        latest = len(database.commits)
        yield from _work(database, load) if together else [world.timeout(load)]
        database.lags += [world.now - commit for commit in database.commits[seen:latest]]
        seen = latest


def _work(database: Database, seconds: float) -> ProcessGenerator:
    """Use one core of the database's machine for so long, in slices."""
    full, rest = divmod(seconds, SLICE)
    for slice_ in [SLICE] * int(full) + [rest]:
        with database.cores.request() as turn:
            yield turn
            yield database.world.timeout(slice_)


def extrapolated(measured: dict[float, float], references: float) -> float:
    """Seconds at so many references, by the power of them that leads through two measured points."""
    (low, first), (high, last) = measured.items()
    power = math.log(last / first) / math.log(high / low)
    return float(last * (references / high) ** power)


def in_memory(references: float) -> bool:
    """Whether each replica holds the references itself, and not Milvus for all of them."""
    return extrapolated(MAKING_SECONDS, references) <= LONGEST_MAKING


def machine(cores: float, memory: float) -> int:
    """Cores of the smallest machine, of 2, 4, 8 and so on, that has so many and, at `CORE_GIB` each, so many bytes."""
    return int(2 ** max(1, math.ceil(math.log2(max(cores, memory / GIB / CORE_GIB)))))


def reference_table() -> str:
    """What each number of references takes, whatever is asked of them."""
    rows = {
        "Postgres on disk, rows and indexes": [size(n * ROW_BYTES) for n in REFERENCES],
        "thumbnails": [size(n * THUMBNAIL_BYTES) for n in REFERENCES],
        "Postgres's indexes that additions touch anywhere": [size(n * SCATTERED_BYTES) for n in REFERENCES],
        "in memory: of each replica": [size(PROCESS_BYTES + n * COPY_BYTES) for n in REFERENCES],
        "in memory: start from Postgres": [span(n * START_SECONDS) for n in REFERENCES],
        "in memory: start from a snapshot": [span(n * SNAPSHOT_SECONDS) for n in REFERENCES],
        "in memory: making lists": [span(extrapolated(MAKING_SECONDS, n)) for n in REFERENCES],
        "in memory: searching lists, a core": [span(extrapolated(SEARCH_SECONDS, n)) for n in REFERENCES],
        "Milvus's memory, IVF_FLAT": [size(n * ENGINE_BYTES) for n in REFERENCES],
        "Milvus's memory, IVF_SQ8": [size(n * SMALL_ENGINE_BYTES) for n in REFERENCES],
        "decoding and embedding all, 16 cores": [span(n * ADDING_SECONDS / 16) for n in REFERENCES],
        "writing all": [span(n / WRITING_RATE) for n in REFERENCES],
    }
    return table(["references", *(f"{n:,}" for n in REFERENCES)], [[name, *cells] for name, cells in rows.items()])


def verdict_table() -> str:
    """Machines and money for each number of references and verdicts a second."""
    head = ["references", "verdicts/s", "replicas", "Milvus", "Postgres", "its disk", "core ms", "$ a month"]
    return table([*head, "$ a million verdicts"], [verdict_row(n, rate) for n in REFERENCES for rate in VERDICTS])


def verdict_row(references: int, rate: int) -> list[str]:
    """One row of `verdict_table`: machines as their number x cores x memory."""
    local = in_memory(references)
    seconds = VERDICT_SECONDS + (extrapolated(SEARCH_SECONDS, references) if local else 0)
    cores = rate * seconds / BUSY
    # A reload holds the copy before until the new one is complete, and so does Milvus the collection before.
    memory = PROCESS_BYTES + (2 * references * COPY_BYTES if local else 0)
    replica = min(machine(cores / REPLICAS, memory), max(CORES, machine(1, memory)))
    replicas = max(REPLICAS, math.ceil(cores / replica))
    engine = 0 if local else machine(DATABASE_CORES, 2 * references * ENGINE_BYTES)
    database = machine(DATABASE_CORES, references * SCATTERED_BYTES)
    disk = references * (ROW_BYTES + THUMBNAIL_BYTES) + rate * RECORD_DAYS * 86_400 * VERDICT_BYTES
    dollars = CORE_DOLLARS * (replicas * replica + engine + database) + DISK_DOLLARS * disk / 1e9
    return [
        f"{references:,}",
        f"{rate:,}",
        f"{replicas} x {kind(replica)}",
        kind(engine) if engine else "-",
        kind(database),
        size(disk),
        f"{1e3 * seconds:.1f}",
        f"{dollars:,.0f}",
        f"{dollars / (rate * MONTH) * 1e6:,.2f}",
    ]


def kind(cores: int) -> str:
    """A machine of so many cores."""
    return f"{cores} cores, {cores * CORE_GIB:,} GiB"


def size(count: float) -> str:
    """Bytes, in units that leave two or three digits before the point."""
    unit, name = next((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB")) if count >= unit or unit == 1e9)
    return f"{count / unit:,.1f} {name}"


def span(seconds: float) -> str:
    """A time, in units that people use for it."""
    units = ((86_400, "days"), (3_600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))
    unit, name = next((unit, name) for unit, name in units if seconds >= unit or unit == 1e-3)
    return f"{seconds / unit:.1f} {name}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|---|{'---:|' * (len(head) - 1)}", *lines[1:]])


@app.command()
def tables() -> None:
    """Print the tables of docs/scale.md, from the costs at the top of this file."""
    print(reference_table(), verdict_table(), sep="\n\n")


@app.command()
def waits(
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
    """Simulate: rows per second and waits, a row for each number of adders."""
    print("| adders | rows/s | waiting, ms | held, ms | lag, ms | at worst, ms |\n|---:|---:|---:|---:|---:|---:|")
    for count in map(int, adders.split(",")):
        costs = {"elsewhere": elsewhere / 1e3, "before": before / 1e3, "held": held / 1e3, "load": load / 1e3}
        outcome = simulate(count, replicas, rows=rows, cores=cores, together=together, **costs)
        times = [1e3 * seconds for seconds in (outcome.waiting, outcome.held, outcome.lag, outcome.worst_lag)]
        print(f"| {count} | {outcome.rate:,.0f} | {' | '.join(f'{time:,.0f}' for time in times)} |", flush=True)


if __name__ == "__main__":
    app()
