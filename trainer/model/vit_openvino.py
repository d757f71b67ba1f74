"""A plain vision transformer as an OpenVINO graph, built from a checkpoint's arrays alone: no torch, no timm."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping
from functools import cache
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from trainer.model.checkpoint import RESIDUAL_CHANNELS, CheckpointConfig, is_network, stem_channels

if TYPE_CHECKING:
    import openvino
    from openvino import Node


VIT_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Dimension, depth and attention heads by timm's name."""
MEAN = {"global_pool": "avg", "class_token": False}
"""Arguments by which the embedding is the mean of the patch tokens."""
VIT_ARGUMENTS = ("embed_dim", "depth", "num_heads", "patch_size", "img_size", "norm_eps", "qkv_bias")
"""Arguments of timm's model that the graph follows."""
NETWORK_STRIDES, NETWORK_EPSILON = (1, 2, 2, 2, 1, 2, 1), 1e-3
"""Of the stages of an EfficientNet, and of the batch norms of timm's conversions from TensorFlow."""
INPUT, OUTPUT = "pixels", "embedding"


class NotPlain(ValueError):
    """The checkpoint is no plain ViT; the message says where it differs."""


def build_graph(config: CheckpointConfig, weights: Mapping[str, np.ndarray]) -> openvino.Model:
    """The function of `build_backbone`: pixels (n, 3, s, s) float32 -> embedding (n, d) float32.

    The graph is for images of s = `config.preprocess.image_size` pixels; the weights have timm's names.

    Raises:
        NotPlain: The architecture, an argument of it, or the weights are not those of a plain ViT.
    """
    refuse_telemetry()
    import openvino
    from openvino import opset13 as op

    match = re.fullmatch(r"vit_(tiny|small|base|large)_patch(\d+)_(\d+)(\..*)?", config.architecture)
    if not match:
        raise NotPlain(f"the architecture is {config.architecture!r}")
    usual = (*VIT_SIZES[match[1]], int(match[2]), int(match[3]), 1e-6, True)
    given = dict(config.architecture_args)
    stem, mean = given.pop("stem", None), given.items() >= MEAN.items()
    if mean:
        given = {key: value for key, value in given.items() if key not in MEAN}
    if others := given.keys() - set(VIT_ARGUMENTS):
        raise NotPlain(f"the architecture has the arguments {sorted(others)}")
    args = dict(zip(VIT_ARGUMENTS, usual, strict=True)) | given
    numbers = {key: value for key, value in args.items() if key != "depth" or not mean or value != 0}
    if not all(isinstance(value, int | float) and (value > 0 or value is False) for value in numbers.values()):
        raise NotPlain(f"an argument of the architecture is no number above 0: {args}")
    dim, depth, heads, patch, usual_size, eps, bias = (args[name] for name in VIT_ARGUMENTS)
    size, grid = config.preprocess.image_size, usual_size // patch
    if dim != config.dim or dim % heads or size % patch:
        raise NotPlain(f"{dim} dimensions for {config.dim}, {heads} heads, {size} pixels in patches of {patch}")
    unused = set(weights)

    def take(name: str, *shape: int) -> np.ndarray:
        unused.discard(name)
        if name not in weights or weights[name].shape != shape:
            raise NotPlain(f"{name} is not among the weights in the shape {shape}")
        return np.asarray(weights[name], np.float32)

    def take_any(name: str) -> np.ndarray:
        return take(name, *getattr(weights.get(name), "shape", ()))

    def linear(x: Node, name: str, into: int, out: int, part: slice = slice(None), bias: bool = True) -> Node:
        x = op.matmul(x, op.constant(take(f"{name}.weight", out, into)[part]), False, True)
        return op.add(x, op.constant(take(f"{name}.bias", out)[part])) if bias else x

    def norm(x: Node, name: str) -> Node:
        x = op.mvn(x, op.constant(np.array([-1])), True, eps, "INSIDE_SQRT")
        return op.add(op.multiply(x, op.constant(take(f"{name}.weight", dim))), op.constant(take(f"{name}.bias", dim)))

    def split(x: Node) -> Node:
        x = op.reshape(x, op.constant(np.array([0, 0, heads, dim // heads])), True)  # (n, t, h, d / h)
        return op.transpose(x, op.constant(np.array([0, 2, 1, 3])))  # (n, h, t, d / h)

    def first(x: Node) -> Node:
        return op.slice(x, op.constant([0]), op.constant([1]), op.constant([1]), op.constant([1]))

    pixels = op.parameter([-1, 3, size, size], np.float32, INPUT)

    def convolution(x: Node, name: str, into: int, out: int, side: int, stride: int) -> Node:
        kernel, padding = op.constant(take(f"{name}.weight", out, into, side, side)), [int(stride < side)] * 2
        x = op.convolution(x, kernel, [stride, stride], padding, padding, [1, 1])
        return op.add(x, op.constant(take(f"{name}.bias", out)[:, None, None]))

    def network(x: Node, name: str) -> Node:
        """The layers of `network_stem`, each batch norm joined to the convolution before it."""

        def layer(
            x: Node, conv: str, norm: str, stride: int = 1, *, depthwise: bool = False, last: bool = False
        ) -> Node:
            kernel = take_any(f"{conv}.weight")
            out = len(kernel)
            mean, variance, weight, bias = (
                take(f"{norm}.{part}", out) for part in ("running_mean", "running_var", "weight", "bias")
            )
            factor = weight / np.sqrt(variance + NETWORK_EPSILON)
            kernel = kernel * factor[:, None, None, None]
            options = ([stride, stride], [0, 0], [0, 0], [1, 1], "same_upper")
            if depthwise:
                x = op.group_convolution(x, op.constant(kernel[:, None]), *options)
            else:
                x = op.convolution(x, op.constant(kernel), *options)
            x = op.add(x, op.constant((bias - mean * factor)[:, None, None]))
            return x if last else op.clamp(x, 0.0, 6.0)

        x = layer(x, f"{name}.0", f"{name}.1", 2)
        for stage, stride in enumerate(NETWORK_STRIDES):
            for number in count():
                block = f"{name}.2.{stage}.{number}"
                if f"{block}.conv_dw.weight" not in weights:
                    break
                before, step = x, stride if number == 0 else 1
                if f"{block}.conv_pwl.weight" in weights:
                    x = layer(x, f"{block}.conv_pw", f"{block}.bn1")
                    x = layer(x, f"{block}.conv_dw", f"{block}.bn2", step, depthwise=True)
                    x = layer(x, f"{block}.conv_pwl", f"{block}.bn3", last=True)
                else:
                    x = layer(x, f"{block}.conv_dw", f"{block}.bn1", step, depthwise=True)
                    x = layer(x, f"{block}.conv_pw", f"{block}.bn2", last=True)
                if before.get_output_partial_shape(0) == x.get_output_partial_shape(0):
                    x = op.add(x, before)
        channels = take_any(f"{name}.3.weight").shape[1]
        return convolution(x, f"{name}.3", channels, dim, 1, 1)

    x, embedding = pixels, "patch_embed.proj"
    if is_network(stem):
        x = network(pixels, embedding)
    elif stem:
        channels, layer = [3, *stem_channels(dim, patch)], 0
        if stem == "residual":
            x, channels[0], layer = convolution(x, f"{embedding}.0", 3, RESIDUAL_CHANNELS, 3, 1), RESIDUAL_CHANNELS, 1
        for into, out in pairwise(channels):
            x = op.relu(convolution(x, f"{embedding}.{layer}", into, out, 3, 2))
            layer += 2  # the ReLU is a layer
        x = convolution(x, f"{embedding}.{layer}", dim, dim, 1, 1)
    else:
        x = convolution(x, embedding, 3, dim, patch, patch)
    x = op.reshape(x, op.constant(np.array([0, dim, -1])), True)  # (n, d, t)
    x = op.transpose(x, op.constant(np.array([0, 2, 1])))  # (n, t, d)
    prefix = 0 if mean else 1
    positions = resized(take("pos_embed", 1, prefix + grid * grid, dim), size // patch, prefix)
    x = op.add(x, op.constant(positions[:, prefix:]))
    if not mean:
        cls = op.constant(take("cls_token", 1, 1, dim) + positions[:, :1])
        batch = op.slice(op.shape_of(x), op.constant([0]), op.constant([1]), op.constant([1]))
        cls = op.broadcast(cls, op.concat([batch, op.constant(np.array([1, dim]))], 0))
        x = op.concat([cls, x], 1)  # (n, 1 + t, d)

    for number in range(depth):
        block = f"blocks.{number}"
        inside = norm(x, f"{block}.norm1")
        query = inside
        if number == depth - 1 and not mean:  # nothing after reads more than the CLS token
            query, x = first(inside), first(x)
        q, k, v = (
            split(linear(y, f"{block}.attn.qkv", dim, 3 * dim, slice(i * dim, (i + 1) * dim), bias))
            for i, y in enumerate((query, inside, inside))
        )
        attended = op.scaled_dot_product_attention(q, k, v)
        attended = op.transpose(attended, op.constant(np.array([0, 2, 1, 3])))  # (n, t, h, d / h)
        attended = op.reshape(attended, op.constant(np.array([0, 0, dim])), True)  # (n, t, d)
        x = op.add(x, linear(attended, f"{block}.attn.proj", dim, dim))
        y = op.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1", dim, 4 * dim), "erf")
        x = op.add(x, linear(y, f"{block}.mlp.fc2", 4 * dim, dim))
    if mean:
        x = norm(op.reduce_mean(x, op.constant(np.array([1])), False), "fc_norm")  # (n, d)
    else:
        x = op.squeeze(norm(x, "norm"), op.constant([1]))  # (n, d)
    if unused:
        raise NotPlain(f"weights of no plain ViT: {sorted(unused)[:3]}")
    x.output(0).get_tensor().set_names({OUTPUT})
    return openvino.Model([x], [pixels], "vit")


def resized(positions: np.ndarray, side: int, prefix: int = 1) -> np.ndarray:
    """Position embeddings for a grid of side x side patches, shape (1, prefix + side * side, d), as timm makes them.

    timm asks torch for antialiased bicubic interpolation, which is Pillow's. The positions given have the shape
    (1, prefix + g * g, d), that of the CLS token first where there is one.
    """
    grid = round((positions.shape[1] - prefix) ** 0.5)
    if grid == side:
        return positions
    planes = positions[0, prefix:].reshape(grid, grid, -1).transpose(2, 0, 1)  # (d, g, g)
    smaller = [Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC) for plane in planes]
    patches = np.stack([np.asarray(plane) for plane in smaller], -1).reshape(1, side * side, -1)  # (1, t, d)
    return np.concatenate([positions[:, :prefix], patches], 1)


def refuse_telemetry() -> None:
    """Keep OpenVINO from telling Google Analytics of each import, as it would of every user who has not refused.

    It does without this package of its own where that is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # which makes an import of it fail


@cache
def openvino_core() -> openvino.Core:
    """One for the process, kept to its end.

    A core gives the thread that makes it a signal stack, and takes the memory back when it goes, perhaps in another
    thread: the next signal would then end the process.
    """
    refuse_telemetry()
    import openvino

    return openvino.Core()


class CompiledGraph:
    """A graph ready to run on the CPU. Threads may share it: each has inference requests of its own.

    Attributes:
        precision: "bf16" or "f32": that of products; inputs and outputs are float32.
    """

    def __init__(self, graph: openvino.Model, precision: str | None = None) -> None:
        """Compile it twice: for one image by all cores, and for many, of which each core takes one after the other.

        Without a precision products are bf16 where the processor has it.
        """
        # Threads bound to cores would wait there for the threads that decode.
        settings: dict[str, Any] = {"ENABLE_CPU_PINNING": False}
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        one = graph.clone()
        # A fixed shape is a third faster, and what the layers of one image pass on stays in a core's cache.
        one.reshape([1, *list(graph.inputs[0].partial_shape)[1:]])
        core = openvino_core()
        self._one = core.compile_model(one, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
        self._many = core.compile_model(one, "CPU", settings | {"PERFORMANCE_HINT": "THROUGHPUT"})
        self._parallel = int(self._many.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        number_type = self._many.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.precision: str = {"bfloat16": "bf16", "float32": "f32"}.get(number_type, number_type)
        self._requests = threading.local()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (n, 3, s, s), float32, to embeddings (n, d), float32.

        Compiled models themselves must not be called (`self._one(pixels)`): that writes later inputs into this array.
        """
        if not hasattr(self._requests, "one"):
            self._requests.one = [self._one.create_infer_request()]
            # Two for each core: while the embedding of one is fetched, the other is at work.
            self._requests.many = [self._many.create_infer_request() for _ in range(2 * self._parallel)]
        requests = self._requests.many if len(pixels) > 1 else self._requests.one
        pixels, embeddings = np.ascontiguousarray(pixels), []
        for row in range(len(pixels) + len(requests)):
            request = requests[row % len(requests)]
            if row >= len(requests):
                request.wait()
                embeddings.append(request.get_output_tensor(0).data.copy())  # (1, d)
            if row < len(pixels):
                request.start_async({0: pixels[row : row + 1]}, share_inputs=True)
        return np.concatenate(embeddings)  # (n, d)
