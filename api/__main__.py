"""Judge images here in the terminal, or serve the HTTP interface and the page."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from random import Random
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from api.access import SCOPES, Keys, hash_secret, in_force, is_loopback, new_secret
from api.breaker import DATABASE_AWAY
from api.judge.detector import Detector
from api.judge.loader import load_detector
from api.judge.uploads import Question, Upload
from api.schemas.problems import ApiError, FailedFile
from api.schemas.verdicts import Explanation
from api.service_settings import ServiceSettings
from api.verdict_printer import show
from indexer.commands import AsJson, CheckpointFolder, Device, fail, opened
from indexer.database.connection import DatabaseBehind
from indexer.settings import SettingsError
from indexer.store.keys import ApiKey, KeyExists
from trainer.data.datasets import read_dataset
from trainer.data.entry import DatasetError, read_file
from trainer.data.folders import is_image_name
from trainer.images import UnreadableImage
from trainer.model.checkpoint import CheckpointError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
keys = typer.Typer(help="API keys: who may call, and for what.", no_args_is_help=True)
app.add_typer(keys, name="keys")
EXPECTED = (SettingsError, CheckpointError, DatasetError, DatabaseBehind, KeyExists, ApiError, *DATABASE_AWAY)

Image = tuple[str, Callable[[], bytes]]
"""A file's name, and how to read it."""


@contextmanager
def expected_failures() -> Iterator[None]:
    """What is wrong with settings, checkpoint, data or database ends the command with one line."""
    try:
        yield
    except EXPECTED as error:
        fail(str(error))


def image_files(paths: Iterable[Path]) -> Iterator[Image]:
    """The files named, and those of folders by their suffix, in order of name."""
    for path in paths:
        files = sorted(file for file in path.rglob("*") if is_image_name(file)) if path.is_dir() else [path]
        for file in files:
            yield str(file), partial(read_file, file)


def data_set_images(paths: Iterable[Path], split: str | None, sample: int | None) -> Iterator[Image]:
    """The images of data sets, or so many of them: real and fake in turns, drawn with a fixed seed."""
    entries = [entry for path in paths for entry in read_dataset(path, split=split)]
    if sample is not None:
        Random(0).shuffle(entries)
        kinds = [[entry for entry in entries if entry.label == label] for label in (1, 0)]
        turns = (entry for pair in zip_longest(*kinds) for entry in pair if entry)
        entries = list(islice(turns, sample))
    for entry in entries:
        yield entry.uri.removeprefix("file://"), entry.read


def uploads(images: Iterable[Image], failures: list[FailedFile]) -> Iterator[Upload]:
    """Files as they are judged; those that cannot be opened go to `failures`."""
    for name, read in images:
        try:
            yield Upload(name, read())
        except (OSError, UnreadableImage) as error:
            detail = f"{name}: {getattr(error, 'strerror', None) or error}"
            failures.append(FailedFile(file=name, error=ApiError("unreadable", detail).problem()))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; anything but loopback needs a key.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 picks a free one.")] = None,
    checkpoint: CheckpointFolder = None,
    device: Device = None,
) -> None:
    """Serve the HTTP interface and the page."""
    from api.http.server import check_address, log_as_json, run

    def load() -> tuple[Detector, str | None]:
        with expected_failures():
            settings = ServiceSettings.read(host=host, port=port, checkpoint=checkpoint, device=device)
            check_address(settings.host, settings.port)
            detector = load_detector(settings)
            try:
                keyed = Keys(detector.store.keys, detector.breaker).exist()
                if not keyed and not is_loopback(settings.host):
                    advice = "make one with `lineup keys create NAME --scope admin`, or listen on 127.0.0.1"
                    raise SettingsError(f"LINEUP_HOST is {settings.host}, which needs an API key: {advice}")
            except (SettingsError, ApiError):
                detector.close()
                raise
        log_as_json()
        return detector, None if keyed or settings.open else settings.token

    run(load)


@app.command()
def detect(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    checkpoint: CheckpointFolder = None,
    device: Device = None,
    k: Annotated[int | None, typer.Option(min=1, max=1000, help="Neighbours shown and voting.")] = None,
    max_false_alarm: Annotated[
        float | None, typer.Option(min=0.0001, max=0.9999, help="Share of real images that may be called fake.")
    ] = None,
    explain: Annotated[str, typer.Option(help="regions, stability, or both with a comma.")] = "",
    split: Annotated[str | None, typer.Option(help="The paths are data sets: judge these splits.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="The paths are data sets: judge so many images.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One verdict as JSON per line on stdout.")] = False,
) -> None:
    """Judge images here in the terminal, without a server."""
    explanations = frozenset(part.strip() for part in explain.split(",") if part.strip())
    if not explanations <= {"regions", "stability"}:
        raise typer.BadParameter(f"{explain!r} is not regions, stability or both", param_hint="--explain")
    question = Question(k, max_false_alarm, cast("frozenset[Explanation]", explanations))
    judged, rejected, console = 0, 0, Console()
    missing: list[FailedFile] = []
    with (
        expected_failures(),
        closing(load_detector(ServiceSettings.read(checkpoint=checkpoint, device=device))) as detector,
    ):
        detector.calibrator.refresh()
        if detector.inactive:
            print(f"warning: {detector.inactive} {detector.hindrance or ''}".rstrip(), file=sys.stderr)
        in_data_sets = split is not None or sample is not None
        files = data_set_images(images, split, sample) if in_data_sets else image_files(images)
        for result in chain(detector.detect(uploads(files, missing), question), missing):
            if as_json:
                print(result.model_dump_json(), flush=True)
            if isinstance(result, FailedFile):
                rejected += 1
                print(f"rejected: {result.error.detail}", file=sys.stderr)
                continue
            judged += 1
            if not as_json:
                show(result, console)
    if not judged + rejected:
        fail(f"no image files in {', '.join(map(str, images))}")
    if rejected:
        print(f"{judged} judged, {rejected} rejected", file=sys.stderr)
    if not judged:
        raise typer.Exit(1)


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="What to call the key; unique.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="detect (when not given), enrol or admin; may be given several times.")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=36500, help="Days until it expires; never when not given.")
    ] = None,
    unless_exists: Annotated[bool, typer.Option(help="Do nothing when a key has this name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    scopes = sorted(set(scope or ["detect"]))
    if not set(scopes) <= set(SCOPES):
        raise typer.BadParameter(f"{', '.join(scopes)} is not of {', '.join(SCOPES)}", param_hint="--scope")
    secret = new_secret()
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    with expected_failures(), opened(ServiceSettings.read()) as store:
        try:
            key = store.keys.create(name, hash_secret(secret), scopes, expires_at=expires_at)
        except KeyExists:
            if not unless_exists:
                raise
            print(f"there is a key {name} already; it cannot be shown again", file=sys.stderr)
            return
    if as_json:
        print(json.dumps(key_json(key) | {"key": secret}))
    else:
        print(secret)
        print("Keep it: it cannot be shown again. Send it as `Authorization: Bearer ...`.", file=sys.stderr)


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """Show all keys, without their secrets."""
    with expected_failures(), opened(ServiceSettings.read()) as store:
        rows = [key_json(key) for key in store.keys.list()]
    if as_json:
        print(json.dumps({"keys": rows}))
        return
    table = Table("name", "scopes", "created", "expires", "revoked")
    for row in rows:
        table.add_row(row["name"], " ".join(row["scopes"]), row["created_at"], row["expires_at"], row["revoked_at"])
    Console().print(table)


@keys.command()
def revoke(name: Annotated[str, typer.Argument(help="The key to end; within seconds, everywhere.")]) -> None:
    """End a key."""
    with expected_failures(), opened(ServiceSettings.read()) as store:
        if not store.keys.revoke(name):
            fail(f"no key in force is called {name!r}; see `lineup keys list`")
        now = datetime.now(UTC)
        keys_left = any(in_force(key, now) for key in store.keys.list())
    print(f"revoked {name}")
    if not keys_left:
        advice = "`lineup keys create NAME --scope admin` makes another"
        print(f"no key is left, and without one nobody may call, this machine included: {advice}", file=sys.stderr)


def key_json(key: ApiKey) -> dict[str, Any]:
    """A key without its secret, as JSON."""
    times = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at")}
    texts = {name: time.isoformat(timespec="seconds") if time else None for name, time in times.items()}
    return {"name": key.name, "scopes": key.scopes, **texts}


if __name__ == "__main__":
    app()
