"""Reconstructions of real images: the autoencoder, and the data set they make."""

import io
import json
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.data.datasets import read_dataset
from trainer.data.entry import role
from trainer.images import decode_image
from trainer.simulation.reconstructions import ReconstructionError, align, read_autoencoder, reconstruct


def weights_of(channels: int, pooled: bool, *, decoder: bool) -> dict[str, torch.Tensor]:
    """Small random weights of one half, named and shaped as in published files."""
    shapes: dict[str, tuple[int, ...]] = {}
    first, last = (1, 19) if decoder else (0, 14)
    blocks = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18) if decoder else (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
    shapes[f"{first}.weight"] = (64, channels if decoder else 3, 3, 3)
    shapes[f"{last}.weight"] = (3 if decoder else channels, 64, 3, 3)
    for block in blocks:
        shapes |= {f"{block}.conv.{layer}.weight": (64, 64, 3, 3) for layer in (0, 2, 4)}
        if pooled and block in ((3, 4, 5) if decoder else (11, 12, 13)):
            shapes |= {f"{block}.pool.0.weight": (256, 64, 1, 1), f"{block}.pool.3.weight": (64, 256, 1, 1)}
            shapes |= {f"{block}.pool.1.weight": (256,), f"{block}.pool.1.bias": (256,)}
    biased = [name for name in shapes if name.endswith("weight") and ".pool." not in name]
    shapes |= {name.replace("weight", "bias"): shapes[name][:1] for name in biased}
    shapes |= {f"{layer}.weight": (64, 64, 3, 3) for layer in ((7, 12, 17) if decoder else (2, 6, 10))}
    generator = torch.Generator().manual_seed(int(decoder))
    return {name: torch.randn(shape, generator=generator).half() / 20 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("autoencoder")
    for name in ("encoder", "decoder"):
        (folder / name).mkdir()
        save_file(weights_of(4, pooled=False, decoder=name == "decoder"), folder / name / "model.safetensors")
    return folder / "encoder" / "model.safetensors", folder / "decoder" / "model.safetensors"


@pytest.mark.parametrize(("channels", "pooled"), [(4, False), (32, True)])
def test_an_autoencoder_of_either_kind_is_read_and_keeps_the_size(tmp_path: Path, channels: int, pooled: bool) -> None:
    encoder, decoder = tmp_path / "e", tmp_path / "d"
    save_file(weights_of(channels, pooled, decoder=False), encoder)
    save_file(weights_of(channels, pooled, decoder=True), decoder)
    autoencoder = read_autoencoder(encoder, decoder)
    assert isinstance(autoencoder, nn.Sequential)
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    latents = autoencoder[0](image)
    assert latents.shape == (1, channels, 4, 6)
    assert autoencoder(image).shape == image.shape
    with pytest.raises(ReconstructionError, match="d is no half of a tiny autoencoder"):
        read_autoencoder(decoder, encoder)


def test_a_reconstruction_has_the_size_of_its_image() -> None:
    """The edges are repeated up to whole latents meanwhile."""
    pixels = np.random.default_rng(0).integers(0, 256, (19, 70, 3), dtype=np.uint8)
    inputs: list[torch.Tensor] = []
    autoencoder = nn.Identity()
    autoencoder.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    np.testing.assert_array_equal(np.asarray(reconstruct(Image.fromarray(pixels), autoencoder)), pixels)
    padded = (255 * inputs[0][0]).round().byte().permute(1, 2, 0).numpy()
    assert padded.shape == (24, 72, 3)
    np.testing.assert_array_equal(padded[19:, 70:], np.broadcast_to(pixels[-1, -1], (5, 2, 3)))


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "444.jpg": ("RGB", {"quality": 91, "subsampling": "4:4:4"}),
    "tables.jpg": ("RGB", {"qtables": [range(1, 65), range(2, 66)], "subsampling": "4:2:2"}),
    "grey.jpg": ("L", {"quality": 60}),
    "turned.jpg": (
        "RGB",
        {"quality": 80, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(4)},
    ),
    "plain.png": ("RGB", {}),
    "palette.png": ("P", {}),
    "lossy.webp": ("RGB", {"quality": 50}),
    "cmyk.jpg": ("CMYK", {}),
    "coarse.jpg": ("RGB", {"qtables": [[256] * 64] * 2}),
}


def test_a_reconstruction_is_written_as_its_image_or_not_at_all(
    tmp_path: Path, halves: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The palette, the lossy WebP, CMYK, coarse tables and too many pixels are skipped, and counted without a word."""
    monkeypatch.setattr("trainer.simulation.reconstructions.read_autoencoder", lambda *_: nn.Identity())
    monkeypatch.setattr("trainer.simulation.reconstructions.MOST_PIXELS", 40 * 56)
    groups = (f"group {number}" for number in count() if role(f"group {number}") == "training")
    data, address = tmp_path / "data", "https://example.org/image"
    data.mkdir()
    lines = ["path,label,generator,split,group,uri,window,licence"]
    noise = np.random.default_rng(0).integers(0, 256, (10, 5, 7, 3), dtype=np.uint8)
    for pixels, name, group in zip(noise, [*FORMS, "large.png"], groups, strict=False):
        mode, options = FORMS.get(name, ("RGB", {}))
        size = (56, 41) if name == "large.png" else (53, 37)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(data / name, **options)
        lines.append(f'{name},real,,train,{group},{address},"0,0,53,37",CC0')
    (data / "manifest.csv").write_text("\n".join(lines))
    capfd.readouterr()  # libjpeg, of the coarse tables as they were made
    counts = align(data, tmp_path / "aligned", *halves, split="train,validation")
    assert counts == {"real": 10, "fake": 0, "reconstructed": 5, "skipped": 5, "unreadable": 0}
    assert capfd.readouterr() == ("", "")
    entries = list(read_dataset(tmp_path / "aligned"))
    originals = {entry.group: entry for entry in entries if not entry.label}
    assert len(originals) == 10
    assert {entry.split for entry in entries} == {"train"}
    for original in originals.values():
        assert original.public_uri == address
        assert original.attributes == {"window": "0,0,53,37", "licence": "CC0"}
    for made in (entry for entry in entries if entry.label):
        assert made.public_uri is None
        assert made.attributes == {"licence": "CC0"}
        contents = originals[made.group].read(), made.read()
        (image, facts), (copy, made_facts) = map(decode_image, contents)
        assert (copy.size, made_facts.format) == (image.size, facts.format)
        np.testing.assert_allclose(np.asarray(copy, float), np.asarray(image, float), atol=24)
        files = [Image.open(io.BytesIO(content)) for content in contents]
        for fact in ("mode", "quantization", "layer"):
            assert getattr(files[0], fact, None) == getattr(files[1], fact, None)


def test_an_aligned_set_has_a_reconstruction_of_each_real_training_image(
    image_folder: Path, tmp_path: Path, halves: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.simulation.reconstructions.read_autoencoder", lambda *_: nn.Identity())
    originals = list(read_dataset(image_folder, split="train"))
    counts = align(image_folder, tmp_path / "aligned", *halves)
    entries = list(read_dataset(tmp_path / "aligned", split="train"))
    made = [entry for entry in entries if entry.generator == "reconstruction"]
    groups = sorted(entry.group for entry in originals if not entry.label and role(entry.group) == "training")
    assert sorted(entry.group for entry in made) == groups
    assert counts == {
        "real": sum(not entry.label for entry in originals),
        "fake": sum(entry.label for entry in originals),
        "reconstructed": len(groups),
        "skipped": 0,
        "unreadable": 0,
    }
    by_bytes = {entry.read(): entry for entry in originals}
    for entry in entries:
        if entry.generator != "reconstruction":
            original = by_bytes[entry.read()]
            assert (entry.group, entry.source, entry.label) == (original.group, original.source, original.label)
            continue
        (original,) = (other for other in originals if other.group == entry.group)
        (image, facts), (made_image, made_facts) = decode_image(original.read()), decode_image(entry.read())
        assert made_image.size == image.size
        assert (made_facts.format, made_facts.jpeg_quality) == (facts.format, facts.jpeg_quality)
    described = json.loads((tmp_path / "aligned" / "reconstructions.json").read_text())["autoencoder"]
    assert described == {half.parent.name: sha256(half.read_bytes()).hexdigest() for half in halves}
    command = ["align", str(image_folder), str(tmp_path / "aligned"), "--device", "cpu", "--json"]
    command += ["--encoder", str(halves[0]), "--decoder", str(halves[1])]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "aligned").rglob("*")}
    assert json.loads(CliRunner().invoke(app, command).stdout) == counts
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "aligned").rglob("*")} == before
    with pytest.raises(ReconstructionError, match="of other settings"):
        align(image_folder, tmp_path / "aligned", *halves, generator="other")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(ReconstructionError, match="holds something else"):
        align(image_folder, tmp_path / "notes", *halves)
