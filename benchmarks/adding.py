"""Images per second of `lineup index add`, with an empty embedded database, against embedding alone.

Embedding alone gets pixels that are decoded and preprocessed already. "decode and embed" overlaps the two as adding
does, without thumbnails and a database. Adding does all of it. The processor time of each stage, measured on one thread
(embedding: of the whole process), says what the cores could do at best if they did nothing else.

    python -m benchmarks.adding
    python -m benchmarks.adding --data SHARDS --checkpoint DIR --images 1000

Without shards and a checkpoint both are made: photographs of noise, and a ViT-Tiny of random weights.
"""

import os
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.serving import photograph, random_checkpoint
from benchmarks.targets import Target
from indexer.database.connection import connect
from indexer.database.embedded import EmbeddedServer
from indexer.ingest.decoded import fingerprint
from indexer.ingest.ingest import ingest
from indexer.ingest.prefetch import map_batches, prefetch
from indexer.settings import Settings
from indexer.store import Store
from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry
from trainer.images import decode_image, thumbnail
from trainer.model.embedder import Embedder

BATCH = 32
CORES = len(os.sched_getaffinity(0))
PICTURES = 16
"""Different ones in the shards that are made."""
SIDES = (1024, 768)


def main(
    data: Annotated[Path | None, typer.Option(help="A data set of any layout.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder.")] = None,
    images: Annotated[int, typer.Option(help="At most so many.")] = 500,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    engine: Annotated[str, typer.Option(help="What embeds: auto, torch, openvino.")] = "auto",
    rounds: Annotated[int, typer.Option(help="Timed turns.")] = 3,
) -> list[Target]:
    """Print the rates, their ratio to embedding alone, and where the processor's time goes; what is wanted of them."""
    with tempfile.TemporaryDirectory(prefix="lineup-") as folder:
        if checkpoint is None:
            random_checkpoint(checkpoint := Path(folder, "checkpoint"))
        embedder = Embedder.load(checkpoint, device=device, engine=engine)
        entries = list(islice(read_dataset(data or make_shards(Path(folder, "shards"), images, SIDES)), images))
        stages = processor_time(entries, embedder)
        adding = {"adding": lambda: add(entries, embedder)}
        rates = measure(embedding_ways(entries, embedder, BATCH) | adding, len(entries), rounds)
    bound = rates[f"the same work, {CORES} cores never idle"] = CORES / sum(stages.values())
    show(rates, embedder)
    print("\n| stage | processor time per image, ms |\n|---|---:|")
    for name, value in stages.items():
        print(f"| {name} | {1e3 * value:.2f} |")
    return [
        Target("adding, times what cores that never idle could do", rates["adding"] / bound, 0.95),
        Target("adding, times embedding alone", rates["adding"] / rates["embedding alone"], 0.85),
    ]


def make_shards(folder: Path, images: int, sides: tuple[int, int]) -> Path:
    """One shard of real images, no two of the same bytes."""
    folder.mkdir()
    pictures = [photograph(seed, sides) for seed in range(PICTURES)]
    with tarfile.open(folder / "0.tar", "w") as shard:
        for record in range(images):
            picture = pictures[record % PICTURES] + f"{record:06}".encode()  # readers stop at the end of the picture
            member = tarfile.TarInfo(f"{record:06}.real.jpg")
            member.size = len(picture)
            shard.addfile(member, BytesIO(picture))
    return folder


def processor_time(entries: Sequence[Entry], embedder: Embedder) -> dict[str, float]:
    """Seconds of processor time per image and stage."""
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
    embed(windows[:BATCH], embedder, BATCH)  # warm
    clocked("embed", embed, windows, embedder, BATCH, clock=time.process_time)
    return {name: value / len(entries) for name, value in spent.items()}


def embedding_ways(entries: Sequence[Entry], embedder: Embedder, batch: int) -> dict[str, Callable[[], float]]:
    """What gives the seconds of embedding alone, of decoding on threads of all cores alone, and of both together.

    Embedding alone has all windows in memory: 5 GB of one window of 224 pixels for each of 8,192 images.
    """

    def decoded() -> Generator[np.ndarray, None, None]:
        with ThreadPoolExecutor(CORES) as pool:
            yield from pool.map(lambda entry: embedder.preprocess([decode_image(entry.read())[0]]), entries)

    windows = list(decoded())
    return {
        "embedding alone": lambda: timed(lambda: embed(windows, embedder, batch)),
        "decoding alone": lambda: timed(lambda: sum(1 for _ in decoded())),
        "decode and embed": lambda: timed(lambda: embed(prefetch(decoded(), 2 * batch), embedder, batch)),
    }


def embed(windows: Iterable[np.ndarray], embedder: Embedder, batch: int) -> None:
    """Embed images as adding does, each given by its windows (w, 3, s, s), uint8."""
    for _ in map_batches(lambda images: embedder.embed_windows(images, batch), (one for one in windows), batch):
        pass


def add(entries: Sequence[Entry], embedder: Embedder) -> float:
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


def measure(ways: Mapping[str, Callable[[], float]], images: int, rounds: int) -> dict[str, float]:
    """Images per second of ways that take turns: medians of rounds, after one that does not count."""
    seconds = [{name: way() for name, way in ways.items()} for _ in range(rounds + 1)][1:]
    return {name: images / median(turn[name] for turn in seconds) for name in ways}


def show(rates: Mapping[str, float], embedder: Embedder) -> None:
    """Print a table of images per second."""
    print(f"{embedder.engine}, {embedder.preprocess.image_size} pixels, {CORES} cores\n")
    print("| | images per second | times embedding alone |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / rates['embedding alone']:.2f} |")


if __name__ == "__main__":
    typer.run(main)
