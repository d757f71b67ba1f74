"""The benchmark of a GPU, in the small form that it has on a CPU."""

from itertools import chain, repeat

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.search import built, embeddings


def test_the_small_form_prints_each_table(capsys: pytest.CaptureFixture[str]) -> None:
    targets = gpu.main(device="cpu")
    assert [(target.wanted, target.figure > 0) for target in targets] == [(8_000, True), (1.5, True)]
    text = capsys.readouterr().out
    for row in ("| embedding alone |", "| decoding alone |", "| decode and embed |", "| lineup |", "| reference |"):
        assert text.count(row) == 1
    assert text.count("| 1,000 | ") == text.count("| 100.00% |") == len(gpu.SMALL.queries), "the CPU beside itself"
    assert all(remark in text for remark in ("What bounds is", "not reported", "beside itself"))


def test_other_neighbours_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    references, half = built(200)[0], built(200)[0]
    half.remove(np.arange(0, 200, 2))
    assert gpu.compare(references, half, embeddings(8, 2), gpu.SMALL) == pytest.approx(0.5, abs=0.2)
    assert "%" in capsys.readouterr().out


def test_a_driver_that_does_not_tell_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        """As NVML's package raises, a plain exception."""

    def utilization() -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    assert gpu.busy(lambda: None) is None


def test_a_gpu_is_as_busy_as_its_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told = chain([0], repeat(0, gpu.IDLE_SAMPLES), [60, 100], repeat(80))
    monkeypatch.setattr(torch.cuda, "utilization", lambda: next(told))
    monkeypatch.setattr(gpu, "SAMPLES", gpu.IDLE_SAMPLES + 2)
    monkeypatch.setattr(gpu, "SAMPLE_SECONDS", 0.001)
    assert gpu.busy(lambda: None) == 80
