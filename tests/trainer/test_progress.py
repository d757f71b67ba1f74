"""Progress of long work where there is no terminal to draw a bar on."""

import io
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from rich.console import Console

from indexer import terminal
from indexer.terminal import image_progress
from trainer import __main__ as trainer
from trainer import progress


@pytest.mark.parametrize(
    ("show", "advance", "line"),
    [
        (lambda: trainer.counting_bar("embedding"), (), "embedding: 1\n"),
        (trainer.training_bar, (0.25, 7, 5.5, 90.0), "update 7, loss 5.500, 90.0 records/s: 25 %\n"),
        (image_progress, (), "images: 1\n"),
        (lambda: image_progress(total=4000), (), "images: 1 of 4,000, 0 %\n"),
    ],
)
def test_a_plain_line_each_period(
    show: Callable[[], AbstractContextManager[Callable[..., None]]],
    advance: tuple[float, ...],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    for module in (trainer, terminal):
        monkeypatch.setattr(module, "console", Console(file=written, width=20))
    monkeypatch.setattr(progress, "PERIOD", 0.001)
    with show() as step:
        step(*advance)
        deadline = time.monotonic() + 60
        while line not in written.getvalue():
            assert time.monotonic() < deadline, written.getvalue()
            time.sleep(0.001)
    told = written.getvalue()
    assert set(told.splitlines(keepends=True)) - {line} <= {line.replace("1", "0"), "starting: 0 %\n"}
    assert "\x1b" not in told


def test_short_work_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(trainer, "console", Console(file=written))
    with trainer.counting_bar("embedding") as step:
        step()
    assert written.getvalue() == ""
