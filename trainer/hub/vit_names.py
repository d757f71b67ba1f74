"""One vision transformer under two names: timm's, which this project uses, and transformers' `ViTModel`."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.model.checkpoint import CheckpointError

TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 16, "img_size": 224, "mlp_ratio": 4.0}
"""What timm's `vit_tiny_patch16_224` is without arguments."""
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
"""timm's name of a tensor outside the blocks, and transformers'."""
INSIDE = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""timm's name of a module of a block, and transformers'; query, key and value are one tensor in timm."""


class HubError(CheckpointError):
    """The source is no `ViTModel` this project can hold, or the checkpoint none that can be exported."""


def from_transformers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict of timm from that of a `ViTModel`; the pooler is dropped.

    Raises:
        HubError: A tensor is missing or unknown.
    """
    rest = {re.sub(r"^(module\.)?(vit\.)?", "", key): value for key, value in tensors.items()}
    rest = {key: value for key, value in rest.items() if not key.startswith(("pooler.", "classifier."))}
    try:
        state = {ours: rest.pop(theirs) for ours, theirs in OUTSIDE.items()}
        depth = 1 + max(int(key.split(".")[2]) for key in rest if key.startswith("encoder.layer."))
        for i in range(depth):
            theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
            for end in ("weight", "bias"):
                parts = [f"{theirs}attention.attention.{part}.{end}" for part in ("query", "key", "value")]
                if end == "weight" or parts[0] in rest:  # qkv_bias may be off
                    state[f"{ours}attn.qkv.{end}"] = np.concatenate([rest.pop(part) for part in parts])  # (3 d, ...)
                state |= {f"{ours}{a}.{end}": rest.pop(f"{theirs}{b}.{end}") for a, b in INSIDE.items()}
    except (KeyError, ValueError) as error:
        raise HubError(f"the weights are not those of a transformers ViTModel: {error} is missing") from error
    if rest:
        raise HubError(f"the weights hold tensors that a plain ViTModel has not: {', '.join(sorted(rest)[:3])}")
    return state


def to_transformers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A `ViTModel`'s state dict of timm's; without pooler, which CoDE does not use.

    Raises:
        HubError: The backbone has tensors that a plain ViT has not.
    """
    rest = dict(state)
    try:
        tensors = {theirs: rest.pop(ours) for ours, theirs in OUTSIDE.items()}
        for i in range(1 + max(int(key.split(".")[1]) for key in rest if key.startswith("blocks."))):
            theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
            for end in ("weight", "bias"):
                if end == "weight" or f"{ours}attn.qkv.bias" in rest:
                    thirds = np.split(rest.pop(f"{ours}attn.qkv.{end}"), 3)
                    for part, third in zip(("query", "key", "value"), thirds, strict=True):
                        tensors[f"{theirs}attention.attention.{part}.{end}"] = third
                tensors |= {f"{theirs}{b}.{end}": rest.pop(f"{ours}{a}.{end}") for a, b in INSIDE.items()}
    except (KeyError, ValueError) as error:
        raise HubError(f"only a plain ViT can be written in the hub's layout: {error} is missing") from error
    if rest:
        raise HubError(f"only a plain ViT can be written in the hub's layout; this has {', '.join(sorted(rest)[:3])}")
    return tensors


def architecture_args(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of timm for `vit_tiny_patch16_224` that give the backbone of a transformers configuration.

    Raises:
        HubError: It is no ViT, or one with parts that timm's has not.
    """
    if hub.get("model_type") != "vit" or hub.get("hidden_act", "gelu") != "gelu" or hub.get("num_channels", 3) != 3:
        raise HubError(
            f"config.json says model_type {hub.get('model_type')!r}, hidden_act {hub.get('hidden_act')!r}; "
            "expected a vit with gelu on three channels"
        )
    try:
        args = {
            "embed_dim": int(hub["hidden_size"]),
            "depth": int(hub.get("num_hidden_layers", 12)),
            "num_heads": int(hub.get("num_attention_heads", 12)),
            "patch_size": int(hub.get("patch_size", 16)),
            "img_size": int(hub.get("image_size", 224)),
            "mlp_ratio": int(hub.get("intermediate_size", 3072)) / int(hub["hidden_size"]),
            "qkv_bias": bool(hub.get("qkv_bias", True)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise HubError(f"config.json is no ViT's: {error}") from error
    usual = {**TINY, "qkv_bias": True}
    return {key: value for key, value in args.items() if value != usual[key]} | {
        "norm_eps": float(hub.get("layer_norm_eps", 1e-12))
    }
