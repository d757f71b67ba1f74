"""Shards as a stream of records: real files of D3's form, broken ones among them."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import small_image
from PIL import Image
from tiny import tiny_settings
from torch.utils.data import DataLoader

from trainer.data.datasets import read_dataset
from trainer.data.entry import default_split, role
from trainer.fit.batches import Sample, collate
from trainer.fit.fit_settings import FitError
from trainer.fit.image_roles import shard_paths
from trainer.fit.run import Run
from trainer.fit.state import state_folder
from trainer.fit.stream import ShardRecords, is_image_member
from trainer.fit.train import fit
from trainer.images import Preprocess
from trainer.model.checkpoint import read_weights
from trainer.model.seen_images import SeenImages
from trainer.views.augmentations import Augmenter
from trainer.views.views import Views

RECORDS = 24


def jpeg_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shard(path: Path, first: int, count: int, broken: tuple[str, ...] = ()) -> None:
    """Records of one real image and two fakes."""
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + count):
            name = f"elsa__train__{number:04d}"
            for place, kind in enumerate(("real", "gen_0", "gen_1")):
                data = jpeg_bytes(small_image(number * 7 + place, kind != "real"))
                data = data[:50] if f"{number}.{kind}" in broken else data
                info = tarfile.TarInfo(f"{name}.{kind}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(f"{name}.caption.txt")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"cat"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write_shard(folder / f"{number}.tar", number * RECORDS // 3, RECORDS // 3)
    return folder


def records(folder: Path, *, seed: int = 0, epoch: int = 0, rank: int = 0) -> ShardRecords:
    views = Views(Preprocess("center_crop", 32), local_size=16, augmenter=Augmenter(32, most=0))
    return ShardRecords(shard_paths(folder), views, seed=seed, epoch=epoch, rank=rank)


def first(stream: Iterator[Sample], count: int = 60) -> list[bytes]:
    return [whole.tobytes() for whole, _, _, _ in islice(stream, count)]


def test_shards_are_found(shards: Path, tmp_path: Path) -> None:
    assert [path.name for path in shard_paths(shards)] == ["0.tar", "1.tar", "2.tar"]
    assert shard_paths(shards / "1.tar") == [shards / "1.tar"]
    assert shard_paths(tmp_path) == shard_paths(tmp_path / "nothing") == []


def test_only_images_are_read() -> None:
    assert is_image_member("folder/elsa__1.real.jpg")
    assert is_image_member("elsa__1.gen_3.PNG")
    assert not is_image_member("elsa__1.caption.txt")
    assert not is_image_member("elsa__1.generous.jpg")


def test_the_stream_has_the_eight_views_of_training_records_alone(shards: Path) -> None:
    plain = {entry.uri: entry for entry in read_dataset(shards, split="train")}
    crops = {}
    stream = records(shards)
    for entry in plain.values():
        image = Image.open(io.BytesIO(entry.read()))
        crops[np.asarray(stream.views.preprocess.crop(image)).tobytes()] = entry
    seen: Counter[str] = Counter()
    for whole, local, failed, origins in islice(iter(stream), 200):
        assert (whole.shape, local.shape, failed) == ((3, 2, 32, 32, 3), (2, 16, 16, 3), [])
        real, fake = (crops[view.tobytes()] for view in whole[0])
        assert (real.label, fake.label) == (0, 1)
        assert real.group == fake.group
        assert (role(real.group), default_split(real.group)) == ("training", "train")
        assert origins == [(sha256(one.read()).hexdigest(), one.group, one.generator or "") for one in (real, fake)]
        seen[real.group] += 1
        seen[fake.generator or ""] += 1
    groups = {entry.group for entry in plain.values() if role(entry.group) == "training"}
    assert groups == seen.keys() & groups
    assert min(seen["DF-IF"], seen["SD-1.4"]) > 60


def test_the_stream_follows_from_seed_epoch_and_rank(shards: Path) -> None:
    one = first(iter(records(shards)))
    assert one == first(iter(records(shards)))
    for other in (records(shards, seed=1), records(shards, epoch=1), records(shards, rank=1)):
        assert one != first(iter(other))


def test_workers_stream_apart_even_where_they_are_more_than_the_shards(shards: Path) -> None:
    loader = DataLoader(records(shards / "0.tar"), batch_size=4, num_workers=2, collate_fn=collate)
    batches = [whole.numpy().tobytes() for whole, _, _, _ in islice(loader, 4)]
    assert len(set(batches)) == 4
    again = [whole.numpy().tobytes() for whole, _, _, _ in islice(loader, 4)]
    assert batches == again


def test_broken_images_and_shards_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", 0, 8, broken=("1.real", "2.gen_0", "2.gen_1", "3.real", "4.real", "5.real"))
    write_shard(tmp_path / "1.tar", 8, 8)
    cut = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "2.tar").write_bytes(b"no tar at all" * 100)
    failed = [line for _, _, lines, _ in islice(iter(records(tmp_path)), 300) for line in lines]
    assert any("0.tar#elsa__train__" in line for line in failed)
    assert any("ReadError" in line for line in failed)


def test_a_stream_without_use_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.fit.stream.MOST_USELESS", 200)
    broken = tuple(f"{number}.real" for number in range(4))
    write_shard(tmp_path / "0.tar", 0, 4, broken)
    with pytest.raises(FitError, match="200 records in a row"):
        next(iter(records(tmp_path)))


def test_what_was_streamed_is_remembered_over_epochs(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entries listed for the heads are but a few of what is streamed."""
    monkeypatch.setattr("trainer.fit.stream.SHUFFLE", 1)
    settings = replace(tiny_settings(shards, tmp_path / "one"), head_images=4, epochs=3)
    state, capture = [], Run.capture

    def stop_once(self: Run) -> None:
        capture(self)
        state.append(set(self.seen.contents.tolist()))
        self.state.save(state_folder(settings.output))
        if len(state) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "capture", stop_once)
    with pytest.raises(KeyboardInterrupt):
        fit(settings)
    fit(settings)
    first, *_, last = state
    assert len(first) > 4
    assert first < last <= set(SeenImages.load(settings.output).contents.tolist())


def test_fit_trains_on_shards_and_resumes_nothing_when_finished(shards: Path, tmp_path: Path) -> None:
    settings = replace(tiny_settings(shards, tmp_path / "one"), epochs=1, positives="generator", cached_batch=6)
    with pytest.raises(FitError, match="leave out --balance and --paired"):
        fit(replace(settings, balance=True))
    metrics = fit(settings)
    assert sum(metrics["images"]["training"].values()) >= RECORDS
    assert metrics["training"]["updates"] == 3
    assert fit(settings)["reused"]
    fit(replace(settings, output=tmp_path / "two"))
    seen = SeenImages.load(tmp_path / "one")
    for entry in read_dataset(shards):
        known = seen.holds(sha256(entry.read()).hexdigest()), seen.names(entry.group)
        assert set(known) == {default_split(entry.group) == "train"}
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    assert all(np.array_equal(one[name], two[name]) for name in one)
