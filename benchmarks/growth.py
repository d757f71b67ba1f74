"""How memory, start-up, adding, searching and following grow with the references, in an embedded database.

Rows are copied in bulk, with simulated embeddings (`benchmarks.search.embeddings`) and no thumbnails; what is measured
then goes the ordinary way, the following with a writer in another process. A home folder that is given is kept: the
next call goes on from the rows that are there, and `--fill-only` only brings them there.

    python -m benchmarks.growth --sizes 10000,100000,1000000,5000000
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import psutil
import psycopg
from sqlalchemy import text

from benchmarks.search import DIM, K, built, embeddings, resident
from indexer.database.connection import connect
from indexer.database.embedded import EmbeddedServer
from indexer.follower import Follower
from indexer.index.vector_index import VectorIndex
from indexer.measure.audit import fact_warnings
from indexer.measure.near_duplicates import related_references
from indexer.memory_copy import MemoryCopy
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.counts import recount
from indexer.store.reference_facts import NewReference
from indexer.store.writing import STAMP

CHECKPOINT = "c" * 32
PER_REVISION = 1_000
BLOCK = 100_000
BATCH = 256
RELATED = 200
"""References whose relatives are asked for: as many as are measured of a new generator."""
ROWS = """insert into reference_image
    (sha256, label, generator_id, source, "group", file_bytes, width, height, format, thumbnail, attributes,
    fingerprint)
select sha256(i::text::bytea), (i % 2)::smallint, case when i % 2 = 1 then :generator + i % 10 end, 'source ' || i % 4,
    'group ' || i, 50000 + hashint8(i) % 10000, 512, 512, 'JPEG', '', '{}', hashint8extended(i, 0)
from generate_series(cast(:first as bigint), cast(:last as bigint)) i order by i returning id"""


def fill(store: Store, n: int, *, embed: bool = True) -> None:
    """Bring the number of references to n, with embeddings unless told otherwise."""
    with store.engine.begin() as connection:
        have = int(connection.scalar(text("select count(*) from reference_image")) or 0)
        if not have:
            connection.execute(text("insert into generator (name) select 'gen ' || i from generate_series(0, 9) i"))
        generator = int(connection.scalar(text("select min(id) from generator")) or 0)
    for first in range(have, n, BLOCK):
        m = min(BLOCK, n - first)
        with store.engine.begin() as connection:
            place = {"generator": generator, "first": first, "last": first + m - 1}
            ids = np.sort(np.array(connection.execute(text(ROWS), place).scalars().all()))
            if not embed:
                continue
            vectors = embeddings(m, 1_000 + first).astype("<f4")
            revision = store.checkpoints.revision(CHECKPOINT)
            driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
            with driver.cursor().copy(
                "copy embedding (image_id, checkpoint_id, vector, revision) from stdin (format binary)"
            ) as copy:
                copy.set_types(["int8", "text", "bytea", "int8"])
                for row, (image_id, vector) in enumerate(zip(ids.tolist(), vectors, strict=True)):
                    copy.write_row((image_id, CHECKPOINT, vector.tobytes(), revision + 1 + row // PER_REVISION))
            stamp = {"revision": revision + -(-m // PER_REVISION), "checkpoint": CHECKPOINT}
            connection.execute(text(STAMP), stamp)
    if have < n:
        recount(store)
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("vacuum analyze"))


def measure(settings: Settings, store: Store, rounds: int) -> dict[str, Any]:
    """Everything at the present size; the same rows are there at the end."""
    with store.engine.connect() as connection:
        disk = int(connection.scalar(text("select pg_database_size(current_database())")) or 0)
    row: dict[str, Any] = {}
    before = resident()
    follower = following(settings, store)
    row["start from Postgres, s"] = seconds(lambda: follower.load(anew=True))
    row["references"] = n = len(follower.index)
    row["bytes on disk each"] = disk / n
    row["bytes of memory each"] = (resident() - before) / n
    row["writing the snapshot, s"] = seconds(follower.save)
    follower = following(settings, store)
    row["start from the snapshot, s"] = seconds(follower.load)
    copy = follower.copy
    assert isinstance(copy, MemoryCopy)
    row |= searches(copy.index, rounds, "flat")
    row |= changes(follower, store, rounds)
    if lists := grown(copy.index, rounds):
        row |= lists
        follower.save()
        follower = following(settings, store)
        row["start from the snapshot of lists, s"] = seconds(follower.load)
    return row


def calls(store: Store, rounds: int) -> dict[str, float]:
    """What a service asks the database for its status, or at the end of an addition, in milliseconds.

    `processor` is that of this process and the database's together, which other programs do not lengthen.
    """
    hashes = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(RELATED)]
    questions: dict[str, Callable[[], object]] = {
        "counts": store.references.counts,
        "sources": store.references.sources,
        "generators": store.generators.list,
        "one generator": lambda: store.generators.get("gen 1"),
        "enrolments": store.enrolments.list,
        "relatives of 1 reference": lambda: related_references(store, hashes[:1], ["group 0"]),
        f"relatives of {RELATED} references": lambda: related_references(store, hashes, [""] * RELATED),
        "warnings": lambda: fact_warnings(store),
    }
    row = {}
    for name, question in questions.items():
        question()  # into the caches
        before = processor_seconds(store)
        row[f"{name}, ms"] = 1e3 * median(seconds(question) for _ in range(rounds))
        row[f"{name}, processor ms"] = 1e3 * (processor_seconds(store) - before) / rounds
    return row


def processor_seconds(store: Store) -> float:
    """Of this process, and of those of the database that serve this program."""
    servers = store.read(text("select pid from pg_stat_activity where application_name = 'lineup'"))
    times = [psutil.Process(row["pid"]).cpu_times() for row in servers]
    return time.process_time() + float(sum(one.user + one.system for one in times))


def measure_alone(n: int, rounds: int) -> dict[str, Any]:
    """What the index alone does at this size, without a database."""
    index, memory = built(n)
    row: dict[str, Any] = {"references": n, "bytes of memory each": memory}
    with tempfile.TemporaryDirectory(prefix="lineup-") as folder:
        path = Path(folder) / "snapshot"
        row["writing the snapshot, s"] = seconds(lambda: index.save(path, {}))
        row["start from the snapshot, s"] = seconds(lambda: VectorIndex.load(path, "cpu"))
    row |= searches(index, rounds, "flat")
    ids, vectors, ones = n + np.arange(BATCH), embeddings(BATCH, 5), np.ones(BATCH, int)
    adding, removing = [], []
    for _ in range(rounds):
        adding.append(seconds(lambda: index.add(ids, vectors, ids % 2, ones, ones)))
        removing.append(seconds(lambda: index.remove(ids)))
    row[f"the index: adding {BATCH}, ms"] = 1e3 * median(adding)
    row[f"the index: removing the last {BATCH}, ms"] = 1e3 * median(removing)
    row["the index: removing the first, ms"] = 1e3 * seconds(lambda: index.remove(np.array([0, 1])))
    return row | grown(index, rounds)


def grown(index: VectorIndex, rounds: int) -> dict[str, float]:
    """Seconds of moving to lists, and what they are like; nothing where no label is large enough."""
    moved: list[bool] = []
    took = seconds(lambda: moved.append(index.grow()))
    if not moved[0]:
        return {}
    return {"making lists, s": took, "recall@20 of lists": index.recall} | searches(index, rounds, "lists")


def searches(index: VectorIndex, rounds: int, kind: str) -> dict[str, float]:
    """Milliseconds of a search for one image and for 32, of the nearest of each label."""
    queries = embeddings(32, 2)
    one = [seconds(lambda: index.search_both(queries[:1], (K, K))) for _ in range(rounds)]
    many = [seconds(lambda: index.search_both(queries, (K, K))) for _ in range(max(2, rounds // 4))]
    return {
        f"search {kind}, 1 query, ms": 1e3 * median(one),
        f"search {kind}, 32 queries, ms each": 1e3 * median(many) / 32,
    }


def changes(follower: Follower, store: Store, rounds: int) -> dict[str, float]:
    """Seconds of adding and removing, and until a follower in another process than the writer has it."""
    follower.start()
    row: dict[str, list[float]] = {}
    with writer(follower.settings) as write:
        for turn in range(rounds):
            for name, command in (("1 reference", "add 1"), (f"{BATCH} references", f"add {BATCH}")):
                revision, took, done = write(f"{command} {turn}")
                row.setdefault(f"adding {name}, ms", []).append(1e3 * took)
                row.setdefault(f"following {name}, ms", []).append(1e3 * (applied(follower, revision) - done))
            revision, took, done = write("remove")
            row.setdefault(f"removing {BATCH + 1}, ms", []).append(1e3 * took)
            row.setdefault(f"following a removal of {BATCH + 1}, ms", []).append(
                1e3 * (applied(follower, revision) - done)
            )
    follower.stop()
    return {name: median(values) for name, values in row.items()} | {
        "following at worst, ms": max(value for name, values in row.items() if "follow" in name for value in values)
    }


def applied(follower: Follower, revision: int) -> float:
    """When the follower has a revision, on the clock that all processes share."""
    while follower.revision < revision:
        time.sleep(0.001)
    return time.monotonic()


@contextmanager
def writer(settings: Settings) -> Iterator[Callable[[str], tuple[int, float, float]]]:
    """A process that writes on command, and says the revision, the seconds it took and when it was committed."""
    arguments = [sys.executable, "-m", "benchmarks.growth", "--writer", "--home", str(settings.home)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        given, taken = process.stdin, process.stdout

        def write(command: str) -> tuple[int, float, float]:
            print(command, file=given, flush=True)
            revision, took, done = taken.readline().split()
            return int(revision), float(took), float(done)

        write("remove")  # connects
        yield write
        given.close()


def write(store: Store) -> None:
    """The other end of `writer`: `add COUNT SEED` and `remove`, which takes away all that was added."""
    ids: list[int] = []
    for line in sys.stdin:
        command, *numbers = line.split()
        rows = [] if command == "remove" else references(*map(int, numbers))
        start = time.monotonic()
        if rows:
            ids += [image_id for image_id in store.references.add(rows, CHECKPOINT).ids if image_id is not None]
        elif ids:
            store.references.remove(ids=ids)
            ids = []
        done = time.monotonic()
        print(store.checkpoints.revision(CHECKPOINT), done - start, done, flush=True)


def references(n: int, seed: int) -> list[NewReference]:
    """Unlike any other, with a thumbnail of the usual size."""
    thumbnail = np.random.default_rng(seed).bytes(6_000)
    return [
        NewReference(
            sha256=hashlib.sha256(f"{time.time_ns()} {n} {i}".encode()).hexdigest(),
            label=i % 2,
            generator="gen 1" if i % 2 else None,
            source="source 1",
            group=f"new {i}",
            uri=None,
            file_bytes=50_000,
            mtime=None,
            width=512,
            height=512,
            format="JPEG",
            jpeg_quality=90,
            thumbnail=thumbnail,
            attributes={},
            vector=vector,
        )
        for i, vector in enumerate(embeddings(n, seed))
    ]


def following(settings: Settings, store: Store) -> Follower:
    """A follower that has read nothing yet."""
    return Follower(settings, store, CHECKPOINT, DIM)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was measured at each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000", help="comma list of reference counts, ascending")
    parser.add_argument("--home", type=Path, help="folder that is kept; a temporary one otherwise")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns")
    parser.add_argument("--fill-only", action="store_true", help="make the rows, measure nothing")
    parser.add_argument("--index-only", action="store_true", help="no database: what the index does alone")
    parser.add_argument("--calls", action="store_true", help="no embeddings: what is asked of the database alone")
    parser.add_argument("--writer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.index_only:
        for size in map(int, options.sizes.split(",")):
            show(size, measure_alone(size, options.rounds))
        return None
    home = options.home or Path(tempfile.mkdtemp(prefix="lineup-"))
    settings = Settings(home=home, database_url=None, device="cpu")
    store = Store(connect(settings))
    try:
        if options.writer:
            return write(store)
        store.checkpoints.register(CHECKPOINT, "simulated", DIM, {})
        for size in map(int, options.sizes.split(",")):
            fill(store, size, embed=not options.calls)
            if options.calls:
                show(size, calls(store, options.rounds))
            elif not options.fill_only:
                show(size, measure(settings, store, options.rounds))
    finally:
        store.engine.dispose()
        if not options.writer:
            EmbeddedServer(home).stop()
            if options.home is None:
                shutil.rmtree(home)
    return None


def show(size: int, row: dict[str, Any]) -> None:
    """Print a line for each value."""
    for name, value in row.items():
        print(f"{size:,} | {name} | {value:.4g}", flush=True)


if __name__ == "__main__":
    main()
