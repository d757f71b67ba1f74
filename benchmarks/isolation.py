"""What decoding in processes of their own costs: processor time of an upload with and without, as a share of a verdict.

Of a verdict only reading and embedding the upload are counted, one image at a time, so the share is rather too large.
Both ways take turns within one run, and the least time counts, so that other programs disturb little.

    python -m benchmarks.isolation --checkpoint DIR
"""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from PIL import Image

from api.judge.uploads import Question, Upload, prepare, prepare_here
from api.service_settings import ServiceSettings
from trainer.model.embedder import Embedder

SIZES = ((512, 512), (1024, 768), (2048, 1536), (4000, 3000))


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    rounds: Annotated[int, typer.Option(help="Turns of ten images.")] = 5,
) -> None:
    """Print a line for each size of a JPEG."""
    embedder, settings = Embedder.load(checkpoint), ServiceSettings()
    for width, height in SIZES:
        upload = Upload("a.jpg", jpeg(width, height))
        preprocess = embedder.preprocess
        views = prepare(upload, Question(), preprocess, settings).views  # starts the process too
        ways: dict[str, Callable[[], object]] = {
            "inside": lambda: prepare_here(upload, Question(), preprocess, settings.max_pixels),  # noqa: B023
            "outside": lambda: prepare(upload, Question(), preprocess, settings),  # noqa: B023
            "embedding": lambda: embedder.embed_stacks([views]),  # noqa: B023
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(processor_time(way))
        inside, outside, embedding = (1000 * min(times[name]) for name in ways)
        share = 100 * (outside - inside) / (inside + embedding)
        print(
            f"{width} x {height}, {len(upload.data) / 1000:,.0f} kB: read in {inside:.2f} ms inside and {outside:.2f} "
            f"ms outside, embedded in {embedding:.2f} ms; the process costs {share:.1f} % of a verdict"
        )


def jpeg(width: int, height: int) -> bytes:
    """A picture with as much detail as photographs have, about 2.5 bits for each pixel."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def processor_time(work: Callable[[], object], times: int = 10) -> float:
    """Seconds of one call, in this process and in those that it started."""

    def used() -> float:
        children = psutil.Process().children(recursive=True)
        return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)

    work()
    start = used()
    for _ in range(times):
        work()
    return (used() - start) / times


if __name__ == "__main__":
    typer.run(main)
