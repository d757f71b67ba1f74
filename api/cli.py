"""The command `lineup`: all programs under one name."""

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

PROGRAMS = {"train": "trainer", "index": "indexer", "serve": "api", "detect": "api", "keys": "api"}
"""The program of each command; `train` and `index` are the whole of theirs."""


class Programs(TyperGroup):
    """Imports a program when a command of it is asked for: detecting needs nothing of training."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of `PROGRAMS`."""
        return list(PROGRAMS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, None where there is none."""
        if cmd_name not in PROGRAMS:
            return None
        program = PROGRAMS[cmd_name]
        group: Any = typer.main.get_command(import_module(f"{program}.__main__").app)
        command = group.get_command(ctx, cmd_name) if program == "api" else group
        command.name = cmd_name
        return command


app = typer.Typer(cls=Programs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def print_version(wanted: bool) -> None:
    """Print the version and end, where it was asked for."""
    if wanted:
        from api.service_status import package_version

        print(f"lineup {package_version()}")
        raise typer.Exit


@app.callback()
def lineup(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Tell whether images were generated, by the known ones closest to them."""
    from api.service_settings import check_names
    from indexer.settings import SettingsError

    try:
        check_names()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
