"""What a GPU does: images embedded from shards, training steps, and FAISS's search beside that of the CPU.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --data SHARDS --checkpoint DIR --records 512
    python -m benchmarks.gpu --device cpu

Without shards and a checkpoint both are made: photographs of noise, and a ViT-Tiny of random weights. Fewer records
fit into a smaller GPU. On a CPU everything is done in a small form, which shows that it runs, not how fast it is. All
ways of a table take turns.
"""

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.adding import CORES, embedding_ways, make_shards, measure, show
from benchmarks.search import K, built, embeddings, recall, turns
from benchmarks.targets import Target
from benchmarks.training import best_of, training_steps
from indexer.index.vector_index import VectorIndex, has_gpu
from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry
from trainer.fit.fit_settings import FitSettings
from trainer.model.checkpoint import CheckpointConfig, build_backbone, save_checkpoint
from trainer.model.embedder import Embedder, pick_device

SAMPLES, IDLE_SAMPLES, SAMPLE_SECONDS = 20, 2, 0.5
"""Of the GPU's use; the driver means up to a second, so the first ones are of the time before."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is done."""

    images: int
    sides: int
    """Pixels of the pictures that are made."""
    batch: int
    pixels: int
    """Sides of what the backbone reads."""
    depth: int
    """Blocks of the backbones that are made."""
    records: int
    references: tuple[int, ...]
    queries: tuple[int, ...]
    rounds: int


LARGE = Sizes(8_192, 512, 256, 224, 12, 1_024, (100_000, 1_000_000), (1, 32, 1_024), 5)
SMALL = Sizes(24, 64, 8, 32, 1, 2, (1_000,), (4,), 1)


def main(
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    data: Annotated[Path | None, typer.Option(help="A data set of any layout, shards at best.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder.")] = None,
    records: Annotated[int | None, typer.Option(help="Of a training step; default 1,024 on a GPU.")] = None,
) -> list[Target]:
    """Print a table of each; what is wanted of them."""
    device = pick_device(device)
    sizes = SMALL if device == "cpu" else LARGE
    sizes = replace(sizes, records=records or sizes.records)
    name = "the CPU, in a small form" if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"{name}; {CORES} cores\n")
    with tempfile.TemporaryDirectory(prefix="lineup-") as folder:
        shards = data or make_shards(Path(folder, "shards"), sizes.images, (sizes.sides, sizes.sides))
        weights = checkpoint or make_checkpoint(Path(folder, "checkpoint"), sizes)
        entries = list(islice(read_dataset(shards), sizes.images))
        targets = embed(entries, Embedder.load(weights, device=device), sizes)
    return targets + train(device, sizes) + search(device, sizes)


def make_checkpoint(folder: Path, sizes: Sizes) -> Path:
    """A ViT-Tiny of random weights."""
    config = CheckpointConfig(name="random", image_size=sizes.pixels, architecture_args={"depth": sizes.depth})
    config = replace(config, preprocess=replace(config.preprocess, image_size=sizes.pixels))
    save_checkpoint(folder, build_backbone(config), config)
    return folder


def embed(entries: list[Entry], embedder: Embedder, sizes: Sizes) -> list[Target]:
    """Images per second from their files to embeddings, beside each half alone."""
    rates = measure(embedding_ways(entries, embedder, sizes.batch), len(entries), sizes.rounds)
    show(rates, embedder)
    bound = min("decoding alone", "embedding alone", key=lambda name: rates[name])
    share = rates["decode and embed"] / rates[bound]
    print(f"\nWhat bounds is {bound.removesuffix(' alone')}: both together reach {share:.2f} of it alone.\n")
    return [Target("images embedded from shards, per second", rates["decode and embed"], 8_000)]


def train(device: str, sizes: Sizes) -> list[Target]:
    """Records per second of a training step in bf16, beside that of the reference, and how busy ours keeps the GPU."""
    settings = FitSettings(
        data=Path("none"),
        output=Path("none"),
        image_size=sizes.pixels,
        batch_size=sizes.records,
        architecture_args=json.dumps({"depth": sizes.depth}),
    )
    steps = training_steps(settings, device)
    rates = {name: sizes.records / value for name, value in best_of(sizes.rounds, steps, time.perf_counter).items()}
    print(f"{sizes.records} records a step, {sizes.pixels} pixels, local {settings.local} pixels\n")
    print("| | training records per second | times the reference |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.1f} | {rate / rates['reference']:.2f} |")
    share = None if device == "cpu" else busy(steps["lineup"])
    told = "not reported (it needs nvidia-ml-py)" if share is None else f"{share:.0f} %"
    print(f"\nGPU busy in our steps: {told}.\n")
    targets = [Target("training records, times the reference's", rates["lineup"] / rates["reference"], 1.5)]
    return targets if share is None else [*targets, Target("GPU busy in training steps, %", share, 80)]


def busy(step: Callable[[], None]) -> float | None:
    """Percentage of the time in which the GPU computes while steps follow each other; None where nobody tells."""
    try:
        torch.cuda.utilization()
    except Exception:  # without NVML's package, its library or its consent, whose errors have no common type
        return None

    def samples() -> list[int]:
        values = []
        for _ in range(SAMPLES):
            time.sleep(SAMPLE_SECONDS)
            values.append(torch.cuda.utilization())
        return values

    with ThreadPoolExecutor(1) as thread:
        sampling = thread.submit(samples)
        while not sampling.done():
            step()
    return mean(sampling.result()[IDLE_SAMPLES:])


def search(device: str, sizes: Sizes) -> list[Target]:
    """Milliseconds of a search among references on the CPU and on the device, and whether they find the same."""
    queries = embeddings(max(sizes.queries), 2)
    print("| references | queries | CPU, ms | GPU, ms | times faster | same neighbours | similarities differ by |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    shares = [compare(built(n)[0], built(n, device=device)[0], queries, sizes) for n in sizes.references]
    if device == "cpu" or not has_gpu():
        print("\nFAISS has no GPU here: the CPU stands beside itself.")
        return []
    return [Target("share of the CPU's neighbours that the GPU finds", min(shares), 0.99)]


def compare(cpu: VectorIndex, gpu: VectorIndex, queries: np.ndarray, sizes: Sizes) -> float:
    """Print the lines of one number of references; the share of neighbours that both find."""
    one, other = cpu.search(queries, K), gpu.search(queries, K)
    share = recall(other.ids, one.ids)
    apart = np.abs(one.similarities - other.similarities).max()
    for count in sizes.queries:
        searches = {name: partial(index.search, queries[:count], K) for name, index in (("CPU", cpu), ("GPU", gpu))}
        seconds = {name: 1e3 * float(np.median(values)) for name, values in turns(searches, sizes.rounds).items()}
        times = seconds["CPU"] / seconds["GPU"]
        row = f"| {len(cpu):,} | {count:,} | {seconds['CPU']:.2f} | {seconds['GPU']:.2f} | {times:.2f} "
        print(f"{row}| {share:.2%} | {apart:.1e} |", flush=True)
    return share


if __name__ == "__main__":
    typer.run(main)
