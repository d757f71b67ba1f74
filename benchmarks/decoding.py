"""Processor time from the bytes of a JPEG to what a backbone reads of one window.

The window is cut from the whole image, and from the rows that it needs. What Pillow, OpenCV and, where it is installed,
pyvips take to decode alone stands beside them. All ways take turns, and times are medians of all threads' time.

    python -m benchmarks.decoding
"""

import io
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Annotated

import cv2
import numpy as np
import typer
from PIL import Image

from benchmarks.serving import photograph
from benchmarks.targets import Target
from trainer.images import Preprocess, decode_image

WINDOW = Preprocess("center_crop", 224)


def main(rounds: Annotated[int, typer.Option(help="Turns.")] = 9) -> list[Target]:
    """Print a table of each file; what is wanted of the first two."""
    cv2.setNumThreads(1)
    large = Image.open(io.BytesIO(photograph(1, (4000, 3000))))
    files = {
        "1024 x 768": photograph(0),
        "4000 x 3000": encoded(large),
        "4000 x 3000, 4:4:4": encoded(large, subsampling=0),
        "4000 x 3000, progressive": encoded(large, progressive=True),
    }
    taken = {}
    for name, data in files.items():
        print(f"\n| {name}, {len(data) / 1000:,.0f} kB | ms of a core | ratio |\n|---|---:|---:|")
        taken[name] = compare(data, rounds)
    wanted = {"1024 x 768": 4, "4000 x 3000": 25}
    return [Target(f"a window of {name}, ms of a core", taken[name], most, True) for name, most in wanted.items()]


def compare(data: bytes, rounds: int) -> float:
    """Print the lines of one file; milliseconds of our way."""
    ways: dict[str, Callable[[], object]] = {
        "window, of the whole image": partial(window, data),
        "window, of its rows": partial(window, data, windows_of=WINDOW),
        "Pillow, decoding alone": lambda: Image.open(io.BytesIO(data)).load(),
        "OpenCV, decoding alone": lambda: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
    }
    if find_spec("pyvips"):
        ways["pyvips, window alone"] = partial(vips_window, data)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(time.process_time() - start)
    medians = {name: 1000 * median(values[1:]) for name, values in times.items()}
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} | {value / medians['window, of the whole image']:.2f} |")
    return medians["window, of its rows"]


def encoded(image: Image.Image, **options: object) -> bytes:
    """An image as a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **({"quality": 85} | options))
    return buffer.getvalue()


def window(data: bytes, windows_of: Preprocess | None = None) -> np.ndarray:
    """What a backbone reads, shape (1, 3, 224, 224)."""
    return WINDOW([decode_image(data, windows_of=windows_of)[0]])


def vips_window(data: bytes) -> np.ndarray:
    """The centre's pixels, shape (224, 224, 3), uint8."""
    import pyvips  # type: ignore[import-not-found]

    image = pyvips.Image.new_from_buffer(data, "", access="sequential")
    pixels: np.ndarray = image.crop((image.width - 224) // 2, (image.height - 224) // 2, 224, 224).numpy()
    return pixels


if __name__ == "__main__":
    typer.run(main)
