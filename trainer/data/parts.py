"""Disjoint parts of a data set, for workers that share it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import Self, TypeVar

from trainer.data.entry import DatasetError, Entry

Archive = TypeVar("Archive")


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """One of `count` parts, 1..count. Together they are the data set, and no image is in two of them.

    Whole archives are dealt by their order, so all must be there before the first worker begins.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str]) -> Self:
        """The part that a text names.

        Args:
            text: `I/N`; or `auto`, this task of a Slurm array or this pod of an indexed Kubernetes job.
            environment: Variables, where `auto` looks. Kubernetes does not say how many pods there are: the job's
                manifest repeats its `completions` as JOB_COMPLETIONS.

        Raises:
            DatasetError: It names none.
        """
        if text == "auto":
            text = _scheduled_part(environment)
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise DatasetError(f"part {text!r} is none; expected I/N with I from 1 to N, or auto: set --part to 1/8")
        return cls(int(match[1]), int(match[2]))

    def holds(self, entry: Entry) -> bool:
        """Whether an image is of this part: by a hash of its key, whatever else is in the data set."""
        digest = blake2b(b"lineup part" + entry.key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.number - 1

    def read(self, archives: Sequence[Archive], read: Callable[[Archive], Iterator[Entry]]) -> Iterator[Entry]:
        """The images of this part in archives: whole archives, or single images where there are too few of them.

        Args:
            archives: Of the data set, in an order that all parts agree on.
            read: Gives the images of one.
        """
        if len(archives) >= self.count:
            return chain.from_iterable(map(read, archives[self.number - 1 :: self.count]))
        return filter(self.holds, chain.from_iterable(map(read, archives)))


WHOLE = DatasetPart(1, 1)


def _scheduled_part(environment: Mapping[str, str]) -> str:
    """`I/N` of this process among those that a scheduler started."""
    try:
        if "SLURM_ARRAY_TASK_ID" in environment:
            task, first, step, count = (
                int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "STEP", "COUNT")
            )
            if count == 1 and task > 1:  # it would read all of the data
                raise DatasetError(
                    f"part auto: task {task} is alone in its array, as a repeated one: set --part to I/N"
                )
            return f"{(task - first) // step + 1}/{count}"
        return f"{int(environment['JOB_COMPLETION_INDEX']) + 1}/{int(environment['JOB_COMPLETIONS'])}"
    except DatasetError:
        raise
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise DatasetError(
            f"part auto: {error} is not set or no number; expected the variables of a Slurm array "
            "(SLURM_ARRAY_TASK_ID, _MIN, _STEP, _COUNT), or JOB_COMPLETION_INDEX and JOB_COMPLETIONS: set --part to I/N"
        ) from error
