"""Shared fixtures: small images, a tiny random checkpoint, and a real Postgres."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import hypothesis
import numpy as np
import psutil
import pytest
from PIL import Image, ImageFilter
from sqlalchemy import URL, create_engine, text

from api.service_settings import ServiceSettings
from indexer.database.connection import connect, migrate
from indexer.database.embedded import EmbeddedServer
from indexer.ingest.ingest import ingest
from indexer.store import Store
from trainer.data.datasets import read_dataset
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import fit_heads
from trainer.images import Preprocess
from trainer.model.checkpoint import CheckpointConfig, build_backbone, read_config, read_weights, save_checkpoint
from trainer.model.embedder import Embedder
from trainer.model.vit_openvino import refuse_telemetry

pytest_plugins = ("publisher",)
# A busy machine is no failure: hypothesis fails examples that take over 200 ms otherwise.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
refuse_telemetry()  # some tests import OpenVINO themselves


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test is marked by its folder: `journey`, `page`, else `unit`."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(folder if folder in ("journey", "page") else "unit")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What `make soak` tried and what failed, as rows of the table in BENCHMARKS.md."""
    if terminalreporter.config.option.markexpr != "soak":
        return
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB"
    rows = []
    for report in (*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])):
        facts = dict(report.user_properties)
        if report.when == "call" or report.failed:
            failed = facts.get("failed", int(report.failed))
            part = Path(report.fspath).stem.removeprefix("test_")
            rows.append((part, facts.get("tried", report.nodeid), failed, datetime.now(UTC).date(), machine, part))
    if rows:
        terminalreporter.write_line("| part | tried | failed | date | machine | command |\n|---|---|---:|---|---|---|")
    for *cells, part in rows:
        terminalreporter.write_line(f"| {' | '.join(map(str, cells))} | `make soak PART={part}` |")


def small_image(seed: int, fake: bool, size: int = 48) -> Image.Image:
    """A blob of smooth colour noise; a fake one is upsampled by two without a filter, which leaves a grid."""
    rng = np.random.default_rng(seed)
    side = size // 2 if fake else size
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1))
    return image.resize((size, size), Image.Resampling.NEAREST)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 real and 2 x 30 fake images as `real/` and `fake/<generator>/`; formats alternate alike for both labels."""
    root = tmp_path_factory.mktemp("images")
    folders = [("real", 60, False), ("fake/gen-a", 30, True), ("fake/gen-b", 30, True)]
    for number, (name, count, fake) in enumerate(folders):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = small_image(1000 * number + i, fake)
            image.save(root / name / f"{i:03d}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT of depth 2 for 32 pixels, dimension 48, with heads and 60 calibration images of each label."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "tiny", 0)


@pytest.fixture(scope="session")
def windowed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    """The backbone of `tiny_checkpoint`, which judges images by five windows."""
    folder, config = tmp_path_factory.mktemp("windowed"), read_config(tiny_checkpoint)
    preprocess = Preprocess(mode="center_crop", image_size=32, windows=5)
    save_checkpoint(folder, read_weights(tiny_checkpoint), replace(config, preprocess=preprocess))
    return Embedder.load(folder, device="cpu", engine="openvino-f32")


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_checkpoint`, with other weights."""
    return make_checkpoint(tmp_path_factory.mktemp("other"), "other", 1)


def make_checkpoint(folder: Path, name: str, seed: int) -> Path:
    """Fill the folder of a tiny checkpoint."""
    import torch

    torch.manual_seed(seed)
    config = CheckpointConfig(
        name=name,
        image_size=32,
        dim=48,
        preprocess=Preprocess(image_size=32),
        architecture_args={"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8},
    )
    save_checkpoint(folder, build_backbone(config), config)
    labels = np.arange(120) % 2
    images = [small_image(90_000 + number, bool(label)) for number, label in enumerate(labels)]
    embeddings = Embedder.load(folder, device="cpu").embed_pixels(config.preprocess(images))
    names = [f"calibration-{number}" for number in range(len(labels))]
    generators = ["gen-a" if label else "" for label in labels]
    hashes = [sha256(image.tobytes()).hexdigest() for image in images]
    calibration = CalibrationSet(embeddings, labels.astype(np.uint8), generators, ["tests"] * 120, hashes, names)
    calibration.save(folder)
    fit_heads(embeddings, labels, calibration=calibration).save(folder)
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[URL]:
    """One server for the whole run; its database `template` is migrated and never connected to again."""
    home = Path(tempfile.mkdtemp(prefix="lineup-"))  # a short path, as a unix socket needs
    server = EmbeddedServer(home)
    url = server.start()
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        # The vacuum would come to the template, and who copies it would wait or fail.
        for setting in ("fsync", "full_page_writes", "autovacuum"):
            connection.execute(text(f"alter system set {setting} = off"))
        connection.execute(text("select pg_reload_conf()"))
        connection.execute(text("create database template"))
    template = create_engine(url.set(database="template"))
    migrate(template)
    template.dispose()
    admin.dispose()
    yield url
    server.leave()
    shutil.rmtree(home, ignore_errors=True)


@contextmanager
def new_database(server: URL) -> Iterator[str]:
    """A migrated, empty database, dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    url = server.set(drivername="postgresql", database=name)
    with admin.connect() as connection:
        connection.execute(text(f"create database {name} template template"))
    yield url.render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"drop database {name} with (force)"))
    admin.dispose()


@pytest.fixture
def database_url(postgres_server: URL) -> Iterator[str]:
    """A migrated, empty database of this test's own."""
    with new_database(postgres_server) as url:
        yield url


@pytest.fixture(scope="module")
def populated(
    postgres_server: URL, tiny_checkpoint: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceSettings]:
    """Settings of a database that holds the image folder; the module's tests leave those references as they are."""
    with new_database(postgres_server) as url:
        home = tmp_path_factory.mktemp("populated")
        settings = ServiceSettings(
            home=home, database_url=url, checkpoint=tiny_checkpoint, device="cpu", k=5, open=True
        )
        store = Store(connect(settings))
        ingest(read_dataset(image_folder, source="tests"), Embedder.load(tiny_checkpoint, device="cpu"), store)
        store.engine.dispose()
        yield settings


def fill_disk(store: Store) -> None:
    """Let the server refuse new references as one does whose disk is full."""
    refusal = "raise exception 'could not extend file: No space left on device' using errcode = 'disk_full'"
    with store.engine.begin() as connection:
        function = f"create function refuse() returns trigger language plpgsql as $$ begin {refusal}; end $$"
        connection.execute(text(function))
        trigger = "create trigger full_disk before insert on reference_image for each row execute function refuse()"
        connection.execute(text(trigger))


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> ServiceSettings:
    """Settings of a fresh home and a fresh database, without a token."""
    return ServiceSettings(home=tmp_path / "home", database_url=database_url, open=True)
