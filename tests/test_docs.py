"""README and help say what the program does."""

import re
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from api.__main__ import app as api_app
from api.http.app import create_app
from api.service_settings import ServiceSettings
from indexer.__main__ import app as indexer_app
from trainer.__main__ import app as trainer_app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
APPS = {"train ": trainer_app, "index ": indexer_app, "": api_app}
"""By what stands between `lineup` and the name of a command."""


@pytest.mark.parametrize("name", ServiceSettings.model_fields)
def test_every_setting_is_documented_as_the_class_says(name: str) -> None:
    field = ServiceSettings.model_fields[name]
    default = "" if field.default_factory or field.default in (None, "") else f"`{field.default}`"
    assert field.description
    assert f"| `LINEUP_{name.upper()}` | {default} | {' '.join(field.description.split())} |" in README


@pytest.mark.parametrize("program", APPS)
def test_every_command_has_help_and_appears_in_the_readme(program: str) -> None:
    group = get_command(APPS[program])
    assert isinstance(group, typer.core.TyperGroup)
    for name, command in group.commands.items():
        assert command.help
        assert re.search(rf"\blineup {program}[^\n]*\b{name}\b", README), name


def test_one_form_of_the_commands_is_used_throughout() -> None:
    paths = [ROOT / name for name in ("README.md", "BENCHMARKS.md", "CHANGELOG.md", "Makefile")]
    for folder in ("api", "indexer", "trainer", "benchmarks", "docs", "docker", "migrations"):
        paths += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".js", ".html", ".yml", "")]
    texts = {path: path.read_text() for path in paths if path.is_file()}
    other = re.compile(r"-m (trainer|indexer|api)\b|`(trainer|indexer|api) [a-z]")
    assert len(texts) > 100
    assert [path for path, text in texts.items() if other.search(text)] == []


def test_every_call_is_in_the_readme(settings: ServiceSettings) -> None:
    paths = create_app(settings).openapi()["paths"]
    missing = {path for path in paths if path.startswith("/v1") and "/".join(path.split("/")[:3]) not in README}
    assert paths
    assert not missing
