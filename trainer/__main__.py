"""Commands of the trainer: `python -m trainer simulate | fit`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)


def fail(error: Exception) -> typer.Exit:
    """Print an expected failure as one line on stderr; raise what comes back."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return typer.Exit(1)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="Folder to write images and manifest.csv into.")],
    records: Annotated[int, typer.Option(min=1, help="Real images; each generator makes as many fakes in turn.")] = 240,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 42,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write a set of SIMULATED photographs and generated images, for demonstrations and tests."""
    from trainer.simulate import simulate as write_images

    try:
        report = write_images(out, records=records, seed=seed)
    except (ValueError, OSError) as error:
        raise fail(error) from None
    if as_json:
        print(json.dumps(report))


if __name__ == "__main__":
    app()
