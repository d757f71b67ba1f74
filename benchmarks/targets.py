"""What the benchmarks are held to: runs those of `make bench`, each in a process of its own, and ends with one table.

That of a GPU is run where there is one. A figure is the one that the benchmark has just printed, and the ratio is that
of the figure to its target.
"""

import importlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from trainer.model.embedder import has_cuda

BENCHMARKS = ("search", "training", "decoding", "serving", "adding")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure of this run, and what it is to be at least, or at most."""

    name: str
    figure: float
    wanted: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it is as it should be."""
        return self.figure <= self.wanted if self.at_most else self.figure >= self.wanted


def measured(benchmark: str) -> list[Target]:
    """What a benchmark, which prints its own tables, gives of its figures."""
    print(f"\n# {benchmark}\n", flush=True)
    targets: list[Target] = importlib.import_module(f"benchmarks.{benchmark}").main()
    return targets


def table(targets: Sequence[Target]) -> str:
    """All of them in Markdown."""
    rows = [
        f"| {one.name} | {'at most' if one.at_most else 'at least'} {one.wanted:g} | {one.figure:.4g} "
        f"| {one.figure / one.wanted:.2f} | {'met' if one.met else 'missed'} |"
        for one in targets
    ]
    return "\n".join(["| | target | figure | ratio | |", "|---|---:|---:|---:|---|", *rows])


def main() -> None:
    targets: list[Target] = []
    for benchmark in (*BENCHMARKS, "gpu") if has_cuda() else BENCHMARKS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            targets += pool.submit(measured, benchmark).result()
    print(f"\n# Targets\n\n{table(targets)}")


if __name__ == "__main__":
    main()
