"""Rows per second of several processes that add references with vectors and thumbnails to one database.

Nothing is decoded or embedded: what is measured is the store, and how long its writers wait for each other's turn with
the revision. Each process adds rows of its own to one embedded database, in transactions of so many rows. Of each
transaction the median time is given until it asks for the revision's lock, until it has it, and until it has committed.

    python -m benchmarks.adders
"""

import tempfile
import time
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from sqlalchemy import event, text

from indexer.database.connection import connect
from indexer.database.embedded import EmbeddedServer
from indexer.ingest.ingest import BULK_IMAGES, WRITE_IMAGES
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.reference_facts import NewReference
from indexer.store.writing import LOCK

DIM = 192
THUMBNAIL_BYTES = 9_800
CHECKPOINT = "0" * 32


def main(
    rows: Annotated[int, typer.Option(help="In all, shared by the processes.")] = 16_000,
    rounds: Annotated[int, typer.Option(help="Timed turns of each size, of which the least disturbed counts.")] = 3,
) -> None:
    """Print a table: a row for each number of adders, a column for each size of transactions."""
    sizes = (WRITE_IMAGES, BULK_IMAGES)
    phases = "before, ms | waiting, ms | held, ms | processor before, ms | processor held, ms"
    columns = " | ".join(f"{size:,} at a time: rows/s | {phases}" for size in sizes)
    print(f"| adders | {columns} |\n|{'---:|' * 13}")
    with tempfile.TemporaryDirectory(prefix="lineup-") as home:
        settings = Settings(home=Path(home), database_url=None)
        engine = connect(settings)
        Store(engine).checkpoints.register(CHECKPOINT, "random", DIM, {})
        for adders in (1, 2, 4, 8):
            turns = [[measured(settings, adders, rows // adders, size) for size in sizes] for _ in range(rounds)]
            best = [max(one) for one in zip(*turns, strict=True)]
            cells = [str(adders), *(f"{number:,.0f}" for numbers in best for number in numbers)]
            print(f"| {' | '.join(cells)} |", flush=True)
        engine.dispose()
        EmbeddedServer(settings.home).stop()


def measured(settings: Settings, adders: int, rows: int, size: int) -> tuple[float, ...]:
    """Of so many processes that add `rows` each, `size` at a time.

    Returns:
        Rows per second, medians of milliseconds before the lock, waiting for it and with it, and of the processor's
        milliseconds before it and with it.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["indexer.ingest.ingest"])
    ready, times = context.Barrier(adders + 1), context.Queue()
    processes = [context.Process(target=add, args=(settings, rows, size, ready, times)) for _ in range(adders)]
    for process in processes:
        process.start()
    ready.wait()
    begin = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - begin
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"{len(failed)} of {adders} adders failed")
    phases = 1e3 * np.median(np.concatenate([times.get() for _ in processes]), axis=0)  # (2, 3)
    return adders * rows / seconds, *phases[0].tolist(), phases[1, 0], phases[1, 2]


def add(settings: Settings, rows: int, size: int, ready: Barrier, times: "Queue[np.ndarray]") -> None:
    """What one process does.

    It gives seconds, and the processor's, before the lock, waiting for it and with it, shape (transactions, 2, 3).
    """
    rng = np.random.default_rng()
    pictures = [rng.bytes(THUMBNAIL_BYTES) for _ in range(16)]
    references = [new_reference(rng, pictures[row % 16]) for row in range(rows)]
    engine = connect(settings)
    store = Store(engine)
    with engine.connect() as connection:  # the only one of the pool, until the end
        server = Path(f"/proc/{connection.scalar(text('select pg_backend_pid()'))}/schedstat")
    phases, lock = [], []

    def now() -> list[float]:
        """The time, and the processor's that this process and its server have used, in seconds."""
        return [time.perf_counter(), time.process_time() + 1e-9 * int(server.read_text().split()[0])]

    def note(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        if statement.startswith(LOCK.split(":")[0]):
            lock.append(now())

    event.listen(engine, "before_cursor_execute", note)
    event.listen(engine, "after_cursor_execute", note)
    ready.wait()
    for start in range(0, rows, size):
        begin = now()
        store.references.add(references[start : start + size], CHECKPOINT)
        phases.append(np.diff([begin, *lock[-2:], now()], axis=0).T)  # (2, 3)
    times.put(np.array(phases))
    engine.dispose()


def new_reference(rng: np.random.Generator, picture: bytes) -> NewReference:
    """A reference of random bytes, whose thumbnail does not compress."""
    fake = bool(rng.integers(2))
    return NewReference(
        sha256=rng.bytes(32).hex(),
        label=int(fake),
        generator=f"generator {rng.integers(8)}" if fake else None,
        source="random",
        group=rng.bytes(8).hex(),
        uri=None,
        file_bytes=100_000,
        mtime=None,
        width=512,
        height=512,
        format="JPEG",
        jpeg_quality=90,
        fingerprint=int(rng.integers(-(2**63), 2**63)),
        thumbnail=rng.bytes(16) + picture,
        attributes={},
        vector=rng.normal(size=DIM).astype(np.float32),
    )


if __name__ == "__main__":
    typer.run(main)
