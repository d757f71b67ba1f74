"""Evaluation from images to the report: what is read, what is measured, what is written."""

import csv
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from sklearn.neighbors import NearestNeighbors
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.data.datasets import read_dataset
from trainer.data.entry import Entry, default_split, role
from trainer.evaluation.embedded_set import EmbeddedSet, embed_entries
from trainer.evaluation.enrolment_curve import enrolment_curve, knn_logits
from trainer.evaluation.file_facts import file_fact_scores
from trainer.evaluation.head_evaluation import Evaluation, EvaluationError, card_figures, evaluate, source_accuracies
from trainer.evaluation.metrics import auroc
from trainer.evaluation.report import write_report
from trainer.evaluation.report_tables import NOT_DIFFUSION, Rows, report_tables, seen_table, unseen_tables
from trainer.evaluation.splits import seen_groups, split_entries
from trainer.evaluation.transforms import Transform, curve_transforms, table_transforms
from trainer.fit.fit_heads import refit
from trainer.heads.heads import Heads, HeadsError, NearestHead, nearest_similarities, unit_length
from trainer.images import FileFacts, Preprocess
from trainer.model.checkpoint import CheckpointConfig, build_backbone, save_checkpoint
from trainer.model.embedder import Embedder
from trainer.model.model_card import add_evaluation, write_metrics
from trainer.model.seen_images import LeftOut, SeenImages

SIZE, DIM = 32, 24
KINDS = [("train", "", 66), ("train", "gen-a", 66), ("test", "", 20), ("test", "gen-a", 14), ("unseen", "gan-b", 14)]


def small_image(rng: np.random.Generator, generator: str) -> Image.Image:
    """Smooth noise; fakes are striped, each generator in its own direction."""
    pixels = np.asarray(
        Image.fromarray(rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)).filter(ImageFilter.BoxBlur(1))
    )
    pixels = pixels // 2 + 64
    if generator == "gen-a":
        pixels[::2] += 24
    elif generator:
        pixels[:, ::2] += 24
    return Image.fromarray(pixels)


def groups(of: str, number: int) -> list[str]:
    """Names of groups of a role."""
    found: list[str] = []
    for i in count():
        if len(found) == number:
            break
        if role(f"group-{i}") == of:
            found.append(f"group-{i}")
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest with splits; of 66 training images of a label 20 have the role calibration, the last 6 validation."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    names = {role: iter(groups(role, 80)) for role in ("training", "calibration", "validation")}
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "generator", "split", "source", "group"])
        for split, generator, number in KINDS:
            for i in range(number):
                path = f"{split}-{generator or 'real'}-{i}.png"
                small_image(rng, generator).save(folder / path)
                of = "validation" if i >= 60 else "calibration" if i % 3 == 0 else "training"
                group = next(names[of]) if split == "train" else path
                writer.writerow([path, "fake" if generator else "real", generator, split, f"source-{i % 2}", group])
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
        writer.writerow(["broken.png", "real", "", "test", "source-0", "broken"])
    return folder


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random backbone with heads fitted on `data`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    args = {"embed_dim": DIM, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": SIZE}
    config = CheckpointConfig(
        name="tiny", image_size=SIZE, dim=DIM, preprocess=Preprocess(image_size=SIZE), architecture_args=args
    )
    torch.manual_seed(0)
    save_checkpoint(folder, build_backbone(config), config)
    refit(folder, data, split="train", views=2)
    return folder


@pytest.fixture(scope="module")
def evaluation(checkpoint: Path, data: Path) -> Evaluation:
    return evaluate(checkpoint, data, with_curves=True, resamples=50)


def facts(sha256: str = "0" * 64, size: int = 100, quality: int | None = 90) -> FileFacts:
    return FileFacts(sha256, size, 40, 40, "JPEG", quality)


def test_every_split_transform_head_and_generator_has_a_row(evaluation: Evaluation) -> None:
    found = {(row["split"], row["transform"], row["head"], row["generator"]) for row in evaluation.rows}
    assert found == {
        (split, transform, head, generator)
        for split, generators in (("test", ["gen-a"]), ("unseen", ["gan-b"]))
        for transform in ("none", "transformed", "equalised")
        for head in ("linear", "svm", "nn1", "knn", "combined")
        for generator in ("all", "real", *generators)
    }
    assert len(evaluation.rows) == len(found)


def test_unseen_generators_are_paired_with_the_reals_of_test(evaluation: Evaluation) -> None:
    rows = Rows(evaluation.rows)
    for split, images in (("test", [34, 20, 14]), ("unseen", [34, 20, 14])):
        names = ["all", "real", *rows.generators(split)]
        assert [rows.value("images", split, "none", "linear", name) for name in names] == images
    assert rows.value("accuracy", "test", "none", "linear", "real") == rows.value(
        "accuracy", "unseen", "none", "linear", "real"
    )


def test_the_unseen_split_alone_still_borrows_the_reals(checkpoint: Path, data: Path, evaluation: Evaluation) -> None:
    alone = evaluate(checkpoint, data, split="unseen", resamples=50)
    assert [row for row in evaluation.rows if row["split"] == "unseen"] == alone.rows
    assert set(alone.sets["none"].generators) == {"", "gan-b"}


def test_data_without_unseen_generators_have_no_rows_of_them(
    checkpoint: Path, data: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(data, tmp_path / "data")) / "manifest.csv"
    lines = [line for line in copied.read_text().splitlines() if ",unseen," not in line]
    copied.write_text("\n".join(lines))
    found = evaluate(checkpoint, copied.parent, resamples=50)
    assert found.splits == ["test"]
    assert found.rows == [row for row in evaluation.rows if row["split"] == "test"]
    document = write_report(found, tmp_path / "report")
    assert not [table.title for table in report_tables(document, [], published=False) if "nseen" in table.title]


def test_the_transformed_images_of_d3s_archive_stand_for_ours(tmp_path: Path) -> None:
    for variant in ("augm", "no_augm"):
        for kind in ("real", "gen_0"):
            (tmp_path / variant / kind).mkdir(parents=True)
            small_image(np.random.default_rng(0), "").save(tmp_path / variant / kind / "0.png")
    tables, extra = table_transforms(SIZE), [transform for _, _, transform in curve_transforms()]
    work = {
        (entry.attributes["variant"], entry.label): [t.name for t in transforms]
        for entry, transforms in split_entries(tmp_path, ["test"], tables, extra, lambda _: False)
    }
    plain = ["none", "equalised", *(transform.name for transform in extra)]
    assert work == {
        (variant, label): names
        for variant, names in (("augm", ["transformed"]), ("no_augm", plain))
        for label in (0, 1)
    }


def test_images_that_the_checkpoint_saw_are_left_out_and_counted(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Of the training split the heads saw 120 of 132 images; only the validation images are left to measure."""
    found = evaluate(checkpoint, data, split="train,test", resamples=5)
    assert found.left_out == LeftOut(120, complete=False)
    rows = Rows(found.rows)
    assert [rows.value("images", "train", "none", "linear", name) for name in ("real", "gen-a")] == [6, 6]
    header, *lines = (data / "manifest.csv").read_text().splitlines()
    reals = [line for line in lines if line.startswith("train-real")][54:]
    for line in reals:
        shutil.copy(data / line.split(",")[0], tmp_path)
    (tmp_path / "manifest.csv").write_text("\n".join([header, *reals]))
    with pytest.raises(EvaluationError, match=r"one label only in split train \(6 images left out.* calibrated"):
        evaluate(checkpoint, tmp_path, split="train")


def test_the_same_bytes_are_left_out_of_any_data_set(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Under other names and groups: of each label one image that the checkpoint saw, and one that it did not."""
    for label, generator in (("real", "real"), ("fake/gen", "gen-a")):
        (tmp_path / "other" / label).mkdir(parents=True)
        for split in ("train", "test"):
            shutil.copy(data / f"{split}-{generator}-1.png", tmp_path / "other" / label / f"{split}.png")
    found = evaluate(checkpoint, tmp_path / "other", split="train,test", resamples=5)
    assert found.left_out == LeftOut(2, complete=False)
    left = {
        sha256((tmp_path / "other" / label / "test.png").read_bytes()).hexdigest() for label in ("real", "fake/gen")
    }
    assert {facts.sha256 for facts in found.sets["none"].facts} == left


def hash_of(entry: Entry) -> str:
    return sha256(entry.read()).hexdigest()


def write_records(folder: Path, layout: str, seed: int) -> Path:
    """40 records of a real image and two fakes, numbered from 0: a shard, or a folder `images`."""
    rng = np.random.default_rng(seed)
    folder = folder / ("train" if layout == "shards" else "images")
    folder.mkdir(parents=True)
    kinds = {"real": "real", "gen_0": "fake/gen-a", "gen_1": "fake/gen-b"}
    with tarfile.open(folder / "0.tar", "w") if layout == "shards" else nullcontext() as archive:
        for number in range(40):
            for field, place in kinds.items():
                data = io.BytesIO()
                small_image(rng, "" if field == "real" else "gen-a").save(data, "PNG")
                if archive is None:
                    (folder / place).mkdir(parents=True, exist_ok=True)
                    (folder / place / f"{number:06d}.png").write_bytes(data.getvalue())
                else:
                    info = tarfile.TarInfo(f"{number:06d}.{field}.png")
                    info.size = len(data.getvalue())
                    archive.addfile(info, io.BytesIO(data.getvalue()))
    return folder


@pytest.mark.parametrize("layout", ["shards", "folders"])
def test_groups_named_alike_in_another_data_set_are_measured(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    own, other = (write_records(tmp_path / name, layout, seed) for seed, name in enumerate(("own", "other")))
    copied = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    entries = list(read_dataset(own))
    assert [entry.group for entry in entries] == [entry.group for entry in read_dataset(other)]
    SeenImages.of(map(hash_of, entries), (entry.group for entry in entries)).save(copied)
    found = evaluate(copied, other, split="train,test", resamples=5)
    assert found.left_out == LeftOut(0)
    assert len(found.sets["none"]) == 120
    moved = Path(shutil.move(own, tmp_path / "moved" / own.name))
    with pytest.raises(EvaluationError, match="120 images left out"):
        evaluate(copied, moved, split="train,test", resamples=5)


def test_the_siblings_of_an_image_that_was_seen_are_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """Of record 0 one fake was seen; record 1 is known by name alone."""
    data = write_records(tmp_path, "shards", 2)
    copied = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    seen = SeenImages.of([hash_of(list(read_dataset(data))[1])], ["000000", "000001"])
    seen.save(copied)
    found = evaluate(copied, data, split="train,test", resamples=5)
    assert found.left_out == LeftOut(3)
    assert set(found.sets["none"].groups) == {f"{number:06d}" for number in range(1, 40)}


def test_a_sibling_counts_in_whatever_split(data: Path, tmp_path: Path) -> None:
    """Of a group that a manifest spreads over splits only the training images were seen."""
    entries = list(read_dataset(data))
    for entry in entries:
        shutil.copy(data / entry.key, tmp_path)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "generator", "split", "group"])
        writer.writerow([entries[0].key, "real", "", "train", "scene"])
        writer.writerow([entries[-2].key, "fake", "gan-b", "test", "scene"])
    seen = SeenImages.of([hash_of(entries[0])], ["scene"])
    assert seen_groups(tmp_path, ["test"], seen) == {"scene"}
    assert seen_groups(tmp_path, ["test"], replace(seen, contents=seen.contents[:0])) == set()


def test_an_evaluation_says_what_it_cannot_know(
    checkpoint: Path, data: Path, tmp_path: Path, evaluation: Evaluation
) -> None:
    """A checkpoint of earlier versions keeps no record; one of `fit` keeps all of it."""
    old, new = (Path(shutil.copytree(checkpoint, tmp_path / name)) for name in ("old", "new"))
    (old / "seen.safetensors").unlink()
    SeenImages.joined([SeenImages.load(new), SeenImages.of([], [])]).save(new)
    runner = CliRunner()
    arguments = ["--data", str(data), "--split", "train,test"]
    without = runner.invoke(app, ["evaluate", "--checkpoint", str(old), *arguments])
    assert without.exit_code == 0, without.output
    assert "keeps no record of what trained its embedding" in without.stderr
    assert "left out:" not in without.stderr
    kept = ["--output", str(tmp_path / "r"), "--card"]
    with_it = runner.invoke(app, ["evaluate", "--checkpoint", str(new), *arguments, *kept])
    assert with_it.exit_code == 0, with_it.output
    assert "120 images left out" in with_it.stderr
    assert "no record" not in with_it.stderr
    assert json.loads((tmp_path / "r" / "report.json").read_text())["left_out"] == {"images": 120, "complete": True}
    assert "120 images left out" in (tmp_path / "r" / "report.md").read_text()
    (new / "seen.safetensors").write_bytes(b"nothing")
    assert "is damaged" in runner.invoke(app, ["evaluate", "--checkpoint", str(new), *arguments]).stderr


def test_the_model_card_gets_the_figures_of_the_best_head(
    evaluation: Evaluation, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    add_evaluation(folder, {"data": "mine"} | card_figures(evaluation))
    card = (folder / "README.md").read_text()
    rows = {
        (row["split"], row["generator"], row["transform"]): row for row in evaluation.rows if row["head"] == "combined"
    }
    for (split, generator, transform), recompressed in {
        ("test", "gen-a", "none"): "no",
        ("unseen", "gan-b", "equalised"): "yes",
    }.items():
        row = rows[split, generator, transform]
        figures = f"{row['accuracy']:.3f} | {row['auroc']:.3f} | {row['auroc_low']:.3f} to {row['auroc_high']:.3f} |"
        assert f"| {split} | {generator} | {row['images']} | {recompressed} | {figures}" in card
    source, shares = next(iter(source_accuracies(evaluation).items()))
    assert f"| {source} | {shares['images']:.0f} | {shares['combined']:.3f} |" in card
    add_evaluation(folder, {"data": "again"} | card_figures(evaluation))
    assert "`mine`" not in (folder / "README.md").read_text()
    write_metrics(folder, {})
    (folder / "metrics.json").write_text("[]")
    arguments = ["evaluate", "--checkpoint", str(folder), "--data", str(tmp_path / "none"), "--card"]
    assert "metrics.json is damaged" in CliRunner().invoke(app, arguments).stderr  # before the data are looked at


def test_heads_take_the_training_split_and_say_how_long_it_takes(checkpoint: Path, tmp_path: Path) -> None:
    for name, generator in (("real", ""), ("fake/gen", "gen-a")):
        (tmp_path / name).mkdir(parents=True)
        for number in range(60):
            small_image(np.random.default_rng(number), generator).save(tmp_path / name / f"{number}.png")
    copied = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (copied / "seen.safetensors").unlink()
    arguments = ["heads", "--checkpoint", str(copied), "--data", str(tmp_path), "--views", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    seen = SeenImages.load(copied)
    roles = [(entry, default_split(entry.group), role(entry.group)) for entry in read_dataset(tmp_path)]
    assert all(
        seen.holds(hash_of(entry)) == seen.names(entry.group) == (split == "train" and of != "validation")
        for entry, split, of in roles
    )
    count = sum(split == "train" and of != "validation" for _, split, of in roles)
    assert re.search(rf"embedding {count} images: about 0\.\d minutes in all", done.stderr)


def test_unreadable_images_are_named(evaluation: Evaluation) -> None:
    assert [rejected.file.rpartition("/")[2] for rejected in evaluation.rejected] == ["broken.png"]


def test_rows_agree_with_the_heads_asked_one_by_one(evaluation: Evaluation, checkpoint: Path) -> None:
    images = evaluation.sets["none"]
    chosen = np.array([name in ("", "gen-a") for name in images.generators])
    heads = Heads.load(checkpoint)
    right = (heads.linear.logit(images.embeddings[chosen]) > 0) == (images.labels[chosen] == 1)
    row = Rows(evaluation.rows).get("test", "none", "linear", "all")
    assert row is not None
    assert row["accuracy"] == pytest.approx(right.mean(), abs=1e-6)


def test_the_same_seed_measures_the_same_and_another_transforms_otherwise(
    checkpoint: Path, data: Path, evaluation: Evaluation
) -> None:
    again, other = (evaluate(checkpoint, data, seed=seed, resamples=50) for seed in (0, 1))
    assert again.rows == evaluation.rows
    np.testing.assert_array_equal(other.sets["none"].embeddings, again.sets["none"].embeddings)
    assert not np.array_equal(other.sets["transformed"].embeddings, again.sets["transformed"].embeddings)
    assert not np.array_equal(other.sets["equalised"].embeddings, again.sets["equalised"].embeddings)


def test_curves_cover_every_strength(evaluation: Evaluation) -> None:
    found = {(row["curve"], row["strength"]) for row in evaluation.curves}
    assert found == {(curve, strength) for curve, strength, _ in curve_transforms()}
    assert {strength for name, strength in found if name == "jpeg quality"} == {95, 85, 75, 65, 50, 40, 30}


class Mirror:
    """Stands for an embedder whose embeddings are the pixels it is given."""

    preprocess = Preprocess(image_size=SIZE)

    def embed_windows(self, images: list[np.ndarray], batch_size: int) -> np.ndarray:
        assert len(images) <= batch_size
        return np.concatenate(images).reshape(len(images), -1)


def test_a_finished_transform_is_cut_no_more(data: Path) -> None:
    grey = Image.fromarray(np.arange(SIZE * SIZE * 3, dtype=np.uint8).reshape(SIZE, SIZE, 3))
    transforms = [Transform("whole", lambda image, rng: grey, finished=True), Transform("cut", lambda image, rng: grey)]
    entries = [next(iter(read_dataset(data, split="test")))]
    sets, _ = embed_entries(cast(Embedder, Mirror()), [(entry, transforms) for entry in entries], seed=0)
    np.testing.assert_array_equal(sets["whole"].embeddings[0], np.asarray(grey).transpose(2, 0, 1).ravel())
    assert not np.allclose(sets["cut"].embeddings, sets["whole"].embeddings)


def test_transforms_are_seeded_by_content_not_by_order() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 320, 3), dtype=np.uint8))
    for transform in [*table_transforms(SIZE), *(transform for _, _, transform in curve_transforms())]:
        first, again = (transform(image, 0, "ab" * 32) for _ in range(2))
        assert first.mode == "RGB"
        assert first.tobytes() == again.tobytes()
    equalised = table_transforms(SIZE)[2]
    assert equalised(image, 0, "ab" * 32).tobytes() != equalised(image, 0, "cd" * 32).tobytes()
    assert min(equalised(Image.new("RGB", (256, 256)), 0, "ef" * 32).size) >= 0.88 * (256 - 7) - 1


def test_a_split_without_images_or_with_one_label_is_refused(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images of split other"):
        evaluate(checkpoint, data, split="other")
    (tmp_path / "fake" / "gen").mkdir(parents=True)
    small_image(np.random.default_rng(0), "gen-a").save(tmp_path / "fake" / "gen" / "0.png")
    (tmp_path / "manifest.csv").write_text("path,label,generator,split\nfake/gen/0.png,fake,gen,test\n")
    with pytest.raises(EvaluationError, match="both real and fake"):
        evaluate(checkpoint, tmp_path, split="test")
    (tmp_path / "fake" / "gen" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(EvaluationError, match=r"no readable image of split test \(1 unreadable"):
        evaluate(checkpoint, tmp_path, split="test")


def test_refit_from_its_cache_gives_the_same_heads(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    on_image: Callable[[int], None] = seen.append
    first, _ = refit(checkpoint, data, split="train", views=2, cache=tmp_path, on_image=on_image)
    embedded = len(seen)
    second, _ = refit(checkpoint, data, split="train", views=2, cache=tmp_path, on_image=on_image)
    assert seen == [120] * 120
    assert len(seen) == embedded
    assert first.id == second.id == Heads.load(checkpoint).id
    assert set(first.maps) == {"linear", "svm"}
    assert first.settings["images"] == {"real": 80, "fake": 80}
    refit(checkpoint, data, split="train", views=2, seed=1, cache=tmp_path, on_image=on_image)
    assert len(seen) == 2 * embedded
    refit(checkpoint, data, split="train", views=2)  # as the other tests expect it


@pytest.mark.parametrize("split", ["test", "train,unseen"])
def test_refit_refuses_the_splits_that_are_measured(checkpoint: Path, data: Path, split: str) -> None:
    with pytest.raises(HeadsError, match="must not fit heads"):
        refit(checkpoint, data, split=split)


def test_embedded_set_takes_joins_and_comes_back(tmp_path: Path) -> None:
    images = EmbeddedSet(
        embeddings=np.eye(3, dtype=np.float32),
        labels=np.array([0, 1, 1], np.uint8),
        generators=["", "a", "b"],
        sources=["x", "y", "z"],
        groups=["1", "2", "3"],
        splits=["test"] * 3,
        facts=[facts(str(i) * 64) for i in range(3)],
    )
    part = images.take(images.labels == 1)
    assert (len(part), part.generators, part.facts[0].sha256[0]) == (2, ["a", "b"], "1")
    assert EmbeddedSet.joined([part, images]).groups == ["2", "3", "1", "2", "3"]
    images.save(tmp_path / "set", "origin")
    loaded = EmbeddedSet.load(tmp_path / "set", "origin")
    assert loaded is not None
    assert loaded.facts == images.facts
    np.testing.assert_array_equal(loaded.embeddings, images.embeddings)
    assert EmbeddedSet.load(tmp_path / "set", "other origin") is None
    (tmp_path / "set").write_bytes(b"nothing")
    assert EmbeddedSet.load(tmp_path / "set", "origin") is None


def test_nearest_similarities_equal_brute_force_and_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    found = nearest_similarities(queries, references, 3)
    np.testing.assert_allclose(found, -np.sort(-(queries @ references.T), axis=1)[:, :3], rtol=1e-6)
    neighbours = NearestNeighbors(n_neighbors=3, metric="cosine").fit(references)
    near = neighbours.kneighbors(queries)[0]
    unit = nearest_similarities(unit_length(queries), unit_length(references), 3)
    np.testing.assert_allclose(unit, 1 - near, rtol=1e-5, atol=1e-6)
    more = nearest_similarities(queries, references, 6)
    assert np.isnan(more[:, 5]).all()
    assert np.isnan(nearest_similarities(queries, references[:0], 2)).all()


def test_the_vote_ranks_by_the_neighbours_of_both_labels() -> None:
    known = np.repeat(np.eye(4)[:2], 12, axis=0) + 0.1 * np.random.default_rng(0).normal(size=(24, 4))
    nearest = NearestHead(unit_length(known).astype(np.float16), np.repeat(np.array([0, 1], np.uint8), 12))
    queries = np.array([[2.0, 0, 0, 0], [3, 1, 0, 0], [1, 3, 0, 0], [0, 5, 0, 0]])
    logits = knn_logits(nearest, queries)
    assert (np.diff(logits) > 0).all()
    assert ((logits > 0) == [False, False, True, True]).all()
    lonely = NearestHead(nearest.embeddings[:12], nearest.labels[:12])
    assert np.isnan(knn_logits(lonely, queries)).all()


def test_enrolment_finds_what_lies_near_the_enrolled() -> None:
    """A new generator in a corner of its own, with only real references around: none found before, all after."""
    rng = np.random.default_rng(0)

    def around(axis: int, n: int) -> np.ndarray:
        x = np.eye(8)[axis] + 0.05 * rng.normal(size=(n, 8))
        return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)

    known = np.concatenate([around(0, 30), around(1, 30)])
    nearest = NearestHead(known.astype(np.float16), np.repeat(np.array([0, 1], np.uint8), 30))
    new = around(0, 40) + 0.4 * np.eye(8, dtype=np.float32)[5]
    images = EmbeddedSet(
        embeddings=np.concatenate([around(0, 20), new]),
        labels=np.repeat(np.array([0, 1], np.uint8), [20, 40]),
        generators=[""] * 20 + ["new"] * 40,
        sources=["x"] * 60,
        groups=[str(i) for i in range(60)],
        splits=["unseen"] * 60,
        facts=[facts(f"{i:064x}") for i in range(60)],
    )
    rows = enrolment_curve(nearest, images, resamples=20)
    by_key = {(row["head"], row["enrolled"]): row for row in rows}
    assert sorted(by_key) == [(head, step) for head in ("knn", "nn1") for step in (0, 5, 10, 20)]
    assert {row["tested"] for row in rows} == {20}
    assert by_key["nn1", 0]["recall"] == 0.0
    assert by_key["nn1", 20]["recall"] >= 0.9
    assert by_key["knn", 20]["recall"] >= 0.9
    assert by_key["nn1", 20]["false_alarms"] <= 0.1


def test_enrolled_groups_are_not_tested() -> None:
    images = EmbeddedSet(
        embeddings=np.eye(6, dtype=np.float32),
        labels=np.array([0, 1, 1, 1, 1, 1], np.uint8),
        generators=["", *["new"] * 5],
        sources=["x"] * 6,
        groups=["0", "a", "a", "b", "c", "b"],
        splits=["unseen"] * 6,
        facts=[facts(f"{9 - i:064x}") for i in range(6)],
    )
    nearest = NearestHead(np.eye(6, dtype=np.float16)[:2], np.array([0, 1], np.uint8))
    # By hash images 5 and 4 are the enrolled half; image 3 is of the group of 5.
    assert {(row["enrolled"], row["tested"]) for row in enrolment_curve(nearest, images, resamples=0)} == {(0, 2)}


def test_file_facts_tell_what_compression_gives_away_and_nothing_else() -> None:
    labels = np.arange(60) % 2
    names = [str(i) for i in range(60)]
    rng = np.random.default_rng(0)
    telling = file_fact_scores([facts(quality=95 if y else 70) for y in labels], labels, names)
    silent = file_fact_scores([facts(size=int(rng.integers(50, 150))) for _ in labels], labels, names)
    assert ((telling > 0.5) == (labels == 1)).all()
    assert auroc(silent, labels) < 0.7  # 0.8 and more for a forest that has seen what it judges
    assert np.isnan(file_fact_scores([facts()] * 4, np.array([0, 1, 0, 1]), names[:4])).all()


def test_report_holds_tables_plots_and_rows(evaluation: Evaluation, tmp_path: Path) -> None:
    document = write_report(evaluation, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == document
    json.dumps(document, allow_nan=False)
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {f"{n}.png" for n in ("roc", "map", "generators", "robustness", "enrolment", "reliability")}
    markdown = (tmp_path / "report.md").read_text()
    for title in ("Seen generators", "Unseen generators: GANs", "AUROC, test, both labels recompressed alike"):
        assert f"### {title}" in markdown
    for title in ("file facts alone", "Real images by source", "Calibration of the checkpoint", "Enrolment"):
        assert title in markdown
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<figcaption>") == 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(evaluation.rows)
    assert "SIMULATED" not in markdown
    assert "published" not in markdown


def test_simulated_images_are_told_by_their_generator(evaluation: Evaluation) -> None:
    images = evaluation.sets["none"]
    kept, said = images.generators[-1], [evaluation.simulated]
    images.generators[-1] = f"sim-{kept}"
    said.append(evaluation.simulated)
    images.generators[-1] = kept
    assert said == [False, True]


def test_tables_beside_those_of_another_checkpoint(evaluation: Evaluation, tmp_path: Path) -> None:
    document = {
        "name": "tiny", "checkpoint": "0123456789", "rows": evaluation.rows, "sources": {}, "file_facts": [],
        "calibration": [], "enrolment": [],
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(document))
    seen = report_tables(document, [tmp_path / "report.json"], published=False)[0]
    assert [line[0] for line in seen.rows[::5]] == ["tiny (Linear)", "tiny 01234567 (Linear)"]
    assert seen.rows[0][1:] == seen.rows[5][1:]
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(EvaluationError, match="is no report"):
        report_tables(document, [tmp_path / "report.json"], published=False)


def row(split: str, transform: str, head: str, generator: str, images: int, accuracy: float) -> dict[str, object]:
    return {
        "split": split, "transform": transform, "head": head, "generator": generator, "images": images,
        "accuracy": accuracy, "balanced": accuracy,
    }  # fmt: skip


def test_tables_in_the_posters_form() -> None:
    names = ("DF-IF", "SD-1.4", "SD-2.1", "SD-XL")
    rows = [
        row("test", transform, "linear", generator, images, accuracy)
        for transform in ("none", "transformed")
        for generator, images, accuracy in [("all", 70, 0.9), ("real", 30, 0.8)]
        + [(name, 10 * (i + 1), 0.1 * i) for i, name in enumerate(names)]
    ]
    table = seen_table({"ours": Rows(rows)}, "test", published=True)
    fake = f"{(0 * 10 + 0.1 * 20 + 0.2 * 30 + 0.3 * 40):.1f}"
    assert table.rows[0] == [
        "ours (Linear)", "90.0", "80.0", fake, "90.0", "80.0", fake, "0.0", "10.0", "20.0", "30.0",
    ]  # fmt: skip
    published = {line[0]: line[1:] for line in table.rows[1:]}
    assert published["published: CoDE (Linear)"] == [
        "98.0", "94.0", "99.0", "95.7", "95.6", "95.8", "94.8", "95.8", "94.9", "97.5",
    ]  # fmt: skip
    others = [entry | {"generator": "gen-a"} if entry["generator"] == "SD-XL" else entry for entry in rows]
    assert len(seen_table({"ours": Rows(others)}, "test", published=True).rows) == 1
    assert len(seen_table({"ours": Rows(rows)}, "test", published=False).rows) == 1


def test_unseen_generators_come_in_blocks_with_their_average() -> None:
    rows = [row("unseen", "none", "svm", name, 10, x) for name, x in [("sd-3", 0.6), ("glide", 0.8), ("stylegan", 0.5)]]
    diffusion, others = unseen_tables({"ours": Rows(rows)}, published=False)
    assert diffusion.rows == [["ours (SVM)", "80.0", "60.0", "70.0"]]
    assert others.rows == [["ours (SVM)", "50.0", "50.0"]]
    assert "| glide | sd-3 | average |" in diffusion.markdown()
    assert "<td>80.0</td>" in diffusion.html()


@pytest.mark.parametrize(
    "name", ["stylegan2-ffhq", "dalle-mini", "DALL-E v1", "muse", "gpt-4o-image", "BigGAN", "sim-latent"]
)
def test_generators_that_are_not_diffusion_models(name: str) -> None:
    assert NOT_DIFFUSION.search(name)


@pytest.mark.parametrize("name", ["SD-XL", "latent-diffusion", "DALL-E 2", "DALL-E v3", "midjourney-2022", "Guided"])
def test_generators_that_are(name: str) -> None:
    assert not NOT_DIFFUSION.search(name)


def test_command_prints_one_document(checkpoint: Path, data: Path, evaluation: Evaluation) -> None:
    runner = CliRunner()
    arguments = ["evaluate", "--checkpoint", str(checkpoint), "--data", str(data)]
    done = runner.invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    keys = ("split", "transform", "head", "generator", "images", "accuracy", "auroc", "ap")
    expected = [tuple(row[key] for key in keys) for row in evaluation.rows]
    document = json.loads(done.stdout)
    assert [tuple(row[key] for key in keys) for row in document["rows"]] == expected
    assert document["left_out"] == {"images": 0, "complete": False}
    failed = runner.invoke(app, ["evaluate", "--checkpoint", "nowhere", "--data", str(data)])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: no checkpoint at nowhere")
    assert failed.stderr.count("\n") == 1
    refused = runner.invoke(app, ["heads", "--checkpoint", str(checkpoint), "--data", str(data), "--split", "test"])
    assert (refused.exit_code, refused.stderr.startswith("error: split test must not")) == (1, True)
