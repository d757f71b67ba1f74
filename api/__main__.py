"""Judge images here in the terminal, or serve the HTTP interface and the page."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from api.access import SCOPES, Keys, hash_secret, in_force, is_loopback, new_secret
from api.breaker import DATABASE_AWAY
from api.image_places import Places
from api.judge.detector import Detector
from api.judge.loader import load_detector
from api.judge.uploads import Question, Upload
from api.schemas.problems import ApiError, FailedFile
from api.schemas.verdicts import Explanation, Verdict
from api.service_settings import ServiceSettings
from api.verdict_file import VerdictFile
from api.verdict_printer import Tally, in_a_line, show
from indexer.commands import AsJson, CheckpointFolder, Device, fail, opened
from indexer.database.connection import DatabaseBehind
from indexer.index.milvus import EngineAway
from indexer.settings import SettingsError
from indexer.store.blobs import BlobsAway
from indexer.store.keys import ApiKey, KeyExists
from indexer.terminal import image_progress
from trainer.data.entry import DatasetError
from trainer.model.checkpoint import CheckpointError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
keys = typer.Typer(help="API keys: who may call, and for what.", no_args_is_help=True)
app.add_typer(keys, name="keys")
PLACES_HELP = (
    "Images, folders of them, data sets in a file (manifest .csv, shard .tar, .parquet, hf://...), https:// addresses, "
    "or - for a list of all these on standard input."
)
OUTPUT_HELP = (
    "Write a line of JSON per image to NAME.jsonl, and a table NAME.csv or NAME.parquet if named so; goes on where it "
    "ended."
)
EXPECTED = (
    SettingsError,
    CheckpointError,
    DatasetError,
    DatabaseBehind,
    EngineAway,
    BlobsAway,
    KeyExists,
    ApiError,
    *DATABASE_AWAY,
)


@contextmanager
def expected_failures() -> Iterator[None]:
    """What is wrong with settings, checkpoint, data or what they name ends the command with one line."""
    try:
        yield
    except EXPECTED as error:
        fail(str(error))
    except BrokenPipeError:  # of stdout, whose reader has had enough: no failure of ours
        raise
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}")


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
    images: Annotated[list[str], typer.Argument(metavar="PLACE...", help=PLACES_HELP)],
    checkpoint: CheckpointFolder = None,
    device: Device = None,
    k: Annotated[int | None, typer.Option(min=1, max=1000, help="Neighbours shown and voting.")] = None,
    max_false_alarm: Annotated[
        float | None, typer.Option(min=0.0001, max=0.9999, help="Share of real images that may be called fake.")
    ] = None,
    explain: Annotated[str, typer.Option(help="regions, stability, or both with a comma.")] = "",
    split: Annotated[str | None, typer.Option(help="The places are data sets: judge these splits.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="The places are data sets: judge so many images.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help=OUTPUT_HELP)] = None,
    details: Annotated[
        bool | None,
        typer.Option(help="Show heads and neighbours of each image, not a line; default: of a single one."),
    ] = None,
    private_addresses: Annotated[
        bool, typer.Option("--private-addresses", help="Also fetch https:// from servers that are not public.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One verdict as JSON per line on stdout.")] = False,
) -> None:
    """Judge images here in the terminal, without a server."""
    explanations = frozenset(part.strip() for part in explain.split(",") if part.strip())
    if not explanations <= {"regions", "stability"}:
        raise typer.BadParameter(f"{explain!r} is not regions, stability or both", param_hint="--explain")
    if output is not None and (as_json or details):
        raise typer.BadParameter("it takes the place of --json and --details", param_hint="--output")
    question = Question(k, max_false_alarm, cast("frozenset[Explanation]", explanations))
    tally, console = Tally(), Console()
    with expected_failures():
        settings = ServiceSettings.read(checkpoint=checkpoint, device=device)
        places = Places(tuple(images), split, sample, settings.max_upload_bytes, private_addresses)
        count = places.count
        with ExitStack() as stack:
            detector = stack.enter_context(closing(load_detector(settings)))
            detector.calibrator.refresh()
            if detector.inactive:
                print(f"warning: {detector.inactive} {detector.hindrance or ''}".rstrip(), file=sys.stderr)
            written = None
            if output is not None:
                written = VerdictFile(output, detector.embedder.id, question)
                inputs = {Path(name).resolve() for name in images}
                for path in written.paths:
                    if path.resolve() in inputs:
                        raise DatasetError(f"--output would replace {path}, which is to be judged; name another file")
                stack.enter_context(written)
            advance = stack.enter_context(image_progress(total=count)) if written else None
            for result in judged(detector, places, question, written, tally, advance):
                if isinstance(result, FailedFile):
                    print(f"rejected: {result.error.detail}", file=sys.stderr)
                if written:
                    written.add(result)
                elif as_json:
                    print(result.model_dump_json(), flush=True)
                elif isinstance(result, Verdict):
                    if count == 1 if details is None else details:
                        show(result, console)
                    else:
                        print(in_a_line(result), flush=True)
    if not tally.images:
        fail(f"no image files in {', '.join(images)}")
    if tally.images > 1 or written:
        for line in tally.lines():
            print(line, file=sys.stderr)
    if written:
        print(f"wrote {' and '.join(map(str, written.paths))}", file=sys.stderr)
    if tally.rejected == tally.images:
        raise typer.Exit(1)


def judged(
    detector: Detector,
    places: Places,
    question: Question,
    written: VerdictFile | None,
    tally: Tally,
    advance: Callable[[], None] | None,
) -> Iterator[Verdict | FailedFile]:
    """What is said of each image that is not in the file already, each counted."""
    failures: list[FailedFile] = []

    def to_judge() -> Iterator[Upload]:
        for upload in places.uploads(failures):
            if written and written.has(upload.file, upload.data):
                tally.before += 1
                if advance:
                    advance()
            else:
                yield upload

    for result in chain(detector.detect(to_judge(), question), failures):
        tally.count(result)
        if advance:
            advance()
        yield result


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
