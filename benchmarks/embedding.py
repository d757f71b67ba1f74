"""Images per second that each engine embeds on this CPU, and how far engines agree on neighbours and verdicts.

    python -m benchmarks.embedding --checkpoint DIR
    python -m benchmarks.embedding --checkpoint DIR --windows 1,5,9 --sizes 128
    LINEUP_HOME=HOME python -m benchmarks.embedding --checkpoint DIR --data DATA --split test,unseen

The second form takes the time of images that are judged by several windows. The third judges images by the references
of HOME with each engine and compares the answers to those of torch.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from api.judge.loader import load_detector
from api.judge.uploads import Upload
from api.schemas.verdicts import Verdict
from api.service_settings import ServiceSettings
from trainer.data.datasets import read_dataset
from trainer.hub.exporter import export_onnx
from trainer.images import Preprocess
from trainer.model.checkpoint import load_backbone, read_config, read_weights, save_checkpoint
from trainer.model.embedder import Embedder

BATCHES = (1, 8, 32)
BASELINE = "torch"
Forward = Callable[[np.ndarray], np.ndarray]


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    data: Annotated[Path | None, typer.Option(help="Compare verdicts on these images instead.")] = None,
    split: Annotated[str, typer.Option(help="Of the data, a comma list.")] = "test,unseen",
    windows: Annotated[str | None, typer.Option(help="Windows of an image instead, a comma list.")] = None,
    sizes: Annotated[str, typer.Option(help="Sides in pixels, a comma list.")] = "112,224",
    rounds: Annotated[int, typer.Option(help="Timed turns of every engine.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of one turn.")] = 0.5,
    others: Annotated[bool, typer.Option(help="ONNX Runtime and torch.compile too (it needs a C++ compiler).")] = False,
) -> None:
    """Print one Markdown table."""
    if data is not None:
        agreement(checkpoint, data, split)
        return
    if windows is not None:
        print("| windows | pixels | ms of a core per image |\n|---:|---:|---:|")
        for count, size in product(windows.split(","), sizes.split(",")):
            windows_cost(checkpoint, int(count), int(size), rounds)
        return
    print(f"{torch.get_num_threads()} threads\n")
    print("| pixels | engine | cosine to torch |" + "".join(f" batch {n} | ratio |" for n in BATCHES))
    print("|---:|---|---:|" + "---:|" * 2 * len(BATCHES))
    for size in sizes.split(","):
        speed(checkpoint, int(size), rounds, seconds, others)


def windows_cost(checkpoint: Path, windows: int, size: int, rounds: int) -> None:
    """The row of a count: the processor's time for each of 32 images of 1024 x 768 pixels, cutting included."""
    config = read_config(checkpoint)
    preprocess = Preprocess(mode="center_crop", image_size=size, windows=windows)
    with tempfile.TemporaryDirectory() as home:
        save_checkpoint(Path(home), read_weights(checkpoint), replace(config, image_size=size, preprocess=preprocess))
        embedder = Embedder.load(Path(home), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels)] * max(BATCHES)
    seconds = []
    for _ in range(rounds + 1):
        start = time.process_time()
        embedder.embed(images)
        seconds.append((time.process_time() - start) / len(images))
    print(f"| {windows} | {size} | {1e3 * median(seconds[1:]):.1f} |", flush=True)  # the first turn warms up


def speed(checkpoint: Path, size: int, rounds: int, seconds: float, others: bool) -> None:
    """Rows for one input size: median rates of turns that all engines take alternately."""
    config = read_config(checkpoint)
    config = replace(config, image_size=size, preprocess=replace(config.preprocess, image_size=size))
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        save_checkpoint(
            folder, {key: torch.from_numpy(value) for key, value in read_weights(checkpoint).items()}, config
        )
        backbone = load_backbone(folder)
        engines: dict[str, Forward] = {"torch": Embedder.load(folder, device="cpu", engine="torch").forward}
        engines["torch, bfloat16"] = rounding(backbone)
        if others:
            engines["torch.compile, bfloat16"] = rounding(torch.compile(backbone, dynamic=False))
            engines["ONNX Runtime"] = onnx_runtime(folder)
        for engine in ("openvino-f32", "openvino"):
            embedder = Embedder.load(folder, device="cpu", engine=engine)
            engines[embedder.engine] = embedder.forward
    pixels = np.random.default_rng(0).normal(size=(max(BATCHES), 3, size, size)).astype(np.float32)
    rates: dict[tuple[str, int], list[float]] = {(name, n): [] for name in engines for n in BATCHES}
    for _ in range(rounds + 1):
        for name, n in rates:
            rates[name, n].append(rate(engines[name], pixels[:n], seconds))
    middle = {key: median(values[1:]) for key, values in rates.items()}  # the first turn warms up
    expected = engines[BASELINE](pixels)
    for name, forward in engines.items():
        cells = [f" {middle[name, n]:.0f}/s | {middle[name, n] / middle[BASELINE, n]:.2f} |" for n in BATCHES]
        print(f"| {size} | {name} | {cosine(forward(pixels), expected).min():.5f} |" + "".join(cells), flush=True)


def rounding(backbone: Callable[[torch.Tensor], torch.Tensor]) -> Forward:
    """Torch with its products in bfloat16."""

    def forward(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            embeddings: np.ndarray = backbone(torch.from_numpy(pixels)).float().numpy()
        return embeddings

    return forward


def onnx_runtime(checkpoint: Path) -> Forward:
    """ONNX Runtime on the exported checkpoint, in float32: its processor kernels have no bfloat16."""
    from onnxruntime import InferenceSession

    export_onnx(checkpoint, checkpoint / "onnx")
    session = InferenceSession(checkpoint / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])

    def forward(pixels: np.ndarray) -> np.ndarray:
        embeddings: np.ndarray = session.run(None, {"pixels": pixels})[0]
        return embeddings

    return forward


def rate(forward: Forward, pixels: np.ndarray, seconds: float) -> float:
    """Images per second."""
    begin, images = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < seconds:
        forward(pixels)
        images += len(pixels)
    return images / passed


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row with its counterpart, shape (n,)."""
    product: np.ndarray = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return product


def agreement(checkpoint: Path, data: Path, split: str) -> None:
    """Verdicts, nearest references and neighbours of every engine against those of torch."""
    uploads = [Upload(Path(entry.uri).name, entry.read()) for entry in read_dataset(data, split=split)]
    answers: dict[str, list[Verdict]] = {}
    for engine in ("torch", "openvino-f32", "openvino"):
        settings = ServiceSettings.read(checkpoint=checkpoint, device="cpu", engine=engine, record=False)
        detector = load_detector(settings)
        detector.calibrator.refresh()
        found = [result for result in detector.detect(uploads) if isinstance(result, Verdict)]
        answers[detector.embedder.engine] = found
        detector.close()
    print(f"{len(answers[BASELINE])} images\n")
    print("| engine | same verdict | same nearest | neighbours shared | scores differ by at most |")
    print("|---|---:|---:|---:|---:|")
    for name, results in answers.items():
        pairs = list(zip(results, answers[BASELINE], strict=True))
        verdicts = np.mean([a.verdict == b.verdict for a, b in pairs])
        first = np.mean([a.neighbours[0].id == b.neighbours[0].id for a, b in pairs])
        both = [({n.id for n in a.neighbours}, {n.id for n in b.neighbours}) for a, b in pairs]
        shared = np.mean([len(a & b) / len(b) for a, b in both])
        apart = max(abs((a.score or 0) - (b.score or 0)) for a, b in pairs)
        print(f"| {name} | {verdicts:.2%} | {first:.2%} | {shared:.2%} | {apart:.4f} |")


if __name__ == "__main__":
    typer.run(main)
