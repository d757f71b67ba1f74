"""Training of the embedding: data in, checkpoint out."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import torch
from torch.utils.data import DataLoader

from trainer.cores import usable_cores
from trainer.fit.batches import Batch, EpochSampler, Pairs, collate, joined
from trainer.fit.checkpoint_writer import write_checkpoint
from trainer.fit.fit_settings import FitError, FitSettings
from trainer.fit.image_roles import Pictures, Roles, read_roles, shard_paths
from trainer.fit.linear_probe import LinearProbe
from trainer.fit.objective import make_objective
from trainer.fit.run import Advance, Processes, Run, restorable
from trainer.fit.state import EpochSummary, RunState, state_folder
from trainer.fit.stream import ShardRecords
from trainer.model.checkpoint import CheckpointError, read_config
from trainer.model.embedder import pick_device
from trainer.model.model_card import read_metrics
from trainer.views.augmentations import Augmenter
from trainer.views.views import Views

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EPOCH_STEPS = 1700
"""Updates of an epoch at D3's scale (the reference code's)."""


def fit(
    settings: FitSettings,
    *,
    overwrite: bool = False,
    show: Callable[[], AbstractContextManager[Advance]] = lambda: nullcontext(lambda *_: None),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train, resume or reuse: afterwards `settings.output` holds a checkpoint of these settings.

    Of several processes the first alone reads and writes there, and tells the others how to begin: their nodes need
    not share a disk.

    Args:
        settings: What to train.
        overwrite: Replace a checkpoint or an unfinished run of whatever settings, and train anew.
        show: Gives a progress display.
        say: Told about epochs in one line each.

    Returns:
        The metrics of the checkpoint, and whether it was `reused`. Empty in all processes but the first.

    Raises:
        FitError: Data, settings or output folder do not allow it, or the loss diverged.
    """
    begin = time.monotonic()
    folder, device = state_folder(settings.output), pick_device(settings.device)
    processes = Processes.join(device)
    first = processes.rank == 0
    begun = processes.share(lambda: None if overwrite else finished_checkpoint(settings) or unfinished_run(settings))
    if isinstance(begun, dict):
        processes.leave()
        return (begun if first else {}) | {"reused": True}
    roles = read_roles(settings)
    views = Views(
        preprocess=settings.preprocessing,
        local_size=settings.local,
        augmenter=Augmenter(settings.image_size, settings.augmentations),
        scale=settings.scale,
        recompress=settings.recompress,
    )
    processes.wait()  # here, not in a step: a back end's own limit is for what takes equally long everywhere
    # As the first process counts them: the others may have failed to read an image.
    generators = processes.share(lambda: training_generators(roles["training"]))
    steps = processes.share(lambda: epoch_steps(settings, roles["training"], processes.world))
    objective, config = make_objective(settings, device, len(generators))
    run = Run(settings, processes, device, objective, steps, generators)
    if begun is not None:
        run.restore(begun)
        say(f"resuming after epoch {begun.epoch}, {begun.updates} updates")
    batches = epoch_batches(settings, roles["training"], views, run)
    probe = LinearProbe.of(roles, views, settings.seed)
    if objective.distillation is not None and begun is None:
        objective.distillation.measure(torch.from_numpy(probe.training.pixels))
    if first and not probe.usable:
        real, fake = (int((probe.validation.labels == label).sum()) // 2 for label in (0, 1))  # each is there twice
        say(
            f"{real} real and {fake} generated validation images: accuracy is not measured, --patience has no effect, "
            "and the last weights are kept"
        )
    deadline = math.inf
    if settings.max_minutes is not None:
        finishing = finishing_seconds(run, probe, roles)
        if run.state.window == math.inf:
            seconds_left = begin + 60 * settings.max_minutes - finishing - time.monotonic()
            run.state.window = max(seconds_left, 1e-3)  # too little for one update ends with what there is
        deadline = time.monotonic() + max(0.0, run.state.window - run.state.seconds) + finishing
    processes.wait()
    with (
        show() if first else nullcontext(lambda *_: None) as advance,
        closing(TensorBoard(settings.tensorboard if first else None)) as tensorboard,
    ):
        while not run.finished():
            summary = judge(run, probe, run.epoch(batches(run.state.epoch), (advance, tensorboard.update)))
            tensorboard.epoch(summary)
            if first:
                run.capture()
                run.state.save(folder)
                say(describe(summary))
        metrics = write_checkpoint(run, config, roles, deadline - 3) if first else {}
    processes.leave()
    return metrics | {"reused": False}


def finished_checkpoint(settings: FitSettings) -> dict[str, Any] | None:
    """The metrics of a checkpoint of these settings at the output folder, or None where there is none.

    Raises:
        FitError: There is something else.
        CheckpointError: Its metrics are damaged.
    """
    if not settings.output.exists() or (settings.output.is_dir() and not any(settings.output.iterdir())):
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
    return {"checkpoint": None, "validation": {}} | read_metrics(settings.output)


def unfinished_run(settings: FitSettings) -> RunState | None:
    """The state of an interrupted run of these settings, or None where there is none.

    Raises:
        FitError: It is of other settings, or of an earlier version.
    """
    folder = state_folder(settings.output)
    state = RunState.load(folder)
    if state is not None and not restorable(state):
        raise FitError(
            f"{folder} holds an unfinished run begun by an earlier version: finish it there, "
            "or start anew with --overwrite"
        )
    if state is None:
        return None
    begun = state.settings | {"half": settings.half}  # it changes what is written, not what is trained
    if differs := differences(begun, settings.record()):
        raise FitError(f"{folder} holds an unfinished run of other settings ({differs}): finish it, or use --overwrite")
    return state


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings that differ, in words; empty where none does. A setting that came later had its default then."""
    old = {field.name: field.default for field in fields(FitSettings) if field.name in new} | old
    changed = [key for key in sorted(set(old) | set(new)) if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed)


def training_generators(training: Pictures) -> list[str]:
    """The generators of training images, in order."""
    return sorted({entry.generator or "" for entry in training.entries if entry.label})


def epoch_steps(settings: FitSettings, training: Pictures, processes: int = 1) -> int:
    """Updates per epoch: as set, else 1,700, or as many as show each real image four times where that is fewer."""
    if settings.epoch_steps or shard_paths(settings.data):
        return settings.epoch_steps or EPOCH_STEPS
    real = int((training.labels == 0).sum())
    return min(EPOCH_STEPS, max(10, math.ceil(4 * real / (settings.records * processes))))


def epoch_batches(
    settings: FitSettings, training: Pictures, views: Views, run: Run
) -> Callable[[int], Iterator[Batch]]:
    """The batches of an epoch, made in worker processes: of pictures, or streamed where the data are shards.

    What a worker makes at a time is no more than a step holds: several updates of more would not fit in memory.
    """
    cores = usable_cores()
    share = cores // 2 if run.device == "cpu" else cores - 1
    workers = max(1, share // run.processes.local) if settings.workers is None else settings.workers
    rank, world = run.processes.rank, run.processes.world
    size = math.gcd(settings.records, settings.batch_size)
    parts = settings.records // size
    cv2.setNumThreads(0)  # here, not in the workers: a forked process waits for ever for OpenCV's pool of threads
    options: dict[str, Any] = {
        "num_workers": workers,
        "collate_fn": collate,
        "prefetch_factor": 2 if workers else None,
        "pin_memory": run.device.startswith("cuda"),
    }
    if paths := shard_paths(settings.data):
        if settings.balance or settings.paired:
            raise FitError(
                f"the shards of {settings.data} are streamed, and their records paired already: "
                "leave out --balance and --paired"
            )
        records = ShardRecords(paths, views, settings.seed, settings.split, rank)

        def stream(epoch: int) -> Iterator[Batch]:
            of_epoch = replace(records, epoch=epoch)
            return islice(joined(iter(DataLoader(of_epoch, batch_size=size, **options)), parts), run.state.steps)

        return stream
    sampler = EpochSampler(run.state.steps * parts, size, rank, world)
    loader: DataLoader[Any] = DataLoader(
        Pairs(training, views, settings.seed, settings.balance, settings.paired),
        batch_sampler=sampler,
        persistent_workers=workers > 0,
        **options,
    )

    def pairs(epoch: int) -> Iterator[Batch]:
        sampler.epoch = epoch
        return joined(iter(loader), parts)

    return pairs


def judge(run: Run, probe: LinearProbe, epoch: dict[str, float]) -> EpochSummary:
    """Look at validation images after an epoch, and put it into the history.

    Under a limit of time only where that takes less than a tenth of the training since the last look, or at the end.
    """
    state, started = run.state, time.monotonic()
    worth = run.settings.max_minutes is None or run.progress(state.seconds) >= 1
    accuracy = auroc = math.nan
    if worth or run.processes.agree(state.seconds - state.judged - 10 * state.judging) > 0:
        if run.processes.rank == 0:
            accuracy, auroc = probe.score(run.embed)
        accuracy = run.processes.agree(accuracy)
        state.judging = time.monotonic() - started
        state.seconds += state.judging
        state.judged = state.seconds
    summary = EpochSummary(
        epoch=state.epoch,
        updates=state.updates,
        seconds=state.seconds,
        progress=run.progress(state.seconds),  # after the look, whose time may have been the last
        accuracy=accuracy,
        auroc=auroc,
        **epoch,
    )
    if state.add(summary) and run.settings.max_minutes is None:
        run.keep_best()
    return summary


def describe(summary: EpochSummary) -> str:
    """An epoch in one line."""
    quality = "" if math.isnan(summary.accuracy) else f"accuracy {summary.accuracy:.3f}, AUROC {summary.auroc:.3f}, "
    speed = f"{summary.records_per_second:.1f} records/s"
    return f"epoch {summary.epoch}: loss {summary.loss:.3f}, {quality}{speed}, {100 * summary.progress:.0f} %"


def finishing_seconds(run: Run, probe: LinearProbe, roles: Roles) -> float:
    """Time to keep for the last look at validation images and for heads on three views of each training image.

    At most a third of all time.
    """
    settings = run.settings
    sample = probe.training.pixels[:128]
    started = time.monotonic()
    run.embed(sample)
    per_window = (time.monotonic() - started) / len(sample)
    images = min(3 * len(roles["training"]), settings.head_images)
    images += len(roles["calibration"]) + len(roles["validation"])
    windows = settings.windows * images
    # Heads embed by torch in float32 on a GPU; on a CPU by OpenVINO, which takes no longer than bf16 in training.
    slower = 1 if run.device == "cpu" else 3
    return min(6 + per_window * (len(probe) + slower * windows), 20 * (settings.max_minutes or math.inf))


class TensorBoard:
    """Writes a run's scalars into a folder of event files, or does nothing where there is none."""

    writer: "SummaryWriter | None" = None

    def __init__(self, folder: Path | None) -> None:
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder)

    def update(self, progress: float, updates: int, loss: float, speed: float) -> None:
        """One update; every tenth is written."""
        if self.writer is not None and updates % 10 == 0:
            self.writer.add_scalar("loss", loss, updates)
            self.writer.add_scalar("records_per_second", speed, updates)

    def epoch(self, summary: EpochSummary) -> None:
        """What `summary.csv` says of an epoch."""
        if self.writer is not None:
            for name in asdict(summary).keys() - {"epoch", "updates"}:
                self.writer.add_scalar(f"epoch/{name}", getattr(summary, name), summary.updates)

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()
