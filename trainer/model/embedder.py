"""The backbone, the checkpoint folder that holds it, and the embeddings it makes of images.

A checkpoint is a folder: `config.json` rebuilds backbone and preprocessing, `model.safetensors` holds the weights.
Its id is a hash of weights and preprocessing, so two folders with one id give the same embeddings: on a GPU torch
makes them, on a CPU OpenVINO, which needs no torch and is several times faster; they agree to a cosine of 0.9999.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.images import Preprocess

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ENGINES = ("auto", "torch", "openvino", "openvino-f32")
"""What `Embedder.load` takes; OpenVINO alone computes in bfloat16 where the processor does."""


class CheckpointError(ValueError):
    """The folder is no usable checkpoint; the message says what was found and what to do."""


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What `config.json` holds: enough to rebuild the backbone, preprocess for it, and tell where it came from."""

    name: str = "code"
    """Shown to people; two checkpoints may share it, never their id."""
    architecture: str = "vit_tiny_patch16_224"
    """A timm model name."""
    image_size: int = 224
    """Side in pixels of what the backbone is fed; position embeddings are interpolated to it."""
    dim: int = 192
    """Length of an embedding."""
    preprocess: Preprocess = field(default_factory=Preprocess)
    architecture_args: dict[str, Any] = field(default_factory=dict)
    """Passed to timm, e.g. depth; `norm_eps` sets the epsilon of every LayerNorm."""
    training: dict[str, Any] = field(default_factory=dict)
    """The settings of the training run."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where weights and training data came from."""
    licence: str = "Apache-2.0"

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CheckpointConfig:
        """Read `to_json` back. Keys of others in the same file (the heads' hyperparameters) are left alone.

        Raises:
            CheckpointError: A value is missing or has the wrong type.
        """
        try:
            known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
            shaped = dict(known["preprocess"])
            for key in ("mean", "std"):
                if key in shaped:
                    shaped[key] = tuple(shaped[key])
            return cls(**(known | {"preprocess": Preprocess(**shaped)}))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{CONFIG_FILE} is not a checkpoint's configuration: {error}") from error


def build_backbone(config: CheckpointConfig) -> nn.Module:
    """A vision transformer from scratch: float input (n, 3, s, s) -> CLS token (n, dim), no classifier.

    Raises:
        CheckpointError: timm has no such architecture, or it does not give `config.dim` values.
    """
    import timm
    from torch import nn

    args = dict(config.architecture_args)
    eps = args.pop("norm_eps", None)
    try:
        backbone: nn.Module = timm.create_model(
            config.architecture, pretrained=False, num_classes=0, global_pool="token", dynamic_img_size=True, **args
        )
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"timm cannot build {config.architecture!r} with {args}: {error}") from error
    if backbone.num_features != config.dim:
        raise CheckpointError(
            f"{config.architecture} with {args} gives {backbone.num_features} dimensions, "
            f"{CONFIG_FILE} says {config.dim}"
        )
    if eps is not None:
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
    return backbone


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the file, then rename over it: a reader sees the old bytes or the new, never half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Replace `config.json` of a checkpoint folder atomically."""
    write_atomically(folder / CONFIG_FILE, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def save_checkpoint(
    folder: Path, backbone: nn.Module | Mapping[str, torch.Tensor] | Mapping[str, np.ndarray], config: CheckpointConfig
) -> str:
    """Write weights and configuration into a folder, each file atomically, weights first.

    Args:
        folder: Made when missing; other files in it (heads, metrics) are left alone.
        backbone: The module, or its state dict, of tensors or arrays.
        config: What rebuilds it.

    Returns:
        The checkpoint's id, 32 hex characters.
    """
    from safetensors.numpy import save

    state = backbone if isinstance(backbone, Mapping) else backbone.state_dict()
    arrays = {key: _float32(value) for key, value in state.items()}
    write_atomically(folder / WEIGHTS_FILE, save(arrays))
    write_config(folder, config.to_json())
    return checkpoint_id(arrays, config.preprocess)


def _float32(values: torch.Tensor | np.ndarray) -> np.ndarray:
    array = values if isinstance(values, np.ndarray) else values.detach().to("cpu").float().numpy()
    return np.asarray(array, np.float32, order="C")


def checkpoint_id(tensors: Mapping[str, np.ndarray], preprocess: Preprocess) -> str:
    """Hash of weights (names, shapes, values) and preprocessing, 32 hex characters."""
    digest = blake2b(json.dumps(asdict(preprocess), sort_keys=True).encode(), digest_size=16)
    for key in sorted(tensors):
        digest.update(f"{key}{tensors[key].shape}{tensors[key].dtype}".encode())
        digest.update(np.ascontiguousarray(tensors[key]).tobytes())
    return digest.hexdigest()


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: No such folder, no `config.json` in it, or one that does not read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {folder} ({CONFIG_FILE} missing): train one with "
            f"`lineup train fit --data IMAGES --output {quote(str(folder))}`, or point --checkpoint or "
            "LINEUP_CHECKPOINT at one"
        )
    try:
        return CheckpointConfig.from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): restore it, or train or import again") from error


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a checkpoint folder by parameter name, float32.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / WEIGHTS_FILE
    try:
        tensors: dict[str, np.ndarray] = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: restore it, or train or import again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is broken ({error}): restore it, or train or import again") from error
    return tensors


def read_id(folder: Path) -> str:
    """The id of the checkpoint in a folder.

    Raises:
        CheckpointError: The folder is missing, or a file is broken.
    """
    config = read_config(folder)
    return checkpoint_id(read_weights(folder), config.preprocess)


def load_backbone(folder: Path) -> nn.Module:
    """The backbone of a checkpoint folder, with its weights, on the CPU, for inference.

    Raises:
        CheckpointError: The folder is missing, a file is broken, or weights and configuration disagree.
    """
    return _loaded(read_config(folder), read_weights(folder), folder)


def _loaded(config: CheckpointConfig, weights: Mapping[str, np.ndarray], folder: Path) -> nn.Module:
    import torch

    backbone = build_backbone(config)
    try:
        backbone.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {reason}") from error
    return backbone.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Embedder:
    """A loaded checkpoint that turns images into embeddings. Safe to share between threads."""

    id: str
    name: str
    dim: int
    preprocess: Preprocess
    config: CheckpointConfig
    engine: str
    """What computes, and how precisely where that is a choice: torch, openvino-bf16 or openvino-f32."""
    device: str
    folder: Path
    forward: Callable[[np.ndarray], np.ndarray]
    """Pixels (n, 3, s, s), float32, to embeddings (n, d), float32."""

    @classmethod
    def load(cls, folder: Path, *, device: str = "auto", engine: str = "auto") -> Embedder:
        """Load a checkpoint folder.

        Args:
            folder: See the module's docstring.
            device: auto, cpu or cuda (cuda:1 and so on are passed on).
            engine: One of `ENGINES`; auto is torch on a GPU, and on a CPU OpenVINO where that is installed and knows
                the architecture.

        Raises:
            CheckpointError: The folder is missing, a file is broken, weights and configuration disagree, or the engine
                cannot run them.
        """
        if engine not in ENGINES:
            raise CheckpointError(f"engine {engine!r} is not known; use {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
        folder = Path(folder)
        config, weights = read_config(folder), read_weights(folder)
        chosen = "cpu" if engine.startswith("openvino") and device == "auto" else pick_device(device)
        named, forward = _start(engine, chosen, config, weights, folder)
        return cls(
            id=checkpoint_id(weights, config.preprocess),
            name=config.name,
            dim=config.dim,
            preprocess=config.preprocess,
            config=config,
            engine=named,
            device=chosen,
            folder=folder,
            forward=forward,
        )

    def embed(self, images: Sequence[Image.Image], batch_size: int = 32) -> np.ndarray:
        """Embeddings of images, shape (n, d), float32, as the backbone made them (any length).

        Args:
            images: RGB, any size; preprocessed here, a batch at a time.
            batch_size: Images per forward pass.
        """
        chunks = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        embeddings = [self.forward(self.preprocess(chunk)) for chunk in chunks]
        return np.concatenate(embeddings) if embeddings else np.empty((0, self.dim), np.float32)  # (n, d)

    def embed_pixels(self, pixels: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Embeddings of images already preprocessed.

        Args:
            pixels: Shape (n, 3, s, s), float32, normalised as `preprocess` does.
            batch_size: Images per forward pass.

        Returns:
            Shape (n, d), float32.
        """
        chunks = [pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size)]
        embeddings = [self.forward(chunk) for chunk in chunks]
        return np.concatenate(embeddings) if embeddings else np.empty((0, self.dim), np.float32)  # (n, d)

    def embed_stacks(self, stacks: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Embeddings of several stacks of preprocessed images, each (n, 3, s, s), in one pass: each (n, d), float32."""
        ends = np.cumsum([len(stack) for stack in stacks])
        return np.split(self.embed_pixels(np.concatenate(stacks)), ends[:-1]) if stacks else []


def _start(
    engine: str, device: str, config: CheckpointConfig, weights: Mapping[str, np.ndarray], folder: Path
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """The engine's name as verdicts give it, and its function."""
    if engine.startswith("openvino") or (engine == "auto" and device == "cpu" and find_spec("openvino")):
        from trainer.model.vit_openvino import CompiledGraph, NotPlain, build_graph

        if device != "cpu":
            raise CheckpointError(
                f"engine {engine!r} computes on the CPU, not on {device!r}; use --device cpu or LINEUP_DEVICE=cpu"
            )
        try:
            compiled = CompiledGraph(build_graph(config, weights), "f32" if engine == "openvino-f32" else None)
            return f"openvino-{compiled.precision}", compiled
        except NotPlain as error:
            if engine != "auto" or not find_spec("torch"):
                hint = "set LINEUP_ENGINE=torch, which needs the extra `train`"
                raise CheckpointError(f"OpenVINO cannot run the checkpoint {folder}: {error}; {hint}") from error
            log.info("embedding with torch: OpenVINO cannot run the checkpoint %s: %s", folder, error)
    if not (find_spec("torch") and find_spec("timm")):
        raise CheckpointError("torch and timm are not installed: add the extra `train`, or set LINEUP_ENGINE=openvino")
    return "torch", _torch(_loaded(config, weights, folder), device)


def _torch(backbone: nn.Module, device: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    backbone = backbone.to(device)

    def forward(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            embedding = backbone(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))
            return embedding.float().cpu().numpy()  # type: ignore[no-any-return]

    return forward


def pick_device(device: str) -> str:
    """The device to compute on: `auto` is cuda where there is one.

    Raises:
        CheckpointError: The device is not known or not there.
    """
    if device.split(":")[0] not in ("auto", "cpu", "cuda"):
        raise CheckpointError(f"device {device!r} is not known; use auto, cpu or cuda")
    if device == "auto":
        return "cuda" if has_cuda() else "cpu"
    if device != "cpu" and not has_cuda():
        raise CheckpointError(
            f"device {device!r} was asked for, but no CUDA device is visible to torch; use --device cpu or auto"
        )
    return device


def has_cuda() -> bool:
    """Whether torch is installed and sees a GPU. Torch, which takes seconds, is asked only where a driver is."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    if not find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()
