"""A teacher's features against numpy, the distance to them against a slow form, and training with it end to end."""

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import timm
import torch
from openvino import opset13 as op
from tiny import tiny_settings

from trainer.fit.fit_settings import FitError, FitSettings, teacher_weight
from trainer.fit.objective import Slices, make_objective
from trainer.fit.run import Run
from trainer.fit.state import RunState, state_folder
from trainer.fit.teacher import Distillation, GraphTeacher, TimmTeacher
from trainer.fit.train import fit
from trainer.model.checkpoint import read_config, read_weights

KERNEL = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32) / 50
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)


def classifier(path: Path, kind: str) -> Path:
    """A network of one layer and a global pooling: 5 channels of squares of 8 pixels.

    A `uint8` one takes channels last and pools as TensorFlow Lite; others take float32. `mean` pools channels last.
    """
    if kind == "uint8":
        pixels = op.parameter([1, 32, 32, 3], np.uint8)
        images = op.transpose(op.convert(pixels, "f32"), op.constant(np.array([0, 3, 1, 2])))
    else:
        pixels = op.parameter([1, 3, 32, 32], np.float32)
        images = pixels
    maps = op.relu(op.convolution(images, op.constant(KERNEL), [8, 8], [0, 0], [0, 0], [1, 1]))
    if kind == "uint8":
        pooled = op.avg_pool(maps, [4, 4], [0, 0], [0, 0], [4, 4], exclude_pad=True)
    elif kind == "mean":
        pooled = op.reduce_mean(op.transpose(maps, op.constant(np.array([0, 2, 3, 1]))), op.constant([-3, -2]))
    else:
        pooled = maps
    openvino.save_model(openvino.Model([pooled], [pixels], "tiny"), path, compress_to_fp16=False)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("teacher") / "tiny.xml", "uint8")


@pytest.fixture
def tiny(image_folder: Path, tmp_path: Path, teacher: Path) -> FitSettings:
    settings: FitSettings = tiny_settings(image_folder, tmp_path / "checkpoint")
    return replace(settings, teacher=str(teacher), precision="float32")


def views_of(n: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, side, side, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


@pytest.mark.parametrize("side", [32, 16])
@pytest.mark.parametrize("kind", ["uint8", "mean"])
def test_a_teacher_gives_its_last_feature_map_at_any_size(tmp_path: Path, kind: str, side: int) -> None:
    views = views_of(3, side)
    network = GraphTeacher.read(classifier(tmp_path / "tiny.xml", kind))
    maps = network(views)
    pixels = views.numpy().astype(np.float32)
    pixels = pixels if kind == "uint8" else (pixels / 255 - IMAGENET[0]) / IMAGENET[1]
    squares = pixels.reshape(3, side // 8, 8, side // 8, 8, 3)
    expected = np.maximum(np.einsum("nyaxbc,kcab->nkyx", squares, KERNEL), 0)
    scale = float(expected.max())
    np.testing.assert_allclose(maps.numpy() / scale, expected / scale, atol=1e-2)  # bfloat16 where the processor has it
    files = [(tmp_path / f"tiny.{suffix}").read_bytes() for suffix in ("xml", "bin")]
    assert network.sha256 == sha256(b"".join(files)).hexdigest()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_of_timm_teaches_its_feature_map(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: create(name, **rest))
    network, views = TimmTeacher(name, "cpu"), views_of(2, 160)
    maps = network(views)
    pixels = (views.permute(0, 3, 1, 2) / 255 - network.mean / 255) / (network.std / 255)
    features = network.model.forward_features(pixels)  # type: ignore[operator]
    if name == "test_vit":
        features = features[:, 1:].transpose(1, 2).reshape(2, 64, 10, 10)
    torch.testing.assert_close(maps, features)
    assert network(views_of(2, 64)).shape == (maps.shape if name == "test_vit" else (2, maps.shape[1], 2, 2))


def test_the_distance_agrees_with_a_slow_form() -> None:
    generator = torch.Generator().manual_seed(0)

    class Fixed:
        name = sha256 = "fixed"

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels[:, :2, :2, 0].float()[:, None] * torch.arange(1.0, 4.0)[:, None, None]  # (m, 3, 2, 2)

    distillation = Distillation(Fixed(), dim=6, image_size=8)
    layer = distillation.map
    assert layer is not None
    distillation.measure(views_of(40, 8))
    views, tokens = views_of(2, 8), torch.randn(2, 17, 6, generator=generator)
    all_maps, maps = Fixed()(views_of(40, 8)), Fixed()(views)
    expected = torch.zeros(2, 2)
    for view in range(2):
        for channel in range(3):
            pooled = all_maps[:, channel].mean((1, 2))
            target = (maps[view, channel].mean() - pooled.mean()) / pooled.std()
            expected[view, 0] += (distillation.pooled(tokens[view, 0])[channel] - target) ** 2 / 3
            every = all_maps[:, channel].flatten()
            for y in (0, 1):
                for x in (0, 1):
                    places = [1 + 4 * (2 * y + i) + 2 * x + j for i in (0, 1) for j in (0, 1)]
                    cell = layer(tokens[view, places].mean(0))[channel]
                    target = (maps[view, channel, y, x] - every.mean()) / every.std()
                    expected[view, 1] += (cell - target) ** 2 / 12
    torch.testing.assert_close(distillation(tokens, views), expected.sum(1))
    distillation.map = None
    torch.testing.assert_close(distillation(tokens, views), expected[:, 0])


@pytest.mark.parametrize("change", [{}, {"tokens": 5, "local_size": 32}])
def test_slices_in_threads_teach_as_the_whole_batch(tiny: FitSettings, change: dict[str, Any]) -> None:
    """Also where embeddings are cached: the same patches are fed when a slice is computed again."""
    settings = replace(tiny, **change)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 256, (5, 3, 2, 32, 32, 3), generator=generator, dtype=torch.uint8)
    size = settings.local
    local = torch.randint(0, 256, (5, 2, size, size, 3), generator=generator, dtype=torch.uint8)
    other, generators = torch.tensor([1, 2, 3, 4, 0]), torch.zeros(5, dtype=torch.long)
    objective = make_objective(settings, "cpu")[0]
    parts = [(whole[first : first + 2], local[first : first + 2], seed) for seed, first in enumerate((0, 2, 4))]
    embeddings, distances = zip(*(objective.embed_views(*part, teach=True) for part in parts), strict=True)
    distance = sum(len(part[0]) / 5 * value for part, value in zip(parts, distances, strict=True))
    loss = objective.loss(torch.cat(embeddings, 2), other, generators) + 3 * distance
    if not settings.tokens:
        torch.testing.assert_close(objective(whole, local, other, generators, 0, 3.0), loss)
    parameters = dict(objective.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()))
    threads = torch.get_num_threads()
    try:
        for slices in (Slices(objective, 3), Slices(objective, 1, most=2)):
            value = slices(whole, local, other, generators, 0, 3.0)
            torch.testing.assert_close(value, loss.detach())
            for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5, msg=name)
                assert parameter.grad is not None
                assert parameter.grad.stride() == parameter.stride(), name  # the fused optimiser reads both alike
            objective.zero_grad()
    finally:
        torch.set_num_threads(threads)
    assert ("distillation.map.weight" in parameters) == (settings.tokens is None)


def test_a_teacher_counts_until_its_share_of_the_schedule(tiny: FitSettings) -> None:
    settings = replace(tiny, teacher_weight=2.0, teacher_until=0.5)
    assert [teacher_weight(settings, progress) for progress in (0.0, 0.49, 0.5, 1.0)] == [2, 2, 0, 0]
    assert teacher_weight(replace(settings, teacher=None), 0.0) == 0


def test_a_teacher_in_two_files_is_known_by_both(tiny: FitSettings, tmp_path: Path) -> None:
    """An `.xml` holds the layers alone, and the `.bin` beside it the weights."""
    path = classifier(tmp_path / "other.xml", "uint8")
    settings = replace(tiny, teacher=str(path))
    before = GraphTeacher.read(path).sha256
    assert settings.record()["teacher"] == f"other.xml, sha256 {before}"
    weights = path.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes().replace(KERNEL.tobytes(), (2 * KERNEL).tobytes()))
    after = GraphTeacher.read(path).sha256
    assert after != before
    assert settings.record()["teacher"] == f"other.xml, sha256 {after}"


def test_a_run_with_a_teacher_resumes_exactly_and_says_who_taught(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(tiny, teacher_until=0.7, ema=0.9)
    straight = replace(settings, output=tiny.output.with_name("straight"))
    fit(straight)
    step, save, steps, states = Run.step, RunState.save, [], []

    def step_then_stop(self: Run, *arguments: Any) -> float:
        steps.append(arguments[3])
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    def keep(self: RunState, folder: Path) -> None:
        save(self, folder)
        states.append({name: value.clone() for name, value in self.tensors["model"].items()})

    monkeypatch.setattr(Run, "step", step_then_stop)
    monkeypatch.setattr(RunState, "save", keep)
    with pytest.raises(KeyboardInterrupt):
        fit(settings)
    fit(settings)
    assert steps == [1, 1, 1, 1, 1, 1, 1, 0]
    taught, left = states
    assert float(taught["distillation.map_std"].min()) > 0
    assert not torch.equal(taught["distillation.map_std"], torch.ones(5))
    assert torch.equal(taught["distillation.map_std"], left["distillation.map_std"])
    assert not torch.equal(taught["distillation.map.weight"], left["distillation.map.weight"])
    weights, expected = read_weights(tiny.output), read_weights(straight.output)
    assert all(np.array_equal(weights[name], value) for name, value in expected.items())
    assert not any(name.startswith("distillation") for name in weights)
    config, digest = read_config(tiny.output), GraphTeacher.read(Path(settings.teacher or "")).sha256
    assert config.provenance["teacher"] == {"name": "tiny.xml", "sha256": digest}
    assert config.training["teacher"] == f"tiny.xml, sha256 {digest}"
    taught_by = "trained from scratch by `lineup train fit` with the features of tiny.xml to learn from."
    assert taught_by in (tiny.output / "README.md").read_text()


def test_a_state_of_before_an_option_came_is_resumed_with_its_default(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(tiny, teacher=None)
    save = RunState.save

    def save_as_before(self: RunState, folder: Path) -> None:
        self.settings = {name: value for name, value in self.settings.items() if not name.startswith("teacher")}
        save(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunState, "save", save_as_before)
    with pytest.raises(KeyboardInterrupt):
        fit(settings)
    monkeypatch.setattr(RunState, "save", save)
    assert state_folder(tiny.output).exists()
    with pytest.raises(FitError, match=r"teacher_weight 1\.0 -> 2\.0"):
        fit(replace(settings, teacher_weight=2.0))
    assert fit(settings)["training"]["updates"] == 6


def no_file(folder: Path) -> Path:
    return folder / "none.tflite"


def no_network(folder: Path) -> Path:
    (folder / "broken.xml").write_text("<net>")
    return folder / "broken.xml"


def no_pooling(folder: Path) -> Path:
    return classifier(folder / "features.xml", "features")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_file, r"none\.tflite is no file"),
        (no_network, r"broken\.xml: OpenVINO cannot read it"),
        (no_pooling, r"features\.xml has no global pooling"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(
    tiny: FitSettings, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        make_objective(replace(tiny, teacher=str(make(tmp_path))), "cpu")


def test_a_share_of_the_schedule_that_is_none_is_refused(tiny: FitSettings) -> None:
    with pytest.raises(FitError, match=r"--teacher-until is 1\.5"):
        replace(tiny, teacher_until=1.5)
