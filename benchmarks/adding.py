"""Images per second of `lineup index add` against embedding alone, with an empty embedded database; medians of rounds.

Embedding alone gets pixels that are decoded and preprocessed already. "decode and embed" overlaps the two as adding
does, without thumbnails and a database. Adding does all of it. The processor time of each stage, measured on one thread
(embedding: of the whole process), says what the cores could do at best if they did nothing else.

    python -m benchmarks.adding DATA --checkpoint DIR
"""

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from indexer.database.connection import connect
from indexer.database.embedded import EmbeddedServer
from indexer.ingest.decoded import fingerprint
from indexer.ingest.ingest import ingest
from indexer.ingest.prefetch import prefetch
from indexer.settings import Settings
from indexer.store import Store
from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry
from trainer.images import decode_image, thumbnail
from trainer.model.embedder import Embedder

BATCH = 32
CORES = len(os.sched_getaffinity(0))


def main(
    data: Annotated[Path, typer.Argument(help="A data set of any layout.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    images: Annotated[int, typer.Option(help="At most so many.")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    engine: Annotated[str, typer.Option(help="What embeds: auto, torch, openvino.")] = "auto",
    rounds: Annotated[int, typer.Option(help="Timed turns.")] = 3,
) -> None:
    """Print the rates, their ratio to embedding alone, and where the processor's time goes."""
    embedder = Embedder.load(checkpoint, device=device, engine=engine)
    entries = list(islice(read_dataset(data), images))
    stages, windows = processor_time(entries, embedder)
    ways: dict[str, Callable[[], float]] = {
        "embedding alone": lambda: timed(lambda: embedder.embed_windows(windows, BATCH)),
        "decode and embed": lambda: timed(lambda: decode_and_embed(entries, embedder)),
        "adding": lambda: adding(entries, embedder),
    }
    seconds = {name: [way() for _ in range(rounds)] for name, way in ways.items()}
    rates = {name: len(entries) / median(values) for name, values in seconds.items()}
    rates[f"the same work, {CORES} cores never idle"] = CORES / sum(stages.values())
    print(f"{len(entries)} images, {embedder.engine}, {embedder.preprocess.image_size} pixels\n")
    print("| | images per second | ratio |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / rates['embedding alone']:.2f} |")
    print("\n| stage | processor time per image, ms |\n|---|---:|")
    for name, value in stages.items():
        print(f"| {name} | {1e3 * value:.2f} |")


def processor_time(entries: Sequence[Entry], embedder: Embedder) -> tuple[dict[str, float], list[np.ndarray]]:
    """Seconds of processor time per image and stage, and each image's windows, shape (w, 3, s, s)."""
    spent: defaultdict[str, float] = defaultdict(float)

    def clocked(name: str, work: Callable[..., Any], *given: Any, clock: Callable[[], float] = time.thread_time) -> Any:
        start = clock()
        result = work(*given)
        spent[name] += clock() - start
        return result

    windows = []
    for entry in entries:
        file = clocked("read", entry.read)
        image, _ = clocked("decode, with facts and hash", decode_image, file)
        clocked("thumbnail", thumbnail, image)
        clocked("fingerprint", fingerprint, image)
        windows.append(clocked("preprocess", embedder.preprocess, [image]))
    embedder.embed_windows(windows[:BATCH], BATCH)  # warm
    clocked("embed", embedder.embed_windows, windows, BATCH, clock=time.process_time)
    return {name: value / len(entries) for name, value in spent.items()}, windows


def decode_and_embed(entries: Sequence[Entry], embedder: Embedder) -> None:
    """The least that any indexer has to do, on as many threads as adding has."""

    def decoded(pool: ThreadPoolExecutor) -> Generator[np.ndarray, None, None]:
        yield from pool.map(lambda entry: embedder.preprocess([decode_image(entry.read())[0]]), entries)

    with ThreadPoolExecutor(CORES) as pool, closing(prefetch(decoded(pool), 2 * BATCH)) as images:
        while batch := list(islice(images, BATCH)):
            embedder.embed_windows(batch, BATCH)


def adding(entries: Sequence[Entry], embedder: Embedder) -> float:
    """Seconds of adding everything to an empty database."""
    with tempfile.TemporaryDirectory(prefix="lineup-") as home:
        settings = Settings(home=Path(home), database_url=None)
        engine = connect(settings)
        took = timed(lambda: ingest(entries, embedder, Store(engine), batch_size=BATCH))
        engine.dispose()
        EmbeddedServer(settings.home).stop()
    return took


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
