"""Checkpoints from and to the hub's layout of transformers (`ViTModel`), and exports for other runtimes.

The official weights (`aimagelab/CoDE`) are such a `ViTModel`: LayerNorm epsilon 1e-12, pooler unused, the feature is
the last hidden state at the CLS token. Their heads are pickles, which can run any code when loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.files import write_atomically
from trainer.hub.vit_names import HubError, architecture_args, from_transformers, to_transformers
from trainer.images import Preprocess
from trainer.model.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    load_backbone,
    read_config,
    read_weights,
    save_checkpoint,
)
from trainer.model.embedder import Embedder
from trainer.model.seen_images import SEEN_FILE

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Of the hub's layout, the first that is there."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import wrote."""

    checkpoint: str
    """Its id."""
    heads: str | None
    """Id of the heads, None when there were none or they were refused."""
    refused: list[str]
    """Pickled heads that were left out."""


def import_checkpoint(
    source: str,
    output: Path,
    *,
    name: str | None = None,
    preprocess: Literal["center_crop", "resize_crop"] = "center_crop",
    trust_pickles: bool = False,
) -> Imported:
    """Turn a transformers `ViTModel` into a checkpoint folder.

    Args:
        source: A folder, or a hub id such as aimagelab/CoDE.
        output: The checkpoint folder to write.
        name: Of the checkpoint; by default what an exported one says, or the source's last part.
        preprocess: How images are brought to size, unless an exported checkpoint says it itself.
        trust_pickles: Load pickled heads: they can run any code.

    Raises:
        HubError: No such source, or not a ViT that fits.
    """
    folder = _folder(source, trust_pickles)
    hub = _json(folder / "config.json")
    own = hub.get("lineup", {})
    tensors = from_transformers(_tensors(folder))
    image_size = int(own.get("image_size") or hub.get("image_size", 224))
    config = CheckpointConfig(
        name=name or own.get("name") or source.rstrip("/").rpartition("/")[2],
        image_size=image_size,
        dim=int(hub["hidden_size"]),
        preprocess=_preprocess(own, image_size, preprocess),
        architecture_args=architecture_args(hub),
        training=own.get("training", {}),
        provenance=own.get("provenance", {"source": source, "revision": _revision(folder)}),
        licence=own.get("licence") or _licence(folder),
    )
    try:
        identity = save_checkpoint(output, tensors, config)
        (output / SEEN_FILE).unlink(missing_ok=True)  # of another checkpoint that was here
        Embedder.load(output, device="cpu")
    except CheckpointError as error:
        raise HubError(f"{source} is no ViT that this project can hold: {error}") from error
    pickles = sorted([*folder.glob("sklearn/*.sav"), *folder.glob("sklearn/*.joblib")])
    if not trust_pickles or not pickles:
        return Imported(identity, None, [str(path.relative_to(folder)) for path in pickles])
    from trainer.hub.pickled_heads import read_pickled_heads

    heads = read_pickled_heads(pickles)
    heads.save(output)
    return Imported(identity, heads.id, [])


def export_hub(checkpoint: Path, output: Path) -> None:
    """Write the hub's layout: config.json, model.safetensors and preprocessor_config.json for `ViTModel`.

    A checkpoint whose image size is not that of its position embeddings needs `interpolate_pos_encoding` there, and
    transformers interpolates a little differently.

    Args:
        checkpoint: The folder.
        output: The folder to write.

    Raises:
        HubError: The backbone is no plain ViT.
    """
    from safetensors.numpy import save

    config, backbone, state = read_config(checkpoint), load_backbone(checkpoint), read_weights(checkpoint)
    blocks: Any = backbone.blocks
    patch = int(backbone.patch_embed.patch_size[0])  # type: ignore[index, union-attr]
    hub = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": config.dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": blocks[0].norm1.eps,
        "image_size": patch * math.isqrt(state["pos_embed"].shape[1] - 1),
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": blocks[0].attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "lineup": {
            "name": config.name,
            "image_size": config.image_size,
            "preprocess": asdict(config.preprocess),
            "training": config.training,
            "provenance": config.provenance,
            "licence": config.licence,
        },
    }
    size = config.preprocess.image_size
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": config.preprocess.mode == "resize_crop",
        "size": {"shortest_edge": round(size * 248 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.preprocess.mean),
        "image_std": list(config.preprocess.std),
    }
    write_atomically(output / "model.safetensors", save(to_transformers(state), {"format": "pt"}))
    write_atomically(output / "config.json", json.dumps(hub, indent=2).encode())
    write_atomically(output / "preprocessor_config.json", json.dumps(processor, indent=2).encode())


def _folder(source: str, trust_pickles: bool) -> Path:
    """The source as a local folder, fetched from the hub where it is none."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise HubError(f"{source} is neither a folder nor a hub id such as aimagelab/CoDE")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["config.json", "README.md", *WEIGHTS, *(["sklearn/*"] if trust_pickles else [])]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HubError(f"{source} is no folder here, and the hub did not give it: {reason}") from error


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a hub folder, float32; a torch file is loaded with weights only, so that no code in it runs."""
    import pickle

    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise HubError(f"{folder} holds neither {' nor '.join(WEIGHTS)}")
    try:
        if path.suffix == ".safetensors":
            with suppress(TypeError):  # bfloat16, which numpy has not
                return {key: value.astype(np.float32) for key, value in load_file(path).items()}
        import torch
        from safetensors.torch import load_file as load_tensors

        if path.suffix == ".safetensors":
            tensors = load_tensors(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            tensors = loaded.get("state_dict", loaded.get("model", loaded))
        return {key: value.float().numpy() for key, value in tensors.items()}
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HubError(f"{path} holds no weights that can be loaded without running code in it: {reason}") from error


def _preprocess(own: Mapping[str, Any], image_size: int, mode: Literal["center_crop", "resize_crop"]) -> Preprocess:
    if "preprocess" not in own:
        return Preprocess(mode=mode, image_size=image_size)
    values = dict(own["preprocess"])
    return Preprocess(**(values | {key: tuple(values[key]) for key in ("mean", "std")}))


def _json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HubError(f"{path} is missing or not JSON: expected the folder of a transformers ViTModel") from error
    if not isinstance(values, dict) or "hidden_size" not in values:
        raise HubError(f"{path} names no hidden_size: expected the folder of a transformers ViTModel")
    return values


def _licence(folder: Path) -> str:
    """What the model card's header says."""
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.M) if card.is_file() else None
    return found.group(1) if found else "unknown: see the source"


def _revision(folder: Path) -> str:
    """The commit of a hub snapshot, whose folder is named by it; empty for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else ""
