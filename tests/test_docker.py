"""What the container files name exists: settings, commands, folders, and the order of services."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from api.cli import app
from api.service_settings import ServiceSettings

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker" / "compose.yml").read_text()


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
    return found


def test_variables_are_settings() -> None:
    names = set(re.findall(r"LINEUP_[A-Z_]+(?=[=:] )|LINEUP_[A-Z_]+(?==)", DOCKERFILE))
    names |= set(re.findall(r"^ +(LINEUP_[A-Z_]+):", COMPOSE, re.MULTILINE))
    assert "LINEUP_DATABASE_URL" in names
    assert {name.removeprefix("LINEUP_").lower() for name in names} <= set(ServiceSettings.model_fields)


def test_copied_paths_exist_and_reach_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    paths = {path for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()}
    assert {"trainer", "indexer", "api", "migrations", "pyproject.toml", "requirements.lock"} <= paths
    assert {path for path in paths if f"!{path}" not in ignored} == set()
    assert {path for path in paths - {"README.md"} if not (ROOT / path).exists()} == set()


def test_every_copied_package_is_installed_and_every_target_exists(services: dict[str, Any]) -> None:
    assert set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)) == {"base", "lean", "cpu", "cuda"}
    assert services["api"]["build"]["target"] == "${LINEUP_TARGET:-lean}"
    assert (ROOT / "docker" / services["api"]["build"]["context"] / services["api"]["build"]["dockerfile"]).exists()


def test_the_lean_image_installs_no_training_library() -> None:
    lean = DOCKERFILE.split("FROM base AS lean")[1].split("FROM ")[0]
    assert re.findall(r"pip install (.*)", lean) == ['".[cpu]"']
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = " ".join(project["dependencies"] + project["optional-dependencies"]["cpu"])
    assert "openvino" in needed
    assert not re.search("torch|timm|scikit|opencv|webdataset", needed)


def test_commands_exist(services: dict[str, Any]) -> None:
    assert re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", DOCKERFILE, re.MULTILINE)[-2:] == ['["lineup"]', '["serve"]']
    for command in (["serve"], services["key"]["command"][:2], services["migrate"]["command"]):
        assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0, command


def test_services_wait_for_each_other(services: dict[str, Any]) -> None:
    waits = {name: dict(service.get("depends_on", {})) for name, service in services.items()}
    assert waits == {
        "db": {},
        "migrate": {"db": {"condition": "service_healthy"}},
        "key": {"migrate": {"condition": "service_completed_successfully"}},
        "api": {"key": {"condition": "service_completed_successfully"}},
    }
    assert services["api"]["init"] is True
    assert services["api"]["ports"] == ["127.0.0.1:8000:8000"]


def test_the_checkpoint_lies_where_it_is_found_unnamed(services: dict[str, Any]) -> None:
    [home] = re.findall(r"LINEUP_HOME=(\S+)", DOCKERFILE)
    mounts = services["api"]["volumes"]
    assert mounts == [
        f"home:{home}",
        f"${{LINEUP_CHECKPOINT_DIR:?the folder of a trained checkpoint}}:{home}/checkpoint:ro",
    ]
    named = [name for name, service in services.items() if "LINEUP_CHECKPOINT" in service.get("environment", {})]
    assert (named, "LINEUP_CHECKPOINT" in DOCKERFILE) == ([], False)  # or no switch would be followed


@pytest.mark.parametrize("named", ["", "elsewhere"])
def test_the_demo_trains_the_checkpoint_that_its_home_serves(named: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LINEUP_", "MAKE"))}
    environment |= {"LINEUP_CHECKPOINT": named} if named else {}
    commands = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert f"--output {named or 'lineup-data/demo/checkpoint'} " in commands
    assert 'export LINEUP_HOME=lineup-data/demo"' in commands
    assert "LINEUP_CHECKPOINT" not in commands
