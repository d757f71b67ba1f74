"""Images per second of `indexer add` against embedding alone, in one process, with an empty embedded database.

Embedding alone gets pixels that are decoded and preprocessed already; adding also reads, decodes, makes thumbnails and
writes. Run it as `python benchmarks/adding.py DATA --checkpoint DIR`.
"""

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from indexer.embedded import EmbeddedServer
from indexer.ingest import ingest
from indexer.postgres import connect
from indexer.settings import Settings
from indexer.store import Store
from trainer.datasets import read_dataset
from trainer.embedder import Embedder
from trainer.images import decode_image

BATCH = 32


def main(
    data: Annotated[Path, typer.Argument(help="A data set of any layout.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    images: Annotated[int, typer.Option(help="At most so many.")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Print both rates and their ratio."""
    embedder = Embedder.load(checkpoint, device=device)
    entries = list(islice(read_dataset(data), images))
    decoded = (embedder.preprocess([decode_image(entry.read())[0]]) for entry in entries)
    pixels = np.concatenate(list(decoded))  # (n, 3, s, s)
    embedder.embed_pixels(pixels[:BATCH], BATCH)  # warm
    start = time.perf_counter()
    embedder.embed_pixels(pixels, BATCH)
    alone = len(pixels) / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory(prefix="lineup-") as home:
        settings = Settings(home=Path(home), database_url=None)
        engine = connect(settings)
        start = time.perf_counter()
        report = ingest(entries, embedder, Store(engine), batch_size=BATCH)
        adding = report["images"] / (time.perf_counter() - start)
        engine.dispose()
        EmbeddedServer(settings.home).stop()
    print("| images | engine | embedding alone | adding | ratio |\n|---|---|---|---|---|")
    print(f"| {len(pixels)} | {embedder.engine} | {alone:.1f}/s | {adding:.1f}/s | {adding / alone:.2f} |")


if __name__ == "__main__":
    typer.run(main)
