"""The checkpoint and the references that come with Lineup: small, without pictures or paths, and ready to judge."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from api.cli import app
from trainer.model.checkpoint import read_config, read_id

ROOT = Path(__file__).parents[2]
PRETRAINED = ROOT / "pretrained"
CHECKPOINT, REFERENCES = PRETRAINED / "checkpoint", PRETRAINED / "references.lineup"
PORTRAITS = sorted((PRETRAINED / "samples").glob("*.jpg"))


def test_the_files_are_small_and_belong_together() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 15e6
    assert REFERENCES.stat().st_size <= 5e6
    with ZipFile(REFERENCES) as archive:
        about = json.loads(archive.read("about.json"))
        rows = [row for page in range(about["pages"]) for row in json.loads(archive.read(f"{page}.json"))]
    assert [checkpoint["id"] for checkpoint in about["checkpoints"]] == [read_id(CHECKPOINT)]
    assert {row["label"] for row in rows} == {0, 1}
    assert all(row["uri"].startswith("https://raw.githubusercontent.com/") for row in rows)


def test_no_path_of_a_machine_is_in_them() -> None:
    config = read_config(CHECKPOINT)
    places = [config.training["data"], config.provenance["data"], str(config.training["teacher"])]
    assert not [place for place in places if Path(place).is_absolute()]
    with ZipFile(REFERENCES) as archive:
        texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    texts += [path.read_bytes() for path in CHECKPOINT.glob("*.json")]
    assert not [text for text in texts if b'"/' in text]


def test_the_demo_judges_what_comes_with_it(database_url: str, tmp_path: Path) -> None:
    env = {"LINEUP_HOME": str(tmp_path), "LINEUP_DATABASE_URL": database_url, "LINEUP_DEVICE": "cpu"}
    env |= {"LINEUP_RECORD": "false"}

    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--json"], env=env)
        assert done.exit_code == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    (report,) = run("index", "import", str(REFERENCES))
    assert report["added"] > 1000
    verdicts = run("detect", *map(str, PORTRAITS), *load_sample_images().filenames)
    assert {verdict["model"]["checkpoint"] for verdict in verdicts} == {read_id(CHECKPOINT)}
    assert len(verdicts) == 4
    for verdict in verdicts:
        assert verdict["score"] is not None
        assert verdict["calibration"]["real"] >= 100
        assert verdict["neighbours"]
        assert all(neighbour["thumbnail"] is None for neighbour in verdict["neighbours"])
        assert len(verdict["image"]["windows"]) == 3


@pytest.mark.parametrize("images", ["", "folder/a.jpg"])
def test_make_demo_judges_the_samples_or_what_it_is_given(images: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LINEUP_", "MAKE"))}
    given = [f"IMAGES={images}"] if images else []
    commands = subprocess.run(
        ["make", "--dry-run", "demo", *given], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "index import pretrained/references.lineup" in commands
    assert f"detect {images} --details\n" in commands if images else "detect pretrained/samples/*.jpg" in commands
