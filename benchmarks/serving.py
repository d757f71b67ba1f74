"""Detection end to end: one image against the reference path, then a server under 1, 8 and 64 clients and with a job.

References are random, as are the weights without `--checkpoint`: nothing here depends on what they say. The reference
path is the one of the paper's code: PIL, the transformers model in eager float32, and scikit-learn's 1-NN, logistic
regression and one-class SVM.
"""

import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
import psutil
import typer
from PIL import Image

from api.client import Client as LineupClient
from api.judge.detector import Detector
from api.judge.loader import load_detector
from api.judge.uploads import Upload
from api.service_settings import ServiceSettings
from benchmarks.targets import Target
from indexer.database.embedded import EmbeddedServer
from indexer.store.reference_facts import NewReference
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import fit_heads
from trainer.images import thumbnail
from trainer.model.checkpoint import CheckpointConfig, build_backbone, save_checkpoint

ROOT = Path(__file__).parent.parent
DIM = 192
MARK = "lineup"
MOST_IN_JOB = 400
"""Images of half a megabyte that one request may hold (`LINEUP_MAX_REQUEST_BYTES`)."""


def photograph(seed: int, size: tuple[int, int] = (1024, 768)) -> bytes:
    """A JPEG with the frequencies of a photograph: noise under a 1/f spectrum."""
    rng = np.random.default_rng(seed)
    height, width = size[1], size[0]
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    spectrum = np.fft.fft2(rng.normal(size=(height, width, 3)), axes=(0, 1)) / (np.hypot(fy, fx) + 1 / width)[..., None]
    pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
    pixels = 127 + 50 * pixels / pixels.std()
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def embeddings(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Raw vectors (n, d) float32 in 50 clusters, and labels (n,) uint8, half of them fake."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(50, DIM))
    cluster = rng.integers(0, 50, n)
    return (centres[cluster] + rng.normal(size=(n, DIM))).astype(np.float32), (cluster % 2).astype(np.uint8)


def random_checkpoint(folder: Path) -> None:
    """A random ViT-Tiny with heads and calibration images."""
    save_checkpoint(folder, build_backbone(CheckpointConfig()), CheckpointConfig(name="random"))
    x, y = embeddings(2000, 1)
    names = [f"{number:064x}" for number in range(len(y))]
    calibration = CalibrationSet(x, y, ["g" if label else "" for label in y], ["-"] * len(y), names, names)
    calibration.save(folder)
    train, labels = embeddings(10_000, 2)
    fit_heads(train, labels, calibration=calibration).save(folder)


def fill(settings: ServiceSettings, n: int) -> None:
    """Write n references."""
    detector = load_detector(settings)
    x, y = embeddings(n, 3)
    small = thumbnail(Image.new("RGB", (64, 64)))
    rows = [
        NewReference(
            sha256=f"{10**6 + i:064x}",
            label=int(y[i]),
            generator=f"gen-{i % 7}" if y[i] else None,
            source="random",
            group=f"group-{i}",
            uri=None,
            file_bytes=1,
            mtime=None,
            width=64,
            height=64,
            format="PNG",
            jpeg_quality=None,
            thumbnail=small,
            attributes={},
            vector=x[i],
        )
        for i in range(n)
    ]
    for start in range(0, n, 1000):
        detector.store.references.add(rows[start : start + 1000], detector.embedder.id)
    detector.follower.catch_up()
    detector.calibrator.refresh()
    detector.follower.save()
    detector.close()


def reference_path(train: np.ndarray, labels: np.ndarray, n: int) -> Callable[[bytes], None]:
    """Judges an image as the paper's code does."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestNeighbors
    from sklearn.svm import OneClassSVM
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=DIM, num_attention_heads=3, intermediate_size=4 * DIM)
    config._attn_implementation = "eager"
    model = ViTModel(config, add_pooling_layer=False)
    model.train(False)
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(embeddings(n, 3)[0])
    linear = LogisticRegression(C=0.316, class_weight="balanced", max_iter=1000).fit(train, labels)
    svm = OneClassSVM(kernel="poly", degree=3, gamma="auto", nu=0.1).fit(train[labels == 0])
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

    def judge(data: bytes) -> None:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = 248 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = (np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255 - mean) / std
        with torch.inference_mode():
            batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())  # (1, 3, 224, 224)
            embedding = model(batch).last_hidden_state[:, 0].numpy()  # (1, d)
        nearest.kneighbors(embedding)
        linear.predict_proba(embedding)
        svm.decision_function(embedding)

    return judge


@contextmanager
def served(settings: ServiceSettings) -> Iterator[tuple[int, int, float]]:
    """A server: its port, its process id, and the seconds until it answered."""
    values = {"LINEUP_HOME": str(settings.home), "LINEUP_CHECKPOINT": str(settings.checkpoint), "LINEUP_DEVICE": "cpu"}
    values["LINEUP_OPEN"] = "true"
    log, start = settings.home / "log", time.perf_counter()
    with log.open("w") as stderr:
        command = [sys.executable, "-m", "api", "serve", "--port", "0"]
        process = subprocess.Popen(command, env=os.environ | values, cwd=ROOT, stderr=stderr)
    try:
        while '"address"' not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.02)
        address = next(json.loads(line)["address"] for line in log.read_text().splitlines() if '"address"' in line)
        yield urlsplit(address).port or 0, process.pid, time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


class Client:
    """One connection that sends whole requests made beforehand: an HTTP library would take its share of two cores."""

    def __init__(self, port: int) -> None:
        self.connection = HTTPConnection("127.0.0.1", port, timeout=120)

    def detect(self, body: bytes) -> None:
        """Send one form and read the verdict."""
        self.connection.request("POST", "/v1/detect", body, {"content-type": f"multipart/form-data; boundary={MARK}"})
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status != 200 or json.loads(content)["results"][0]["degraded"]:
            raise RuntimeError(f"{answer.status} {content[:300]!r}")


def form(data: bytes) -> bytes:
    """A body that holds one image."""
    head = f'--{MARK}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    return head.encode() + data + f"\r\n--{MARK}--\r\n".encode()


def saturate(port: int, clients: int, seconds: float, forms: list[bytes]) -> tuple[float, list[float]]:
    """Clients that ask again as soon as they are answered: images per second, and seconds per image, ascending."""
    times: list[float] = []
    numbers, end = count(), time.perf_counter() + seconds

    def work(_: int) -> None:
        client = Client(port)
        while (start := time.perf_counter()) < end:
            client.detect(forms[next(numbers) % len(forms)])
            times.append(time.perf_counter() - start)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    return len(times) / (time.perf_counter() - start), sorted(times)


def arrive(port: int, rate: float, seconds: float, forms: list[bytes]) -> tuple[float, list[float]]:
    """Images that arrive at random moments, so many per second, whether or not others are answered; see `saturate`."""
    gaps = np.random.default_rng(0).exponential(1 / rate, int(rate * seconds))
    times: list[float] = []
    idle = [Client(port) for _ in range(64)]

    def work(number: int, due: float) -> None:
        client = idle.pop()
        client.detect(forms[number % len(forms)])
        times.append(time.perf_counter() - due)
        idle.append(client)

    start = time.perf_counter()
    with ThreadPoolExecutor(len(idle)) as pool:
        for number, due in enumerate(start + np.cumsum(gaps)):
            time.sleep(max(0.0, due - time.perf_counter()))
            pool.submit(work, number, due)
    return len(times) / (time.perf_counter() - start), sorted(times)


def job(port: int, images: list[bytes], number: int) -> float:
    """Images per second of a job of so many, from its sending to its end."""
    start = time.perf_counter()
    with LineupClient(f"http://127.0.0.1:{port}") as lineup:
        state = lineup.start_job(*((f"{one}.jpg", images[one % len(images)]) for one in range(number)))
        while not state.ended_at:
            time.sleep(0.05)
            state = lineup.job(state.id)
    if state.failed:
        raise RuntimeError(f"{state.failed} of {number} images failed")
    return number / (time.perf_counter() - start)


def rates(detector: Detector, images: list[bytes], seconds: float) -> tuple[float, float]:
    """Images per second of the embedding engine alone in batches of 32, and with decoding beside it."""
    views = [detector.prepare(Upload("a.jpg", image)).views for image in images * 2]  # of 32 images, each (w, 3, s, s)

    def repeat(work: Callable[[], object]) -> float:
        work()
        done, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            work()
            done += len(views)
        return done / (time.perf_counter() - start)

    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def both() -> None:
            decoding = [pool.submit(detector.prepare, Upload("a.jpg", image)) for image in images * 2]
            detector.embedder.embed_stacks(views)
            for future in decoding:
                future.result()

        return repeat(lambda: detector.embedder.embed_stacks(views)), repeat(both)


def resident(pid: int) -> int:
    """MiB."""
    return int(psutil.Process(pid).memory_info().rss / 2**20)


def quantile(times: list[float], q: float) -> float:
    """Of ascending times."""
    return times[min(len(times) - 1, int(len(times) * q))]


def row(name: str, rate: float, times: list[float], pid: int) -> str:
    """A line of the table of loads."""
    p50, p95, p99 = (1000 * quantile(times, q) for q in (0.5, 0.95, 0.99))
    return f"| {name} | {rate:.1f} | {p50:.0f} | {p95:.0f} | {p99:.0f} | {resident(pid)} |"


def one_image(
    settings: ServiceSettings, images: list[bytes], references: int, rounds: int, seconds: float
) -> tuple[float, float]:
    """Print the table of one image at a time, and the rates that nothing around the engine can exceed.

    Returns:
        How many times faster than the reference path it is, and the engine's images per second with decoding beside it.
    """
    train, labels = embeddings(10_000, 2)
    judge = reference_path(train, labels, references)
    detector = load_detector(settings)
    detector.calibrator.refresh()
    paths: dict[str, Callable[[bytes], object]] = {
        "reference": judge,
        f"Lineup ({detector.embedder.engine})": lambda data: list(detector.detect([Upload("a.jpg", data)])),
    }
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds + 3):  # in turns, so that both see the same machine; three to warm up
        for name, path in paths.items():
            # Not timed: it finds the other path's caches and spinning threads.
            path(images[(number + 1) % len(images)])
            start = time.perf_counter()
            path(images[number % len(images)])
            taken[name].append(time.perf_counter() - start)
    print(f"One 1024x768 JPEG, {references:,} references, {os.cpu_count()} cores\n")
    print("| path | median ms | times faster |\n|---|---:|---:|")
    base = statistics.median(taken["reference"][3:])
    for name, values in taken.items():
        median = statistics.median(values[3:])
        print(f"| {name} | {1000 * median:.1f} | {base / median:.2f} |")  # the last is ours
    alone, both = rates(detector, images, seconds / 4)
    print(f"\nThe engine embeds {alone:.1f} images/s in batches of 32, and {both:.1f} with decoding beside it")
    detector.close()
    return base / median, both


def main(
    references: Annotated[int, typer.Option()] = 50_000,
    rounds: Annotated[int, typer.Option(help="Images judged one at a time by each path.")] = 30,
    seconds: Annotated[float, typer.Option(help="Of each load.")] = 20.0,
    clients: Annotated[list[int] | None, typer.Option(help="1, 8 and 64 when not given.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="One of 192 dimensions, in place of random weights.")] = None,
    home: Annotated[Path | None, typer.Option(help="Keep checkpoint and references here, for another run.")] = None,
) -> list[Target]:
    """Print two Markdown tables; what is wanted of them."""
    folder = home or Path(tempfile.mkdtemp(prefix="lineup-"))
    settings = ServiceSettings(home=folder, checkpoint=folder / "checkpoint", device="cpu")
    images = [photograph(seed) for seed in range(16)]
    forms = [form(image) for image in images]
    try:
        if not (folder / "checkpoint").exists():
            if checkpoint is None:
                random_checkpoint(folder / "checkpoint")
            else:
                shutil.copytree(checkpoint, folder / "checkpoint")
            fill(settings, references)
        elif checkpoint is not None:
            raise typer.BadParameter(
                f"{folder} has a checkpoint already: leave out --checkpoint, or name another --home"
            )
        faster, decode_and_embed = one_image(settings, images, references, rounds, seconds)
        with served(settings) as (port, pid, start_up):
            print(f"\nStart-up {start_up:.1f} s, {resident(pid)} MiB at rest\n")
            print("| clients | images/s | p50 ms | p95 ms | p99 ms | resident MiB |\n|---|---:|---:|---:|---:|---:|")
            saturate(port, 2, seconds / 10, forms)  # to warm up
            highest = 0.0
            medians: list[float] = []
            for number in clients or [1, 8, 64]:
                rate, times = saturate(port, number, seconds, forms)
                highest = max(highest, rate)
                medians.append(quantile(times, 0.5))
                print(row(str(number), rate, times, pid), flush=True)
            rate, times = arrive(port, highest / 2, seconds, forms)
            print(row("half load", rate, times, pid))
            number = min(int(highest * seconds), MOST_IN_JOB)
            print(f"\nA job of {number} images, nobody else calling: {job(port, images, number):.1f} images/s")
        return [
            Target("one verdict, times faster than the reference path", faster, 4),
            Target("most images/s under load, of decoding and embedding alone", highest / decode_and_embed, 0.9),
            Target("p99 at half load, times one image of one client", quantile(times, 0.99) / medians[0], 3, True),
        ]
    finally:
        EmbeddedServer(folder).stop()
        if home is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
