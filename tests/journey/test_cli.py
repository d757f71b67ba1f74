"""The command `lineup`: every program under one name, and the same where it is installed from a wheel."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from zipfile import ZipFile

import pytest
from typer.testing import CliRunner

from api.cli import PROGRAMS, app
from api.service_status import package_version
from indexer.database.embedded import EmbeddedServer

ROOT = Path(__file__).parents[2]
PACKAGES = ("api", "indexer", "trainer", "migrations")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], ["train", "index", "serve", "detect", "keys"]),
        (["train"], ["simulate", "fit", "heads", "evaluate", "import", "export"]),
        (["index"], ["add", "remove", "status", "check", "rebuild", "migrate", "stop"]),
        (["keys"], ["create", "list", "revoke"]),
        (["train", "fit"], ["Usage: lineup train fit"]),
        (["serve"], ["Usage: lineup serve", "--port"]),
        (["detect"], ["Usage: lineup detect", "--json"]),
    ],
)
def test_every_program_is_there(arguments: list[str], shown: list[str]) -> None:
    done = CliRunner().invoke(app, [*arguments, "--help"], prog_name="lineup", env={"COLUMNS": "150"})
    assert done.exit_code == 0, done.output
    assert [text for text in shown if text not in done.stdout] == []


def test_the_version_is_told() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"lineup {package_version()}\n")


def test_a_command_that_is_not_there_is_wrong_usage() -> None:
    done = CliRunner().invoke(app, ["trian"])
    assert done.exit_code == 2
    assert "No such command 'trian'" in done.stderr


@pytest.mark.parametrize(("name", "unneeded"), [("detect", {"trainer.__main__"}), ("train", {"faiss", "torch"})])
def test_a_command_imports_its_own_program_only(name: str, unneeded: set[str]) -> None:
    code = "import sys; from api.cli import app; app(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    command = [sys.executable, "-c", code, name, "--help"]
    modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert f"{PROGRAMS[name]}.__main__" in modules
    assert not unneeded.intersection(modules)


def test_a_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    source, installed, elsewhere = tmp_path / "source", tmp_path / "installed", tmp_path / "elsewhere"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    files = {path.relative_to(source) for name in PACKAGES for path in (source / name).rglob("*") if path.is_file()}
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, check=True)
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    assert {path for path in files if not (installed / path).is_file()} == set()

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("lineup", scripts["lineup"], "console_scripts").load() is app
    elsewhere.mkdir()
    home = Path(tempfile.mkdtemp(prefix="lineup-"))  # a short path, as a unix socket needs
    code = "import migrations; print(migrations.__file__); from api.cli import app; app()"
    command = [sys.executable, "-c", code, "index", "status", "--json"]
    environment = os.environ | {"PYTHONPATH": str(installed), "LINEUP_HOME": str(home)}
    environment.pop("LINEUP_DATABASE_URL", None)
    try:
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        where, status = done.stdout.splitlines()
        assert Path(where).is_relative_to(installed)
        assert json.loads(status)["references"] == {"real": 0, "fake": 0}
    finally:
        EmbeddedServer(home).stop()
        shutil.rmtree(home, ignore_errors=True)
