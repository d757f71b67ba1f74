"""Processes that train together, and what runs on each of several nodes."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import pytest
import timm  # noqa: F401 - once, before processes are forked; so torch._dynamo
import torch
import torch._dynamo
import torch.distributed as dist

from trainer.fit import train
from trainer.fit.checkpoint_writer import write_checkpoint
from trainer.fit.fit_settings import FitSettings
from trainer.fit.run import Run

Launch = Callable[[Callable[..., None], Sequence[tuple[Any, ...]]], list[int | None]]


@contextmanager
def launcher() -> Iterator[Launch]:
    """Calls a function in a process for each of its arguments, with a rank and a port first; gives the exit codes.

    They are forked from a process of their own, which has imported torch: in the server that forks the processes which
    decode, torch would count to the memory that these may take.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as parent:
        yield lambda work, arguments: parent.submit(_run, work, arguments).result()


def _run(work: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[int | None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    processes = [context.Process(target=work, args=(rank, port, *one)) for rank, one in enumerate(arguments)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def train_on_node(rank: int, port: int, settings: FitSettings, dies: bool) -> None:
    """Train as one of two nodes, and write beside the output what was said, the metrics and the weights.

    Args:
        rank: 0 or 1.
        port: Of the first node.
        settings: Those of the run, with this node's own output.
        dies: Whether the first node is killed after the first epoch.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    lines: list[str] = []

    class RecordedRun(Run):
        def finished(self) -> bool:
            torch.save(self.objective.state_dict(), settings.output.with_name("weights.pt"))
            finished = super().finished()
            if finished:  # from here on the other node waits for the first, longer than the back end allows
                dist.set_timeout(timedelta(seconds=0.5), dist.group.WORLD)
            return finished

    def write_slowly(*arguments: Any) -> dict[str, Any]:
        time.sleep(1)
        return write_checkpoint(*arguments)

    def say(line: str) -> None:
        lines.append(line)
        if dies and line.startswith("epoch 1"):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "Run", RecordedRun)
        patched.setattr(train, "write_checkpoint", write_slowly)
        metrics = train.fit(settings, say=say)
    settings.output.with_name("heard.json").write_text(json.dumps({"lines": lines, "metrics": metrics}))
