"""Real images and what an autoencoder makes of them: fakes of the same content, so that content tells nothing.

Many generators end in the decoder of an autoencoder; what it leaves in an image that it merely copies is its trace
alone (aligned pairs: Rajan et al., arXiv 2410.11835; Guillaro et al., B-Free, arXiv 2412.17671).
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import get_sampling
from torch import Tensor, nn

from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry, check_generator, role
from trainer.data.manifest import GITHUB_COLUMNS, MANIFEST_COLUMNS
from trainer.files import whole_folder
from trainer.images import FileFacts, UnreadableImage, decode_image

MULTIPLE = 8
"""Pixels a side that a latent stands for."""
MOST_PIXELS = 1 << 20
"""Of a larger image none is made: the first layer keeps 64 numbers per pixel."""
MOST_EXIF_BYTES = 65_533
"""What a segment of a JPEG holds."""
COARSEST = 255
"""Of a JPEG's quantisation, in a baseline file: libjpeg writes a coarser one too, but prints that it does."""
DESCRIPTION = "reconstructions.json"


PLACE_COLUMNS = ("uri", "window", *GITHUB_COLUMNS)
"""What says where an image was published and which part of it this is; a reconstruction was not."""


class ReconstructionError(ValueError):
    """The autoencoder is not one that is known, or the output folder holds something else."""


class Block(nn.Module):
    """Three convolutions around which the input is added, where the weights have it after a pooling by groups."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])
        widened = nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU(), nn.Conv2d(256, 64, 1, bias=False)
        self.pool = nn.Sequential(*widened) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, 64, h, w) in and out."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """Holds latents within -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return 3 * torch.tanh(x / 3)


def read_autoencoder(encoder: Path, decoder: Path) -> nn.Module:
    """A tiny autoencoder (github.com/madebyollin/taesd and its kin) from its two safetensors files.

    Images (n, 3, h, w) in 0..1, sides multiples of 8, in and out; the latents have a place for 8 x 8 pixels.

    Raises:
        ReconstructionError: A file is broken, or of another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    halves: list[nn.Module] = []
    for path, build in ((encoder, _encoder), (decoder, _decoder)):
        try:
            weights = {name: value.float() for name, value in load_file(path).items()}
            half = build(weights)
            half.load_state_dict(weights)
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ReconstructionError(f"{path} is no half of a tiny autoencoder ({reason})") from error
        halves.append(half)
    return nn.Sequential(*halves).eval().requires_grad_(False)


def _encoder(weights: dict[str, Tensor]) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), Block(pooled=False)]
    for _ in range(3):
        layers.append(nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False))
        layers += [Block(f"{len(layers) + place}.pool.0.weight" in weights) for place in range(3)]
    return nn.Sequential(*layers, nn.Conv2d(64, len(weights[f"{len(layers)}.bias"]), 3, padding=1))


def _decoder(weights: dict[str, Tensor]) -> nn.Module:
    layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(weights["1.weight"].shape[1], 64, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [Block(f"{len(layers) + place}.pool.0.weight" in weights) for place in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(pooled=False), nn.Conv2d(64, 3, 3, padding=1))


@dataclass(frozen=True, slots=True)
class Form:
    """How a file holds an image, so that another can be written alike."""

    mode: str
    """Pillow's, L or RGB."""
    options: dict[str, Any]
    """What `Image.save` takes."""

    def encode(self, image: Image.Image) -> bytes:
        """A file of the same form."""
        stream = io.BytesIO()
        image.convert(self.mode).save(stream, **self.options)
        return stream.getvalue()


def read_form(content: bytes, facts: FileFacts) -> Form | None:
    """The form of a readable image: of a JPEG with its tables and sampling; none where it cannot be repeated.

    A reconstruction would be told by more colours than a palette has, or by lacking the loss of another format. The
    metadata, which may ask for a turn, are part of the form.
    """
    with Image.open(io.BytesIO(content)) as file:
        options = {"format": facts.format, "exif": file.info.get("exif", b"")}
        if facts.format == "JPEG":
            tables, sampling = getattr(file, "quantization"), get_sampling(file)  # noqa: B009
            options |= {"qtables": tables, "subsampling": sampling}
            known = (sampling >= 0 or file.mode == "L") and max(map(max, tables.values())) <= COARSEST
        else:
            known = facts.format == "PNG"
        repeatable = known and file.mode in ("L", "RGB") and len(options["exif"]) <= MOST_EXIF_BYTES
        return Form(file.mode, options) if repeatable else None


def reconstruct(image: Image.Image, autoencoder: nn.Module, device: str = "cpu") -> Image.Image:
    """What the autoencoder makes of an RGB image: of the same size, its last rows and columns repeated meanwhile."""
    width, height = image.size
    room = (0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)
    pixels = np.pad(np.asarray(image), room, "edge")  # (h', w', 3)
    with torch.inference_mode():
        inputs = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None] / 255  # (1, 3, h', w')
        outputs = autoencoder(inputs)[0].clamp(0, 1).permute(1, 2, 0)[:height, :width]  # (h, w, 3)
    return Image.fromarray((255 * outputs).round().byte().cpu().numpy())


def align(
    data: Path,
    output: Path,
    encoder: Path,
    decoder: Path,
    *,
    split: str = "train",
    generator: str = "reconstruction",
    device: str = "cpu",
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Write a data set of all images of a split and of reconstructions of its real training images.

    A reconstruction has the group, the source, the size and the turn of its image and is written as it is: a JPEG of
    the same tables and sampling, or a PNG. So neither content nor file tells them apart. An image of more than
    `MOST_PIXELS`, or in another form, is copied and skipped. Images that calibrate or validate are not reconstructed.
    Nothing happens where the folder is there already; it appears whole or not at all.

    Args:
        data: Data set of any layout.
        output: A new or empty folder.
        encoder: Safetensors file of a tiny autoencoder.
        decoder: Its other half.
        split: Which images, a comma list.
        generator: Name of the reconstructions.
        device: cpu or cuda.
        on_image: Told about each image.

    Returns:
        Images by kind: real, fake, reconstructed, skipped, unreadable.

    Raises:
        ReconstructionError: The autoencoder is not known, or the folder holds something else.
        DatasetError: `data` is no data set.
    """
    check_generator(generator, "--generator")
    autoencoder = read_autoencoder(encoder, decoder).to(device)
    files = {"encoder": encoder, "decoder": decoder}
    halves = {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    settings = {"data": str(data), "split": split, "generator": generator, "autoencoder": halves}
    if (counts := _existing(output, settings)) is not None:
        return counts
    counted: Counter[str] = Counter(real=0, fake=0, reconstructed=0, skipped=0, unreadable=0)
    rows: list[dict[str, str]] = []
    with whole_folder(output) as folder:
        for entry in read_dataset(data, split=split):
            on_image()
            try:
                content = entry.read()
                image, facts = decode_image(content, upright=False)
            except (UnreadableImage, OSError):
                counted["unreadable"] += 1
                continue
            row = _row(entry)
            rows.append(row | {"path": _write(folder, content, facts.format)})
            counted["fake" if entry.label else "real"] += 1
            if entry.label or role(entry.group) != "training":
                continue
            form = read_form(content, facts)
            if form is None or image.width * image.height > MOST_PIXELS:
                counted["skipped"] += 1
                continue
            copy = form.encode(reconstruct(image, autoencoder, device))
            rows.append({name: value for name, value in row.items() if name not in PLACE_COLUMNS})
            rows[-1] |= {"path": _write(folder, copy, facts.format), "label": "fake", "generator": generator}
            counted["reconstructed"] += 1
        columns = dict.fromkeys([*MANIFEST_COLUMNS, "uri"]) | dict.fromkeys(name for row in rows for name in row)
        with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(columns), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        (folder / DESCRIPTION).write_text(json.dumps(settings | {"images": dict(counted)}, indent=2) + "\n")
    return dict(counted)


def _existing(output: Path, settings: dict[str, Any]) -> dict[str, int] | None:
    """What a folder holds, if it is the result of these settings; none if it is free."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        description: dict[str, Any] = json.loads((output / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise ReconstructionError(f"{output} holds something else: choose another folder") from error
    images: dict[str, int] = description.pop("images", {})
    if description != settings:
        raise ReconstructionError(f"{output} holds reconstructions of other settings: remove it, or choose another")
    return images


def _row(entry: Entry) -> dict[str, str]:
    return entry.attributes | {
        "label": "fake" if entry.label else "real",
        "generator": entry.generator or "",
        "split": entry.split or "",
        "source": entry.source,
        "group": entry.group,
        "uri": entry.public_uri or entry.attributes.get("uri", ""),
    }


def _write(folder: Path, content: bytes, kind: str) -> str:
    """Write an image under the name of its bytes; returns its path within the folder."""
    name = sha256(content).hexdigest()
    path = Path("images", name[:2], f"{name}.{kind.lower()}")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
    return path.as_posix()
