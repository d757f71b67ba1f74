"""The checkpoint folder: what rebuilds a backbone, its weights, and their id.

`config.json` rebuilds backbone and preprocessing, `model.safetensors` holds the weights. The id is a hash of weights
and preprocessing, so two folders with one id give the same embeddings. `config.json` names the id, and the SHA-256 of
every file that is read again, so that a damaged file is refused; checkpoints written before it did are read without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b, file_digest, sha256
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
STEMS = ("conv", "residual")
NETWORK_STEM = re.compile(r"tf_efficientnet_lite[0-4]")
"""Networks of timm that may be stems: no attention, no swish, which serves well on a CPU."""
NETWORK_PATCH = 32
"""Pixels that such a network joins to a token."""
NETWORK_STAGES = 7
"""Of such a network, after its first convolution."""
FROZEN_STAGES = 2
"""The first of them, which do not learn unless told to: they cost most, and see edges and colours."""
RESIDUAL_CHANNELS = 6
"""The pixels, and what each has over its surroundings."""
RESIDUAL_GAIN = 4.0
"""By which that is weighted at first, so that it is about as strong as the pixels."""


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
    """Passed to timm, e.g. depth; `norm_eps` sets the epsilon of every LayerNorm, and `stem` puts convolutions in place
    of the patch embedding: "conv" or "residual", see `conv_stem`, or "tf_efficientnet_lite0", see `network_stem`."""
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
            CheckpointError: A value is missing, of the wrong type, or out of range.
        """
        try:
            known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
            config = cls(**known | {"preprocess": Preprocess(**values["preprocess"])})
            for part, usual in ((config, cls()), (config.preprocess, Preprocess())):
                for name in (entry.name for entry in fields(part)):
                    value, expected = getattr(part, name), type(getattr(usual, name))
                    if type(value) is not expected:
                        raise TypeError(f"{name} is {value!r}; expected {expected.__name__}")
            if min(config.dim, config.image_size) < 1:
                raise ValueError(f"dim is {config.dim} and image_size {config.image_size}; expected at least 1")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{CONFIG_FILE} is not a checkpoint's configuration: {error}") from error
        return config


def build_backbone(config: CheckpointConfig) -> nn.Module:
    """A vision transformer from scratch: float input (n, 3, s, s) -> CLS token (n, dim), no classifier.

    With the arguments `"global_pool": "avg", "class_token": false` it gives the mean of the patch tokens.

    Raises:
        CheckpointError: timm has no such architecture, or it does not give `config.dim` values.
    """
    import timm
    from torch import nn

    args = dict(config.architecture_args)
    eps, stem = args.pop("norm_eps", None), args.pop("stem", None)
    if stem not in (None, *STEMS) and not is_network(stem):
        raise CheckpointError(
            f"architecture argument stem is {stem!r}; expected conv, residual or tf_efficientnet_lite0 to 4, or none "
            "for the patch embedding"
        )
    try:
        backbone: nn.Module = timm.create_model(
            config.architecture,
            pretrained=False,
            num_classes=0,
            dynamic_img_size=True,
            **{"global_pool": "token"} | args,
        )
    except Exception as error:  # timm does not check its arguments: whatever they break first is raised
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"timm cannot build {config.architecture!r} with {args}: {reason}") from error
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
        patch = embedding.patch_size[0]
        if is_network(stem):
            embedding.proj = network_stem(timm.create_model(stem, num_classes=0), config.dim, patch)
        else:
            embedding.proj = conv_stem(config.dim, patch, residual=stem == "residual")
    return backbone


def conv_stem(dim: int, patch: int, *, residual: bool = False) -> nn.Sequential:
    """Convolutions from pixels (n, 3, s, s) to patch tokens (n, dim, s / patch, s / patch).

    Each 3x3 convolution halves the side and is followed by a ReLU; their channels double up to `dim`, and a 1x1
    convolution ends them ("Early Convolutions Help Transformers See Better", arXiv 2106.14881, there with batch norm,
    whose averages over views of one record would tell the views of each other).

    Args:
        dim: Of the tokens, d.
        patch: Side of what a token sees first, pixels.
        residual: Whether another 3x3 convolution comes before them, which starts out as the pixels beside
            `RESIDUAL_GAIN` times what they have over the mean around them, and learns on: traces of generators lie
            there, faint beside the content (Bayar and Stamm, "A deep learning approach to universal image manipulation
            detection using a new convolutional layer", IH&MMSec 2016).

    Raises:
        CheckpointError: The patch is no power of two, or the dimension cannot be halved as often.
    """
    import torch
    from torch import nn

    channels = stem_channels(dim, patch)
    layers: list[nn.Module] = []
    if residual:
        pixel = torch.zeros(3, 3)
        pixel[1, 1] = 1
        kernels = torch.stack([pixel, RESIDUAL_GAIN * (pixel - 1 / 9)])  # (2, 3, 3)
        split = nn.Conv2d(3, RESIDUAL_CHANNELS, 3, padding=1)
        split.weight = nn.Parameter(torch.einsum("khw,oi->koihw", kernels, torch.eye(3)).flatten(0, 1))  # (6, 3, 3, 3)
        split.bias = nn.Parameter(torch.zeros(RESIDUAL_CHANNELS))
        layers.append(split)
    for into, out in pairwise((RESIDUAL_CHANNELS if residual else 3, *channels)):
        convolution = nn.Conv2d(into, out, 3, stride=2, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # torch's own would fade from layer to layer
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))


def is_network(stem: object) -> bool:
    """Whether a stem is a network of timm, which may come with weights."""
    return isinstance(stem, str) and NETWORK_STEM.fullmatch(stem) is not None


def network_stem(network: Any, dim: int, patch: int, frozen: int = FROZEN_STAGES) -> nn.Sequential:
    """A convolutional network of timm as a stem: from pixels (n, 3, s, s) to patch tokens (n, dim, s / 32, s / 32).

    What it learnt of a million photographs is what a few thousand images cannot teach. Its batch norms are fixed, so
    that no view tells of another, and so are its first stages.

    Args:
        network: timm's, of a name that `is_network`; its layers become part of the stem.
        dim: Of the tokens, d.
        patch: Side of what a token sees first, pixels.
        frozen: Stages that do not learn, the first, of `NETWORK_STAGES`; the convolution before them does not either.

    Raises:
        CheckpointError: The patch is not of 32 pixels.
    """
    import timm
    from torch import nn

    if patch != NETWORK_PATCH:
        raise CheckpointError(
            f"patch_size is {patch}, and a network as stem makes patches of {NETWORK_PATCH} pixels: set "
            f'"patch_size": {NETWORK_PATCH} in --architecture-args'
        )
    for part in (network.conv_stem, *network.blocks[:frozen]):
        part.requires_grad_(False)
    channels = network.blocks[-1][-1].conv_pwl.out_channels
    last = nn.Conv2d(channels, dim, 1)
    stem: Any = nn.Sequential(network.conv_stem, network.bn1, network.blocks, last)
    layers: Any = timm.layers  # partly without types
    fixed: nn.Sequential = layers.freeze_batch_norm_2d(stem)
    return fixed


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


def write_file(folder: Path, name: str, data: bytes, sections: Mapping[str, Any] | None = None) -> None:
    """Replace a file of a checkpoint atomically, then `config.json` with its new hash.

    After a kill between the two the file is refused until its writer is run again, never read for what it is not.

    Args:
        folder: Of the checkpoint.
        name: Of the file.
        data: Its bytes.
        sections: What else changes in `config.json`.

    Raises:
        CheckpointError: `config.json` has something else than hashes there, or as `read_sections`; nothing is written.
    """
    config = read_sections(folder)
    hashes = _hashes(folder, config) | {name: sha256(data).hexdigest()}
    write_atomically(folder / name, data)
    write_config(folder, {**config, **(sections or {}), "files": hashes})


def check_file(folder: Path, name: str, remedy: str) -> None:
    """Compare the bytes of a checkpoint's file with the hash in `config.json`, where that names one.

    A file that cannot be opened is left to its reader.

    Args:
        folder: Of the checkpoint.
        name: Of the file.
        remedy: What to do about other bytes, for the message.

    Raises:
        CheckpointError: They are other bytes, or as `read_sections`.
    """
    hashes = _hashes(folder, read_sections(folder))
    if name not in hashes:
        return
    with suppress(OSError), (folder / name).open("rb") as file:
        if (digest := file_digest(file, "sha256").hexdigest()) != (expected := hashes[name]):
            raise CheckpointError(
                f"{folder / name} is damaged (its SHA-256 is {digest}, {CONFIG_FILE} says {expected}): {remedy}"
            )


def _hashes(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The SHA-256 of files by name, as `config.json` of a folder has them; none in one of before.

    Raises:
        CheckpointError: It has something else there.
    """
    hashes = config.get("files", {})
    if not isinstance(hashes, dict):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} says files is {hashes!r}; expected hashes by name: "
            "restore it, or train or import again"
        )
    return hashes


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
    stored = {key: value.astype(np.float32, copy=False) for key, value in arrays.items()}
    identity, data = checkpoint_id(stored, config.preprocess), save(arrays)
    write_atomically(folder / WEIGHTS_FILE, data)
    write_config(folder, config.to_json() | {"id": identity, "files": {WEIGHTS_FILE: sha256(data).hexdigest()}})
    return identity


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
        CheckpointError: The file is missing, damaged or broken, or a weight is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path, remedy = folder / WEIGHTS_FILE, "restore it, or train or import again"
    check_file(folder, WEIGHTS_FILE, remedy)
    try:
        tensors: dict[str, np.ndarray] = load_file(path)
        weights = {key: value.astype(np.float32, copy=False) for key, value in tensors.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {remedy}") from error
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is broken ({error}): {remedy}") from error
    if diverged := [key for key, value in weights.items() if not np.isfinite(value).all()]:
        raise CheckpointError(f"{path} holds weights that are not finite, as in {diverged[0]}: {remedy}")
    return weights


def read_id(folder: Path, weights: Mapping[str, np.ndarray] | None = None) -> str:
    """The id of the checkpoint in a folder.

    Args:
        folder: Of the checkpoint.
        weights: As `read_weights` gives them, where the caller holds them already.

    Raises:
        CheckpointError: The folder is missing, a file is broken, or `config.json` names another id.
    """
    sections = read_sections(folder)
    preprocess = CheckpointConfig.from_json(sections).preprocess
    identity = checkpoint_id(read_weights(folder) if weights is None else weights, preprocess)
    if sections.get("id", identity) != identity:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} is damaged: weights and preprocessing have the id {identity}, it says "
            f"{sections['id']}: restore it, or train or import again"
        )
    return identity


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
