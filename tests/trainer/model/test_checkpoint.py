"""The checkpoint folder: written, read back, and what is said of a broken one."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads
from trainer.images import Preprocess
from trainer.model.checkpoint import (
    RESIDUAL_GAIN,
    CheckpointConfig,
    CheckpointError,
    build_backbone,
    checkpoint_id,
    conv_stem,
    load_backbone,
    read_config,
    read_id,
    read_weights,
    save_checkpoint,
    stem_channels,
)
from trainer.model.embedder import Embedder
from trainer.model.model_card import add_evaluation, read_metrics, write_card, write_metrics
from trainer.model.seen_images import SeenImages
from trainer.model.vit_openvino import NotPlain, build_graph


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


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
    loaded = Embedder.load(tmp_path / "deep" / "c", device="cpu", engine="torch")
    assert (loaded.id, loaded.name, loaded.dim, loaded.engine) == (saved, "a", 24, "torch")
    assert loaded.config == config
    again = load_backbone(loaded.folder)
    for name, value in backbone.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert {m.eps for m in again.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}
    assert sorted(path.name for path in (tmp_path / "deep" / "c").iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_is_one_checkpoint_however_it_is_read(tmp_path: Path) -> None:
    args = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
    config = CheckpointConfig(image_size=32, dim=48, preprocess=Preprocess(image_size=32), architecture_args=args)
    state = {key: value.numpy() for key, value in build_backbone(config).state_dict().items()}
    rounded = {key: value.astype(np.float16).astype(np.float32) for key, value in state.items()}
    single = save_checkpoint(tmp_path / "single", state, config)
    half = save_checkpoint(tmp_path, state, config, half=True)
    assert half == save_checkpoint(tmp_path / "rounded", rounded, config) != single
    weights = read_weights(tmp_path)
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    assert all(np.array_equal(weights[key], rounded[key]) for key in rounded)
    loaded = [Embedder.load(tmp_path, device="cpu", engine=engine).id for engine in ("torch", "openvino-f32")]
    assert [read_id(tmp_path), *loaded] == [half] * 3
    size, whole = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("", "single"))
    assert size < 0.55 * whole
    with pytest.raises(CheckpointError, match=r"cls_token has weights beyond half precision .* go without --half"):
        save_checkpoint(tmp_path, state | {"cls_token": state["cls_token"] + 1e5}, config, half=True)
    assert read_id(tmp_path) == half


def test_a_stem_makes_the_tokens_of_patches() -> None:
    stem = conv_stem(48, 8)
    assert [layer.out_channels for layer in stem if isinstance(layer, torch.nn.Conv2d)] == [12, 24, 48, 48]
    assert stem(torch.zeros(2, 3, 64, 32)).shape == (2, 48, 8, 4)
    pixels = torch.randn(1, 3, 8, 8)
    around = torch.nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1)
    torch.testing.assert_close(
        conv_stem(48, 8, residual=True)[0](pixels), torch.cat([pixels, RESIDUAL_GAIN * (pixels - around)], 1)
    )
    for dim, patch in ((48, 12), (50, 16), (48, 1)):
        with pytest.raises(CheckpointError, match=f"tokens of {dim} values of patches of {patch} pixels"):
            stem_channels(dim, patch)
    with pytest.raises(CheckpointError, match="stem is 'deep'; expected conv, residual or tf_efficientnet_lite0 to 4"):
        build_backbone(CheckpointConfig(architecture_args={"depth": 1, "stem": "deep"}))


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
        checkpoint_id(weights, Preprocess(mode="center_crop", windows=5)),
        checkpoint_id(weights | {"b": np.array([1, 1, 2], np.float32)}, Preprocess()),
        checkpoint_id(weights | {"a": np.zeros((3, 2), np.float32)}, Preprocess()),
        checkpoint_id({"a": weights["a"], "c": weights["b"]}, Preprocess()),
    ]
    assert len({plain, *changed}) == 6


def test_keys_of_others_in_the_configuration_are_left_alone(tiny_checkpoint: Path) -> None:
    assert "heads" in json.loads((tiny_checkpoint / "config.json").read_text())
    assert read_config(tiny_checkpoint).name == "tiny"


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "not there; really"
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*not there") as caught:
        Embedder.load(folder)
    command = shlex.split(str(caught.value).split("`")[1])
    assert command == ["lineup", "train", "fit", "--data", "IMAGES", "--output", str(folder)]


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
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        Embedder.load(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"files": {}}))
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


def test_weights_are_float32_whatever_was_trained(tmp_path: Path) -> None:
    config = CheckpointConfig(architecture_args={"depth": 1})
    save_checkpoint(tmp_path, build_backbone(config).bfloat16(), config)
    assert {value.dtype for value in read_weights(tmp_path).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "heads.safetensors", "calibration.safetensors", "seen.safetensors", "metrics.json"]
)
def test_one_flipped_bit_of_a_file_is_refused(folder: Path, name: str) -> None:
    SeenImages.of([], []).save(folder)
    write_metrics(folder, {"checkpoint": "of tests"})
    readers: dict[str, Callable[[Path], Any]] = {
        "model.safetensors": read_id,
        "heads.safetensors": Heads.load,
        "calibration.safetensors": CalibrationSet.load,
        "seen.safetensors": SeenImages.load,
        "metrics.json": read_metrics,
    }
    readers[name](folder)
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged \(its SHA-256 is [0-9a-f]{{64}}, .*\): \w+"):
        readers[name](folder)
    for other in readers.keys() - {name}:
        readers[other](folder)


@pytest.mark.parametrize("files", [None, [], "of none"])
def test_what_is_no_hashes_is_refused_by_readers_and_by_writers(folder: Path, files: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))
    for use in (read_metrics, partial(write_metrics, metrics={})):
        with pytest.raises(CheckpointError, match=r"says files is .*; expected hashes by name"):
            use(folder)
    assert not (folder / "metrics.json").exists()


def test_a_kill_between_a_file_and_its_hash_is_refused_and_mended_by_writing_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = CalibrationSet.load(folder)
    fewer = images.take(range(len(images) - 1))
    with monkeypatch.context() as patch:
        patch.setattr("trainer.model.checkpoint.write_config", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fewer.save(folder)
    with pytest.raises(CheckpointError, match=r"calibration\.safetensors is damaged .*lineup train heads"):
        CalibrationSet.load(folder)
    fewer.save(folder)
    assert CalibrationSet.load(folder).digest == fewer.digest
    assert Heads.load(folder).id == json.loads((folder / "config.json").read_text())["heads"]["id"]


def test_figures_whose_writing_was_killed_are_written_by_measuring_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"head": "linear", "rows": [], "sources": {}, "left_out": 0}
    write_metrics(folder, {"checkpoint": "of tests"})
    add_evaluation(folder, {"data": "first"} | figures)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.model.checkpoint.write_config", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add_evaluation(folder, {"data": "second"} | figures)
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged"):
        write_card(folder)
    add_evaluation(folder, {"data": "second"} | figures)
    assert "Of `second`" in (folder / "README.md").read_text()
    assert read_metrics(folder) == {"checkpoint": "of tests"}


def test_a_checkpoint_without_hashes_is_read_as_far_as_it_makes_sense(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["files"], values["id"]
    (folder / "config.json").write_text(json.dumps(values))
    identity, images, heads = read_id(folder), CalibrationSet.load(folder), Heads.load(folder)
    assert identity == Embedder.load(folder, device="cpu").id
    broken = [
        replace(images, embeddings=images.embeddings + np.float32("nan")),
        replace(images, embeddings=images.embeddings[:, 0]),
        replace(images, labels=images.labels + np.uint8(1)),
        replace(images, sources=[1] * len(images)),  # type: ignore[list-item]
        replace(images, groups=images.groups[1:]),
    ]
    for damaged in broken:
        damaged.save(folder)
        with pytest.raises(CheckpointError, match=r"calibration\.safetensors is broken"):
            CalibrationSet.load(folder)
    replace(heads, linear=replace(heads.linear, bias=float("inf"))).save(folder)
    with pytest.raises(CheckpointError, match=r"heads\.safetensors is broken \(linear\.bias holds .* not finite"):
        Heads.load(folder)
    save_checkpoint(folder, read_weights(folder) | {"norm.bias": np.full(48, np.nan, np.float32)}, read_config(folder))
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds weights that are not finite, as in norm"):
        Embedder.load(folder)


def test_preprocessing_that_gives_another_id_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["preprocess"]["mean"][0] += 0.001
    (folder / "config.json").write_text(json.dumps(values))
    for load in (read_id, Embedder.load):
        with pytest.raises(CheckpointError, match=r"config\.json is damaged: weights and preprocessing have the id"):
            load(folder)


WRONG_VALUES: tuple[Any, ...] = (None, "x", -1, 10**30, float("nan"), [], {"a": 1}, True)


@pytest.mark.parametrize(
    "path",
    [
        "name", "architecture", "image_size", "dim", "preprocess", "preprocess.mode", "preprocess.image_size",
        "preprocess.mean", "preprocess.mean.0", "preprocess.windows", "architecture_args", "architecture_args.depth",
        "architecture_args.num_heads", "architecture_args.patch_size", "architecture_args.img_size", "training",
        "provenance", "licence", "files", "id", "heads", "heads.maps", "heads.maps.svm", "heads.maps.svm.heads",
        "heads.maps.svm.weights.0", "heads.maps.svm.intercept", "heads.calibration_digest",
    ],
)  # fmt: skip
def test_a_broken_field_is_one_line_or_changes_nothing(folder: Path, path: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    *outer, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    section = reduce(lambda inside, key: inside[key], outer, values)
    messages = set()
    for section[last] in WRONG_VALUES:
        (folder / "config.json").write_text(json.dumps(values))
        try:
            build_graph(read_config(folder), read_weights(folder))
            read_id(folder)
            Heads.load(folder)
            write_card(folder)
        except (CheckpointError, NotPlain) as error:
            messages.add(str(error))
    assert messages or path in ("name", "heads.calibration_digest")
    assert not any("\n" in message for message in messages)
