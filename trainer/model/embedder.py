"""A loaded checkpoint that turns images into embeddings.

On a GPU torch computes, on a CPU OpenVINO, which needs no torch and is several times faster; they agree to a cosine of
0.9999.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from trainer.images import Preprocess
from trainer.model.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    load_backbone,
    read_config,
    read_id,
    read_weights,
)
from trainer.model.vit_openvino import CompiledGraph, NotPlain, build_graph

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

log = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "openvino", "openvino-f32")
"""What `Embedder.load` takes; OpenVINO alone computes in bfloat16 where the processor does."""


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
    """Normalised pixels (n, 3, s, s), float32, to embeddings (n, d), float32."""

    @classmethod
    def load(cls, folder: Path, *, device: str = "auto", engine: str = "auto") -> Self:
        """Load a checkpoint folder.

        Args:
            folder: Of the checkpoint.
            device: auto, cpu or cuda (cuda:1 and so on are passed on).
            engine: One of `ENGINES`; auto is torch on a GPU, and on a CPU OpenVINO where that is installed and knows
                the architecture.

        Raises:
            CheckpointError: The folder is missing, a file is broken, weights and configuration disagree, or the engine
                cannot run them.
        """
        if engine not in ENGINES:
            raise CheckpointError(f"engine {engine!r} is not known; use {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
        config, weights = read_config(folder), read_weights(folder)
        identity = read_id(folder, weights)
        device = "cpu" if engine.startswith("openvino") and device == "auto" else pick_device(device)
        engine_name, forward = _start(engine, device, config, weights, folder)
        return cls(
            id=identity,
            name=config.name,
            dim=config.dim,
            preprocess=config.preprocess,
            config=config,
            engine=engine_name,
            device=device,
            folder=folder,
            forward=forward,
        )

    def embed(self, images: Sequence[Image.Image], batch_size: int = 32) -> np.ndarray:
        """Embeddings of RGB images of any size, shape (n, d), float32, as the backbone made them (any length).

        The way in for other programs: ours preprocess in threads and call `embed_windows`.
        """
        chunks = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        embeddings = [self.embed_windows([self.preprocess([image]) for image in chunk], batch_size) for chunk in chunks]
        return np.concatenate(embeddings) if embeddings else np.empty((0, self.dim), np.float32)  # (n, d)

    def embed_pixels(self, pixels: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Embeddings, shape (n, d), float32, of windows (n, 3, s, s), uint8, as `preprocess` gives them."""
        chunks = [pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size)]
        embeddings = [self.forward(self.preprocess.normalised(chunk)) for chunk in chunks]
        return np.concatenate(embeddings) if embeddings else np.empty((0, self.dim), np.float32)  # (n, d)

    def embed_windows(self, images: Sequence[np.ndarray], batch_size: int = 32) -> np.ndarray:
        """Embeddings of images, shape (n, d), float32, each given by its windows (w, 3, s, s), uint8.

        A pass has `batch_size` windows, of however many images.
        """
        if not images:
            return np.empty((0, self.dim), np.float32)
        embeddings = self.embed_pixels(np.concatenate(images), batch_size)  # (windows of all, d)
        return self.preprocess.joined(embeddings, [len(windows) for windows in images])

    def embed_stacks(self, stacks: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Embeddings of several stacks of n images, given as to `embed_windows`, in one go: each (n, d), float32."""
        ends = np.cumsum([len(stack) for stack in stacks])
        embeddings = self.embed_windows([windows for stack in stacks for windows in stack])
        return np.split(embeddings, ends[:-1]) if stacks else []


def _start(
    engine: str, device: str, config: CheckpointConfig, weights: Mapping[str, np.ndarray], folder: Path
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """The engine's name as verdicts give it, and its function."""
    if engine.startswith("openvino") or (engine == "auto" and device == "cpu" and find_spec("openvino")):
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
    return "torch", _torch_forward(load_backbone(folder, weights), device)


def _torch_forward(backbone: nn.Module, device: str) -> Callable[[np.ndarray], np.ndarray]:
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
