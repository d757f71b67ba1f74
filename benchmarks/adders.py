"""Rows per second of several processes that add references with vectors and thumbnails to one database.

Nothing is decoded or embedded: what is measured is the store, and how long its writers wait for each other's turn with
the revision. Each process adds rows of its own to one embedded database, in transactions of so many rows.

    python -m benchmarks.adders
"""

import tempfile
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from indexer.database.connection import connect
from indexer.database.embedded import EmbeddedServer
from indexer.ingest.ingest import BULK_IMAGES, WRITE_IMAGES
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.reference_facts import NewReference

DIM = 192
THUMBNAIL_BYTES = 9_800
CHECKPOINT = "0" * 32


def main(
    rows: Annotated[int, typer.Option(help="In all, shared by the processes.")] = 16_000,
    rounds: Annotated[int, typer.Option(help="Timed turns of each size, of which the least disturbed counts.")] = 3,
) -> None:
    """Print a table: a row for each number of adders, a column for each size of transactions."""
    sizes = (WRITE_IMAGES, BULK_IMAGES)
    print("| adders | " + " | ".join(f"{size:,} rows at a time" for size in sizes) + " |\n|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="lineup-") as home:
        settings = Settings(home=Path(home), database_url=None)
        engine = connect(settings)
        Store(engine).checkpoints.register(CHECKPOINT, "random", DIM, {})
        for adders in (1, 2, 4, 8):
            turns = [[rate(settings, adders, rows // adders, size) for size in sizes] for _ in range(rounds)]
            cells = [str(adders), *(f"{max(rates):,.0f}" for rates in zip(*turns, strict=True))]
            print(f"| {' | '.join(cells)} |", flush=True)
        engine.dispose()
        EmbeddedServer(settings.home).stop()


def rate(settings: Settings, adders: int, rows: int, size: int) -> float:
    """Rows per second of so many processes that add `rows` each, `size` at a time."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["indexer.ingest.ingest"])
    ready = context.Barrier(adders + 1)
    processes = [context.Process(target=add, args=(settings, rows, size, ready)) for _ in range(adders)]
    for process in processes:
        process.start()
    ready.wait()
    begin = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - begin
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"{len(failed)} of {adders} adders failed")
    return adders * rows / seconds


def add(settings: Settings, rows: int, size: int, ready: Barrier) -> None:
    """What one process does."""
    rng = np.random.default_rng()
    pictures = [rng.bytes(THUMBNAIL_BYTES) for _ in range(16)]
    references = [new_reference(rng, pictures[row % 16]) for row in range(rows)]
    engine = connect(settings)
    store = Store(engine)
    ready.wait()
    for start in range(0, rows, size):
        store.references.add(references[start : start + size], CHECKPOINT)
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
