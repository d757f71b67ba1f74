"""What the limits of `api.judge.detail` refuse of a data set and of drawn images, and what they keep from being judged.

Every image of the split is cut to what a backbone would see of it. With a checkpoint, its linear head judges the images
of the calibration and validation roles once more from centred windows of fewer pixels, which shows from which side on
there is too little left to tell the labels apart.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from api.judge.detail import LEAST_CONTRAST, LEAST_DETAIL, detail_share, luminance, shortfall
from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry, role
from trainer.evaluation.embedded_set import embed_entries
from trainer.evaluation.metrics import auroc
from trainer.evaluation.transforms import Transform, jpeg
from trainer.heads.heads import Heads
from trainer.images import Preprocess, decode_image
from trainer.model.embedder import Embedder

CONTRASTS = (1.0, 2.0, LEAST_CONTRAST, 5.0, 10.0)
DETAILS = (0.001, 0.002, LEAST_DETAIL, 0.01, 0.02)
SIDES = (1.0, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Of a window, as shares of the side that the backbone reads."""
QUALITY = 75
"""JPEG quality of the windows that are recompressed."""


def main(
    data: Annotated[Path, typer.Option()],
    split: Annotated[str, typer.Option()] = "train",
    side: Annotated[int, typer.Option(help="What the backbone reads, pixels, without a checkpoint.")] = 224,
    checkpoint: Annotated[Path | None, typer.Option(envvar="LINEUP_CHECKPOINT")] = None,
) -> None:
    """Print two Markdown tables, with a checkpoint three."""
    embedder = Embedder.load(checkpoint) if checkpoint else None
    preprocess = embedder.preprocess if embedder else Preprocess("center_crop", side)
    entries = list(read_dataset(data, split=split))
    print_shares(entries, preprocess)
    print_drawn(preprocess)
    if checkpoint and embedder:
        judged = [entry for entry in entries if role(entry.group) != "training"]
        print_sides(judged, embedder, Heads.load(checkpoint))


def print_shares(entries: Sequence[Entry], preprocess: Preprocess) -> None:
    """How many images of each label lie under each limit."""
    labels = np.array([entry.label for entry in entries])
    images = (decode_image(entry.read())[0] for entry in entries)
    pixels = [luminance(image.size, preprocess.crop(image), preprocess) for image in images]
    counts = [int((labels == label).sum()) for label in (0, 1)]
    print(f"| limit | of {counts[0]:,} real images | of {counts[1]:,} fake images |\n|---|---:|---:|")
    contrasts = np.array([grey.std() for grey in pixels])
    details = np.array([detail_share(grey) for grey in pixels])
    rows = [(f"contrast {limit:g}", contrasts < limit) for limit in CONTRASTS]
    rows += [(f"detail {limit:.1%}", details < limit) for limit in DETAILS]
    rows.append(("both limits in use", (contrasts < LEAST_CONTRAST) | (details < LEAST_DETAIL)))
    for name, under in rows:
        real, fake = (int(under[labels == label].sum()) for label in (0, 1))
        print(f"| {name} | {real} ({real / max(1, counts[0]):.1%}) | {fake} ({fake / max(1, counts[1]):.1%}) |")


def print_drawn(preprocess: Preprocess) -> None:
    """What is measured of images that hold nothing, and of simple ones that hold something."""
    print("\n| drawn image | contrast | detail | answer |\n|---|---:|---:|---|")
    for name, image in drawn(preprocess.image_size).items():
        grey = luminance(image.size, preprocess.crop(image), preprocess)
        answer = (shortfall(image.size, preprocess.crops(image), preprocess) or "judged").partition(":")[0]
        print(f"| {name} | {grey.std():.1f} | {detail_share(grey):.2%} | {answer} |")


def drawn(side: int) -> dict[str, Image.Image]:
    """Images of this side in pixels, by name."""
    rng = np.random.default_rng(0)
    across, down = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    noise, disc = rng.normal(size=(side, side)), across**2 + down**2 < 0.25

    def image(grey: np.ndarray, quality: int | None = None) -> Image.Image:
        rgb = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
        return jpeg(rgb, rng, quality=quality) if quality else rgb

    gradient, glow = 128 + 127 * across, 255 * np.exp(-3 * (across**2 + down**2))
    return {
        "black": image(0 * noise),
        "white": image(0 * noise + 255),
        "one colour, JPEG 50": image(0 * noise + 90, 50),
        "black with noise of 1 level": image(noise + 3),
        "blank page: noise of 2 levels": image(245 + 2 * noise),
        "blank page: noise of 3 levels, JPEG 75": image(245 + 3 * noise, 75),
        "gradient": image(gradient),
        "gradient, JPEG 75": image(gradient, 75),
        "glow": image(glow),
        "glow, JPEG 75": image(glow, 75),
        "grey with noise of 5 levels": image(128 + 5 * noise),
        "disc on a ground": image(np.where(disc, 200, 30)),
    }


def print_sides(entries: Sequence[Entry], embedder: Embedder, heads: Heads) -> None:
    """AUROC of the linear head on centred windows, and how many of each label it calls fake."""
    print("\n| window, pixels | images | plain: AUROC, reals and fakes called fake, % | recompressed: the same |")
    print("|---:|---:|---:|---:|")
    for share in SIDES:
        side = round(share * embedder.preprocess.image_size)
        transforms = [
            Transform("plain", partial(window, side=side)),
            Transform("recompressed", partial(window, side=side, quality=QUALITY)),
        ]
        sets, _ = embed_entries(embedder, [(entry, transforms) for entry in entries], seed=0)
        cells = []
        for transform in transforms:
            part = sets[transform.name]
            logits = heads.linear.logit(part.embeddings)
            fake = [(logits >= 0)[part.labels == label].mean() for label in (0, 1)]
            cells.append(", ".join(f"{100 * value:.1f}" for value in (float(auroc(logits, part.labels)), *fake)))
        print(f"| {side} | {len(part)} | {' | '.join(cells)} |")


def window(image: Image.Image, rng: np.random.Generator, *, side: int, quality: int | None = None) -> Image.Image:
    """The centre of an image, a square of `side` pixels, as it is or recompressed."""
    centre = Preprocess("center_crop", side).crop(image)
    return jpeg(centre, rng, quality=quality) if quality else centre


if __name__ == "__main__":
    typer.run(main)
