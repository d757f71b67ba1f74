"""One training run in one process: model, optimiser, schedule and state, epoch by epoch."""

import copy
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.cores import usable_cores
from trainer.fit.batches import Batch, Origin
from trainer.fit.fit_settings import FitError, FitSettings, learning_rate, teacher_weight
from trainer.fit.loss import derangement
from trainer.fit.muon import Muon
from trainer.fit.objective import Objective, Slices
from trainer.fit.state import RunState
from trainer.model.checkpoint import is_network
from trainer.model.seen_images import SeenImages
from trainer.views.augmentations import Pixels

PARAMETER_GROUPS = 2
"""How many `parameter_groups` gives."""
WAIT_LIMIT = timedelta(days=1)
"""How long processes wait for one that reads its data, looks at validation images or fits heads. One that ends is
noticed at once."""
Advance = Callable[[float, int, float, float], None]
"""Told about each update: share of the schedule done, updates done, loss, records per second."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that `torchrun` started, on one node or several; alone without it."""

    rank: int = 0
    world: int = 1
    local: int = 1
    """Processes of this node, which share its cores."""
    group: dist.ProcessGroup | None = None
    """All of them once more, for what is decided on CPUs: it waits as long as one of them works alone."""

    @classmethod
    def join(cls, device: str) -> Self:
        """Join the group that the environment describes."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            if device.startswith("cuda"):
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if not dist.is_initialized():
            return cls()
        world = dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=WAIT_LIMIT))
        return cls(dist.get_rank(), world, local, group)

    def wait(self) -> None:
        """Go on once all are here."""
        if self.world > 1:
            dist.barrier(self.group)

    def leave(self) -> None:
        """Leave the group once all are through."""
        self.wait()
        if self.world > 1:
            dist.destroy_process_group()

    def agree(self, value: float) -> float:
        """The first process's value, so that all take the same decision.

        Nothing that a process knows alone may be compared with it afterwards: times differ.
        """
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, 0, group=self.group)
        return float(shared[0])

    def share(self, decide: Callable[[], T]) -> T:
        """What the first process decides by its own disk, or the error that it meets, in all of them.

        Args:
            decide: Called in the first process alone; tensors that it gives are on the CPU.

        Raises:
            ValueError: As `decide`, in all of them.
            OSError: Likewise.
        """
        if self.world == 1:
            return decide()
        decision: list[Any] = [None]
        if self.rank == 0:
            try:
                decision = [decide()]
            except (ValueError, OSError) as error:
                decision = [error]
        dist.broadcast_object_list(decision, 0, group=self.group)
        if isinstance(decision[0], Exception):
            raise decision[0]
        shared: T = decision[0]
        return shared

    def gather(self, seen: SeenImages) -> list[SeenImages]:
        """The records of all processes."""
        if self.world == 1:
            return [seen]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, seen, group=self.group)
        return parts


@dataclass(slots=True)
class Run:
    """Everything that changes while training."""

    settings: FitSettings
    processes: Processes
    device: str
    objective: Objective
    steps: int
    """Updates per epoch, where no state says otherwise."""
    generators: list[str] = field(default_factory=list)
    """Those of the training images; of shards, those of the records that were listed."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Reason by uri of images that could not be read on the way."""
    seen: SeenImages = field(default_factory=lambda: SeenImages.of([], []))
    """Images of the epochs done, those of all processes."""
    state: RunState = field(init=False)
    model: nn.Module = field(init=False)
    """What a step calls: the objective, or the same under DistributedDataParallel."""
    optimisers: dict[str, torch.optim.Optimizer] = field(init=False)
    """By the name of their tensors in the state."""
    average: Objective | None = field(init=False, default=None)
    slices: Slices | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        settings, world = self.settings, self.processes.world
        self.state = RunState(settings.record(), self.steps)
        self.model = self.objective
        if world > 1 and not settings.cached_batch:  # the layers of a teacher that no longer teaches are not used
            unused = settings.teacher is not None
            self.model = nn.parallel.DistributedDataParallel(self.objective, find_unused_parameters=unused)
        threads = max(1, usable_cores() // self.processes.local) if self.device == "cpu" else 1
        matrices = block_matrices(self.objective) if settings.optimiser == "muon" else []
        stem = stem_weights(self.objective) if settings.stem_rate < 1 else []
        groups = parameter_groups(self.objective, settings.weight_decay, without=[*matrices, *stem])
        self.optimisers = {"optimiser": torch.optim.AdamW(groups, lr=1e-6, fused=True)}
        if stem:
            self.optimisers["stem"] = torch.optim.AdamW(stem, lr=1e-6, weight_decay=0.0, fused=True)
        if matrices:
            self.optimisers["muon"] = Muon(matrices, lr=1e-6, weight_decay=settings.weight_decay, threads=threads)
        if settings.cached_batch or (self.device == "cpu" and world == 1):
            self.slices = Slices(self.objective, min(threads, settings.batch_size), settings.batch_size)
        elif self.device == "cpu":
            torch.set_num_threads(threads)
        if settings.ema:
            self.average = copy.deepcopy(self.objective).requires_grad_(False)

    @property
    def result(self) -> Objective:
        """The weights that are judged and written: the average where there is one."""
        return self.average or self.objective

    def progress(self, seconds: float) -> float:
        """Share of the schedule that is done, 0..1: the larger of updates done and time used."""
        share = self.state.updates / (self.settings.epochs * self.state.steps)
        if self.state.window < math.inf:
            share = self.processes.agree(max(share, seconds / self.state.window))
        return min(1.0, share)

    def step(self, batch: Batch, order: torch.Generator, rate: float, teaching: float = 0.0) -> float:
        """One update; returns the loss.

        Args:
            batch: Views.
            order: Draws what is random.
            rate: The learning rate.
            teaching: Weight of the distance to the teacher's features.
        """
        whole, local, unreadable, origins = batch
        self.unreadable.update({uri: reason for uri, _, reason in (line.partition("\t") for line in unreadable)})
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = rate * (self.settings.stem_rate if name == "stem" else 1)
        whole, local = (views.to(self.device, non_blocking=True) for views in (whole, local))
        other = derangement(len(whole), order).to(self.device)
        generators = self.places(origins[1::2]) if self.settings.knows_generators else torch.zeros(len(whole)).long()
        seed = int(torch.randint(2**31, (), generator=order))
        if self.slices is not None:
            loss = self.slices(whole, local, other, generators.to(self.device), seed, teaching)
        else:
            loss = self.model(whole, local, other, generators.to(self.device), seed, teaching)
            torch.autograd.backward(loss)
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.settings.clip)
        for optimiser in self.optimisers.values():
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            decay = min(self.settings.ema, (1 + self.state.updates) / (10 + self.state.updates))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.objective.parameters()), 1 - decay)
        self.state.updates += 1
        return float(loss.detach())

    def places(self, fakes: Sequence[Origin]) -> Tensor:
        """The place of each fake's generator among all, shape (n,).

        Raises:
            FitError: One is not among them.
        """
        if missing := {fake.generator for fake in fakes} - set(self.generators):
            raise FitError(
                f"generators {', '.join(sorted(missing))} are not among the first images of the shards, which have "
                f"{', '.join(self.generators)}: raise --head-images, so that more are listed"
            )
        return torch.tensor([self.generators.index(fake.generator) for fake in fakes])  # (n,)

    def epoch(self, batches: Iterator[Batch], listeners: Sequence[Advance] = ()) -> dict[str, float]:
        """Train until the batches or the time end, and return what the summary of the epoch needs.

        Raises:
            FitError: The loss is no longer finite.
        """
        settings, state, world = self.settings, self.state, self.processes.world
        seed = np.random.SeedSequence((settings.seed, state.epoch, self.processes.rank)).generate_state(1, np.uint64)[0]
        order = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
        begin, losses, rate, records = time.monotonic(), [], 0.0, [self.seen]
        self.model.train()
        for batch in batches:
            progress = self.progress(state.seconds + time.monotonic() - begin)
            if progress >= 1:
                break
            rate = learning_rate(settings, progress, world)
            losses.append(self.step(batch, order, rate, teacher_weight(settings, progress)))
            records.append(SeenImages.of((origin.sha256 for origin in batch[3]), (origin.group for origin in batch[3])))
            if not math.isfinite(losses[-1]):
                raise FitError(f"the loss became {losses[-1]} at update {state.updates}: lower --learning-rate")
            speed = len(losses) * settings.records * world / (time.monotonic() - begin)
            for listener in listeners:
                listener(progress, state.updates, losses[-1], speed)
        self.seen = SeenImages.joined(self.processes.gather(SeenImages.joined(records)))
        elapsed = time.monotonic() - begin
        state.seconds += elapsed
        state.epoch += 1
        return {
            "learning_rate": rate,
            "loss": float(np.mean(losses)) if losses else math.nan,
            "records_per_second": len(losses) * settings.records * world / max(elapsed, 1e-9),
        }

    def embed(self, pixels: Pixels, block: int = 64) -> np.ndarray:
        """Embeddings (n, d) of pixels (n, s, s, 3), uint8, by the weights that are kept."""
        self.result.eval()

        def embed(start: int) -> np.ndarray:
            with torch.inference_mode():
                views = torch.from_numpy(pixels[start : start + block]).to(self.device)
                return self.result.embed(views).cpu().numpy()

        with ThreadPoolExecutor(self.slices.threads if self.slices else 1) as pool:
            return np.concatenate(list(pool.map(embed, range(0, len(pixels), block))))  # (n, d)

    def keep_best(self) -> None:
        """Remember the weights that are kept, which a later epoch may not improve on."""
        self.state.tensors["best"] = {key: value.cpu().clone() for key, value in self.result.state_dict().items()}

    def weights(self) -> dict[str, Tensor]:
        """The state dict that the checkpoint gets: that of the best epoch where one was remembered."""
        return dict(self.state.tensors.get("best") or self.result.state_dict())

    def capture(self) -> None:
        """Put the tensors into the state."""
        self.state.tensors["model"] = self.objective.state_dict()
        self.state.tensors |= {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}
        self.state.tensors["seen"] = [torch.from_numpy(hashes) for hashes in (self.seen.contents, self.seen.groups)]
        if self.average is not None:
            self.state.tensors["average"] = self.average.state_dict()

    def restore(self, state: RunState) -> None:
        """Go on where a state was taken."""
        self.state = state
        self.objective.load_state_dict(state.tensors["model"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state.tensors[name])
        self.seen = SeenImages(*(hashes.numpy() for hashes in state.tensors["seen"]))
        if self.average is not None:
            self.average.load_state_dict(state.tensors["average"])

    def finished(self) -> bool:
        """Whether the schedule, the time or the patience has run out."""
        settings, state = self.settings, self.state
        idle = state.epoch - state.best_epoch if state.best_epoch else 0  # none: no epoch could be judged
        if settings.max_minutes is None and settings.patience and idle >= settings.patience:
            return True
        return self.progress(state.seconds) >= 1


def restorable(state: RunState) -> bool:
    """Whether a state is as `Run.capture` leaves it; earlier versions had one group of parameters and no record."""
    return "seen" in state.tensors and len(state.tensors["optimiser"]["param_groups"]) == PARAMETER_GROUPS


def block_matrices(objective: Objective) -> list[nn.Parameter]:
    """The matrices of the backbone's blocks, which are what Muon is for; embeddings and last layers are not."""
    blocks: Any = getattr(objective.backbone, "blocks")  # noqa: B009 - of vision transformers, which all are
    return [parameter for parameter in blocks.parameters() if parameter.ndim == 2]


def stem_weights(objective: Objective) -> list[nn.Parameter]:
    """What learns of a network of timm that is the stem; nothing where none is."""
    if not is_network(objective.settings.timm_args.get("stem")):
        return []
    network: Any = objective.backbone.get_submodule("patch_embed.proj")
    layers = network[:-1]  # the last makes tokens, and is new
    return [weight for weight in layers.parameters() if weight.requires_grad]


def parameter_groups(
    objective: Objective, weight_decay: float, *, without: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not, told apart as by timm's optimiser factory, which the reference uses.

    Biases, norms and what the backbone names itself (class token, position embedding) do not decay; those that another
    optimiser moves are left out.
    """
    elsewhere = set(map(id, without))
    backbone: Any = objective.backbone
    exempt = {f"backbone.{name}" for name in backbone.no_weight_decay()}
    decaying: list[nn.Parameter] = []
    constant: list[nn.Parameter] = []
    for name, parameter in objective.named_parameters():
        if id(parameter) in elsewhere:
            continue
        (constant if parameter.ndim < 2 or name in exempt else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": constant, "weight_decay": 0.0}]
