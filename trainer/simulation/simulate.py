"""Simulated photographs and simulated generators, for trying the whole of Lineup without any real data.

A record is a theme. Its real image is a scene seen by a simulated camera; each of its fakes is another scene of the
same theme that carries the trace of one kind of generator. All images of a record share size, file format and
quality, so that these tell nothing.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from textwrap import fill
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.console import Console

from trainer.files import whole_folder
from trainer.progress import Bar
from trainer.simulation.camera import photograph
from trainer.simulation.fingerprints import GENERATORS, generate
from trainer.simulation.scenes import draw_theme, render

SEEN_GENERATORS = ("sim-upconv", "sim-nearest", "sim-bilinear", "sim-latent")
UNSEEN_GENERATORS = ("sim-spectral",)
MANIFEST_COLUMNS = ("path", "label", "generator", "split", "source", "group")

# Other pictures under the same settings need another number.
_VERSION = 3
_README = """\
THESE IMAGES ARE SIMULATED. No photograph and no output of a real generator is among them.

"real" images are computer-drawn scenes (dead leaves with 1/f texture) passed through a simulated camera: mosaic,
noise, demosaicing, tone curve, sharpening. "fake" images are scenes of the same kind without a camera, each with the
trace of one kind of generator:

{generators}

Results on them say that the program works. They say nothing about how well real generators are detected.

{records} records, images of about {size} pixels, seed {seed}. manifest.csv lists every file. {unseen} is kept
for the split "unseen" and exists for the records of the split "test" only, so that no group is in two splits that
must not meet.
"""


class SimulationError(ValueError):
    """The output folder holds something else, or a setting is out of range."""


@dataclass(frozen=True, slots=True)
class _Settings:
    records: int
    size: int
    seed: int
    version: int = _VERSION


def simulate(
    output: Path, records: int, *, size: int = 160, seed: int = 42, workers: int | None = None, progress: bool = True
) -> dict[str, int]:
    """Write `records` simulated records and a manifest to `output`; nothing happens where they are there already.

    The same settings give the same bytes. The folder appears whole or not at all.

    Args:
        output: A new or empty folder.
        records: Three of ten are for the split `test`.
        size: Sides vary around this many pixels.
        seed: Decides everything.
        workers: Processes; by default one per core, none for a few records.
        progress: Whether to show how far it is on stderr.

    Returns:
        Images per split: `{"train": ..., "test": ..., "unseen": ...}`.

    Raises:
        SimulationError: `output` holds something else, or a number is out of range.
    """
    if records < 1 or size < 64 or seed < 0:
        raise SimulationError(
            f"records is {records}, size {size}, seed {seed}; expected at least 1 record, 64 pixels and a seed from 0"
        )
    output, settings = Path(os.path.abspath(output)), _Settings(records, size, seed)  # noqa: PTH100 - keeps links
    if (counts := _existing(output, settings)) is not None:
        return counts
    try:
        with whole_folder(output) as folder:
            rows = _draw(folder, settings, workers, progress)
            counts = dict(Counter(row["split"] for row in rows))
            with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, MANIFEST_COLUMNS, lineterminator="\n")
                table.writeheader()
                table.writerows(rows)
            (folder / "README.txt").write_text(_readme(settings), encoding="utf-8")
            (folder / "simulation.json").write_text(json.dumps({**asdict(settings), "images": counts}, indent=2) + "\n")
    except OSError as error:
        if (counts := _existing(output, settings)) is None:  # or another process was faster
            raise SimulationError(f"cannot write {output} ({error.strerror})") from error
    return counts


def _existing(output: Path, settings: _Settings) -> dict[str, int] | None:
    """What a folder holds, if it is the result of these settings; none if it is free."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        description: dict[str, Any] = json.loads((output / "simulation.json").read_text())
    except (OSError, ValueError) as error:
        raise SimulationError(f"{output} exists and is no simulation: choose another folder") from error
    images: dict[str, int] = description.pop("images", {})
    if description != asdict(settings):
        new, old = (", ".join(f"{k} {v}" for k, v in s.items()) for s in (asdict(settings), description))
        raise SimulationError(f"{output} holds another simulation ({old}; asked: {new}): remove it, or choose another")
    return images


def _readme(settings: _Settings) -> str:
    texts = [f"{name}: {' '.join((draw.__doc__ or '').split())}" for name, draw in GENERATORS.items()]
    about = "\n\n".join(fill(text, 116, initial_indent="  ", subsequent_indent="    ") for text in texts)
    return _README.format(generators=about, unseen=", ".join(UNSEEN_GENERATORS), **asdict(settings))


def _draw(folder: Path, settings: _Settings, workers: int | None, progress: bool) -> list[dict[str, str]]:
    """Draw all records; the rows of the manifest, in order."""
    for name in ("real", *(f"fake/{generator}" for generator in (*SEEN_GENERATORS, *UNSEEN_GENERATORS))):
        (folder / name).mkdir(parents=True)
    if workers is None:
        workers = 1 if settings.records < 16 else len(os.sched_getaffinity(0))
    draw = partial(_draw_record, folder, settings)
    rows: list[dict[str, str]] = []
    bar = Bar(*Bar.get_default_columns(), console=Console(stderr=True, quiet=not progress))
    with bar, _mapper(workers) as mapper:
        for record in bar.track(
            mapper(draw, range(settings.records)), settings.records, description="Simulating images"
        ):
            rows += record
    return rows


@contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    if workers < 2:
        yield map
        return
    # Forking a process that has threads, as every one with torch, can hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield partial(pool.map, chunksize=4)


def _draw_record(folder: Path, settings: _Settings, record: int) -> list[dict[str, str]]:
    """Draw and write the images of one record; their rows of the manifest."""
    rng = np.random.default_rng([settings.seed, record])
    theme, test = draw_theme(rng), record % 10 in (3, 6, 9)
    width, height = (16 * round(settings.size * rng.uniform(0.8, 1.2) / 16) for _ in range(2))
    suffix, options = _draw_encoding(rng)
    rows = []
    for number, generator in enumerate([None, *SEEN_GENERATORS, *(UNSEEN_GENERATORS if test else ())]):
        image_rng = np.random.default_rng([settings.seed, record, 1 + number])
        scene = render(theme, width, height, image_rng)
        picture = photograph(scene, image_rng) if generator is None else generate(generator, scene, image_rng)
        path = f"fake/{generator}/{record:06d}{suffix}" if generator else f"real/{record:06d}{suffix}"
        Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(folder / path, **options)
        split = "unseen" if generator in UNSEEN_GENERATORS else "test" if test else "train"
        label = "fake" if generator else "real"
        group = f"sim-{settings.seed}-{record:06d}"
        rows.append(dict(zip(MANIFEST_COLUMNS, (path, label, generator or "", split, "simulated", group), strict=True)))
    return rows


def _draw_encoding(rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """File name ending and Pillow's options."""
    kind, quality = rng.random(), int(rng.integers(72, 98))
    if kind < 0.5:
        return ".jpg", {"quality": quality, "subsampling": int(rng.choice((0, 2)))}
    return (".webp", {"quality": quality}) if kind < 0.75 else (".png", {})
