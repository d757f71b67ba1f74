"""The benchmark of adding, with few pictures and without its database."""

from pathlib import Path

import pytest

from benchmarks import adding
from trainer.data.datasets import read_dataset


def test_adding_is_held_to_what_the_cores_could_do(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = adding.make_shards(tmp_path / "shards", 20, (40, 30))
    assert len({entry.read() for entry in read_dataset(shards)}) == 20
    monkeypatch.setattr(adding, "add", lambda entries, _: 0.1 * len(entries))  # ten images a second
    targets = adding.main(data=shards, checkpoint=tiny_checkpoint, rounds=1)
    rows = dict(line.strip("| ").split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if " | " in line)
    assert rows["adding"] == "10"
    assert {"embedding alone", "decoding alone", "decode and embed", "read", "thumbnail", "embed"} < rows.keys()
    stages = ("read", "decode, with facts and hash", "thumbnail", "fingerprint", "preprocess", "embed")
    seconds = sum(float(rows[stage]) for stage in stages) / 1e3
    assert targets[0].figure == pytest.approx(10 * seconds / adding.CORES, rel=0.1)
    assert [target.wanted for target in targets] == [0.95, 0.85]
