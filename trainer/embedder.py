"""The backbone, the checkpoint folder that holds it, and the embeddings it makes of images.

A checkpoint is a folder: `config.json` rebuilds backbone and preprocessing, `model.safetensors` holds the weights.
Its id is a hash of weights and preprocessing, so two folders with one id give the same embeddings.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.images import Preprocess

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


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


def save_checkpoint(folder: Path, backbone: nn.Module | Mapping[str, torch.Tensor], config: CheckpointConfig) -> str:
    """Write weights and configuration into a folder, each file atomically, weights first.

    Args:
        folder: Made when missing; other files in it (heads, metrics) are left alone.
        backbone: The module, or its state dict.
        config: What rebuilds it.

    Returns:
        The checkpoint's id, 32 hex characters.
    """
    from safetensors.torch import save
    from torch import nn

    state = backbone.state_dict() if isinstance(backbone, nn.Module) else backbone
    tensors = {key: value.detach().to("cpu").float().contiguous() for key, value in state.items()}
    write_atomically(folder / WEIGHTS_FILE, save(tensors))
    write_config(folder, config.to_json())
    return checkpoint_id({key: value.numpy() for key, value in tensors.items()}, config.preprocess)


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
            f"`python -m trainer fit --output {folder}`, or point --checkpoint or LINEUP_CHECKPOINT at one"
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


@dataclass(frozen=True, slots=True)
class Embedder:
    """A loaded checkpoint that turns images into embeddings. Safe to share between threads."""

    id: str
    name: str
    dim: int
    preprocess: Preprocess
    config: CheckpointConfig
    engine: str
    device: str
    folder: Path
    backbone: nn.Module

    @classmethod
    def load(cls, folder: Path, *, device: str = "auto", engine: str = "auto") -> Embedder:
        """Load a checkpoint folder.

        Args:
            folder: See the module's docstring.
            device: auto, cpu or cuda (cuda:1 and so on are passed on).
            engine: auto or torch.

        Raises:
            CheckpointError: The folder is missing, a file is broken, or weights and configuration disagree.
        """
        import torch

        if engine not in ("auto", "torch"):
            raise CheckpointError(f"engine {engine!r} is not known; use auto or torch")
        folder = Path(folder)
        config, tensors = read_config(folder), read_weights(folder)
        backbone = build_backbone(config)
        try:
            backbone.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {reason}") from error
        chosen = pick_device(device)
        return cls(
            id=checkpoint_id(tensors, config.preprocess),
            name=config.name,
            dim=config.dim,
            preprocess=config.preprocess,
            config=config,
            engine="torch",
            device=chosen,
            folder=folder,
            backbone=backbone.eval().requires_grad_(False).to(chosen),
        )

    def embed(self, images: Sequence[Image.Image], batch_size: int = 32) -> np.ndarray:
        """Embeddings of images, shape (n, d), float32, as the backbone made them (any length).

        Args:
            images: RGB, any size; preprocessed here, a batch at a time.
            batch_size: Images per forward pass.
        """
        chunks = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        embeddings = [self._forward(self.preprocess(chunk)) for chunk in chunks]
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
        embeddings = [self._forward(chunk) for chunk in chunks]
        return np.concatenate(embeddings) if embeddings else np.empty((0, self.dim), np.float32)  # (n, d)

    def _forward(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            embedding = self.backbone(torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device))
            return embedding.float().cpu().numpy()  # type: ignore[no-any-return]


def pick_device(device: str) -> str:
    """The device to compute on: `auto` is cuda where there is one.

    Raises:
        CheckpointError: The device is not known or not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise CheckpointError(f"device {device!r} is not known; use auto, cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError(
            f"device {device!r} was asked for, but no CUDA device is visible; use --device cpu or auto"
        )
    return device
