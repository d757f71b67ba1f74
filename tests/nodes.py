"""What runs on each of several nodes that train together."""

import json
import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer.fit import train
from trainer.fit.checkpoint_writer import write_checkpoint
from trainer.fit.fit_settings import FitSettings
from trainer.fit.run import Run


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
