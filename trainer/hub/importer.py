"""Checkpoints from the hub's layout of transformers (`ViTModel`).

The official weights (`aimagelab/CoDE`) are such a `ViTModel`: LayerNorm epsilon 1e-12, pooler unused, the feature is
the last hidden state at the CLS token. Their heads are pickles, which can run any code when loaded, and are left out.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from shlex import quote
from typing import Any, Literal

import numpy as np

from trainer.hub.vit_names import HubError, architecture_args, from_transformers
from trainer.model.checkpoint import CheckpointConfig, CheckpointError, save_checkpoint
from trainer.model.embedder import Embedder
from trainer.model.model_card import EVALUATION_FILE, METRICS_FILE, write_card
from trainer.model.seen_images import SEEN_FILE

HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Of the hub's layout, the first that is there."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import wrote."""

    checkpoint: str
    """Its id."""
    refused: list[str]
    """Pickled heads that were left out."""


def import_checkpoint(
    source: str,
    output: Path,
    *,
    name: str | None = None,
    preprocess: Literal["center_crop", "resize_crop"] = "center_crop",
) -> Imported:
    """Turn a transformers `ViTModel` into a checkpoint folder.

    Args:
        source: A folder, or a hub id such as aimagelab/CoDE.
        output: The checkpoint folder to write.
        name: Of the checkpoint; by default what an exported one says, or the source's last part.
        preprocess: How images are brought to size, unless an exported checkpoint says it itself.

    Raises:
        HubError: No such source, or not a ViT that fits.
    """
    folder = _folder(source, output)
    hub = _json(folder / "config.json")
    origin = hub.get("lineup", {})
    tensors = from_transformers(_tensors(folder))
    image_size = int(origin.get("image_size") or hub.get("image_size", 224))
    derived = {
        "name": source.rstrip("/").rpartition("/")[2],
        "preprocess": {"mode": preprocess, "image_size": image_size},
        "provenance": {"source": source, "revision": _revision(folder)},
        "licence": _licence(folder),
    }
    fixed = {"image_size": image_size, "dim": int(hub["hidden_size"]), "architecture_args": architecture_args(hub)}
    fixed |= {"name": name} if name else {}
    config = CheckpointConfig.from_json(derived | origin | fixed)
    try:
        identity = save_checkpoint(output, tensors, config)
        (output / SEEN_FILE).unlink(missing_ok=True)  # of another checkpoint that was here
        Embedder.load(output, device="cpu")
    except CheckpointError as error:
        raise HubError(f"{source} is no ViT that this project can hold: {error}") from error
    for figures in (METRICS_FILE, EVALUATION_FILE):
        (output / figures).unlink(missing_ok=True)
    write_card(output)
    pickles = sorted([*folder.glob("sklearn/*.sav"), *folder.glob("sklearn/*.joblib")])
    return Imported(identity, [str(path.relative_to(folder)) for path in pickles])


def _folder(source: str, output: Path) -> Path:
    """The source as a local folder, fetched from the hub where it is none."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise HubError(f"{source} is neither a folder nor a hub id such as aimagelab/CoDE")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["config.json", "README.md", *HUB_WEIGHTS]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        folder = source.rpartition("/")[2]
        files = " ".join(f"--include {quote(pattern)}" for pattern in patterns)
        raise HubError(
            f"{source} is no folder here, and the hub did not give it ({reason}). On a machine with the network: "
            f"`hf download {source} {files} --local-dir {folder}`, or save config.json, README.md and "
            f"{HUB_WEIGHTS[0]} (where there is none {HUB_WEIGHTS[1]}) of https://huggingface.co/{source}/tree/main in "
            f"a folder {folder}. Then, here: `lineup train import {folder} --output {quote(str(output))}`"
        ) from error


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a hub folder, float32; a torch file is loaded with weights only, so that no code in it runs."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = next((folder / name for name in HUB_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise HubError(f"{folder} holds neither {' nor '.join(HUB_WEIGHTS)}")
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
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError, EOFError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HubError(f"{path} holds no weights that can be loaded without running code in it: {reason}") from error


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
    line = re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.M) if card.is_file() else None
    return line[1] if line else "unknown: see the source"


def _revision(folder: Path) -> str:
    """The commit of a hub snapshot, whose folder is named by it; empty for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else ""
