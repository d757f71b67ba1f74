"""Simulated image sets: the same bytes for the same seed, whole or not at all, and files that tell no label."""

import csv
import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from trainer import progress
from trainer.__main__ import app
from trainer.data.datasets import read_dataset
from trainer.images import decode_image
from trainer.simulation.camera import photograph, sharpen, tone
from trainer.simulation.fingerprints import GENERATORS, generate
from trainer.simulation.scenes import draw_theme, render
from trainer.simulation.simulate import MANIFEST_COLUMNS, SEEN_GENERATORS, UNSEEN_GENERATORS, SimulationError, simulate

RECORDS = 30


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "images"
    simulate(folder, RECORDS, size=96, progress=False, workers=1)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_record_is_one_real_image_and_one_of_each_generator(simulated: Path) -> None:
    table = rows(simulated)
    assert tuple(table[0]) == MANIFEST_COLUMNS
    records = defaultdict(list)
    for row in table:
        records[row["group"]].append(row)
    assert len(records) == RECORDS
    for record in records.values():
        splits = {row["generator"]: row["split"] for row in record}
        assert splits in (
            {"": "train"} | dict.fromkeys(SEEN_GENERATORS, "train"),
            {"": "test"} | dict.fromkeys(SEEN_GENERATORS, "test") | dict.fromkeys(UNSEEN_GENERATORS, "unseen"),
        )
        assert {row["label"] for row in record if row["generator"]} == {"fake"}
    assert Counter(row["split"] for row in table) == {"train": 21 * 5, "test": 9 * 5, "unseen": 9}
    assert len(SEEN_GENERATORS) >= 4
    assert set(GENERATORS) == {*SEEN_GENERATORS, *UNSEEN_GENERATORS}


def test_the_reader_takes_every_image(simulated: Path) -> None:
    entries = list(read_dataset(simulated))
    assert len(entries) == len(rows(simulated)) == len({hashlib.sha256(entry.read()).digest() for entry in entries})
    for entry in entries:
        image, facts = decode_image(entry.read())
        assert image.width % 16 == image.height % 16 == 0
        assert 64 <= min(image.size) <= max(image.size) <= 128
        assert entry.uri.endswith({"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}[facts.format])


def test_the_command_says_what_it_wrote_and_where(tmp_path: Path) -> None:
    written = CliRunner().invoke(app, ["simulate", str(tmp_path / "one"), "--records", "1"])
    assert f"wrote {tmp_path / 'one'}: " in written.stderr
    assert "images, all of them simulated" in written.stderr


def test_the_folder_says_plainly_that_it_is_simulated(simulated: Path) -> None:
    text = (simulated / "README.txt").read_text()
    assert text.startswith("THESE IMAGES ARE SIMULATED.")
    assert all(name in text and name.startswith("sim-") for name in GENERATORS)
    assert {row["source"] for row in rows(simulated)} == {"simulated"}


def test_files_alone_tell_nothing(simulated: Path) -> None:
    """Format, size and quality are equal within a record; bytes are near enough that a forest learns nothing."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    entries = list(read_dataset(simulated))
    facts = [decode_image(entry.read())[1] for entry in entries]
    encodings = defaultdict(set)
    for entry, fact in zip(entries, facts, strict=True):
        encodings[entry.group].add((fact.format, fact.width, fact.height, fact.jpeg_quality))
    assert all(len(encoding) == 1 for encoding in encodings.values())
    assert {fact.format for fact in facts} == {"JPEG", "PNG", "WEBP"}
    table = np.array(
        [
            (
                fact.width,
                fact.height,
                fact.bytes,
                fact.bytes / (fact.width * fact.height),
                fact.jpeg_quality or 0,
                ("JPEG", "PNG", "WEBP").index(fact.format),
            )
            for fact in facts
        ]
    )
    labels = np.array([entry.label for entry in entries])
    groups = [entry.group for entry in entries]
    forest = RandomForestClassifier(60, min_samples_leaf=3, class_weight="balanced", random_state=0)
    scores = cross_val_predict(forest, table, labels, groups=groups, cv=GroupKFold(5), method="predict_proba")[:, 1]
    assert roc_auc_score(labels, scores) < 0.65


def features(image: Image.Image) -> np.ndarray:
    """Levels and short-range correlations of colours and of what a median filter takes away."""
    pixels = np.asarray(image, np.float32)[:64, :64]
    rest = np.stack([pixels[..., c] - cv2.medianBlur(pixels[..., c], 3) for c in range(3)], -1)
    rest -= rest.mean((0, 1))
    near = [(rest[:, d:] * rest[:, :-d]).mean() / (rest.var() + 1) for d in (1, 2, 3, 4, 8)]
    across = [(rest[..., a] * rest[..., b]).mean() / (rest.var() + 1) for a, b in ((0, 1), (0, 2), (1, 2))]
    phases = [np.log(rest[y::2, x::2].var() + 1) for y in (0, 1) for x in (0, 1)]
    return np.array([*near, *across, *phases, *np.quantile(pixels, (0, 0.01, 0.99, 1))])


def test_pixels_tell_what_files_do_not(simulated: Path) -> None:
    """A simple linear classifier on pixels beats chance clearly; a set without traces would leave it at 0.5."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    entries = list(read_dataset(simulated))
    table = np.stack([features(decode_image(entry.read())[0]) for entry in entries])
    labels = np.array([entry.label for entry in entries])
    groups = [entry.group for entry in entries]
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    scores = cross_val_predict(model, table, labels, groups=groups, cv=GroupKFold(5), method="predict_proba")[:, 1]
    assert 0.75 < roc_auc_score(labels, scores) < 0.999


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_processes(tmp_path: Path) -> None:
    counts = [simulate(tmp_path / name, 4, size=64, workers=n, progress=False) for name, n in (("a", 1), ("b", 2))]
    assert counts[0] == counts[1] == {"train": 15, "test": 5, "unseen": 1}
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    simulate(tmp_path / "c", 4, size=64, seed=43, progress=False)
    assert digests(tmp_path / "c") != digests(tmp_path / "a")
    simulate(tmp_path / "d", 5, size=64, progress=False)  # more records keep the first ones
    first = {path: digest for path, digest in digests(tmp_path / "a").items() if "/" in path}
    assert first.items() <= digests(tmp_path / "d").items()


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    counts = simulate(tmp_path / "a", 1, size=64, progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert simulate(tmp_path / "a", 1, size=64, progress=False) == counts
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    simulate(tmp_path / "a", 1, size=64, progress=False)
    with pytest.raises(SimulationError, match=r"another simulation \(records 1, .*asked: records 2"):
        simulate(tmp_path / "a", 2, size=64, progress=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/photo.jpg").write_bytes(b"mine")
    with pytest.raises(SimulationError, match="is no simulation: choose another folder"):
        simulate(tmp_path / "b", 1, progress=False)
    (tmp_path / "empty").mkdir()
    assert simulate(tmp_path / "empty", 1, size=64, progress=False) == {"train": 5}
    for records, size, seed in ((0, 64, 0), (1, 63, 0), (1, 64, -1)):
        with pytest.raises(SimulationError, match="expected at least 1 record"):
            simulate(tmp_path / "x", records, size=size, seed=seed, progress=False)


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def save(image: Image.Image, path: Path, **options: object) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "a", 2, size=64, progress=False)
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_give_one_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    simulate(other, 1, size=64, progress=False)
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        """The other run finishes just before this one."""
        if not target.exists():
            rename(other, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert simulate(tmp_path / "a", 1, size=64, progress=False) == {"train": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_progress_goes_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PERIOD", 0.001)
    simulate(tmp_path / "a", 1, size=64)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Simulating images: 0 %" in err
    assert json.loads((tmp_path / "a/simulation.json").read_text())["images"] == {"train": 5}


# What scenes, camera and generators are made of


def test_scenes_have_the_spectrum_of_natural_images() -> None:
    """Power falls like 1 / f^2, give or take, over the lower frequencies (Field 1987)."""
    power = np.zeros((96, 96))
    window = np.outer(np.hanning(96), np.hanning(96))
    for seed in range(12):
        rng = np.random.default_rng(seed)
        grey = render(draw_theme(rng), 96, 96, rng).mean(-1)
        power += np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    f = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(96)[None])
    low = (f > 0.03) & (f < 0.3)
    slope = np.polyfit(np.log(f[low]), np.log(power[low]), 1)[0]
    assert -3.3 < slope < -1.5


def test_surfaces_alone_have_it_too() -> None:
    theme = replace(draw_theme(np.random.default_rng(0)), cover=0.0, ridges=0, texture=0.3)
    sky = render(theme, 96, 96, np.random.default_rng(1)).mean(-1)
    step, spread = np.abs(np.diff(sky, axis=1)).mean(), sky.std()
    assert 0 < step < 0.3 * spread  # white noise would step by more than its spread


def test_images_of_a_theme_are_different_scenes_of_its_colours() -> None:
    theme = draw_theme(np.random.default_rng(1))
    first, second = (render(theme, 64, 80, np.random.default_rng(seed)) for seed in (2, 3))
    assert first.shape == (80, 64, 3)
    assert first.dtype == np.float32
    assert (first.min() >= 0, first.max() <= 1) == (True, True)
    assert np.abs(first - second).mean() > 0.02
    np.testing.assert_array_equal(first, render(theme, 64, 80, np.random.default_rng(2)))


def test_tone_is_the_srgb_curve_with_contrast() -> None:
    class Flat(np.random.Generator):
        def uniform(self, *_: object) -> float:  # type: ignore[override]
            return 0.0

    light = np.array([0.0, 0.002, 0.2140, 1.0, 2.0], np.float32)
    np.testing.assert_allclose(tone(light, Flat(np.random.PCG64())), [0, 0.02584, 0.5, 1, 1], atol=1e-3)


def test_sharpening_keeps_the_mean_and_raises_edges() -> None:
    edge = np.repeat(np.array([0.25, 0.75], np.float32), 16)[None].repeat(8, 0)
    out = sharpen(edge, 1.0, 1.0)
    assert out.max() > 0.8
    assert out[:, 0].mean() == pytest.approx(0.25, abs=1e-6)


def test_a_camera_keeps_the_colours() -> None:
    scene = np.full((32, 32, 3), (0.5, 0.25, 0.05), np.float32)
    for seed in range(6):  # whatever its exposure, contrast and demosaicing
        red, green, blue = photograph(scene, np.random.default_rng(seed)).mean((0, 1))
        assert red > green + 0.05 > blue + 0.1


def test_a_camera_leaves_the_trace_of_its_mosaic() -> None:
    """Where a colour was interpolated its noise is smoother than where it was measured: for green, a chequer."""
    scene = np.full((64, 64, 3), 0.4, np.float32)
    green = np.stack([photograph(scene, np.random.default_rng(seed))[..., 1] for seed in range(40)])
    spread = green.std(0)
    y, x = np.mgrid[0:64, 0:64]
    measured = (y + x) % 2 == 1
    assert spread[measured].mean() > 1.1 * spread[~measured].mean()


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_keeps_the_picture_and_its_range(name: str) -> None:
    rng = np.random.default_rng(3)
    scene = render(draw_theme(rng), 96, 64, rng)
    drawn = generate(name, scene, np.random.default_rng(0))
    assert drawn.shape == (64, 96, 3)
    assert (drawn.min() > 0.01, drawn.max() < 0.99) == (True, True)
    small, wanted = (
        cv2.resize(picture, (12, 8), interpolation=cv2.INTER_AREA) for picture in (drawn, tone(scene, rng))
    )
    assert np.corrcoef(small.ravel(), wanted.ravel())[0, 1] > 0.9
    np.testing.assert_array_equal(drawn, generate(name, scene, np.random.default_rng(0)))


@pytest.fixture(scope="module")
def scenes() -> list[np.ndarray]:
    rngs = [np.random.default_rng(seed) for seed in range(8)]
    return [render(draw_theme(rng), 96, 96, rng) for rng in rngs]


def drawn_by(name: str, scenes: list[np.ndarray]) -> list[np.ndarray]:
    """Grey pictures of the scenes by a generator, each (96, 96)."""
    return [generate(name, scene, np.random.default_rng(seed)).mean(-1) for seed, scene in enumerate(scenes)]


@pytest.fixture
def traceless(scenes: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What a generator without a trace would draw."""
    monkeypatch.setitem(GENERATORS, "sim-none", lambda picture, rng: picture)
    return drawn_by("sim-none", scenes)


def peak(name: str, period: int) -> float:
    """Power of a flat picture at one horizontal or vertical period, in units of the median power."""
    flat = [np.full((64, 64, 3), 0.3, np.float32)] * 8
    power = np.sum([np.abs(np.fft.fft2(grey - grey.mean())) ** 2 for grey in drawn_by(name, flat)], 0)
    k = 64 // period
    return float(max(power[0, k], power[k, 0]) / np.median(power))


def steps(pictures: list[np.ndarray]) -> np.ndarray:
    """Mean size of the step between neighbouring columns by their place modulo 8, shape (8,)."""
    sizes = np.mean([np.abs(np.diff(grey, axis=1)).mean(0) for grey in pictures], 0)[:88]
    return np.asarray(sizes.reshape(-1, 8).mean(0))


def band(pictures: list[np.ndarray], low: float, high: float) -> float:
    """Power between two frequencies in cycles per pixel."""
    window = np.outer(np.hanning(96), np.hanning(96))
    power = np.sum([np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2 for grey in pictures], 0)
    f = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(96)[None])
    return float(power[(f >= low) & (f < high)].mean())


def test_transposed_convolution_leaves_a_checkerboard_at_several_scales() -> None:
    assert peak("sim-upconv", 2) > 30
    assert peak("sim-upconv", 4) > 30
    assert peak("sim-bilinear", 2) < 10


def test_nearest_upsampling_steps_at_every_second_column(scenes: list[np.ndarray], traceless: list[np.ndarray]) -> None:
    inside, between = (steps(drawn_by("sim-nearest", scenes))[start::2].mean() for start in (0, 1))
    assert between > 1.15 * inside
    inside, between = (steps(traceless)[start::2].mean() for start in (0, 1))
    assert between < 1.05 * inside


def test_bilinear_upsampling_and_sharpening_move_power_down(
    scenes: list[np.ndarray], traceless: list[np.ndarray]
) -> None:
    drawn = drawn_by("sim-bilinear", scenes)
    gains = [band(drawn, *edges) / band(traceless, *edges) for edges in ((0.05, 0.15), (0.3, 0.45))]
    assert gains[0] > 2 * gains[1]


def test_latent_patches_repeat_every_eight_pixels(scenes: list[np.ndarray], traceless: list[np.ndarray]) -> None:
    """What the decoder makes up is least certain halfway between two patches, and its patches fade unevenly."""

    def contrast(pictures: list[np.ndarray]) -> float:
        details = [np.abs(grey - cv2.GaussianBlur(grey, (0, 0), 1.5)).mean(0) for grey in pictures]
        by_place = np.mean(details, 0).reshape(-1, 8).mean(0)
        return float(np.abs(np.fft.fft(by_place)[1]) / by_place.sum())

    assert contrast(drawn_by("sim-latent", scenes)) > 2 * contrast(traceless)
    assert peak("sim-latent", 8) > 100
    assert peak("sim-bilinear", 8) < 10


def test_spectral_truncation_lacks_high_frequencies(scenes: list[np.ndarray], traceless: list[np.ndarray]) -> None:
    drawn = drawn_by("sim-spectral", scenes)
    assert band(drawn, 0.03, 0.1) > 0.6 * band(traceless, 0.03, 0.1)
    assert band(drawn, 0.3, 0.5) < 0.4 * band(traceless, 0.3, 0.5)
