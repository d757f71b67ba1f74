"""Embeddings by every engine: the same images give the same neighbours, whatever computes."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_image
from PIL import Image

from trainer.images import Preprocess
from trainer.model.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    build_backbone,
    load_backbone,
    read_config,
    read_weights,
    save_checkpoint,
)
from trainer.model.embedder import Embedder, pick_device
from trainer.model.vit_openvino import MEAN, NotPlain, build_graph, resized


@pytest.fixture(scope="session")
def embedder(tiny_checkpoint: Path) -> Embedder:
    return Embedder.load(tiny_checkpoint, device="cpu", engine="openvino-f32")


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)) for i in range(count)]


def test_embeddings_are_the_backbones_cls_token(embedder: Embedder) -> None:
    images = pictures(3)
    x = embedder.embed(images, batch_size=2)
    assert x.shape == (3, 48)
    assert x.dtype == np.float32
    pixels = embedder.preprocess(images)
    normalised = torch.from_numpy(embedder.preprocess.normalised(pixels))
    with torch.inference_mode():
        tokens = load_backbone(embedder.folder).forward_features(normalised)  # type: ignore[operator]
    np.testing.assert_allclose(x, tokens[:, 0].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(embedder.embed_pixels(pixels), x, rtol=1e-5, atol=1e-6)


def test_batches_and_threads_do_not_change_embeddings(embedder: Embedder) -> None:
    pixels = embedder.preprocess(pictures(7))
    whole = embedder.embed_pixels(pixels)
    np.testing.assert_allclose(embedder.embed_pixels(pixels, batch_size=2), whole, rtol=1e-4, atol=1e-5)
    with ThreadPoolExecutor(4) as pool:
        for x in pool.map(embedder.embed_pixels, [pixels] * 8):
            np.testing.assert_allclose(x, whole, rtol=1e-4, atol=1e-5)


def test_an_image_of_several_windows_has_one_embedding(windowed: Embedder) -> None:
    """Every way gives the mean direction and length of its windows, whatever other images share the pass."""
    images = [*pictures(4), small_image(3, False).resize((32, 20))]
    expected, single = [], Preprocess("center_crop", 32)
    for image in images:
        crops = [image.crop((x, y, x + w, y + h)) for x, y, w, h in windowed.preprocess.boxes(*image.size)]
        vectors = [vector for crop in crops for vector in windowed.embed_pixels(single([crop]))]
        lengths = [np.linalg.norm(vector) for vector in vectors]
        mean = sum(vector / length for vector, length in zip(vectors, lengths, strict=True))
        expected.append(mean / np.linalg.norm(mean) * sum(lengths) / len(lengths))
    windows = [windowed.preprocess([image]) for image in images]
    assert [len(stack) for stack in windows] == [5, 5, 5, 5, 1]
    np.testing.assert_allclose(windowed.embed(images, batch_size=2), expected, atol=1e-5)
    np.testing.assert_allclose(windowed.embed_windows(windows, batch_size=3), expected, atol=1e-5)
    stacks = windowed.embed_stacks([windows[:1], windows[1:4], windows[4:]])
    assert [len(stack) for stack in stacks] == [1, 3, 1]
    np.testing.assert_allclose(np.concatenate(stacks), expected, atol=1e-5)
    lengths = np.linalg.norm(expected, axis=1)
    assert lengths.max() < 1.1 * lengths.min()  # which say nothing of the number of windows
    by_torch = Embedder.load(windowed.folder, device="cpu", engine="torch")
    np.testing.assert_allclose(by_torch.embed(images), expected, atol=1e-4)


def test_no_images_give_no_embeddings(embedder: Embedder) -> None:
    assert embedder.embed_pixels(np.empty((0, 3, 32, 32), np.uint8)).shape == embedder.embed([]).shape == (0, 48)


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


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row with its counterpart, shape (n,)."""
    product: np.ndarray = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return product


def saved(folder: Path, **changes: Any) -> Path:
    """A random ViT of depth 2, as the trainer would leave it, its weights far from their start at zero or one."""
    usual: dict[str, Any] = {"architecture_args": {"depth": 2}, "preprocess": Preprocess(image_size=64)}
    config = CheckpointConfig(**(usual | changes))
    torch.manual_seed(0)
    backbone = build_backbone(config)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for name, kernel in backbone.get_submodule("patch_embed").named_parameters():
        if name.count(".") > 2:  # a deep network lets nothing of the pixels through at random, or chaos
            torch.nn.init.kaiming_normal_(kernel)
    for name, buffer in backbone.named_buffers():
        torch.nn.init.uniform_(buffer, 0.5, 1) if "running_var" in name else torch.nn.init.normal_(buffer, 0.5, 0.2)
    save_checkpoint(folder, backbone, config)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preprocess": Preprocess(image_size=224)},
        {"preprocess": Preprocess(image_size=256)},
        {"architecture": "vit_small_patch32_224.augreg_in21k", "dim": 384},
        {"architecture_args": {"depth": 1, "norm_eps": 1e-12, "qkv_bias": False, "num_heads": 6}},
        {
            "architecture_args": {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8},
            "dim": 48,
        },
        {"architecture_args": {"depth": 1, "stem": "conv"}},
        {"architecture_args": {"depth": 1, "stem": "residual"}},
        {"architecture_args": {"depth": 1, "stem": "tf_efficientnet_lite0", "patch_size": 32}},
        {"architecture_args": {"depth": 2, "stem": "conv"} | MEAN},
        {"architecture_args": {"depth": 0, "stem": "tf_efficientnet_lite0", "patch_size": 32} | MEAN},
    ],
    ids=[
        *("smaller", "native", "larger", "small", "arguments", "tiny", "stem", "residual", "network"),
        *("mean", "mean of a network"),
    ],
)
def test_engines_agree(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, **changes)
    exact, rounded = (Embedder.load(folder, device="cpu", engine=engine) for engine in ("openvino-f32", "openvino"))
    expected = Embedder.load(folder, device="cpu", engine="torch")
    x = np.random.default_rng(0).normal(size=(5, 3, *[expected.preprocess.image_size] * 2)).astype(np.float32)
    given = x.copy()
    for engine, least in ((exact, 0.99999), (rounded, 0.9999)):
        assert cosine(engine.forward(x), expected.forward(x)).min() > least
        assert cosine(engine.forward(x[3:4]), engine.forward(x)[3:4]).min() > 0.9999
    np.testing.assert_allclose(exact.forward(x), expected.forward(x), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(x, given)
    assert (exact.engine, expected.engine) == ("openvino-f32", "torch")
    assert rounded.engine in ("openvino-bf16", "openvino-f32")


def test_nearest_images_are_the_same_by_every_engine(tiny_checkpoint: Path) -> None:
    images = [small_image(number, fake=bool(number % 2)) for number in range(80)]
    orders = []
    for engine in ("torch", "openvino"):
        embedder = Embedder.load(tiny_checkpoint, device="cpu", engine=engine)
        x = embedder.embed_pixels(embedder.preprocess(images))
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        orders.append(np.argsort(-(unit[:40] @ unit[40:].T), axis=1)[:, :10])
    shared = [len(set(a) & set(b)) for a, b in zip(*orders, strict=True)]
    assert np.mean(shared) >= 9.8  # of 10; random weights put all images close together


def test_threads_get_their_own_answers(tiny_checkpoint: Path) -> None:
    embedder = Embedder.load(tiny_checkpoint, device="cpu", engine="openvino")
    x = np.random.default_rng(0).normal(size=(64, 3, 32, 32)).astype(np.float32)
    given, expected = x.copy(), embedder.forward(x)
    parts = [slice(start, start + size) for size in (1, 2, 3, 5) for start in range(0, 60, 4)] * 4
    with ThreadPoolExecutor(8) as pool:
        for part, got in zip(parts, pool.map(lambda part: embedder.forward(x[part]), parts), strict=True):
            assert cosine(got, expected[part]).min() > 0.9999
    np.testing.assert_array_equal(x, given)


@pytest.mark.parametrize("side", [3, 7, 20])
def test_position_embeddings_are_resized_as_timm_does(side: int) -> None:
    from timm.layers.pos_embed import resample_abs_pos_embed

    positions = np.random.default_rng(0).normal(size=(1, 1 + 14 * 14, 12)).astype(np.float32)
    expected = resample_abs_pos_embed(torch.from_numpy(positions), [side, side], [14, 14])
    np.testing.assert_allclose(resized(positions, side), expected.numpy(), atol=1e-5)


def test_an_engine_is_chosen_by_device_and_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = saved(tmp_path / "plain")
    other = saved(tmp_path / "other", architecture_args={"depth": 1, "init_values": 1e-5})
    assert Embedder.load(plain, device="cpu").engine.startswith("openvino-")
    with caplog.at_level(logging.INFO):
        assert Embedder.load(other, device="cpu").engine == "torch"
    assert "the architecture has the arguments ['init_values']" in caplog.text
    with pytest.raises(CheckpointError, match=r"OpenVINO cannot run .*init_values.*LINEUP_ENGINE=torch"):
        Embedder.load(other, device="cpu", engine="openvino")
    monkeypatch.setattr("trainer.model.embedder.has_cuda", lambda: True)
    with pytest.raises(CheckpointError, match=r"computes on the CPU, not on 'cuda'"):
        Embedder.load(plain, device="cuda", engine="openvino")
    assert Embedder.load(plain, engine="openvino").device == "cpu"
    monkeypatch.setattr(
        "trainer.model.embedder.find_spec", lambda name: find_spec(name) if name != "openvino" else None
    )
    assert Embedder.load(plain, device="cpu").engine == "torch"
    monkeypatch.setattr("trainer.model.embedder.find_spec", lambda name: find_spec(name) if name != "torch" else None)
    with pytest.raises(CheckpointError, match="OpenVINO cannot run"):
        Embedder.load(other, device="cpu")
    with pytest.raises(CheckpointError, match=r"not installed: add the extra `train`"):
        Embedder.load(plain, device="cpu", engine="torch")


def test_weights_of_another_model_are_no_plain_vit(tiny_checkpoint: Path) -> None:
    config, weights = read_config(tiny_checkpoint), read_weights(tiny_checkpoint)
    build_graph(config, weights)
    wrong = [
        (replace(config, architecture="resnet18"), weights, "architecture is 'resnet18'"),
        (config, weights | {"reg_token": weights["cls_token"]}, r"no plain ViT: \['reg_token'\]"),
        (config, {name: x for name, x in weights.items() if name != "norm.weight"}, "norm.weight is not among"),
        (config, weights | {"pos_embed": weights["pos_embed"][:, 1:]}, r"pos_embed .* in the shape \(1, 17, 48\)"),
        (replace(config, dim=47), weights, "48 dimensions for 47"),
        (replace(config, preprocess=Preprocess(image_size=30)), weights, "30 pixels in patches of 8"),
        (replace(config, architecture_args={"patch_size": [8, 8]}), weights, "no number above 0"),
    ]
    for of, given, message in wrong:
        with pytest.raises(NotPlain, match=message):
            build_graph(of, given)


DROPPED = """
import gc, signal, sys, threading
from pathlib import Path
import numpy as np
from trainer.model.embedder import Embedder
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
held = [Embedder.load(Path(sys.argv[1]), device="cpu", engine="openvino")]
held[0].forward(np.zeros((1, 3, 32, 32), np.float32))
thread = threading.Thread(target=lambda: (held.clear(), gc.collect()))
thread.start()
thread.join()
signal.raise_signal(signal.SIGUSR1)
print(seen)
"""


def test_signals_are_survived_after_an_embedder_is_dropped_in_another_thread(tiny_checkpoint: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DROPPED, str(tiny_checkpoint)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[1]"), done.stderr
