"""Scalars of a training run for TensorBoard."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from trainer.fit.state import EpochSummary

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVERY = 10
"""Updates between two points of the loss."""


class Scalars:
    """Writes event files into a folder, or does nothing where there is none."""

    def __init__(self, folder: Path | None) -> None:
        self.writer: SummaryWriter | None = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder)

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def update(self, progress: float, updates: int, loss: float, speed: float) -> None:
        """One update; every tenth is written."""
        if self.writer is not None and updates % EVERY == 0:
            self.writer.add_scalar("loss", loss, updates)
            self.writer.add_scalar("records_per_second", speed, updates)

    def epoch(self, summary: EpochSummary) -> None:
        """What `summary.csv` says of an epoch."""
        if self.writer is not None:
            for name, value in asdict(summary).items():
                if name not in ("epoch", "updates"):
                    self.writer.add_scalar(f"epoch/{name}", value, summary.updates)
