"""Commands of the indexer: what it takes to fill, inspect and repair the store of reference images."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from sqlalchemy.exc import OperationalError

from indexer.embedded import EmbeddedFailure
from indexer.follower import Follower
from indexer.postgres import DatabaseBehind, DatabaseUnreachable, connect, migrate, schema_revision, stop
from indexer.settings import Settings, SettingsError, read_settings
from indexer.store import (
    BadGeneratorName,
    BadVector,
    Checkpoint,
    GeneratorExists,
    Store,
    UnknownCheckpoint,
    UnknownGenerator,
)
from indexer.terminal import (
    image_progress,
    tell_added,
    tell_agreement,
    tell_rebuilt,
    tell_removed,
    tell_status,
    write_report,
)
from trainer.datasets import DatasetError
from trainer.embedder import CheckpointError, checkpoint_id, read_config, read_weights

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
CheckpointFolder = Annotated[Path | None, typer.Option("--checkpoint", help="Checkpoint folder.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]


@app.callback()
def handle_termination() -> None:
    """Fill, inspect and repair the store of reference images."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # so that the embedded server is left properly

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def expected_failures() -> Iterator[None]:
    """What can go wrong without a fault of the program ends as one line on stderr and exit code 1."""
    try:
        yield
    except OperationalError as error:
        fail(f"the database stopped answering ({error.orig}); what was written stays, run the command again")
    except (
        SettingsError,
        DatabaseUnreachable,
        DatabaseBehind,
        EmbeddedFailure,
        DatasetError,
        CheckpointError,
        BadGeneratorName,
        GeneratorExists,
        BadVector,
        UnknownGenerator,
        UnknownCheckpoint,
    ) as error:
        fail(str(error))


def fail(message: str, code: int = 1) -> NoReturn:
    """Say it in one line, and end: 1 failed, 2 wrong usage."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def opened(settings: Settings, *, check: bool = True) -> Iterator[Store]:
    """The store of these settings."""
    engine = connect(settings, check=check)
    try:
        yield Store(engine)
    finally:
        engine.dispose()


def checkpoint_of(folder: Path, store: Store) -> Checkpoint:
    """What the store knows of the checkpoint in a folder.

    Raises:
        CheckpointError: The folder holds none.
        UnknownCheckpoint: Nothing was added with it.
    """
    return store.get_checkpoint(checkpoint_id(read_weights(folder), read_config(folder).preprocess))


def serving_checkpoint(settings: Settings, store: Store) -> Checkpoint | None:
    """The checkpoint of the settings; where there is no such folder or nothing was added with it, the active one."""
    try:
        return checkpoint_of(settings.checkpoint_folder, store)
    except (CheckpointError, UnknownCheckpoint):
        return store.active_checkpoint()


def renew_snapshot(settings: Settings, store: Store, checkpoint_id: str, *, anew: bool = False) -> int:
    """Write the snapshot of the index as the rows are now, and return the number of its vectors.

    Args:
        settings: Where it lies.
        store: The rows.
        checkpoint_id: Whose index.
        anew: Do not trust the snapshot that is there.
    """
    follower = Follower(settings, store, checkpoint_id, store.get_checkpoint(checkpoint_id).dim)
    if anew:
        follower.forget_snapshot()
    follower.load()
    follower.save()
    return len(follower.index)


@app.command()
def add(
    path: Annotated[Path, typer.Argument(help="A folder, manifest, archive or image; every layout is understood.")],
    label: Annotated[str | None, typer.Option(help="real or fake: all of PATH is of this kind.")] = None,
    generator: Annotated[str | None, typer.Option(help="What made the fakes; created if new.")] = None,
    source: Annotated[str | None, typer.Option(help="Where the images came from; default: the folder's name.")] = None,
    split: Annotated[str | None, typer.Option(help="Comma list of splits to take.")] = None,
    family: Annotated[str | None, typer.Option(help="Of the generator: such as diffusion.")] = None,
    vendor: Annotated[str | None, typer.Option(help="Of the generator: who made it.")] = None,
    version: Annotated[str | None, typer.Option(help="Of the generator.")] = None,
    released_on: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Of the generator.")] = None,
    checkpoint: CheckpointFolder = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option(help="Read and decode everything, but write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Add images as references; what is known already is skipped, so an interrupted run can be repeated."""
    facts = {"family": family, "vendor": vendor, "version": version}
    facts_given: dict[str, Any] = {name: value for name, value in facts.items() if value is not None}
    if released_on is not None:
        facts_given["released_on"] = released_on.date()
    if facts_given and (generator is None or "," in generator):
        fail("--family, --vendor, --version and --released-on need --generator with one name", 2)
    with expected_failures():
        from indexer.ingest import ingest
        from trainer.datasets import read_dataset
        from trainer.embedder import Embedder

        settings = read_settings(checkpoint=checkpoint, device=device)
        choice: dict[str, Any] = {"split": split, "label": label, "generator": generator, "source": source}
        entries = read_dataset(path, **choice)
        embedder = Embedder.load(settings.checkpoint_folder, device=settings.device)
        with opened(settings) as store:
            if facts_given and not dry_run:
                with suppress(GeneratorExists):
                    store.create_generator(str(generator))
                store.update_generator(str(generator), facts_given)
            with image_progress(console, lambda: read_dataset(path, **choice)) as advance:
                report = ingest(
                    entries,
                    embedder,
                    store,
                    max_pixels=settings.max_pixels,
                    generator=generator,
                    source=source,
                    dry_run=dry_run,
                    on_image=advance,
                )
            if not dry_run:
                renew_snapshot(settings, store, embedder.id)
            active = store.active_checkpoint()
        if report["rejected"] or report["conflicts"]:
            report["report"] = str(write_report(settings.home, report))
    if as_json:
        print(json.dumps(report))
    else:
        tell_added(console, report, dry_run)
    if not dry_run and active is not None and active.id != embedder.id:
        console.print(f"note: {embedder.name} ({embedder.id}) is not the active checkpoint, {active.id} is")
    if len(report["rejected"]) == report["images"]:
        raise typer.Exit(1)


@app.command()
def remove(
    ids: Annotated[list[int] | None, typer.Option("--id", help="One reference; may be repeated.")] = None,
    generator: Annotated[str | None, typer.Option(help="The generator and all its references.")] = None,
    source: Annotated[str | None, typer.Option(help="All references of this source.")] = None,
    enrolment: Annotated[int | None, typer.Option(help="All references that this enrolment added.")] = None,
    forget: Annotated[bool, typer.Option(help="Also refuse these images from now on.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove references: rows, thumbnails, vectors, and from every index that follows."""
    criteria = {"ids": ids or None, "source": source, "enrolment": enrolment}
    chosen: dict[str, Any] = {name: value for name, value in criteria.items() if value is not None}
    if len(chosen) + (generator is not None) != 1:
        fail("give one of --id, --generator, --source and --enrolment", 2)
    with expected_failures():
        settings = read_settings()
        with opened(settings) as store:
            if generator is not None:
                removed = store.delete_generator(generator, forget=forget)
            else:
                removed = store.remove(**chosen, forget=forget)
            for checkpoint_id in removed.revisions:
                renew_snapshot(settings, store, checkpoint_id)
    if as_json:
        print(json.dumps({"removed": removed.references, "revisions": removed.revisions, "forgotten": forget}))
    else:
        tell_removed(removed, forget)


@app.command()
def status(checkpoint: CheckpointFolder = None, device: Device = None, as_json: AsJson = False) -> None:
    """What the store holds, and how far the index is."""
    with expected_failures():
        from indexer.status import store_status

        settings = read_settings(checkpoint=checkpoint, device=device)
        with opened(settings) as store:
            one = serving_checkpoint(settings, store) if checkpoint is None else checkpoint_of(checkpoint, store)
            found = store_status(settings, store, one)
    if as_json:
        print(json.dumps(found, default=str))
    else:
        tell_status(found)


@app.command()
def check(checkpoint: CheckpointFolder = None, device: Device = None, as_json: AsJson = False) -> None:
    """Compare rows, index and snapshot of every checkpoint (or of one); exit code 0 only where they agree."""
    with expected_failures():
        from indexer.agreement import compare

        settings = read_settings(checkpoint=checkpoint, device=device)
        with opened(settings) as store:
            which = store.checkpoints() if checkpoint is None else [checkpoint_of(checkpoint, store)]
            results = [compare(settings, store, one) for one in which]
        agree = not any(result.problems for result in results)
    if as_json:
        print(json.dumps({"agree": agree, "checkpoints": [asdict(result) for result in results]}))
    else:
        tell_agreement(results)
    if not agree:
        raise typer.Exit(1)


@app.command()
def rebuild(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Embed everything with this checkpoint, then make it the active one.")
    ] = None,
    partial: Annotated[bool, typer.Option(help="Switch although some images cannot be read any more.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make the snapshots anew from the rows; with --checkpoint, embed all references with another checkpoint first."""
    with expected_failures():
        settings = read_settings(checkpoint=checkpoint, device=device)
        report: dict[str, Any] = {}
        with opened(settings) as store:
            if checkpoint is not None:
                from indexer.reembedding import reembed
                from trainer.embedder import Embedder

                embedder = Embedder.load(checkpoint, device=settings.device)
                with image_progress(console, None) as advance:
                    report = reembed(embedder, store, max_pixels=settings.max_pixels, partial=partial, on_image=advance)
            report["indexes"] = [
                {"checkpoint": one.id, "size": renew_snapshot(settings, store, one.id, anew=True)}
                for one in store.checkpoints()
            ]
    if as_json:
        print(json.dumps(report))
    else:
        tell_rebuilt(console, report)
    if checkpoint is not None and not report["active"]:
        raise typer.Exit(1)


@app.command("migrate")
def migrate_command(
    revision: Annotated[str, typer.Argument(help="Where to; `base` drops everything.")] = "head",
) -> None:
    """Bring the database's tables to this version (the embedded database does so by itself)."""
    with expected_failures(), opened(read_settings(), check=False) as store:
        migrate(store.engine, revision)
        with store.engine.connect() as connection:
            print(f"schema at {schema_revision(connection) or 'nothing'}")


@app.command("stop")
def stop_command() -> None:
    """Stop the embedded database of this home, whoever uses it."""
    with expected_failures():
        settings = read_settings()
        print("stopped" if stop(settings) else f"no embedded database runs in {settings.home}")
