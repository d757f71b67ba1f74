"""Import and export: embeddings agree with transformers, ONNX Runtime and OpenVINO, and no pickle runs."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.hub.exporter import export_hub, export_onnx, export_openvino
from trainer.hub.importer import import_checkpoint
from trainer.hub.vit_names import HubError, architecture_args
from trainer.images import Preprocess
from trainer.model.checkpoint import CheckpointConfig, build_backbone, read_weights, save_checkpoint
from trainer.model.embedder import Embedder

SIZE, DIM = 32, 48


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny `ViTModel` with random weights as transformers writes it."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=100,
        image_size=SIZE,
        patch_size=8,
    )
    model = ViTModel(config)
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide a wrong name
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 3, SIZE, SIZE)).astype(np.float32)


def by_transformers(folder: Path, pixels: np.ndarray) -> np.ndarray:
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False)  # in evaluation mode
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(pixels)).last_hidden_state[:, 0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `fit` writes it: with its own name, preprocessing and licence."""
    folder = tmp_path_factory.mktemp("checkpoint")
    args = {"embed_dim": DIM, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": SIZE}
    preprocess = Preprocess(image_size=SIZE)
    config = CheckpointConfig(
        name="tiny", image_size=SIZE, dim=DIM, preprocess=preprocess, architecture_args=args, licence="MIT"
    )
    torch.manual_seed(1)
    save_checkpoint(folder, build_backbone(config), config)
    return folder


def test_imported_embeddings_equal_transformers(source: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    imported = import_checkpoint(str(source), tmp_path)
    embedder = Embedder.load(tmp_path, engine="torch")
    assert imported.checkpoint == embedder.id
    assert embedder.preprocess == Preprocess(mode="center_crop", image_size=SIZE)
    np.testing.assert_allclose(embedder.forward(pixels), by_transformers(source, pixels), atol=1e-5)


def test_a_torch_file_gives_the_same_checkpoint(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "torch"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save(load_file(source / "model.safetensors"), other / "pytorch_model.bin")
    first, second = (import_checkpoint(str(s), tmp_path / s.name) for s in (source, other))
    assert first.checkpoint == second.checkpoint


def test_bfloat16_weights_are_widened(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "rounded"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {key: value.bfloat16() for key, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors")
    import_checkpoint(str(other), tmp_path / "out")
    weights = read_weights(tmp_path / "out")
    np.testing.assert_array_equal(weights["cls_token"], tensors["embeddings.cls_token"].float().numpy())


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_torch_file_with_code_in_it_is_refused(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "torch"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save({"embeddings.cls_token": Harmful(tmp_path / "harm")}, other / "pytorch_model.bin")
    with pytest.raises(HubError, match="without running code"):
        import_checkpoint(str(other), tmp_path / "out")
    assert not (tmp_path / "harm").exists()


def test_the_official_configuration_is_timms_tiny() -> None:
    official = {
        "model_type": "vit", "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3,
        "intermediate_size": 768, "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "qkv_bias": True,
    }  # fmt: skip
    assert architecture_args(official) == {"norm_eps": 1e-12}


@pytest.mark.parametrize("change", [{"model_type": "deit"}, {"hidden_act": "relu"}, {"num_channels": 1}])
def test_another_architecture_is_refused(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(HubError, match="expected a vit with gelu on three channels"):
        import_checkpoint(str(tmp_path), tmp_path / "out")


def test_sources_that_are_no_model_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="neither a folder nor a hub id"):
        import_checkpoint("no such folder", tmp_path / "out")
    with pytest.raises(HubError, match="missing or not JSON"):
        import_checkpoint(str(tmp_path), tmp_path / "out")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(HubError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        import_checkpoint(str(tmp_path), tmp_path / "out")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(HubError, match="holds no weights"):
        import_checkpoint(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_network_it_says_what_to_fetch_and_how_to_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object, **options: object) -> str:
        raise LocalEntryNotFoundError("the hub cannot be reached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(HubError, match=r"the hub cannot be reached") as caught:
        import_checkpoint("aimagelab/CoDE", tmp_path / "a b")
    message = str(caught.value)
    assert "\n" not in message
    fetch, command = (shlex.split(part) for part in message.split("`")[1::2])
    assert fetch[:3] == ["hf", "download", "aimagelab/CoDE"]
    assert {"config.json", "README.md", "model.safetensors", "pytorch_model.bin"} <= set(fetch)
    # the folder that was fetched, here a stand-in, is imported by the command as it is printed
    monkeypatch.chdir(tmp_path)
    Path("CoDE").symlink_to(source)
    assert fetch[-1] == "CoDE"
    done = CliRunner().invoke(app, command[2:])
    assert done.exit_code == 0, done.output
    assert Embedder.load(tmp_path / "a b").name == "CoDE"


def test_an_imported_checkpoint_has_a_model_card(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Theirs\n")
    output = tmp_path / "out"
    import_checkpoint(str(folder), output, name="theirs")
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "# theirs" in card
    assert f"imported from {folder.name}. " in card
    assert "lineup train evaluate --data IMAGES --card" in card


def test_exported_hub_layout_comes_back_and_equals_transformers(
    checkpoint: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    export_hub(checkpoint, tmp_path / "hub")
    original = Embedder.load(checkpoint, engine="torch")
    np.testing.assert_allclose(by_transformers(tmp_path / "hub", pixels), original.forward(pixels), atol=1e-5)
    imported = import_checkpoint(str(tmp_path / "hub"), tmp_path / "back")
    back = Embedder.load(tmp_path / "back", engine="torch")
    assert imported.checkpoint == original.id
    assert (back.name, back.preprocess, back.config.licence) == ("tiny", original.preprocess, "MIT")
    np.testing.assert_array_equal(back.forward(pixels), original.forward(pixels))
    processor = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert (processor["do_resize"], processor["size"]) == (True, {"shortest_edge": 35})


def test_an_import_exported_again_has_the_same_tensors(source: Path, tmp_path: Path) -> None:
    import_checkpoint(str(source), tmp_path / "in")
    export_hub(tmp_path / "in", tmp_path / "out")
    before = {k: v for k, v in load_file(source / "model.safetensors").items() if not k.startswith("pooler")}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_onnx_equals_torch_for_any_batch(checkpoint: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    import onnxruntime

    export_onnx(checkpoint, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    expected = Embedder.load(checkpoint, engine="torch").forward(pixels)
    for count in (1, 5):
        np.testing.assert_allclose(session.run(None, {"pixels": pixels[:count]})[0], expected[:count], atol=1e-4)


def test_openvino_equals_torch_for_any_batch(checkpoint: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    import openvino

    export_openvino(checkpoint, tmp_path)
    compiled = openvino.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    expected = Embedder.load(checkpoint, engine="torch").forward(pixels)
    for count in (1, 5):
        np.testing.assert_allclose(request.infer({"pixels": pixels[:count]})["embedding"], expected[:count], atol=1e-4)


def test_pickled_heads_are_named_and_not_run(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    (folder / "sklearn").mkdir()
    joblib.dump(Harmful(tmp_path / "harm"), folder / "sklearn" / "knn.sav")
    done = CliRunner().invoke(app, ["import", str(folder), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[-1].endswith("left out pickled heads, which can run any code: sklearn/knn.sav")
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out" / "heads.safetensors").exists()


def test_commands_import_and_export(source: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["import", str(source), "--output", str(tmp_path / "in"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["checkpoint"] == Embedder.load(tmp_path / "in").id
    far = tmp_path / ("so long a name that a line of eighty characters cannot hold the command " * 2).strip()
    told = runner.invoke(app, ["import", str(source), "--output", str(far)]).stderr
    assert f"`lineup train heads --checkpoint {shlex.quote(str(far))} --data IMAGES`" in told.splitlines()[1]
    arguments = ["export", "--checkpoint", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--format", "hub"]
    done = runner.invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"hub": str(tmp_path / "out" / "hub")}
    assert runner.invoke(app, [*arguments[:-1], "tensorflow"]).exit_code == 2
    failed = runner.invoke(app, ["import", str(tmp_path / "nowhere"), "--output", str(tmp_path / "x")])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
