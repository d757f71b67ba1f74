"""Training end to end on a few small images: schedule, batches, resume, reuse, several processes."""

import importlib
import io
import json
import math
import shutil
import signal
from collections.abc import Sequence
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from nodes import launcher, train_on_node
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from tiny import TINY, tiny_command, tiny_settings
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.data.datasets import read_dataset
from trainer.data.entry import default_split, role
from trainer.fit.batches import Batch, EpochSampler, Pairs, Sample, collate
from trainer.fit.fit_heads import embed_for_heads, refit
from trainer.fit.fit_settings import FitError, FitSettings, learning_rate
from trainer.fit.image_roles import Pictures, read_roles
from trainer.fit.linear_probe import LinearProbe
from trainer.fit.objective import make_objective
from trainer.fit.run import Processes, Run
from trainer.fit.state import RunState, state_folder
from trainer.fit.train import epoch_batches, epoch_steps, finishing_seconds, fit, judge
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads
from trainer.images import Preprocess
from trainer.model.checkpoint import CheckpointError, read_config, read_id, read_weights
from trainer.model.embedder import Embedder
from trainer.model.seen_images import SeenImages
from trainer.views.augmentations import Augmenter
from trainer.views.views import Views


@pytest.fixture
def tiny(image_folder: Path, tmp_path: Path) -> FitSettings:
    return tiny_settings(image_folder, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def whole(
    image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FitSettings, dict[str, Any], list[str]]:
    """A finished run, its metrics and what it said."""
    settings = tiny_settings(image_folder, tmp_path_factory.mktemp("whole") / "checkpoint")
    lines: list[str] = []
    metrics = fit(settings, say=lines.append)
    return settings, metrics, lines


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = read_weights(one), read_weights(two)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_learning_rate_warms_up_and_ends_at_zero(tiny: FitSettings) -> None:
    settings = replace(tiny, batch_size=256, epochs=10, warmup_epochs=1)
    peak = 2e-3 * math.sqrt(256 / 1024)
    assert learning_rate(settings, 0.0) == pytest.approx(1e-6)
    assert learning_rate(settings, 0.05) == pytest.approx((1e-6 + peak) / 2)
    assert learning_rate(settings, 0.1) == pytest.approx(peak)
    assert learning_rate(settings, 0.55) == pytest.approx(peak / 2)
    assert learning_rate(settings, 1.0) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(settings, 0.1, processes=4) == pytest.approx(2e-3)
    assert learning_rate(replace(settings, cached_batch=1024), 0.1) == pytest.approx(2e-3)


def test_default_local_size_is_96_at_224_in_whole_patches(tiny: FitSettings) -> None:
    expected = {(224, None): 96, (112, None): 48, (64, None): 32, (112, 112): 112}
    for (size, local), pixels in expected.items():
        settings = FitSettings(data=tiny.data, output=tiny.output, image_size=size, local_size=local)
        assert settings.local == pixels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "train,test"}, "split test must not train"),
        ({"split": "unseen"}, "split unseen must not train"),
        ({"batch_size": 1}, "--batch-size to 2 or more"),
        ({"image_size": 33}, "change --image-size"),
        ({"local_size": 12}, "change --local-size"),
        ({"paired": 1.5}, r"--paired is 1\.5"),
        ({"proxies": -1.0}, r"--proxies -1\.0: neither may be below 0"),
        ({"cached_batch": 3}, "--cached-batch 3 is less than --batch-size 4"),
        ({"positives": "generator", "loss": "bce"}, "leave out --loss bce"),
        ({"max_minutes": 0.0}, "--max-minutes is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny: FitSettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        replace(tiny, **change)


def test_every_setting_that_is_an_option_is_in_the_help() -> None:
    shown = CliRunner().invoke(app, ["fit", "--help"], env={"COLUMNS": "200"}).stdout
    names = {field.name for field in fields(FitSettings)} - {"cache_bytes"}
    assert {"--overwrite", "--json", *(f"--{name.replace('_', '-')}" for name in names)} <= set(shown.split())
    assert "--cache-bytes" not in shown


def test_the_command_trains_by_its_options(tiny: FitSettings) -> None:
    command = tiny_command(tiny.data, tiny.output)
    done = CliRunner().invoke(app, [*command, "--loss", "bce"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["training"]["updates"] == 3
    recorded = read_config(tiny.output).training
    assert (recorded["loss"], recorded["seed"], recorded["architecture_args"]) == ("bce", 42, json.loads(TINY))
    assert CliRunner().invoke(app, [*command, "--loss", "none"]).exit_code == 2


def test_only_training_images_feed_the_loss(tiny: FitSettings) -> None:
    roles = read_roles(tiny)
    groups = {name: {entry.group for entry in pictures.entries} for name, pictures in roles.items()}
    assert sum(map(len, groups.values())) == len(list(read_dataset(tiny.data, split="train"))) < 120
    assert not groups["training"] & (groups["calibration"] | groups["validation"])
    pairs = Pairs(roles["training"], Views(preprocess=tiny.preprocessing, local_size=16), seed=0)
    places = {place for record in range(2000) for place in pairs.pair(0, record)[:2]}
    assert places == set(range(len(roles["training"])))


def test_without_a_split_only_the_training_split_is_read(tiny: FitSettings) -> None:
    splits = {entry.split for pictures in read_roles(tiny).values() for entry in pictures.entries}
    assert splits == {"train"}


def test_pairs_follow_from_seed_epoch_and_record(tiny: FitSettings) -> None:
    training = read_roles(tiny)["training"]
    views = Views(preprocess=tiny.preprocessing, local_size=16)
    one, same, other = Pairs(training, views, 0), Pairs(training, views, 0), Pairs(training, views, 1)
    np.testing.assert_array_equal(one[3, 5][0], same[3, 5][0])
    np.testing.assert_array_equal(one[3, 5][1], same[3, 5][1])
    for changed in (one[4, 5], one[3, 6], other[3, 5]):
        assert not np.array_equal(one[3, 5][0], changed[0])


def test_each_real_image_comes_once_per_turn_with_generators_drawn_alike(tiny: FitSettings) -> None:
    training = read_roles(tiny)["training"]
    of_b = [entry for entry in training.entries if entry.generator == "gen-b"]
    training = Pictures(
        [entry for entry in training.entries if entry.generator != "gen-b"] + of_b[:2], tiny.preprocessing
    )
    pairs = Pairs(training, Views(), seed=0)
    drawn = [pairs.pair(0, record) for record in range(len(pairs) * 10)]
    for turn in range(10):
        reals = [real for real, _, _ in drawn[turn * len(pairs) : (turn + 1) * len(pairs)]]
        assert sorted(reals) == pairs.reals.tolist()
    share = np.mean([training.entries[fake].generator == "gen-b" for _, fake, _ in drawn])
    assert 0.4 < share < 0.6  # two images of the one generator, dozens of the other


def test_balanced_pairs_follow_the_root_of_a_names_size_and_share_alike_by_group(tiny: FitSettings) -> None:
    training = read_roles(tiny)["training"]
    reals, fakes = ([entry for entry in training.entries if entry.label == label] for label in (0, 1))
    names = [*[("large", "one")] * 8, *[("large", "two")] * 1, *[("small", "three")]]
    entries = [replace(real, source=name, group=group) for real, (name, group) in zip(reals, names, strict=False)]
    entries += [replace(fake, generator=name, group=group) for fake, (name, group) in zip(fakes, names, strict=False)]
    pictures = Pictures(entries, tiny.preprocessing)
    pairs = Pairs(pictures, Views(), 0, balance=True)
    drawn = [pairs.pair(0, record) for record in range(3000)]
    expected = np.array([*[3 / 4 / 2 / 8] * 8, 3 / 4 / 2, 1 / 4])  # the roots of 9 and 1 are 3 and 1
    for label in (0, 1):
        share = np.bincount([pair[:2][label] - 10 * label for pair in drawn], minlength=10) / len(drawn)
        np.testing.assert_allclose(share, expected, atol=0.03)
    again = Pairs(pictures, Views(), 0, balance=True)
    assert [again.pair(0, record)[:2] for record in range(50)] == [pair[:2] for pair in drawn[:50]]
    assert [again.pair(1, record)[:2] for record in range(50)] != [pair[:2] for pair in drawn[:50]]


def test_a_paired_fake_is_of_the_real_images_group_where_one_is(tiny: FitSettings) -> None:
    training = read_roles(tiny)["training"]
    reals, fakes = ([entry for entry in training.entries if entry.label == label] for label in (0, 1))
    named = [replace(fake, group=real.group) for real, fake in zip(reals[:10], fakes[:10], strict=True)]
    pictures = Pictures([*reals, *named, *fakes[10:]], tiny.preprocessing)
    for chance in (0.0, 0.5, 1.0):
        pairs = Pairs(pictures, Views(), 0, paired=chance)
        drawn = [pairs.pair(0, record)[:2] for record in range(20 * len(reals))]
        paired = [fake == len(reals) + real for real, fake in drawn if real < 10]
        assert np.mean(paired) == pytest.approx(chance, abs=0.1)
        assert {fake for real, fake in drawn if real >= 10} == set(range(len(reals), len(pictures)))


def test_processes_share_the_records_of_an_epoch() -> None:
    whole = list(EpochSampler(steps=2, batch_size=4, epoch=7))
    parts = [list(EpochSampler(2, 2, rank, 2, epoch=7)) for rank in (0, 1)]
    assert whole == [one + two for one, two in zip(*parts, strict=True)]
    assert whole[1][0] == (7, 4)


@pytest.mark.parametrize(("part", "common"), [(3, 3), (4, 2)])
def test_updates_of_several_parts_are_read_part_by_part(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch, part: int, common: int
) -> None:
    """Else each worker would hold several updates of more records than fit in memory."""
    settings = replace(tiny, batch_size=6)
    views, training = Views(preprocess=tiny.preprocessing, local_size=tiny.local), read_roles(tiny)["training"]
    sizes: list[int] = []

    def counted(samples: Sequence[Sample]) -> Batch:
        sizes.append(len(samples))
        return collate(samples)

    monkeypatch.setattr("trainer.fit.train.collate", counted)
    epochs = []
    for form in (settings, replace(settings, batch_size=part, cached_batch=6)):
        run = Run(form, Processes(), "cpu", make_objective(form, "cpu")[0], 2)
        epochs.append(list(epoch_batches(form, training, views, run)(0)))
    assert sizes == [6, 6, *[common] * (12 // common)]
    for batch, expected in zip(*epochs, strict=True):
        assert torch.equal(batch[0], expected[0])
        assert torch.equal(batch[1], expected[1])
        assert batch[2:] == expected[2:]


def test_an_epoch_of_a_small_set_shows_each_real_image_four_times(tiny: FitSettings) -> None:
    training = read_roles(tiny)["training"]
    real = int((training.labels == 0).sum())
    assert epoch_steps(replace(tiny, epoch_steps=None), training) == math.ceil(4 * real / 4)
    assert epoch_steps(tiny, training) == 3


Whole = tuple[FitSettings, dict[str, Any], list[str]]


def test_fit_writes_a_checkpoint_that_embeds_and_has_heads(whole: Whole) -> None:
    settings, metrics, lines = whole
    assert not metrics["reused"]
    assert metrics["training"]["updates"] == 6
    assert len(lines) == 2
    embedder, heads = Embedder.load(settings.output, device="cpu"), Heads.load(settings.output)
    assert (embedder.id, heads.id, embedder.dim) == (metrics["checkpoint"], metrics["heads"], 48)
    assert set(metrics["validation"]) == {"linear", "svm", "nn1"}
    assert sum(sum(images.values()) for images in metrics["images"].values()) == len(
        list(read_dataset(settings.data, split="train"))
    )
    assert json.loads((settings.output / "metrics.json").read_text())["checkpoint"] == embedder.id
    card = (settings.output / "README.md").read_text()
    labels = [entry.label for entry in read_dataset(settings.data, split="train")]
    for row in ("| gen-a | ", f"| {settings.data.name} | {labels.count(0)} | {labels.count(1)} |  |  |"):
        assert row in card
    assert str(settings.data.parent) not in card  # where the images lie is no reader's business
    assert len((settings.output / "summary.csv").read_text().splitlines()) == 3
    assert [path.name for path in settings.output.parent.iterdir()] == ["checkpoint"]


def test_a_checkpoint_remembers_what_it_saw(whole: Whole) -> None:
    seen, settings = SeenImages.load(whole[0].output), whole[0]
    assert seen.complete
    for entry in read_dataset(settings.data):
        known = seen.holds(sha256(entry.read()).hexdigest()), seen.names(entry.group)
        assert set(known) == {default_split(entry.group) == "train"}


def test_fitting_the_heads_again_gives_the_same(whole: Whole, tmp_path: Path) -> None:
    settings, metrics, _ = whole
    again = shutil.copytree(settings.output, tmp_path / "again")
    training = len(read_roles(settings)["training"])
    refit(again, settings.data, images=settings.head_images, views=settings.head_images // training, device="cpu")
    assert Heads.load(again).id == metrics["heads"]
    for name in ("calibration", "seen"):
        assert (again / f"{name}.safetensors").read_bytes() == (settings.output / f"{name}.safetensors").read_bytes()


def test_a_second_run_changes_nothing_and_other_settings_are_refused(whole: Whole) -> None:
    settings = whole[0]
    before = {path.name: path.stat().st_mtime_ns for path in settings.output.iterdir()}
    assert fit(settings)["reused"]
    with pytest.raises(FitError, match=r"other settings \(seed 42 -> 1\)"):
        fit(replace(settings, seed=1))
    with pytest.raises(FitError, match=r"other settings \(architecture_args .*'depth': 2.* -> .*'depth': 1"):
        fit(replace(settings, architecture_args=TINY.replace('"depth": 2', '"depth": 1')))
    assert {path.name: path.stat().st_mtime_ns for path in settings.output.iterdir()} == before


def test_a_folder_that_is_no_checkpoint_is_left_alone(tiny: FitSettings) -> None:
    tiny.output.mkdir()
    (tiny.output / "notes.txt").write_text("mine")
    with pytest.raises(FitError, match="is no checkpoint"):
        fit(tiny)
    assert (tiny.output / "notes.txt").read_text() == "mine"


def test_resume_gives_the_weights_of_an_uninterrupted_run(
    tiny: FitSettings, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = RunState.save, []

    def save_then_stop(self: RunState, folder: Path) -> None:
        save(self, folder)
        saved.append(self.epoch)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunState, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny)
    assert not tiny.output.exists()
    with pytest.raises(FitError, match=r"unfinished run of other settings \(batch_size 4 -> 5\)"):
        fit(replace(tiny, batch_size=5))
    fit(tiny)
    assert saved == [1, 2]
    assert_same_weights(tiny.output, whole[0].output)


def test_muon_moves_the_blocks_and_resumes(tiny: FitSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(tiny, optimiser="muon", ema=0.5)
    uninterrupted = replace(tiny, output=tiny.output.with_name("uninterrupted"))
    fit(uninterrupted)
    save = RunState.save

    def save_then_stop(self: RunState, folder: Path) -> None:
        save(self, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunState, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny)
    state = RunState.load(state_folder(tiny.output))
    assert state is not None
    assert len(state.tensors["muon"]["state"]) == 4 * json.loads(TINY)["depth"]  # qkv, projection and two of the MLP
    fit(tiny)
    assert_same_weights(tiny.output, uninterrupted.output)


def test_a_run_whose_weights_are_beyond_half_precision_is_ended_without_it(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, settings = Run.weights, replace(tiny, epochs=1, half=True)
    with monkeypatch.context() as patched:
        patched.setattr(Run, "weights", lambda run: {name: 1e6 + value for name, value in weights(run).items()})
        with pytest.raises(CheckpointError, match="go without --half"):
            fit(settings)
    monkeypatch.setattr(Run, "step", lambda *_: pytest.fail("trained on"))
    fit(replace(settings, half=False))
    assert read_config(tiny.output).training["half"] is False


@pytest.mark.parametrize("part", ["seen", "optimiser"])
def test_an_unfinished_run_of_an_earlier_version_is_refused_in_words(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    capture = Run.capture

    def stop_as_before(self: Run) -> None:
        capture(self)
        if part == "seen":
            del self.state.tensors["seen"]
        else:
            self.state.tensors["optimiser"] = torch.optim.AdamW(self.objective.parameters()).state_dict()
        self.state.save(state_folder(tiny.output))
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "capture", stop_as_before)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny)
    with pytest.raises(FitError, match="begun by an earlier version: finish it there, or start anew with --overwrite"):
        fit(tiny)


def test_a_stop_within_an_epoch_restarts_that_epoch(tiny: FitSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(tiny, ema=0.9, patience=1, tokens=5)
    straight = replace(tiny, output=tiny.output.with_name("straight"))
    fit(straight)
    step, steps = Run.step, []

    def step_then_stop(self: Run, *arguments: Any) -> float:
        steps.append(self.state.updates)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Run, "step", step_then_stop)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny)
    fit(tiny, overwrite=False)
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5]
    assert_same_weights(tiny.output, straight.output)


def test_a_broken_state_is_named(tiny: FitSettings) -> None:
    folder = state_folder(tiny.output)
    folder.mkdir()
    whole = io.BytesIO()
    torch.save({"epoch": Path("anything that is no tensor")}, whole)
    for content in (b"", whole.getvalue()[:200], whole.getvalue()):
        (folder / "last.pt").write_bytes(content)
        with pytest.raises(FitError, match=r"last\.pt is broken .* --overwrite"):
            fit(tiny)


def test_overwrite_starts_anew(tiny: FitSettings, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole[0].output, tiny.output)
    settings = replace(tiny, seed=1, epochs=1)
    assert not fit(settings, overwrite=True)["reused"]
    assert read_config(tiny.output).training["seed"] == 1
    assert Heads.load(tiny.output).id == json.loads((tiny.output / "metrics.json").read_text())["heads"]


def test_early_stopping_keeps_the_best_epoch(tiny: FitSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, weights = iter([0.6, 0.8, 0.7, 0.7, 0.9]), []

    def score(self: LinearProbe, embed: object) -> tuple[float, float]:
        return next(scores), 0.5

    capture = Run.capture

    def remember(self: Run) -> None:
        weights.append({key: value.clone() for key, value in self.result.backbone.state_dict().items()})
        capture(self)

    monkeypatch.setattr(LinearProbe, "score", score)
    monkeypatch.setattr(Run, "capture", remember)
    metrics = fit(replace(tiny, epochs=50, patience=2))
    assert metrics["training"]["epochs"] == 4
    kept = read_weights(tiny.output)
    assert all(np.array_equal(kept[name], value) for name, value in weights[1].items())
    assert not all(np.array_equal(kept[name], value) for name, value in weights[3].items())


def test_two_nodes_without_a_common_disk_resume_and_end_alike(tiny: FitSettings) -> None:
    """Twice the first node is lost or through with it: then both go on with what it knows."""
    disks = [tiny.output.with_name(name) for name in ("one", "two")]
    nodes = [replace(tiny, output=disk / "checkpoint") for disk in disks]
    for disk in disks:
        disk.mkdir()
    with launcher() as launch:
        assert launch(train_on_node, [(settings, True) for settings in nodes])[0] == -signal.SIGKILL
        assert [state_folder(settings.output).exists() for settings in nodes] == [True, False]
        assert launch(train_on_node, [(settings, False) for settings in nodes]) == [0, 0]
        heard = [json.loads((disk / "heard.json").read_text()) for disk in disks]
        assert all("resuming after epoch 1, 3 updates" in words["lines"] for words in heard)
        assert heard[0]["metrics"]["training"]["updates"] == 6
        weights = [torch.load(disk / "weights.pt", weights_only=True) for disk in disks]
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        assert [settings.output.exists() for settings in nodes] == [True, False]
        assert launch(train_on_node, [(settings, False) for settings in nodes]) == [0, 0]
    reused = [json.loads((disk / "heard.json").read_text())["metrics"] for disk in disks]
    assert reused == [heard[0]["metrics"] | {"reused": True}, {"reused": True}]


def test_the_processes_of_a_node_share_its_cores(tiny: FitSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.fit.run.usable_cores", lambda: 6)
    monkeypatch.setattr("trainer.fit.train.usable_cores", lambda: 12)
    settings = replace(tiny, cached_batch=8, workers=None)  # without DistributedDataParallel, which needs a group
    run = Run(settings, Processes(rank=5, world=8, local=2), "cpu", make_objective(settings, "cpu")[0], 1)
    assert run.slices is not None
    assert run.slices.threads == 3
    roles = read_roles(settings)
    views = Views(preprocess=settings.preprocessing, local_size=settings.local)
    made: dict[str, Any] = {}
    monkeypatch.setattr("trainer.fit.train.DataLoader", lambda *_, **options: made.update(options))
    epoch_batches(settings, roles["training"], views, run)
    assert made["num_workers"] == 3


def test_all_processes_look_at_validation_images_when_the_first_does(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the look before took here."""
    monkeypatch.setattr(Processes, "agree", lambda self, value: 0.5)
    settings = replace(tiny, cached_batch=8, max_minutes=1.0)
    run = Run(settings, Processes(rank=1, world=2, local=1), "cpu", make_objective(settings, "cpu")[0], 1)
    run.state.window, run.state.seconds, run.state.judging = 60.0, 30.0, 20.0
    probe: Any = None  # only the first process has a look of its own
    summary = judge(run, probe, {"learning_rate": 0.0, "loss": 0.0, "records_per_second": 0.0})
    assert summary.accuracy == 0.5
    assert run.state.judged == run.state.seconds > 30.0


@pytest.mark.parametrize("kept", [("real",), ()])
def test_without_validation_images_of_both_labels_all_epochs_are_trained(
    tiny: FitSettings, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    """Nothing can be judged then: patience has no effect, and the last weights are kept."""
    data = shutil.copytree(tiny.data, tmp_path / tiny.data.name)
    for entry in read_dataset(data):
        if role(entry.group) == "validation" and not entry.key.startswith(kept):
            (data / entry.key).unlink()
    lines: list[str] = []
    settings = replace(tiny, data=data, epochs=4, patience=2, warmup_epochs=0.5)
    assert fit(settings, say=lines.append)["training"]["epochs"] == 4
    assert lines[0].startswith(f"{4 if kept else 0} real and 0 generated validation images: accuracy is not measured")
    fit(replace(settings, output=tmp_path / "never", patience=0))
    assert_same_weights(settings.output, tmp_path / "never")


def test_less_time_than_starting_takes_still_gives_a_checkpoint(tiny: FitSettings) -> None:
    metrics = fit(replace(tiny, epochs=100_000, max_minutes=1e-6))
    assert metrics["training"]["epochs"] == 1
    assert Embedder.load(tiny.output, device="cpu").dim == 48


def test_max_minutes_ends_the_schedule_with_a_usable_checkpoint(tiny: FitSettings) -> None:
    settings = replace(tiny, epochs=100_000, max_minutes=0.05)
    fit(settings)
    rows = (settings.output / "summary.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert float(last["progress"]) == 1.0
    assert float(last["learning_rate"]) < 1e-4
    assert Embedder.load(settings.output, device="cpu").dim == len(Heads.load(settings.output).linear.weight) == 48


def stopped_once(monkeypatch: pytest.MonkeyPatch, where: str, name: str) -> None:
    """Let a function of a module do its work and then raise KeyboardInterrupt, the first time it is called."""
    module = importlib.import_module(where)
    real, calls = getattr(module, name), []

    def stop(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        calls.append(name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(module, name, stop)


def test_a_resumed_run_keeps_its_time_and_schedule(tiny: FitSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[float] = []
    save = RunState.save

    def save_then_stop(self: RunState, folder: Path) -> None:
        save(self, folder)
        windows.append(self.window)
        if len(windows) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunState, "save", save_then_stop)
    settings = replace(tiny, epochs=100_000, max_minutes=0.05)
    with pytest.raises(KeyboardInterrupt):
        fit(settings)
    fit(settings)
    assert len(set(windows)) == 1
    rows = [line.split(",") for line in (settings.output / "summary.csv").read_text().splitlines()]
    progress = [float(row[rows[0].index("progress")]) for row in rows[1:]]
    assert progress == sorted(progress)
    assert progress[-1] == 1


@pytest.mark.parametrize("change", [{}, {"max_minutes": 0.05, "epochs": 100_000}, {"patience": 1, "epochs": 9}])
def test_a_run_that_only_lacks_its_heads_trains_no_more(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Even where images have gone meanwhile."""
    data = shutil.copytree(tiny.data, tmp_path / tiny.data.name)
    settings = replace(tiny, data=data, epoch_steps=None, batch_size=8, **change)
    accuracies = iter([0.9, 0.8])
    if "patience" in change:
        monkeypatch.setattr(LinearProbe, "score", lambda *_: (next(accuracies), 0.5))
    stopped_once(monkeypatch, "trainer.fit.fit_heads", "fit_heads")
    with pytest.raises(KeyboardInterrupt):
        fit(settings)
    for entry in [entry for entry in read_dataset(data, split="train") if not entry.label][:20]:
        (data / entry.key).unlink()
    done = RunState.load(state_folder(settings.output))
    assert done is not None
    monkeypatch.setattr(Run, "step", lambda *_: pytest.fail("trained on"))
    metrics = fit(settings)
    assert (metrics["training"]["updates"], metrics["training"]["epochs"]) == (done.updates, done.epoch)


@pytest.mark.parametrize("cache_bytes", [1000, 4 << 30])
def test_files_that_go_while_training_cost_no_training(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache_bytes: int
) -> None:
    """One image of each role and all of a generator: named, counted and skipped where they are not in memory."""
    data = shutil.copytree(tiny.data, tmp_path / tiny.data.name)
    entries = list(read_dataset(data, split="train"))
    gone = {entry.key for entry in entries if entry.generator == "gen-b"}
    for name in ("training", "calibration", "validation"):
        gone.add(next(entry.key for entry in entries if role(entry.group) == name and not entry.label))
    save = RunState.save

    def save_and_delete(self: RunState, folder: Path) -> None:
        save(self, folder)
        for key in gone:
            (data / key).unlink(missing_ok=True)

    monkeypatch.setattr(RunState, "save", save_and_delete)
    metrics = fit(replace(tiny, data=data, cache_bytes=cache_bytes, head_images=1000))
    assert metrics["training"]["updates"] == 6
    listed = tiny.output / "unreadable.csv"
    if cache_bytes > 1000:
        assert metrics["unreadable"] == 0
        assert not listed.exists()
    else:
        assert metrics["unreadable"] == len(gone)
        assert all(f"{key},no such file" in listed.read_text() for key in gone)


def test_heads_and_probe_see_images_as_they_are_served(tiny: FitSettings, windowed: Embedder) -> None:
    """Several windows: an augmented view of which no augmentation was drawn is embedded as the image itself."""
    settings = replace(tiny, preprocess="center_crop", windows=5, augmentations=0)
    roles = read_roles(settings)
    embedder = replace(windowed, config=replace(windowed.config, training=settings.record()))
    entries = [entry for name in ("training", "calibration") for entry in roles[name].entries]
    training, calibration, _ = embed_for_heads(embedder, entries, images=1000, seed=0, views=2)
    for part, name, copies in ((training, "training", 2), (calibration, "calibration", 1)):
        images = [Image.fromarray(roles[name].read(entry).image) for entry in roles[name].entries]
        np.testing.assert_allclose(part.embeddings, np.tile(windowed.embed(images), (copies, 1)), atol=1e-5)

    views = Views(settings.preprocessing, settings.local, Augmenter(32, most=0))
    probe = LinearProbe.of(roles, views, 0)
    images = [Image.fromarray(roles["validation"].read(entry).image) for entry in roles["validation"].entries]
    crops = [np.asarray(crop) for image in images for crop in settings.preprocessing.crops(image)]
    np.testing.assert_array_equal(probe.validation.pixels, crops * 2)
    assert probe.validation.counts == [5] * 2 * len(images)
    assert probe.score(lambda pixels: pixels.reshape(len(pixels), -1)[:, :48].astype(np.float32))[1] >= 0


def test_the_probe_holds_no_more_windows_than_images_of_one(tiny: FitSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.fit.linear_probe.PROBE_IMAGES", 11)
    settings = replace(tiny, preprocess="center_crop", windows=5)
    views = Views(settings.preprocessing, settings.local, Augmenter(32, most=0))
    probe = LinearProbe.of(read_roles(settings), views, 0)
    for part in (probe.training, probe.validation):
        assert part.counts == [5] * 2 * 2  # two images, each plain and augmented


def test_a_checkpoint_of_several_windows_is_written_with_heads_of_its_own(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier that training with `bce` makes knows single windows, and is no head here."""
    trained: dict[str, torch.Tensor] = {}
    weights = Run.weights

    def noted(run: Run) -> dict[str, torch.Tensor]:
        trained.update(weights(run))
        return trained

    monkeypatch.setattr(Run, "weights", noted)
    settings = replace(tiny, preprocess="center_crop", windows=5, loss="bce", epochs=1, epoch_steps=1)
    fit(settings)
    embedder, heads = Embedder.load(settings.output, device="cpu"), Heads.load(settings.output)
    assert embedder.preprocess == Preprocess("center_crop", 32, windows=5)
    calibration, roles = CalibrationSet.load(settings.output), read_roles(settings)
    assert calibration is not None
    images = [Image.fromarray(roles["calibration"].read(entry).image) for entry in roles["calibration"].entries]
    np.testing.assert_allclose(calibration.embeddings, embedder.embed(images), atol=1e-2)
    assert not np.array_equal(heads.linear.weight, trained["classifier.weight"][0].double().numpy())
    assert "in up to 5 windows whose embeddings are averaged" in (settings.output / "README.md").read_text()


def test_windows_need_the_native_resolution(tiny: FitSettings) -> None:
    with pytest.raises(FitError, match="--windows is 5 with resize_crop: add --preprocess center_crop"):
        replace(tiny, windows=5)
    with pytest.raises(FitError, match="--windows is 0: set it above 0"):
        replace(tiny, windows=0)


@pytest.mark.parametrize(("device", "slower"), [("cpu", 1), ("cuda", 3)])
def test_time_kept_for_the_heads_follows_from_what_will_embed_them(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch, device: str, slower: int
) -> None:
    """A second per view here: OpenVINO takes no longer than the training, torch in float32 does."""
    roles = read_roles(tiny)
    views = Views(preprocess=tiny.preprocessing, local_size=tiny.local)
    probe = LinearProbe.of(roles, views, 0)
    run = Run(tiny, Processes(), "cpu", make_objective(tiny, "cpu")[0], 1)
    run.device = device
    monkeypatch.setattr(Run, "embed", lambda *_: None)
    clock = iter([0.0, float(len(probe.training.pixels[:128]))])
    monkeypatch.setattr("trainer.fit.train.time.monotonic", lambda: next(clock))
    heads = min(3 * len(roles["training"]), tiny.head_images) + len(roles["calibration"]) + len(roles["validation"])
    expected = 6 + len(probe) + slower * heads
    assert finishing_seconds(run, probe, roles) == expected
    run.settings, clock = replace(tiny, preprocess="center_crop", windows=5), iter([0.0, 128.0])
    assert finishing_seconds(run, probe, roles) == expected + 4 * slower * heads


def one_update(settings: FitSettings) -> tuple[Run, dict[str, torch.Tensor]]:
    """A run after one update with random views, and its weights before it."""
    run = Run(settings, Processes(), "cpu", make_objective(settings, "cpu")[0], 1)
    before = {name: value.clone() for name, value in run.objective.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    size, local = settings.image_size, settings.local
    whole = torch.randint(0, 256, (4, 3, 2, size, size, 3), generator=generator, dtype=torch.uint8)
    crops = torch.randint(0, 256, (4, 2, local, local, 3), generator=generator, dtype=torch.uint8)
    run.step((whole, crops, [], []), generator, 1e-3)
    return run, before


def test_the_average_moves_towards_the_weights_by_its_decay(tiny: FitSettings) -> None:
    run, before = one_update(replace(tiny, ema=0.9))
    assert run.average is not None
    assert run.result is run.average
    decay = min(0.9, 1 / 10)  # of the first update: a young average forgets its start sooner
    moved = 0
    for name, after in run.objective.state_dict().items():
        expected = decay * before[name] + (1 - decay) * after
        torch.testing.assert_close(run.average.state_dict()[name], expected)
        moved += not torch.equal(before[name], after)
    assert moved > 10
    assert one_update(tiny)[0].average is None


def test_only_matrices_decay_as_in_the_reference(tiny: FitSettings) -> None:
    """Its optimiser is made by timm's factory, from a backbone without a head."""
    run = Run(tiny, Processes(), "cpu", make_objective(tiny, "cpu")[0], 1)
    factory = importlib.import_module("timm.optim").create_optimizer_v2
    reference = factory(run.objective.backbone, opt="adamw", lr=1e-3, weight_decay=tiny.weight_decay)
    decaying, expected = (
        [{id(parameter) for parameter in group["params"]} for group in groups if group["weight_decay"]]
        for groups in (run.optimisers["optimiser"].param_groups, reference.param_groups)
    )
    assert decaying == expected
    assert len(decaying[0]) < len(list(run.objective.parameters())) / 2


@pytest.mark.parametrize(("clip", "scaled"), [(0.0, False), (1e-3, True)])
def test_gradients_are_scaled_to_the_norm_that_clip_allows(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch, clip: float, scaled: bool
) -> None:
    norms = []

    def watch(self: torch.optim.AdamW) -> None:
        gradients = [value.grad for group in self.param_groups for value in group["params"] if value.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    one_update(replace(tiny, clip=clip))
    assert (norms[0] == pytest.approx(1e-3, rel=1e-2)) == scaled


def test_a_stop_while_the_checkpoint_is_written_leaves_none_and_the_next_run_ends_it(
    tiny: FitSettings, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("trainer.fit.checkpoint_writer.write_card", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny)
    assert not tiny.output.exists()
    fit(tiny)
    assert_same_weights(tiny.output, whole[0].output)
    assert [path.name for path in tiny.output.parent.iterdir()] == [tiny.output.name]


@pytest.mark.parametrize(
    "change",
    [
        {"terms": "global"},
        {"terms": "multi-scale"},
        {"anchors": "real"},
        {"loss": "bce"},
        {"loss": "reference"},
        {"batch_size": 3, "cached_batch": 4},
        {"positives": "generator", "proxies": 0.5},
        {"local_size": 32},
        {"precision": "float32"},
        {"half": True},
        {"balance": True, "paired": 0.5},
    ],
)
def test_ablations_train(tiny: FitSettings, change: dict[str, Any]) -> None:
    metrics = fit(replace(tiny, epochs=1, **change))
    assert read_config(tiny.output).training | change == read_config(tiny.output).training
    if change == {"loss": "bce"}:
        assert "linear" in metrics["validation"]
        assert Heads.load(tiny.output).linear.weight.shape == (48,)
    if change == {"half": True}:
        stored = load_file(tiny.output / "model.safetensors")
        assert {array.dtype for array in stored.values()} == {np.dtype(np.float16)}
        assert read_id(tiny.output) == metrics["checkpoint"]


@pytest.mark.parametrize("rate", ["drop_path_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate"])
def test_a_backbone_that_draws_is_refused_where_its_parts_are_computed_twice(tiny: FitSettings, rate: str) -> None:
    settings = replace(tiny, architecture_args=TINY.replace("{", f'{{"{rate}": 0.5, ', 1))
    make_objective(settings, "cpu")
    with pytest.raises(FitError, match=r"--cached-batch 8 .* and .*Drop.* set the drop rates in --architecture-args"):
        make_objective(replace(settings, cached_batch=8), "cpu")


def test_a_stem_is_trained_and_kept(tiny: FitSettings) -> None:
    settings = replace(tiny, architecture_args=TINY.replace("{", '{"stem": "conv", ', 1))
    fit(settings)
    assert {key for key in read_weights(settings.output) if "patch_embed" in key} >= {"patch_embed.proj.0.weight"}
    with pytest.raises(FitError, match=r"--pretrained: timm has no weights of a convolutional stem"):
        replace(settings, pretrained=True)


def test_a_network_of_timm_is_a_stem_that_reads_the_same_pixels(tiny: FitSettings, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network: Any = timm.create_model("tf_efficientnet_lite0")
    file = tmp_path / "network.safetensors"
    for name, buffer in network.named_buffers():
        if name.startswith("bn1.running"):
            torch.nn.init.uniform_(buffer, 0.5, 2)
    save_file({key: value for key, value in network.state_dict().items() if "num_batches" not in key}, file)
    args = TINY.replace("{", '{"stem": "tf_efficientnet_lite0", ', 1).replace('"patch_size": 8', '"patch_size": 32')
    settings = replace(tiny, architecture_args=args, pretrained=True, pretrained_file=file, local_size=32)
    objective, _ = make_objective(settings, "cpu")
    stem: Any = objective.backbone.get_submodule("patch_embed.proj")
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    expected = network.eval().bn1(network.conv_stem(pixels.permute(0, 3, 1, 2) / 127.5 - 1))
    inside = (slice(None), slice(None), slice(-1), slice(-1))  # beyond the border is 0, of either normalisation
    torch.testing.assert_close(stem[1](stem[0](objective.normalised(pixels)))[inside], expected[inside])
    assert torch.equal(stem[2][6][0].conv_pwl.weight, network.blocks[6][0].conv_pwl.weight)
    assert not any(weight.requires_grad for weight in (*stem[0].parameters(), *stem[2][:2].parameters()))
    assert all(weight.requires_grad for weight in stem[2][2:].parameters())
    whole, _ = make_objective(replace(settings, frozen_stages=7), "cpu")
    learning = {name for name, weight in whole.backbone.named_parameters() if weight.requires_grad}
    assert {name for name in learning if "proj." in name and "patch" in name} == {
        "patch_embed.proj.3.weight",
        "patch_embed.proj.3.bias",
    }
    with pytest.raises(FitError, match=r"--frozen-stages is 8: set it to 0 to 7"):
        replace(settings, frozen_stages=8)
    assert settings.record()["pretrained_file"].startswith("network.safetensors, sha256 ")
    with pytest.raises(FitError, match=r"the stem tf_efficientnet_lite0 keeps what .*: add --pretrained"):
        replace(settings, pretrained=False, pretrained_file=None)
    with pytest.raises(FitError, match=r"--pretrained-file .*gone is no file"):
        replace(settings, pretrained_file=tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"patch_size is 8, and a network as stem makes patches of 32 pixels"):
        make_objective(replace(settings, architecture_args=args.replace("32}", "8}")), "cpu")
    run, before = one_update(replace(settings, stem_rate=0.1))
    moved = {name: (run.objective.state_dict()[name] - value).abs().max().item() for name, value in before.items()}
    proj = "backbone.patch_embed.proj"  # AdamW's first update moves what has a gradient by the learning rate
    assert moved[f"{proj}.3.bias"] == pytest.approx(1e-3, rel=0.01)
    assert moved[f"{proj}.2.6.0.conv_pwl.weight"] == pytest.approx(1e-4, rel=0.01)
    assert moved[f"{proj}.0.weight"] == 0
    with pytest.raises(FitError, match=r"--stem-rate is 0: set it above 0 and to 1 at most"):
        replace(settings, stem_rate=0)
    with pytest.raises(
        FitError, match=r"--stem-rate 0.1 and --frozen-stages 2 are for a stem that is a network of timm"
    ):
        replace(tiny, stem_rate=0.1)
    fit(settings)
    metrics = fit(settings)
    assert "timm's weights of tf_efficientnet_lite0, its stem," in (settings.output / "README.md").read_text()
    assert metrics["checkpoint"] == read_id(settings.output)


def test_pretrained_starts_from_timms_weights(tiny: FitSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    create, official = timm.create_model, {}

    def offline(name: str, *, pretrained: bool, **options: Any) -> torch.nn.Module:
        model: torch.nn.Module = create(name, pretrained=False, **options)
        if pretrained:
            official.update({key: torch.full_like(value, 0.25) for key, value in model.state_dict().items()})
            model.load_state_dict(official)
        return model

    monkeypatch.setattr(timm, "create_model", offline)
    started = make_objective(replace(tiny, pretrained=True), "cpu")[0].backbone.state_dict()
    assert official
    assert all(torch.equal(started[key], value) for key, value in official.items())
    other = make_objective(tiny, "cpu")[0].backbone.state_dict()
    assert not any(torch.equal(other[key], value) for key, value in official.items() if value.dim() > 1)


def test_unreadable_images_are_counted_and_listed(tiny: FitSettings, image_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "real" / "cut.jpg").write_bytes((data / "real" / "000.jpg").read_bytes()[:100])
    (data / "fake" / "gen-a" / "empty.png").write_bytes(b"")
    metrics = fit(replace(tiny, data=data, epochs=1))
    assert metrics["unreadable"] == 2
    listed = (tiny.output / "unreadable.csv").read_text()
    assert "cut.jpg" in listed
    assert "empty.png" in listed
    images = len(list(read_dataset(data, split="train"))) - 2
    assert sum(sum(counts.values()) for counts in metrics["images"].values()) == images


def test_images_that_do_not_fit_into_memory_are_read_as_they_are_needed(tiny: FitSettings, whole: Whole) -> None:
    lazy = replace(tiny, cache_bytes=1000)
    assert not read_roles(lazy)["training"].memory
    fit(lazy)
    assert_same_weights(lazy.output, whole[0].output)


def test_worker_processes_make_the_same_views(tiny: FitSettings, whole: Whole) -> None:
    fit(replace(tiny, workers=2))
    assert_same_weights(tiny.output, whole[0].output)


def test_tensorboard_gets_scalars(tiny: FitSettings, tmp_path: Path) -> None:
    fit(replace(tiny, epochs=1, epoch_steps=10, tensorboard=tmp_path / "events"))
    (events,) = (tmp_path / "events").iterdir()
    content = events.read_bytes()
    assert b"loss" in content
    assert b"epoch/accuracy" in content


def test_bfloat16_is_left_where_the_processor_would_emulate_it(
    tiny: FitSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    exact = make_objective(replace(tiny, precision="float32"), "cpu")[0].embed(pixels)
    objective = make_objective(replace(tiny, precision="bf16"), "cpu")[0]
    for present in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda present=present: {"avx2": True, "amx_bf16": present})
        assert torch.equal(objective.embed(pixels), exact) != present


def test_training_learns(tiny: FitSettings) -> None:
    fit(replace(tiny, epoch_steps=80, batch_size=8, learning_rate=1e-2, warmup_epochs=0.2))
    rows = [line.split(",") for line in (tiny.output / "summary.csv").read_text().splitlines()]
    first, second = (float(row[rows[0].index("loss")]) for row in rows[1:])
    assert second < 0.9 * first
