"""The checkpoint folder: what is written is read back, what is broken is named."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.embedder import (
    CheckpointConfig,
    CheckpointError,
    Embedder,
    build_backbone,
    checkpoint_id,
    pick_device,
    read_config,
    read_weights,
    save_checkpoint,
    write_atomically,
)
from trainer.images import Preprocess


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def embedder(tiny_checkpoint: Path) -> Embedder:
    return Embedder.load(tiny_checkpoint, device="cpu")


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)) for i in range(count)]


def test_embeddings_are_the_backbones_cls_token(embedder: Embedder) -> None:
    images = pictures(3)
    x = embedder.embed(images)
    assert x.shape == (3, 48)
    assert x.dtype == np.float32
    pixels = torch.from_numpy(embedder.preprocess(images))
    with torch.inference_mode():
        tokens = embedder.backbone.forward_features(pixels)  # type: ignore[operator]
    np.testing.assert_allclose(x, tokens[:, 0].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(embedder.embed_pixels(pixels.numpy()), x, rtol=1e-5, atol=1e-6)


def test_batches_and_threads_do_not_change_embeddings(embedder: Embedder) -> None:
    images = pictures(7)
    whole = embedder.embed(images)
    np.testing.assert_allclose(embedder.embed(images, batch_size=2), whole, rtol=1e-4, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        for x in pool.map(embedder.embed, [images] * 8):
            np.testing.assert_allclose(x, whole, rtol=1e-4, atol=1e-5)


def test_no_images_give_no_embeddings(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, 48)
    assert embedder.embed_pixels(np.empty((0, 3, 32, 32), np.float32)).shape == (0, 48)


def test_a_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    config = CheckpointConfig(
        name="a",
        image_size=32,
        dim=24,
        preprocess=Preprocess(mode="center_crop", image_size=32),
        architecture_args={"depth": 1, "embed_dim": 24, "num_heads": 2, "norm_eps": 1e-12},
        training={"seed": 1},
        provenance={"from": "here"},
        licence="MIT",
    )
    backbone = build_backbone(config)
    saved = save_checkpoint(tmp_path / "deep" / "c", backbone, config)
    loaded = Embedder.load(tmp_path / "deep" / "c", device="cpu")
    assert (loaded.id, loaded.name, loaded.dim, loaded.engine) == (saved, "a", 24, "torch")
    assert loaded.config == config
    for name, value in backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], value)
    assert {m.eps for m in loaded.backbone.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}
    assert sorted(path.name for path in (tmp_path / "deep" / "c").iterdir()) == ["config.json", "model.safetensors"]


def test_other_sizes_share_the_state_dict() -> None:
    config = CheckpointConfig(image_size=112, architecture_args={"depth": 1})
    backbone = build_backbone(config)
    assert backbone.get_parameter("pos_embed").shape == (1, 197, 192)
    assert backbone(torch.zeros(2, 3, 112, 112)).shape == backbone(torch.zeros(2, 3, 48, 48)).shape == (2, 192)


def test_the_id_follows_weights_and_preprocessing() -> None:
    weights = {"a": np.zeros((2, 3), np.float32), "b": np.ones(3, np.float32)}
    plain = checkpoint_id(weights, Preprocess())
    assert len(plain) == 32
    assert plain == checkpoint_id(dict(reversed(weights.items())), Preprocess())
    changed = [
        checkpoint_id(weights, Preprocess(mode="center_crop")),
        checkpoint_id(weights | {"b": np.array([1, 1, 2], np.float32)}, Preprocess()),
        checkpoint_id(weights | {"a": np.zeros((3, 2), np.float32)}, Preprocess()),
        checkpoint_id({"a": weights["a"], "c": weights["b"]}, Preprocess()),
    ]
    assert len({plain, *changed}) == 5


def test_keys_of_others_in_the_configuration_are_left_alone(tiny_checkpoint: Path) -> None:
    assert "heads" in json.loads((tiny_checkpoint / "config.json").read_text())
    assert read_config(tiny_checkpoint).name == "tiny"


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere.*trainer fit --output"):
        Embedder.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "config.json"),
        ("{}", "not a checkpoint's configuration"),
        ('{"preprocess": {"mode": "center_crop", "sise": 3}}', "not a checkpoint's configuration"),
    ],
)
def test_a_broken_configuration_is_named(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Embedder.load(folder)


def test_missing_and_broken_weights_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors is broken"):
        Embedder.load(folder)
    weights.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors is broken"):
        Embedder.load(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        Embedder.load(folder)


def test_weights_of_another_dimension_are_named(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"dim": 192}))
    with pytest.raises(CheckpointError, match=r"gives 48 dimensions, config\.json says 192"):
        Embedder.load(folder)
    args = values["architecture_args"] | {"embed_dim": 96}
    (folder / "config.json").write_text(json.dumps(values | {"dim": 96, "architecture_args": args}))
    with pytest.raises(CheckpointError, match=r"does not fit config.json"):
        Embedder.load(folder)


def test_an_unknown_architecture_device_or_engine_is_named(tiny_checkpoint: Path) -> None:
    config = read_config(tiny_checkpoint)
    with pytest.raises(CheckpointError, match="timm cannot build 'vit_of_dreams'"):
        build_backbone(replace(config, architecture="vit_of_dreams"))
    with pytest.raises(CheckpointError, match="device 'abacus' is not known"):
        Embedder.load(tiny_checkpoint, device="abacus")
    with pytest.raises(CheckpointError, match="engine 'steam' is not known"):
        Embedder.load(tiny_checkpoint, engine="steam")
    if not torch.cuda.is_available():
        assert pick_device("auto") == "cpu"
        with pytest.raises(CheckpointError, match="no CUDA device"):
            pick_device("cuda")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_weights_are_float32_whatever_was_trained(tmp_path: Path) -> None:
    config = CheckpointConfig(architecture_args={"depth": 1})
    save_checkpoint(tmp_path, build_backbone(config).bfloat16(), config)
    assert {value.dtype for value in read_weights(tmp_path).values()} == {np.dtype(np.float32)}
