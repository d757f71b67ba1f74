"""Another network whose features the backbone learns to predict from the same views (feature distillation).

Few images do not teach a backbone to see; a network that has seen many passes on what it sees (FitNets, arXiv
1412.6550).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.fit.fit_settings import TIMM_TEACHER, FitError, teacher_sha256
from trainer.images import Preprocess
from trainer.model.vit_openvino import CompiledGraph, openvino_core, refuse_telemetry

if TYPE_CHECKING:
    from openvino import Model, Output

IMAGENET = Preprocess()
"""Its mean and deviation are what networks for float32 expect."""
MEASURED_VIEWS = 512
"""Views, at most, whose features say what the mean and the deviation of a channel are."""
MEASURED_AT_ONCE = 32
LEAST_DEVIATION = 0.1
"""Share of the channels' mean deviation; one that hardly moves in the measured views would outweigh all others."""


class Teacher(Protocol):
    """A network that is not trained. Safe to share between threads."""

    name: str
    sha256: str

    def __call__(self, pixels: Tensor) -> Tensor:
        """Feature maps (m, c, h, w), float32, on the device of the pixels (m, s, s, 3), uint8."""
        ...


@dataclass(slots=True)
class GraphTeacher:
    """A convolutional network of a file that OpenVINO reads, on the CPU, cut before its last global pooling.

    A uint8 input gets the pixels as they are, a float32 one normalised by ImageNet's mean and deviation.
    """

    name: str
    sha256: str
    graph: Model
    """Pixels in, feature map out."""
    images_last: bool
    """Whether the channels are the last axis of the input."""
    maps_last: bool
    """Whether they are that of the feature map."""
    compiled: dict[int, CompiledGraph] = field(default_factory=dict)
    """By the side of a view in pixels."""
    compiling: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a `.tflite`, `.onnx` or `.xml` file.

        Raises:
            FitError: OpenVINO does not read it, or it is no convolutional network of one image.
        """
        refuse_telemetry()
        import openvino

        try:
            whole = openvino_core().read_model(path)
        except RuntimeError as error:
            raise FitError(f"--teacher {path}: OpenVINO cannot read it ({_reason(error)})") from error
        shape = whole.inputs[0].partial_shape
        if len(whole.inputs) != 1 or len(shape) != 4:
            raise FitError(f"--teacher {path} has {len(whole.inputs)} inputs, one of shape {shape}; expected one image")
        feature_map, maps_last = last_feature_map(whole)
        if feature_map is None:
            raise FitError(f"--teacher {path} has no global pooling; expected a convolutional classifier")
        graph = openvino.Model([feature_map], whole.get_parameters(), "teacher")
        images_last = str(shape[3]) == "3"
        return cls(path.name, teacher_sha256(path), graph, images_last, maps_last)

    def __call__(self, pixels: Tensor) -> Tensor:
        array = pixels.cpu().numpy()
        side = array.shape[1]
        with self.compiling:
            if side not in self.compiled:
                self.compiled[side] = self._compile(side)
        if self.graph.inputs[0].element_type.to_dtype() != np.uint8:
            mean, std = np.array(IMAGENET.mean, np.float32), np.array(IMAGENET.std, np.float32)
            array = (array / np.float32(255) - mean) / std  # (m, s, s, 3)
        maps = torch.from_numpy(self.compiled[side](array if self.images_last else array.transpose(0, 3, 1, 2)))
        maps = maps.float().to(pixels.device)
        return maps.permute(0, 3, 1, 2) if self.maps_last else maps  # (m, c, h, w)

    def _compile(self, side: int) -> CompiledGraph:
        graph = self.graph.clone()
        try:
            graph.reshape([-1, side, side, 3] if self.images_last else [-1, 3, side, side])
            return CompiledGraph(graph)
        except RuntimeError as error:
            raise FitError(f"--teacher {self.name} cannot look at {side} pixels ({_reason(error)})") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing of it changes


def last_feature_map(graph: Model) -> tuple[Output | None, bool]:
    """What the last global pooling reads, None where there is none, and whether the channels are its last axis."""
    for node in reversed(graph.get_ordered_ops()):
        kind = node.get_type_name()
        if kind not in ("AvgPool", "ReduceMean") or len(node.input_value(0).partial_shape) != 4:
            continue
        axes = {2, 3}  # of a pooling, and of ONNX's, whose axes are computed
        if kind == "ReduceMean" and (given := node.input_value(1).get_node()).get_type_name() == "Constant":
            axes = {int(axis) % 4 for axis in given.data}
        if axes in ({2, 3}, {1, 2}):
            return node.input_value(0), axes == {1, 2}
    return None, False


class TimmTeacher:
    """A network of timm with its pretrained weights, on the device that trains."""

    def __init__(self, name: str, device: str) -> None:
        import timm

        try:
            self.model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # whatever timm and the hub's client raise
            raise FitError(f"--teacher {TIMM_TEACHER}{name}: timm cannot load it ({_reason(error)})") from error
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.name = TIMM_TEACHER + name
        digest = sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        self.sha256 = digest.hexdigest()
        cfg: dict[str, Any] = getattr(self.model, "pretrained_cfg")  # noqa: B009 - of timm's modules only
        self.side = cfg["input_size"][1] if cfg.get("fixed_input_size") else None
        self.mean, self.std = (255 * torch.tensor(cfg[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
        self.prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        views = pixels.to(self.mean.device).permute(0, 3, 1, 2)  # (m, 3, s, s)
        views = (views.float() - self.mean) / self.std
        if self.side is not None and self.side != views.shape[2]:
            views = F.interpolate(views, (self.side, self.side), mode="bicubic", antialias=True)
        features: Tensor = getattr(self.model, "forward_features")(views)  # noqa: B009
        if features.ndim == 3:  # (m, prefix + t, c)
            patches = features[:, self.prefix :]
            grid = round(patches.shape[1] ** 0.5)
            return patches.transpose(1, 2).reshape(len(patches), -1, grid, grid).float()  # (m, c, h, w)
        return (features.permute(0, 3, 1, 2) if self.channels_last else features).float()  # (m, c, h, w)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing of it changes


def load_teacher(name: str, device: str) -> Teacher:
    """The teacher of `--teacher`: a file, or `timm/NAME`.

    Raises:
        FitError: It cannot be loaded.
    """
    if name.startswith(TIMM_TEACHER):
        return TimmTeacher(name.removeprefix(TIMM_TEACHER), device)
    return GraphTeacher.read(Path(name))


class Distillation(nn.Module):
    """How far a teacher's features of views are from what a linear layer makes of the backbone's tokens.

    The class token predicts the mean over the teacher's feature map, and the patch tokens, averaged over the cells of
    its grid, the map itself. Both are standardised by channel, so that no channel outweighs others by its unit.

    Attributes:
        teacher: The network that is learnt from; no part of the state dict.
    """

    pooled_mean: Tensor
    pooled_std: Tensor
    map_mean: Tensor
    map_std: Tensor

    def __init__(self, teacher: Teacher, dim: int, image_size: int, prefix: int = 1, *, dense: bool = True) -> None:
        """Linear layers from tokens of `dim` values to the teacher's channels.

        Args:
            teacher: Network that is learnt from.
            dim: Length of a token.
            image_size: Side of a view in pixels; the teacher is asked once for the number of its channels.
            prefix: Tokens before those of the patches.
            dense: Whether all patches of a view are fed, so that the map is predicted too.
        """
        super().__init__()
        self.__dict__["teacher"] = teacher
        self.teacher: Teacher
        self.prefix = prefix
        channels = teacher(torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8)).shape[1]
        self.pooled, self.map = nn.Linear(dim, channels), nn.Linear(dim, channels) if dense else None
        for part in ("pooled", "map"):
            self.register_buffer(f"{part}_mean", torch.zeros(channels))
            self.register_buffer(f"{part}_std", torch.ones(channels))

    def measure(self, pixels: Tensor) -> None:
        """Take the mean and the deviation of each channel from the features of views (n, s, s, 3), uint8."""
        pixels = pixels[:: -(-len(pixels) // MEASURED_VIEWS)]
        maps = torch.cat([self.teacher(views) for views in torch.split(pixels, MEASURED_AT_ONCE)])  # (n, c, h, w)
        for values, mean, deviation in (
            (maps.mean((2, 3)), self.pooled_mean, self.pooled_std),
            (maps.permute(0, 2, 3, 1).flatten(0, 2), self.map_mean, self.map_std),
        ):
            std = values.std(0)
            mean.copy_(values.mean(0))
            deviation.copy_(std.clamp(min=LEAST_DEVIATION * float(std.mean())))

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """Mean squared error per view, shape (m,), of standardised features.

        Args:
            tokens: The backbone's, shape (m, prefix + p, d).
            pixels: The views, shape (m, s, s, 3), uint8.
        """
        maps = self.teacher(pixels)  # (m, c, h, w)
        target = (maps.mean((2, 3)) - self.pooled_mean) / self.pooled_std  # (m, c)
        distance: Tensor = (self.pooled(tokens[:, 0]) - target).square().mean(1)  # (m,)
        if self.map is None:
            return distance
        patches = tokens[:, self.prefix :].transpose(1, 2)  # (m, d, p)
        side = round(patches.shape[2] ** 0.5)
        grid = (min(side, maps.shape[2]), min(side, maps.shape[3]))
        patches = patches.reshape(len(patches), -1, side, side)  # (m, d, side, side)
        cells = F.adaptive_avg_pool2d(patches, grid).permute(0, 2, 3, 1)  # (m, h, w, d)
        maps = F.adaptive_avg_pool2d(maps, grid).permute(0, 2, 3, 1)  # (m, h, w, c)
        target = (maps - self.map_mean) / self.map_std  # (m, h, w, c)
        distance += (self.map(cells) - target).square().mean((1, 2, 3))  # (m,)
        return distance


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
