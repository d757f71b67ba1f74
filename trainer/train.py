"""Training of the embedding: data in, checkpoint out."""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainer.augmentations import Augmenter, Pixels
from trainer.batches import Pairs, Pictures, RecordBatches, collate
from trainer.datasets import read_dataset, role
from trainer.embedder import CheckpointConfig, CheckpointError, build_backbone, pick_device, read_config
from trainer.loss import derangement
from trainer.objective import Objective, Slices, plain_attention
from trainer.probe import Probe
from trainer.recipe import FitError, FitSettings, learning_rate
from trainer.release import release
from trainer.state import SUMMARY_FILE, EpochSummary, RunState, state_folder, write_summary
from trainer.views import Views

EPOCH_STEPS = 1700
"""Updates of an epoch at D3's scale (the reference code's)."""

Batch = tuple[Tensor, Tensor, list[str]]
Advance = Callable[[float, int, float], None]
"""Told about each update: share of the schedule done, updates done, loss."""


def epoch_steps(settings: FitSettings, records: int, processes: int = 1) -> int:
    """Updates per epoch: as set, else 1,700, or as many as show each real image four times where that is fewer."""
    few = math.ceil(4 * records / (settings.batch_size * processes))
    return settings.epoch_steps or min(EPOCH_STEPS, max(10, few))


@dataclass(slots=True)
class Processes:
    """This process among those that `torchrun` started; alone without it."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device: str) -> Processes:
        """Join the group that the environment describes."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def agree(self, value: float) -> float:
        """The first process's value, so that all take the same decision."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        shared = shared.cuda() if dist.get_backend() == "nccl" else shared
        dist.broadcast(shared, 0)
        return float(shared[0])


def read_roles(settings: FitSettings) -> dict[str, Pictures]:
    """The images of the data set by role, decoded as far as memory allows.

    Raises:
        FitError: There are not at least two real and two generated training images.
    """
    roles = {name: Pictures([], settings.preprocessing) for name in ("training", "calibration", "validation")}
    for entry in read_dataset(settings.data, split=settings.split):
        roles[role(entry.group)].entries.append(entry)
    budget = settings.cache_bytes
    for pictures in roles.values():
        budget -= pictures.keep(budget)
    labels = roles["training"].labels
    if (labels == 0).sum() < 2 or (labels == 1).sum() < 2:
        raise FitError(
            f"{settings.data} has {(labels == 0).sum()} real and {(labels == 1).sum()} generated training images "
            f"(split {settings.split or 'any'}); at least 2 of each are needed: add images or change --split"
        )
    return roles


def make_objective(settings: FitSettings, device: str) -> tuple[Objective, CheckpointConfig]:
    """Backbone and loss with weights drawn from the seed (or timm's), and the configuration of the checkpoint."""
    torch.manual_seed(settings.seed)
    args = dict(settings.architecture_args)
    config = CheckpointConfig(
        name=settings.name,
        architecture=settings.architecture,
        image_size=settings.image_size,
        dim=int(args.get("embed_dim", 0)),
        preprocess=settings.preprocessing,
        architecture_args=args,
        training=settings.record(),
        provenance={"code": "lineup trainer fit", "data": str(settings.data), "split": settings.split},
    )
    import timm

    if not config.dim:
        bare = timm.create_model(settings.architecture, pretrained=False, num_classes=0, **args)
        config = replace(config, dim=int(bare.get_parameter("cls_token").shape[-1]))
        torch.manual_seed(settings.seed)
    backbone = build_backbone(config)
    if settings.pretrained:
        official = timm.create_model(settings.architecture, pretrained=True, num_classes=0, **args)
        backbone.load_state_dict(official.state_dict())
    if device == "cpu":
        plain_attention(backbone)
    return Objective(backbone, config.dim, settings).to(device), config


@dataclass(slots=True)
class Run:
    """One training run in one process."""

    settings: FitSettings
    processes: Processes
    device: str
    objective: Objective
    loader: Callable[[int], Iterator[Batch]]
    """The batches of an epoch."""
    steps: int
    """Updates per epoch."""
    window: float = math.inf
    """Seconds of training that `max_minutes` leaves."""
    state: RunState = field(init=False)
    model: nn.Module = field(init=False)
    optimiser: torch.optim.AdamW = field(init=False)
    average: Objective | None = field(init=False, default=None)
    slices: Slices | None = field(init=False, default=None)
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.settings
        self.state = RunState(settings.record())
        self.model = nn.parallel.DistributedDataParallel(self.objective) if self.processes.world > 1 else self.objective
        self.optimiser = torch.optim.AdamW(
            self.objective.parameters(), lr=1e-6, weight_decay=settings.weight_decay, fused=True
        )
        if self.device == "cpu" and self.processes.world == 1:
            self.slices = Slices(self.objective, min(os.cpu_count() or 1, settings.batch_size))
        if settings.ema:
            self.average = copy.deepcopy(self.objective).requires_grad_(False)

    @property
    def kept(self) -> Objective:
        """The weights that are judged and kept: the average where there is one."""
        return self.average or self.objective

    def progress(self, seconds: float) -> float:
        """Share of the schedule that is done, 0..1."""
        done = self.state.updates / (self.settings.epochs * self.steps)
        return min(1.0, self.processes.agree(max(done, seconds / self.window)))

    def step(self, batch: Batch, order: torch.Generator, rate: float) -> float:
        """One update; returns the loss."""
        whole, local, failed = batch
        self.unreadable.update({uri: reason for uri, _, reason in (line.partition("\t") for line in failed)})
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        whole, local = (views.to(self.device, non_blocking=True) for views in (whole, local))
        other = derangement(len(whole), order).to(self.device)
        if self.slices is not None:
            loss = self.slices(whole, local, other)
        else:
            loss = self.model(whole, local, other)
            torch.autograd.backward(loss)
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.settings.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average is not None:
            decay = min(self.settings.ema, (1 + self.state.updates) / (10 + self.state.updates))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.objective.parameters()), 1 - decay)
        self.state.updates += 1
        return float(loss.detach())

    def epoch(self, advance: Advance) -> dict[str, float]:
        """Train until the end of the epoch or of the time, and return what the summary needs."""
        settings, state = self.settings, self.state
        seed = np.random.SeedSequence((settings.seed, state.epoch, self.processes.rank)).generate_state(1, np.uint64)[0]
        order = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
        begin, used, losses, rate, progress = time.monotonic(), state.seconds, [], 0.0, 0.0
        self.model.train()
        for batch in self.loader(state.epoch):
            progress = self.progress(used + time.monotonic() - begin)
            if progress >= 1:
                break
            rate = learning_rate(settings, progress, self.processes.world)
            losses.append(self.step(batch, order, rate))
            if not math.isfinite(losses[-1]):
                raise FitError(f"the loss became {losses[-1]} at update {state.updates}: lower --learning-rate")
            advance(progress, state.updates, losses[-1])
        elapsed = time.monotonic() - begin
        state.seconds = used + elapsed
        state.epoch += 1
        return {
            "progress": progress,
            "learning_rate": rate,
            "loss": float(np.mean(losses)) if losses else math.nan,
            "records_per_second": len(losses) * settings.batch_size * self.processes.world / max(elapsed, 1e-9),
        }

    def embed(self, pixels: Pixels, block: int = 64) -> np.ndarray:
        """Embeddings (n, d) of pixels (n, s, s, 3), uint8, by the weights that are kept."""
        self.kept.eval()

        def embed(start: int) -> np.ndarray:
            with torch.inference_mode():
                views = torch.from_numpy(pixels[start : start + block]).to(self.device)
                return self.kept.embed(views).cpu().numpy()

        with ThreadPoolExecutor(self.slices.threads if self.slices else 1) as pool:
            return np.concatenate(list(pool.map(embed, range(0, len(pixels), block))))  # (n, d)

    def capture(self) -> None:
        """Put the tensors into the state."""
        self.state.tensors |= {"model": self.objective.state_dict(), "optimiser": self.optimiser.state_dict()}
        if self.average is not None:
            self.state.tensors["average"] = self.average.state_dict()

    def restore(self, state: RunState) -> None:
        """Go on where a state was taken."""
        self.state = state
        self.objective.load_state_dict(state.tensors["model"])
        self.optimiser.load_state_dict(state.tensors["optimiser"])
        if self.average is not None:
            self.average.load_state_dict(state.tensors["average"])

    def finished(self) -> bool:
        """Whether the schedule, the time or the patience has run out."""
        settings, state = self.settings, self.state
        if settings.max_minutes is None and settings.patience and state.epoch - state.best_epoch >= settings.patience:
            return True
        return self.progress(state.seconds) >= 1


def loader_of(
    settings: FitSettings, pictures: Pictures, views: Views, processes: Processes, device: str, steps: int
) -> Callable[[int], Iterator[Batch]]:
    """Batches of an epoch from worker processes that live as long as the run."""
    cores = os.cpu_count() or 1
    workers = settings.workers
    if workers is None:
        workers = max(1, cores // 2 if device == "cpu" else cores // processes.world - 1)
    cv2.setNumThreads(0)  # here, not in the workers: a forked process waits for ever for OpenCV's pool of threads
    batches = _Epochs(RecordBatches(0, steps, settings.batch_size, processes.rank, processes.world))
    loader: DataLoader[Any] = DataLoader(
        Pairs(pictures, views, settings.seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers else None,
        pin_memory=device.startswith("cuda"),
    )

    def epoch(number: int) -> Iterator[Batch]:
        batches.current = replace(batches.current, epoch=number)
        return iter(loader)

    return epoch


@dataclass(slots=True)
class _Epochs:
    """A batch sampler whose epoch changes while the workers live on."""

    current: RecordBatches

    def __len__(self) -> int:
        return len(self.current)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.current)


def fit(
    settings: FitSettings,
    *,
    overwrite: bool = False,
    show: Callable[[], AbstractContextManager[Advance]] = lambda: nullcontext(lambda *_: None),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train, resume or reuse: afterwards `settings.output` holds a checkpoint of these settings.

    Args:
        settings: What to train.
        overwrite: Replace a checkpoint or a state of other settings, and train anew.
        show: Gives a progress display.
        say: Told about epochs in one line each.

    Returns:
        The metrics of the checkpoint, and whether it was `reused`.

    Raises:
        FitError: The data or the output folder do not allow it.
    """
    begin = time.monotonic()
    folder = state_folder(settings.output)
    device = pick_device(settings.device)
    processes = Processes.join(device)
    if not overwrite and (metrics := finished_checkpoint(settings)) is not None:
        return metrics | {"reused": True}
    state = None if overwrite else RunState.load(folder)
    if state is not None and (differs := differences(state.settings, settings.record())):
        raise FitError(f"{folder} holds an unfinished run of other settings ({differs}): finish it, or use --overwrite")
    roles = read_roles(settings)
    views = Views(
        settings.preprocessing,
        settings.local,
        Augmenter(settings.image_size, settings.augmentations),
        settings.scale,
        settings.recompress,
    )
    steps = epoch_steps(settings, len(Pairs(roles["training"], views, 0)), processes.world)
    objective, config = make_objective(settings, device)
    run = Run(
        settings,
        processes,
        device,
        objective,
        loader_of(settings, roles["training"], views, processes, device, steps),
        steps,
    )
    if state is not None:
        run.restore(state)
        say(f"resuming after epoch {state.epoch}, {state.updates} updates")
    probe = Probe.of(roles["training"], roles["validation"], views, settings.seed)
    deadline = begin + 60 * (settings.max_minutes or math.inf)
    if settings.max_minutes is not None:
        run.window = run.state.seconds + deadline - time.monotonic() - finishing_seconds(run, probe, roles)
    with show() as advance:
        while not run.finished():
            summary = run.epoch(advance)
            started = time.monotonic()
            accuracy, auroc = probe.score(run.embed) if processes.rank == 0 else (math.nan, math.nan)
            accuracy = processes.agree(accuracy)
            run.state.seconds += time.monotonic() - started
            line = EpochSummary(
                epoch=run.state.epoch,
                updates=run.state.updates,
                seconds=run.state.seconds,
                accuracy=accuracy,
                auroc=auroc,
                **summary,
            )
            if run.state.add(line) and settings.max_minutes is None:
                run.state.tensors["best"] = {key: value.clone() for key, value in run.kept.state_dict().items()}
            say(
                f"epoch {line.epoch}: loss {line.loss:.3f}, accuracy {accuracy:.3f}, AUROC {auroc:.3f}, "
                f"{line.records_per_second:.1f} records/s, {100 * line.progress:.0f} %"
            )
            if processes.rank == 0:
                run.capture()
                run.state.save(folder)
    weights = run.state.tensors.get("best") or run.kept.state_dict()
    weights = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    metrics = {}
    if processes.rank == 0:
        report = {
            "updates": run.state.updates,
            "epochs": run.state.epoch,
            "seconds": run.state.seconds,
            "unreadable": len(run.unreadable),
        }
        metrics = release(
            settings.output,
            weights,
            config,
            roles,
            views,
            seed=settings.seed,
            head_images=settings.head_images,
            device=device,
            deadline=deadline - 3,
            report=report | {"history": run.state.history},
        )
        write_summary(settings.output / SUMMARY_FILE, run.state.history)
        shutil.rmtree(folder, ignore_errors=True)
    if processes.world > 1:
        dist.barrier()
    return metrics | {"reused": False}


def finishing_seconds(run: Run, probe: Probe, roles: dict[str, Pictures]) -> float:
    """Time to keep for the last look at validation images and for heads on three views of each training image.

    At most a third of all time.
    """
    sample = probe.training[:128]
    started = time.monotonic()
    run.embed(sample)
    per_view = (time.monotonic() - started) / len(sample)
    images = (
        min(3 * len(roles["training"]), run.settings.head_images) + len(roles["calibration"]) + len(roles["validation"])
    )
    float32 = 3  # the heads' embeddings are not made in bf16, and take so many times as long
    return min(6 + per_view * (len(probe) + float32 * images), 20 * (run.settings.max_minutes or math.inf))


def finished_checkpoint(settings: FitSettings) -> dict[str, Any] | None:
    """The metrics of a checkpoint of these settings at the output folder, or None where there is no checkpoint.

    Raises:
        FitError: There is one of other settings.
    """
    import json

    if not settings.output.exists():
        return None
    if settings.output.is_dir() and not any(settings.output.iterdir()):
        return None
    try:
        config = read_config(settings.output)
    except CheckpointError as error:
        raise FitError(f"{settings.output} exists and is no checkpoint ({error}): choose another --output") from error
    if differs := differences(config.training, settings.record()):
        raise FitError(
            f"{settings.output} holds a checkpoint trained with other settings ({differs}): "
            "choose another --output, or use --overwrite"
        )
    path = settings.output / "metrics.json"
    metrics: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return metrics


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings that differ, in words; empty where none does."""
    changed = [key for key in sorted(set(old) | set(new)) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed)
