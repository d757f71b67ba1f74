"""What a training step differentiates: one forward pass over all views of a batch, and the loss on it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.fit.fit_settings import FitError, FitSettings
from trainer.fit.loss import code_loss, proxy_loss, supervised_contrastive_loss
from trainer.fit.teacher import Distillation, load_teacher
from trainer.images import Preprocess
from trainer.model.checkpoint import OWN_ARGUMENTS, CheckpointConfig, build_backbone, network_stem

DROP_CHANCES = {"Dropout": "p", "DropPath": "drop_prob", "PatchDropout": "prob", "PatchDropoutWithIndices": "prob"}
"""The attribute with the chance of each kind of layer that draws in training, PyTorch's and timm's."""


class Objective(nn.Module):
    """Backbone and loss as one module, so that one call per step is all that DistributedDataParallel sees."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, dim: int, settings: FitSettings, generators: int = 1) -> None:
        """A loss without a teacher.

        Args:
            backbone: Gives embeddings of `dim` values.
            dim: Their number.
            settings: What decides the loss.
            generators: How many there are, for the centres of `proxies`.
        """
        super().__init__()
        self.backbone = backbone
        self.settings = settings
        self.classifier = nn.Linear(dim, 1) if settings.loss == "bce" else None
        self.proxies = nn.Parameter(torch.randn(1 + generators, dim)) if settings.proxies else None
        preprocess = settings.preprocessing
        self.register_buffer("mean", 255 * torch.tensor(preprocess.mean).view(3, 1, 1), persistent=False)
        self.patches: PatchSubset | None = None
        self.distillation: Distillation | None = None
        if settings.tokens:
            self.patches = PatchSubset(settings.tokens, int(getattr(backbone, "num_prefix_tokens", 1)))
            backbone.patch_drop = self.patches
        self.register_buffer("std", 255 * torch.tensor(preprocess.std).view(3, 1, 1), persistent=False)

    def forward(
        self, whole: Tensor, local: Tensor, other: Tensor, generators: Tensor, seed: int = 0, teaching: float = 0.0
    ) -> Tensor:
        """The loss of a batch of records, a scalar.

        Args:
            whole: Plain, augmented and global views, shape (n, 3, 2, s, s, 3), uint8.
            local: Local crops, shape (n, 2, l, l, 3), uint8.
            other: A derangement of the records, shape (n,).
            generators: Of the records' fakes, 0..g-1, shape (n,).
            seed: Decides the patches that are fed, where not all are.
            teaching: Weight of the distance to the teacher's features.
        """
        embeddings, distance = self.embed_views(whole, local, seed, teach=teaching > 0)
        return self.loss(embeddings, other, generators) + teaching * distance

    def loss(self, embeddings: Tensor, other: Tensor, generators: Tensor) -> Tensor:
        """The loss of embeddings (4, 2, n, d) of plain, augmented, global and local views; real, fake."""
        settings = self.settings
        views = embeddings.flatten(0, 2)  # (4 * 2 * n, d)
        classes = torch.stack([torch.zeros_like(generators), 1 + generators])  # (2, n), 0 is real
        classes = classes.expand(4, -1, -1).flatten()  # (4 * 2 * n,)
        if settings.positives == "generator":
            loss = supervised_contrastive_loss(views, classes, temperature=settings.temperature, gather=settings.gather)
        else:
            loss = self.label_loss(embeddings, other)
        if self.proxies is not None:
            loss = loss + settings.proxies * proxy_loss(views, classes, self.proxies, temperature=settings.temperature)
        return loss

    def label_loss(self, embeddings: Tensor, other: Tensor) -> Tensor:
        """The part of the loss that knows real and fake alone."""
        if self.classifier is not None:
            logits: Tensor = self.classifier(embeddings)[..., 0]  # (4, 2, n)
            labels = torch.arange(2.0, device=logits.device)[None, :, None].expand_as(logits)
            return F.binary_cross_entropy_with_logits(logits, labels)
        plain, augmented, global_crop, local_crop = embeddings
        settings = self.settings
        twice = settings.loss == "reference"
        loss = code_loss(
            plain,
            augmented,
            global_crop,
            local_crop,
            other,
            temperature=settings.temperature,
            terms=settings.terms,
            anchors="real" if twice else settings.anchors,
            gather=settings.gather,
        )
        return 2 * loss if twice else loss

    def embed_views(self, whole: Tensor, local: Tensor, seed: int = 0, *, teach: bool = False) -> tuple[Tensor, Tensor]:
        """Embeddings of all views, shape (4, 2, n, d), float32: plain, augmented, global, local; real, fake.

        Beside them stands the mean distance of their features to the teacher's, a scalar; 0 where it does not teach.
        """
        whole = whole.permute(1, 2, 0, 3, 4, 5).flatten(0, 2)  # (3 * 2 * n, s, s, 3)
        local = local.transpose(0, 1).flatten(0, 1)  # (2 * n, l, l, 3)
        stacks = [torch.cat([whole, local])] if local.shape[1:] == whole.shape[1:] else [whole, local]
        with self.patches.seeded(seed) if self.patches else nullcontext():
            if teach:
                parts, distances = zip(*map(self.compare, stacks), strict=True)
                distance = torch.cat(distances).mean()
            else:
                parts, distance = tuple(map(self.embed, stacks)), self.mean.new_zeros(())
        embeddings = torch.cat(parts)
        return embeddings.view(4, 2, -1, embeddings.shape[1]), distance  # (4, 2, n, d), ()

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings of uint8 pixels (m, s, s, 3), shape (m, d), float32."""
        with self.autocast(pixels.device):
            embeddings: Tensor = self.backbone(self.normalised(pixels))
        return embeddings.float()

    def compare(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of uint8 pixels (m, s, s, 3), shape (m, d), and the distances to the teacher's, shape (m,)."""
        if self.distillation is None:
            raise RuntimeError("there is no teacher to compare with")
        backbone: Any = self.backbone
        with self.autocast(pixels.device):
            tokens = backbone.forward_features(self.normalised(pixels))  # (m, prefix + p, d)
            embeddings = backbone.forward_head(tokens)
        distances: Tensor = self.distillation(tokens.float(), pixels)
        return embeddings.float(), distances

    def normalised(self, pixels: Tensor) -> Tensor:
        """What the backbone reads of uint8 pixels (m, s, s, 3): shape (m, 3, s, s), float32."""
        return (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (m, 3, s, s)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of products on a device."""
        bf16 = self.settings.precision == "bf16" and multiplies_bf16(device)
        # Each weight is cast once per call, and a cache of casts would be shared by the threads of `Slices`.
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself: a CPU that emulates it trains at a third of float32's speed."""
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {"bf16": True}
    return any(present for name, present in capabilities.items() if name.endswith("bf16"))


class PatchSubset(nn.Module):
    """Keeps the class token and at most so many patches of each view, drawn anew for each; without a draw, all.

    In timm's backbones it takes the place of patch dropout (arXiv 2208.07220), whose share of patches grows with the
    view and whose draw neither a thread nor a resumed run can repeat.
    """

    def __init__(self, most: int, prefix: int) -> None:
        super().__init__()
        self.most, self.prefix = most, prefix

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Within this context and thread, forward passes draw from a generator of this seed."""
        token = _DRAW.set(torch.Generator().manual_seed(seed))
        try:
            yield
        finally:
            _DRAW.reset(token)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, prefix + p, d) in, (n, prefix + min(p, most), d) out."""
        generator, patches = _DRAW.get(), x.shape[1] - self.prefix
        if generator is None or patches <= self.most:
            return x
        order = torch.rand(len(x), patches, generator=generator).argsort(1)[:, : self.most]  # (n, most)
        places = order.to(x.device)[..., None].expand(-1, -1, x.shape[2])  # (n, most, d)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, places)], 1)


_DRAW: ContextVar[torch.Generator | None] = ContextVar("draw", default=None)


class Slices:
    """Forward and backward passes over slices of a batch, a slice per thread, with the gradient of the whole batch.

    Threads that meet twice per step use the cores of a CPU better than kernels that each split their work: at 112
    pixels and two cores a step was seen to take two thirds of the time, and not to collapse beside other programs.

    A batch of more records than may be in work at once is embedded without a graph first, and again with one when the
    loss has given the gradient of each embedding (GradCache, arXiv 2101.06983). In a group of processes the gradients
    are averaged, as DistributedDataParallel does.
    """

    def __init__(self, objective: Objective, threads: int, most: int | None = None) -> None:
        """Use these threads.

        Args:
            objective: What is differentiated.
            threads: Slices in work at once.
            most: Records in work at once; default all.
        """
        torch.set_num_threads(1)
        self.objective = objective
        self.threads = threads
        self.most = most
        self.pool = ThreadPoolExecutor(threads)
        self.backbone = [parameter for parameter in objective.backbone.parameters() if parameter.requires_grad]

    def __call__(
        self, whole: Tensor, local: Tensor, other: Tensor, generators: Tensor, seed: int = 0, teaching: float = 0.0
    ) -> Tensor:
        """Add to the gradients of all parameters; returns the loss. Arguments as `Objective.forward`."""
        objective, records = self.objective, len(whole)
        at_once = min(records, self.most or records)
        size = -(-at_once // self.threads)
        slices = list(zip(torch.split(whole, size), torch.split(local, size), count(seed), strict=False))
        parameters = [*self.backbone]
        if teaching and objective.distillation is not None:
            parameters += objective.distillation.parameters()

        def embeddings(views: Slice) -> Tensor:
            with torch.no_grad():
                return objective.embed_views(*views)[0]

        def forward(views: Slice) -> tuple[Tensor, Tensor]:
            return objective.embed_views(*views, teach=teaching > 0)

        def backward(
            views: Slice, passed: tuple[Tensor, Tensor] | None, leaf: Tensor
        ) -> tuple[Tensor, Sequence[Tensor]]:
            part, distance = passed or forward(views)
            weight = distance.new_tensor(teaching * len(views[0]) / records)  # of a slice's mean in that of all
            if not teaching:
                return weight, torch.autograd.grad(part, parameters, leaf.grad)
            gradient = torch.autograd.grad((part, distance), parameters, (leaf.grad, weight))
            return weight * distance.detach(), gradient

        passes: list[tuple[Tensor, Tensor] | None] = [None] * len(slices)
        if at_once < records:
            parts = list(self.pool.map(embeddings, slices))
        else:
            passes = list(self.pool.map(forward, slices))
            parts = [passed[0] for passed in passes if passed is not None]
        leaves = [part.detach().requires_grad_() for part in parts]  # (4, 2, size, d)
        loss = objective.loss(torch.cat(leaves, 2), other, generators)
        torch.autograd.backward(loss)
        total = loss.detach()
        for distance, gradient in self.pool.map(backward, slices, passes, leaves):
            total = total + distance
            for parameter, share in zip(parameters, gradient, strict=True):
                if parameter.grad is None:  # laid out as the parameter, which the fused optimiser relies on
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad += share
        self._average()
        return total

    def _average(self) -> None:
        """Give all processes of the group the mean of their gradients."""
        if not dist.is_initialized():
            return
        for parameter in self.objective.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def rescaled(network: nn.Module, preprocess: Preprocess) -> nn.Module:
    """Let a network's first convolution read pixels normalised as by `preprocess`, not as the network learnt them."""
    layers: Any = network
    taught = layers.pretrained_cfg
    mean, std = (torch.tensor(value)[:, None, None] for value in (preprocess.mean, preprocess.std))  # (3, 1, 1)
    taught_mean, taught_std = (torch.tensor(taught[key])[:, None, None] for key in ("mean", "std"))  # (3, 1, 1)
    with torch.no_grad():  # what it learnt of is a x + b, where x is what is read here
        layers.bn1.running_mean -= (layers.conv_stem.weight * (mean - taught_mean) / taught_std).sum((1, 2, 3))
        layers.conv_stem.weight *= std / taught_std
    return network


Slice = tuple[Tensor, Tensor, int]
"""Whole and local views of some records, and the seed of their patches."""


def plain_attention(backbone: nn.Module) -> nn.Module:
    """Let attention run as two matrix products.

    At the few dozen tokens of small views on a CPU this was seen 1.6 times as fast per training step as PyTorch's
    fused kernel, whose backward pass there computes in float32.
    """
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 - an attribute of some modules only
    return backbone


def make_objective(settings: FitSettings, device: str, generators: int = 1) -> tuple[Objective, CheckpointConfig]:
    """Backbone and loss with weights drawn from the seed (or timm's), and the configuration of the checkpoint.

    Raises:
        FitError: The backbone draws, and its parts would be computed twice.
    """
    import timm

    args = settings.timm_args
    known = {key: value for key, value in args.items() if key not in OWN_ARGUMENTS}
    with torch.device("meta"):
        bare = timm.create_model(settings.architecture, pretrained=False, num_classes=0, **known)
    config = CheckpointConfig(
        name=settings.name,
        architecture=settings.architecture,
        image_size=settings.image_size,
        dim=int(getattr(bare, "num_features")),  # noqa: B009 - of timm's modules only
        preprocess=settings.preprocessing,
        architecture_args=args,
        training=settings.record(),
        provenance={"code": "lineup train fit", "data": str(settings.data), "split": settings.split},
    )
    torch.manual_seed(settings.seed)
    objective = Objective(build_backbone(config), config.dim, settings, generators)
    kinds = ((type(module).__name__, module) for module in objective.backbone.modules())
    drawing = sorted({kind for kind, module in kinds if getattr(module, DROP_CHANCES.get(kind, ""), 0)})
    if settings.cached_batch and drawing:
        raise FitError(
            f"--cached-batch {settings.cached_batch} computes each part twice, and {', '.join(drawing)} would draw "
            "anew: set the drop rates in --architecture-args to 0, or leave out --cached-batch"
        )
    if settings.pretrained:
        network = args.get("stem")
        official = timm.create_model(
            network or settings.architecture,
            pretrained=True,
            num_classes=0,
            pretrained_cfg_overlay={"file": settings.pretrained_file} if settings.pretrained_file else None,
            **({} if network else known),
        )
        if network:
            embedding: Any = objective.backbone.patch_embed
            official = rescaled(official, config.preprocess)
            embedding.proj = network_stem(official, config.dim, settings.patch, settings.frozen_stages)
        else:
            objective.backbone.load_state_dict(official.state_dict())
    if settings.teacher:
        teacher = load_teacher(settings.teacher, device)
        config.provenance["teacher"] = {"name": teacher.name, "sha256": teacher.sha256}
        prefix = int(getattr(objective.backbone, "num_prefix_tokens", 1))
        objective.distillation = Distillation(
            teacher, config.dim, settings.image_size, prefix, dense=settings.tokens is None
        )
    if device == "cpu":
        plain_attention(objective.backbone)
    return objective.to(device), config
