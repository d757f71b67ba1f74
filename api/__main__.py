"""Commands of the API: `python -m api serve | detect | keys`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from api.detector import Detector
from api.problems import ApiError
from api.schemas import Explanation, FailedFile, Verdict
from api.terminal import show
from api.uploads import Question, Upload
from indexer.postgres import DatabaseBehind, DatabaseUnreachable
from indexer.settings import SettingsError, read_settings
from trainer.embedder import CheckpointError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})


def fail(error: Exception) -> typer.Exit:
    """Print an expected failure as one line on stderr; raise what comes back."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return typer.Exit(1)


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files named, and those of folders by their suffix, in order of name."""
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            yield path


def judge_file(detector: Detector, path: Path, question: Question) -> Verdict | FailedFile:
    """The verdict on one file, or why it cannot be read."""
    try:
        if path.stat().st_size > detector.settings.max_upload_bytes:
            limit = f"LINEUP_MAX_UPLOAD_BYTES allows {detector.settings.max_upload_bytes:,}"
            raise ApiError("too-large", f"{path} has {path.stat().st_size:,} bytes; {limit}")
        return next(detector.detect([Upload(str(path), path.read_bytes())], question))
    except OSError as error:
        problem = ApiError("unreadable", f"{path}: {error.strerror or error}")
    except ApiError as error:
        problem = error
    return FailedFile(file=str(path), error=problem.problem())


@app.command()
def detect(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    k: Annotated[int | None, typer.Option(min=1, max=1000, help="Neighbours shown and voting.")] = None,
    max_false_alarm: Annotated[
        float | None, typer.Option(min=0.0001, max=0.9999, help="Share of real images that may be called fake.")
    ] = None,
    explain: Annotated[str, typer.Option(help="regions, stability, or both with a comma.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One verdict as JSON per line on stdout.")] = False,
) -> None:
    """Judge images here in the terminal, without a server."""
    asked = frozenset(part.strip() for part in explain.split(",") if part.strip())
    if not asked <= {"regions", "stability"}:
        raise typer.BadParameter(f"{explain!r} is not regions, stability or both", param_hint="--explain")
    question = Question(k, max_false_alarm, cast("frozenset[Explanation]", asked))
    try:
        detector = Detector(read_settings(checkpoint=checkpoint, device=device)).load()
    except (SettingsError, CheckpointError, DatabaseUnreachable, DatabaseBehind) as error:
        raise fail(error) from None
    judged, failed, console = 0, 0, Console()
    try:
        detector.calibrate()
        for path in image_files(images):
            result = judge_file(detector, path, question)
            if as_json:
                print(result.model_dump_json(), flush=True)
            if isinstance(result, FailedFile):
                failed += 1
                print(f"rejected: {result.error.detail}", file=sys.stderr)
                continue
            judged += 1
            if not as_json:
                show(result, console)
    finally:
        detector.close()
    if not judged + failed:
        raise fail(ValueError(f"no image files in {', '.join(map(str, images))}"))
    if failed:
        print(f"{judged} judged, {failed} rejected", file=sys.stderr)
    if not judged:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
