"""The state of an unfinished training run, in a folder beside the checkpoint it will become."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch

from trainer.files import write_atomically
from trainer.fit.fit_settings import FitError

STATE_FILE = "last.pt"
SUMMARY_FILE = "summary.csv"


def state_folder(output: Path) -> Path:
    """Where the state of the run lies that will write this checkpoint folder."""
    return output.with_name(output.name + ".state")


@dataclass(frozen=True, slots=True)
class EpochSummary:
    """One line of `summary.csv`."""

    epoch: int
    updates: int
    seconds: float
    """Training time since the first start."""
    progress: float
    """Share of the schedule done, 0..1."""
    learning_rate: float
    loss: float
    """Mean over the epoch, in nats."""
    records_per_second: float
    accuracy: float
    """Balanced accuracy of a linear head on validation images, 0..1; NaN without any."""
    auroc: float


@dataclass(slots=True)
class RunState:
    """Everything that a run needs to go on after an epoch as if it had never stopped."""

    settings: dict[str, Any]
    """`FitSettings.record()` of the run."""
    steps: int
    """Updates per epoch, fixed at the first start."""
    window: float = float("inf")
    """Seconds of training that `max_minutes` leaves, fixed at the first start."""
    epoch: int = 0
    """Epochs done."""
    updates: int = 0
    seconds: float = 0.0
    """Training time used."""
    judging: float = 0.0
    """Seconds that the last look at validation images took."""
    judged: float = 0.0
    """`seconds` after it."""
    best: float = float("-inf")
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    """State dicts of model, optimiser, average and best weights, and the record of images seen."""

    def save(self, folder: Path) -> None:
        """Write `last.pt` and `summary.csv`, each atomically."""
        buffer = io.BytesIO()
        torch.save({name: getattr(self, name) for name in self.__dataclass_fields__}, buffer)
        write_atomically(folder / STATE_FILE, buffer.getvalue())
        write_table(folder / SUMMARY_FILE, list(EpochSummary.__dataclass_fields__), self.history)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the state back, or None where there is none. Only tensors and plain values are ever unpickled.

        Raises:
            FitError: The file is broken.
        """
        path = folder / STATE_FILE
        if not path.is_file():
            return None
        try:
            return cls(**torch.load(path, map_location="cpu", weights_only=True))
        except (RuntimeError, OSError, EOFError, TypeError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FitError(f"{path} is broken ({reason}): start anew with --overwrite") from error

    def add(self, summary: EpochSummary) -> bool:
        """Record an epoch; whether it is the best so far (ties go to the later one)."""
        self.history.append(asdict(summary))
        better = summary.accuracy >= self.best
        if better:
            self.best, self.best_epoch = summary.accuracy, summary.epoch
        return better


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
