"""The checkpoint folder: what rebuilds a backbone, its weights, and their id.

`config.json` rebuilds backbone and preprocessing, `model.safetensors` holds the weights. The id is a hash of weights
and preprocessing, so two folders with one id give the same embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from trainer.files import write_atomically
from trainer.images import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
OWN_ARGUMENTS = ("norm_eps", "stem")
"""Arguments of an architecture that timm does not know."""


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
    """Passed to timm, e.g. depth; `norm_eps` sets the epsilon of every LayerNorm, and `stem` "conv" puts convolutions
    in place of the patch embedding, see `conv_stem`."""
    training: dict[str, Any] = field(default_factory=dict)
    """The settings of the training run."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where weights and training data came from."""
    licence: str = "Apache-2.0"

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_json` back. Keys of others in the same file (the heads' hyperparameters) are left alone.

        Raises:
            CheckpointError: A value is missing or has the wrong type.
        """
        try:
            fields = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
            return cls(**fields | {"preprocess": Preprocess(**values["preprocess"])})
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
    eps, stem = args.pop("norm_eps", None), args.pop("stem", None)
    if stem not in (None, "conv"):
        raise CheckpointError(f"architecture argument stem is {stem!r}; expected conv, or none for the patch embedding")
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
    if stem:
        embedding: Any = backbone.patch_embed
        embedding.proj = conv_stem(config.dim, embedding.patch_size[0])
    return backbone


def conv_stem(dim: int, patch: int) -> nn.Sequential:
    """Convolutions from pixels (n, 3, s, s) to patch tokens (n, dim, s / patch, s / patch).

    Each 3x3 convolution halves the side and is followed by a ReLU; their channels double up to `dim`, and a 1x1
    convolution ends them ("Early Convolutions Help Transformers See Better", arXiv 2106.14881, there with batch norm,
    whose averages over views of one record would tell the views of each other).

    Raises:
        CheckpointError: The patch is no power of two, or the dimension cannot be halved as often.
    """
    from torch import nn

    channels = stem_channels(dim, patch)
    layers: list[nn.Module] = []
    for into, out in pairwise((3, *channels)):
        convolution = nn.Conv2d(into, out, 3, stride=2, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # torch's own would fade from layer to layer
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))


def stem_channels(dim: int, patch: int) -> list[int]:
    """Output channels of each 3x3 convolution of a stem.

    Raises:
        CheckpointError: As `conv_stem`.
    """
    count = patch.bit_length() - 1
    if patch != 2**count or count < 1 or dim % 2 ** (count - 1):
        raise CheckpointError(f"a convolutional stem cannot make tokens of {dim} values of patches of {patch} pixels")
    return [dim >> (count - 1 - number) for number in range(count)]


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Replace `config.json` of a checkpoint folder atomically."""
    write_atomically(folder / CONFIG_FILE, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def save_checkpoint(
    folder: Path,
    backbone: nn.Module | Mapping[str, torch.Tensor] | Mapping[str, np.ndarray],
    config: CheckpointConfig,
    *,
    half: bool = False,
) -> str:
    """Write weights and configuration into a folder, each file atomically, weights first.

    With half precision the id is that of the rounded weights, which is what anybody loads.

    Args:
        folder: Made when missing; other files in it (heads, metrics) are left alone.
        backbone: The module, or its state dict, of tensors or arrays.
        config: What rebuilds it.
        half: Store the weights in half precision, half the size.

    Returns:
        The checkpoint's id, 32 hex characters.

    Raises:
        CheckpointError: A weight is beyond half precision (65,504).
    """
    from safetensors.numpy import save

    state = backbone if isinstance(backbone, Mapping) else backbone.state_dict()
    arrays = {key: _float32(value) for key, value in state.items()}
    if half:
        limit = float(np.finfo(np.float16).max)
        if large := [key for key, value in arrays.items() if np.abs(value).max(initial=0) > limit]:
            raise CheckpointError(f"{large[0]} has weights beyond half precision ({limit:,.0f}): go without --half")
        arrays = {key: value.astype(np.float16) for key, value in arrays.items()}
    write_atomically(folder / WEIGHTS_FILE, save(arrays))
    write_config(folder, config.to_json())
    stored = {key: value.astype(np.float32, copy=False) for key, value in arrays.items()}
    return checkpoint_id(stored, config.preprocess)


def _float32(values: torch.Tensor | np.ndarray) -> np.ndarray:
    array = values if isinstance(values, np.ndarray) else values.detach().to("cpu").float().numpy()
    return np.asarray(array, np.float32, order="C")


def checkpoint_id(tensors: Mapping[str, np.ndarray], preprocess: Preprocess) -> str:
    """Hash of weights (names, shapes, values as float32) and preprocessing, 32 hex characters."""
    values = asdict(preprocess)
    if preprocess.windows == 1:  # checkpoints from before there were more keep their id
        del values["windows"]
    digest = blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16)
    for key in sorted(tensors):
        digest.update(f"{key}{tensors[key].shape}{tensors[key].dtype}".encode())
        digest.update(np.ascontiguousarray(tensors[key]).tobytes())
    return digest.hexdigest()


def read_sections(folder: Path) -> dict[str, Any]:
    """All of `config.json` of a checkpoint folder, the sections of others included.

    Raises:
        CheckpointError: No such folder, no `config.json` in it, or one that does not read.
    """
    path = folder / CONFIG_FILE
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        command = f"lineup train fit --data IMAGES --output {quote(str(folder))}"
        raise CheckpointError(
            f"no checkpoint at {folder} ({CONFIG_FILE} missing): train one with `{command}`, or point --checkpoint or "
            "LINEUP_CHECKPOINT at one"
        ) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): restore it, or train or import again") from error


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of a checkpoint folder; for errors see `read_sections` and `CheckpointConfig.from_json`."""
    return CheckpointConfig.from_json(read_sections(folder))


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a checkpoint folder by parameter name, float32, whatever precision they are stored in.

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
    return {key: value.astype(np.float32, copy=False) for key, value in tensors.items()}


def read_id(folder: Path) -> str:
    """The id of the checkpoint in a folder.

    Raises:
        CheckpointError: The folder is missing, or a file is broken.
    """
    config = read_config(folder)
    return checkpoint_id(read_weights(folder), config.preprocess)


def load_backbone(folder: Path, weights: Mapping[str, np.ndarray] | None = None) -> nn.Module:
    """The backbone of a checkpoint folder, with its weights, on the CPU, for inference.

    Args:
        folder: Of the checkpoint.
        weights: As `read_weights` gives them, where the caller holds them already.

    Raises:
        CheckpointError: The folder is missing, a file is broken, or weights and configuration disagree.
    """
    import torch

    backbone = build_backbone(read_config(folder))
    tensors = {key: torch.from_numpy(value) for key, value in (weights or read_weights(folder)).items()}
    try:
        backbone.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {reason}") from error
    return backbone.eval().requires_grad_(False)
