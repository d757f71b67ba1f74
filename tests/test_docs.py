"""README and help say what the program does."""

import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer
from typer.main import get_command

from api.__main__ import app as api_app
from api.http.app import create_app
from api.service_settings import ServiceSettings
from api.verdict_file import COLUMNS
from indexer.__main__ import app as indexer_app
from trainer.__main__ import app as trainer_app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
APPS = {"train ": trainer_app, "index ": indexer_app, "": api_app}
"""By what stands between `lineup` and the name of a command."""
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


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
        further = command.help.partition("\n\n")[2].splitlines()
        assert all(line.endswith(".") for line in further if line), "its lines are broken in the terminal, too"
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


def test_every_column_of_a_table_is_explained() -> None:
    guide = (ROOT / "docs" / "index.md").read_text()
    assert [column for column in COLUMNS if f"`{column}`" not in guide] == []


def anchors(page: Path) -> set[str]:
    """What a link may name within a page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading)) for heading in headings)
    return {heading.lower().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        parts = urlsplit(link)
        if not parts.scheme:
            target = (page.parent / parts.path).resolve() if parts.path else page
            assert target.exists(), link
            assert not parts.fragment or parts.fragment in anchors(target), link


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `lineup ...` in the fenced blocks of a page."""
    for language, block in FENCED.findall(page.read_text()):
        if language in ("", "bash", "sh"):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                words = shlex.split(re.sub(r"\$\(.*?\)", "X", line.removeprefix("$ ")), comments=True)
                words = [word for word in words if not re.fullmatch(r"LINEUP_\w+=.*", word)]
                if words[:1] == ["lineup"]:
                    yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    for words in commands(page):
        program = f"{words[0]} " if f"{words[0]} " in APPS else ""
        group: Any = get_command(APPS[program])
        rest = words[1:] if program else words
        while isinstance(group, typer.core.TyperGroup) and rest:
            assert rest[0] in group.commands, " ".join(words)
            group, rest = group.commands[rest[0]], rest[1:]
        options = {name for option in group.params for name in (*option.opts, *option.secondary_opts)}
        for word in rest:
            if re.match(r"\[?--?[a-z]", word):
                assert word.strip("[]").partition("=")[0] in options, " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_import_what_there_is(page: Path) -> None:
    for language, block in FENCED.findall(page.read_text()):
        if language == "python":
            for statement in ast.walk(ast.parse(block)):
                if isinstance(statement, ast.ImportFrom) and statement.module:
                    module = import_module(statement.module)
                    assert [name.name for name in statement.names if not hasattr(module, name.name)] == []


def test_the_page_of_fields_is_that_of_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("fields", ROOT / "docs" / "fields.py")
    assert spec
    assert spec.loader
    fields = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fields", fields)
    spec.loader.exec_module(fields)
    assert fields.PAGE.read_text() == fields.text(), "make docs writes it anew"
    assert [row for row in fields.text().splitlines() if row.endswith("|  |")] == []
