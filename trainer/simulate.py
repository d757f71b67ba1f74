"""Simulated photographs and simulated generators, for trying the whole of Lineup without any real data."""

from __future__ import annotations

from pathlib import Path

SEEN = ("sim-upconv", "sim-nearest", "sim-bilinear", "sim-latent")
UNSEEN = ("sim-spectral",)


class SimulationError(ValueError):
    """The output folder holds something else, or a setting is out of range."""


def simulate(
    output: Path, records: int, *, size: int = 192, seed: int = 42, workers: int | None = None, progress: bool = True
) -> dict[str, int]:
    """Write `records` simulated records and a manifest to `output`; nothing happens where they are there already.

    Returns:
        Images per split: `{"train": ..., "test": ..., "unseen": ...}`.
    """
    raise NotImplementedError
