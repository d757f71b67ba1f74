"""Fill, inspect and repair the store of reference images."""

import os
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer
from sqlalchemy.exc import DBAPIError

from indexer.commands import (
    AsJson,
    CheckpointFolder,
    Device,
    checkpoint_of,
    expected_failures,
    fail,
    opened,
    renew_snapshot,
    serving_checkpoint,
)
from indexer.database.connection import migrate, schema_revision, stop
from indexer.database.embedded import exit_on_termination
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.blobs import SHARDS, BlobsAway
from indexer.store.checkpoints import with_active_folder
from indexer.store.counts import miscounts, recount
from indexer.store.generators import GeneratorExists
from indexer.store.reference_facts import LABEL_NAMES
from indexer.store.relabelling import Kind, Relabelled
from indexer.store.removing import Removed
from indexer.terminal import (
    answer,
    image_progress,
    note,
    save_report,
    tell_added,
    tell_agreement,
    tell_audit,
    tell_discovery,
    tell_evaluation,
    tell_imported,
    tell_rebuilt,
    tell_relabelled,
    tell_removed,
    tell_status,
    tell_thumbnails,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def handle_termination() -> None:
    """Fill, inspect and repair the store of reference images."""
    exit_on_termination()


@app.command()
@expected_failures()
def add(
    path: Annotated[
        Path,
        typer.Argument(
            help="A folder, manifest, archive or image, here or at s3://, gs://, az:// or https://; or hf://datasets/OWNER/NAME."
        ),
    ],
    label: Annotated[str | None, typer.Option(help="real or fake: all of PATH is of this kind.")] = None,
    generator: Annotated[str | None, typer.Option(help="What made the fakes; created if new.")] = None,
    source: Annotated[str | None, typer.Option(help="Where the images came from; default: the folder's name.")] = None,
    split: Annotated[str | None, typer.Option(help="Comma list of splits to take.")] = None,
    family: Annotated[str | None, typer.Option(help="Of the generator: such as diffusion.")] = None,
    vendor: Annotated[str | None, typer.Option(help="Of the generator: who made it.")] = None,
    version: Annotated[str | None, typer.Option(help="Of the generator.")] = None,
    released_on: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Of the generator.")] = None,
    part: Annotated[
        str | None,
        typer.Option(help="I/N: add one of N parts beside other workers; auto: of a Slurm array or Kubernetes job."),
    ] = None,
    checkpoint: CheckpointFolder = None,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option(help="Read and decode everything, but write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Add images as references; what is known already is skipped, so an interrupted run can be repeated.

    At the end it says what the enrolment changed, and warns where facts of the files tell the labels apart.
    Of several parts, which share an enrolment, the last to end does so.
    """
    options: dict[str, Any] = {"family": family, "vendor": vendor, "version": version}
    options["released_on"] = released_on and released_on.date()
    facts = {name: value for name, value in options.items() if value is not None}
    if facts and (generator is None or "," in generator):
        fail("--family, --vendor, --version and --released-on need --generator with one name", 2)
    from indexer.ingest.ingest import ingest
    from indexer.ingest.workers import join_workers, leave_workers
    from indexer.measure.enrolment_effect import consequences
    from trainer.data.datasets import is_remote, read_dataset
    from trainer.data.parts import WHOLE, DatasetPart
    from trainer.model.embedder import Embedder

    settings = Settings.read(checkpoint=checkpoint, device=device)
    share = WHOLE if part is None else DatasetPart.parse(part, os.environ)
    choice: dict[str, Any] = {"split": split, "label": label, "generator": generator, "source": source}
    entries = read_dataset(path, **choice, part=share, hold=True)
    with opened(settings) as store:
        named = settings.checkpoint is not None
        settings = with_active_folder(settings, store.checkpoints)
        embedder = Embedder.load(settings.checkpoint_folder, device=settings.device, engine=settings.engine)
        if facts and not dry_run:
            with suppress(GeneratorExists):
                store.generators.create(str(generator))
            store.generators.update(str(generator), facts)
        shared = None
        if share != WHOLE and not dry_run:
            shared = join_workers(store, embedder, path, share, choice)
        with image_progress(None if is_remote(path) else lambda: read_dataset(path, **choice, part=share)) as advance:
            report = ingest(
                entries,
                embedder,
                store,
                max_pixels=settings.max_pixels,
                image_seconds=settings.image_seconds,
                generator=generator,
                source=source,
                enrolment=shared,
                dry_run=dry_run,
                while_active=not named,
                on_image=advance,
            )
        if shared is not None:
            report = leave_workers(store, shared, share, report)
        if not dry_run and not report.get("parts_left"):
            follower = renew_snapshot(settings, store, embedder.id, folder=embedder.folder)
            if report["enrolment"] is not None:
                report |= consequences(settings, follower, report["enrolment"])
                store.enrolments.finish(report["enrolment"], report)
        active = store.checkpoints.active()
    if (report["rejected"] or report["conflicts"]) and not dry_run:
        save_report(settings.home, "add", report)
    answer(as_json, report, lambda: tell_added(report, dry_run))
    if not dry_run and active is not None and active.id != embedder.id:
        note(
            f"note: {embedder.name} ({embedder.id}) is not the active checkpoint: the searches of {active.name} "
            f"({active.id}), which is, do not find these images until `lineup index rebuild --checkpoint` with it"
        )
    if 0 < report["images"] == len(report["rejected"]):
        raise typer.Exit(1)


@app.command()
@expected_failures()
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
    given: dict[str, Any] = {name: value for name, value in criteria.items() if value is not None}
    if len(given) + (generator is not None) != 1:
        fail("give one of --id, --generator, --source and --enrolment", 2)
    settings = Settings.read()
    with opened(settings) as store:
        if generator is not None:
            removed = store.generators.delete(generator, forget=forget)
        else:
            removed = store.references.remove(**given, forget=forget)
        indexes = renewed(settings, store, removed, "removed")
        try:
            store.blobs.drain()
        except (BlobsAway, DBAPIError) as error:
            reason = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())
            note(f"warning: {reason}; a service, or `lineup index check --blobs --repair`, deletes the objects later")
    report = {"removed": removed.references, "revisions": removed.revisions, "forgotten": forget}
    report["indexes"] = indexes
    answer(as_json, report, lambda: tell_removed(report))


def renewed(settings: Settings, store: Store, changed: Removed | Relabelled, verb: str) -> list[dict[str, Any]]:
    """Renew the snapshot of every index that a change touched; how many vectors it did is told under `verb`."""
    followers = [renew_snapshot(settings, store, checkpoint_id) for checkpoint_id in changed.revisions]
    return [
        {"checkpoint": one.checkpoint_id, verb: changed.vectors[one.checkpoint_id]}
        | {"size": len(one.index), "snapshot": one.saved_revision}
        for one in followers
    ]


@app.command()
@expected_failures()
def relabel(
    ids: Annotated[list[int] | None, typer.Option("--id", help="One reference; may be repeated.")] = None,
    generator: Annotated[str | None, typer.Option(help="All references of this generator.")] = None,
    source: Annotated[str | None, typer.Option(help="All references of this source.")] = None,
    enrolment: Annotated[int | None, typer.Option(help="All references that this enrolment added.")] = None,
    to: Annotated[str | None, typer.Option(help="real, or what made them: a generator, created if new.")] = None,
    undo: Annotated[bool, typer.Option(help="Make them again what they were before.")] = False,
    as_json: AsJson = False,
) -> None:
    """Change label and generator of references, which keep vectors and pictures but get new ids."""
    criteria = {"ids": ids or None, "generator": generator, "source": source, "enrolment": enrolment}
    given: dict[str, Any] = {name: value for name, value in criteria.items() if value is not None}
    if len(given) != 1 or (to is None) != undo:
        fail("give one of --id, --generator, --source and --enrolment, and one of --to and --undo", 2)
    kind = None
    if to is not None:
        kind = Kind(0, None) if to.lower() == LABEL_NAMES[0] else Kind(1, to)
    settings = Settings.read()
    with opened(settings) as store:
        relabelled = store.references.relabel(kind, **given)
        indexes = renewed(settings, store, relabelled, "relabelled")
    report = {"relabelled": len(relabelled.ids), "ids": relabelled.ids, "revisions": relabelled.revisions}
    report["indexes"] = indexes
    answer(as_json, report, lambda: tell_relabelled(report))


@app.command()
@expected_failures()
def discover(
    enrol: Annotated[
        str | None, typer.Option(metavar="CANDIDATE", help="Make references of this candidate's images.")
    ] = None,
    generator: Annotated[str | None, typer.Option(help="What made them, for --enrol; created if new.")] = None,
    source: Annotated[str | None, typer.Option(help="Where they came from, for --enrol; default: verdicts.")] = None,
    min_images: Annotated[int, typer.Option(min=2, help="Images of a candidate, at least.")] = 5,
    checkpoint: CheckpointFolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Group judged images that no reference explains: candidates for a generator that nobody has enrolled.

    They come from kept verdicts that are uncertain, of an unknown generator, novel or disputed.
    The images were not kept: what --enrol adds has the vector of this checkpoint alone. Needs the extra `train`.
    """
    if (enrol is None) != (generator is None) or (source is not None and enrol is None):
        fail("--enrol and --generator go together, and --source with them", 2)
    from indexer.follower import Follower
    from indexer.measure.calibrate import latest_calibration
    from indexer.measure.discovery import SOURCE, enrol_candidate
    from indexer.measure.discovery import discover as find_candidates
    from indexer.measure.enrolment_effect import consequences

    settings = Settings.read(checkpoint=checkpoint, device=device)
    with opened(settings) as store:
        one = serving_checkpoint(settings, store) if checkpoint is None else checkpoint_of(checkpoint, store)
        if one is None:
            fail("there are no references yet: `lineup index add` first")
        follower = Follower(settings, store, one.id, one.dim)
        follower.load()
        search = partial(find_candidates, follower, latest_calibration(store, one.id), smallest=min_images)
        if enrol is None or generator is None:
            report = search().summary()
        else:
            active = settings.checkpoint is None
            report = enrol_candidate(follower, search, enrol, generator, source=source or SOURCE, while_active=active)
            if report["enrolment"] is not None:
                folder = one.find(settings.checkpoint_folder)
                follower = renew_snapshot(settings, store, one.id, folder=folder)
                if folder is not None:
                    settings = settings.model_copy(update={"checkpoint": folder})
                    report |= consequences(settings, follower, report["enrolment"])
                store.enrolments.finish(report["enrolment"], report)
    if enrol is None:
        answer(as_json, report, lambda: tell_discovery(report))
    else:
        answer(as_json, report, lambda: tell_added(report, dry_run=False))
        if report["enrolment"] is not None:
            note(f"to undo it: lineup index remove --enrolment {report['enrolment']}")


@app.command()
@expected_failures()
def status(checkpoint: CheckpointFolder = None, device: Device = None, as_json: AsJson = False) -> None:
    """What the store holds, and how far the index is."""
    from indexer.measure.status import store_status

    settings = Settings.read(checkpoint=checkpoint, device=device)
    with opened(settings) as store:
        one = serving_checkpoint(settings, store) if checkpoint is None else checkpoint_of(checkpoint, store)
        report = store_status(settings, store, one)
    answer(as_json, report, lambda: tell_status(report))


@app.command()
@expected_failures()
def check(
    checkpoint: CheckpointFolder = None,
    device: Device = None,
    blobs: Annotated[bool, typer.Option("--blobs", help="Compare rows and object storage (LINEUP_BLOBS) too.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="With --blobs: delete objects that no row names.")] = False,
    orphan_hours: Annotated[
        float, typer.Option(min=0, help="With --blobs: how old an object must be to count as one that no row names.")
    ] = 24,
    as_json: AsJson = False,
) -> None:
    """Compare rows, counts, index and snapshot of every checkpoint (or of one); exit code 0 only where they agree."""
    from indexer.measure.check import compare, compare_blobs

    settings = Settings.read(checkpoint=checkpoint, device=device)
    if repair and not blobs:
        fail("--repair goes with --blobs; `lineup index rebuild` repairs counts and indexes", 2)
    if blobs and settings.blobs is None:
        fail("--blobs needs LINEUP_BLOBS, which is not set", 2)
    with opened(settings) as store:
        checkpoints = store.checkpoints.list() if checkpoint is None else [checkpoint_of(checkpoint, store)]
        results = [compare(settings, store, one) for one in checkpoints]
        problems = miscounts(store)
        objects = None
        if blobs:
            with image_progress(total=len(SHARDS), what="shards") as advance:
                objects = compare_blobs(store, repair=repair, hours=orphan_hours, on_shard=advance)
    agree = not problems and not any(result.problems for result in results)
    agree = agree and not (objects and (objects.missing or objects.orphans))
    report = {"agree": agree, "checkpoints": [asdict(result) for result in results], "counts": problems}
    if objects is not None:
        report["blobs"] = asdict(objects)
    answer(as_json, report, lambda: tell_agreement(results, problems, objects))
    if not agree:
        raise typer.Exit(1)


@app.command()
@expected_failures()
def rebuild(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Embed everything with this checkpoint, then make it the active one.")
    ] = None,
    partial: Annotated[bool, typer.Option(help="Switch although some images cannot be read any more.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Make snapshots and counts anew from the rows; with --checkpoint, embed all references with another one first.

    All commands then use that one, and running services change to it, unless LINEUP_CHECKPOINT names another.
    """
    settings = Settings.read(checkpoint=checkpoint, device=device)
    report: dict[str, Any] = {}
    with opened(settings) as store:
        if checkpoint is not None:
            from indexer.ingest.reembed import reembed
            from trainer.model.embedder import Embedder

            embedder = Embedder.load(checkpoint, device=settings.device, engine=settings.engine)
            todo = sum(store.references.counts().values()) - store.changes.embedded(embedder.id)
            with image_progress(total=todo) as advance:
                report = reembed(
                    embedder,
                    store,
                    max_pixels=settings.max_pixels,
                    image_seconds=settings.image_seconds,
                    partial=partial,
                    private_addresses=settings.private_addresses,
                    on_image=advance,
                )
            if report["unreadable"]:
                save_report(settings.home, "rebuild", report)
        if miscounts(store):
            recount(store)
        report["indexes"] = []
        for one in store.checkpoints.list():
            with image_progress(total=store.changes.embedded(one.id), what="index") as advance:
                follower = renew_snapshot(settings, store, one.id, anew=True, on_rows=advance)
            report["indexes"].append(
                {"checkpoint": one.id, "size": len(follower.index), "snapshot": follower.saved_revision}
            )
    answer(as_json, report, lambda: tell_rebuilt(report))
    named = Settings.read().checkpoint
    if checkpoint is not None and named is not None and named.resolve() != checkpoint.resolve():
        note(f"note: where LINEUP_CHECKPOINT is {named}, as it is here, that goes on being used")
    if checkpoint is not None and not report["active"]:
        raise typer.Exit(1)


@app.command()
@expected_failures()
def ship(checkpoint: CheckpointFolder = None) -> None:
    """Bring new references into the search engine of LINEUP_INDEX for as long as this runs.

    Services do it themselves, one at a time; this takes over where none does.
    """
    from indexer.follower import POLL
    from indexer.milvus_copy import MilvusCopy

    settings = Settings.read(checkpoint=checkpoint)
    if settings.index is None:
        fail("LINEUP_INDEX names no search engine: without one every process holds the references in its memory")
    with opened(settings) as store:
        one = serving_checkpoint(settings, store) if checkpoint is None else checkpoint_of(checkpoint, store)
        if one is None:
            fail("the store has no references yet: run lineup index add first")
        MilvusCopy(settings.index, store, one.id, one.dim).keep(Event(), POLL)


@app.command()
@expected_failures()
def evaluate(
    data: Annotated[Path, typer.Option(help="Data set of any layout.")],
    split: Annotated[str, typer.Option(help="Comma list of splits.")] = "test,unseen",
    seed: Annotated[int, typer.Option(help="Fixes transforms and bootstraps.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to keep the result in; nothing is measured again before data, index or checkpoint change."
        ),
    ] = None,
    checkpoint: CheckpointFolder = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """The trainer's tables with the index's heads: knn, nn1, linear, svm and combined, with thresholds and coverage."""
    from indexer.follower import Follower
    from indexer.measure.index_evaluation import evaluate as measure
    from indexer.measure.index_evaluation import evaluate_once
    from trainer.model.embedder import Embedder

    settings = Settings.read(checkpoint=checkpoint, device=device)
    with opened(settings) as store, image_progress() as advance:
        settings = with_active_folder(settings, store.checkpoints)
        embedder = Embedder.load(settings.checkpoint_folder, device=settings.device, engine=settings.engine)
        follower = Follower(settings, store, embedder.id, embedder.dim)
        follower.load()
        follower.try_to_save()
        images: dict[str, Any] = {"data": data, "split": split, "seed": seed, "on_image": advance}
        if output is None:
            evaluation, reused = measure(settings, follower, embedder, **images), False
        else:
            evaluation, reused = evaluate_once(settings, follower, embedder, file=output, **images)
    if reused:
        note(f"reused {output}, measured with these images, this checkpoint and these references")
    for rejected in evaluation.rejected:
        note(f"rejected {rejected.file}: {rejected.reason}")
    answer(as_json, asdict(evaluation), lambda: tell_evaluation(evaluation))


@app.command()
@expected_failures()
def audit(as_json: AsJson = False) -> None:
    """Whether facts of the files alone tell real from fake references, and near duplicates across labels."""
    from indexer.measure.audit import audit as examine

    with opened(Settings.read()) as store:
        report = examine(store)
    answer(as_json, report, lambda: tell_audit(report))


@app.command()
@expected_failures()
def thumbnails(
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest file that is fetched.")] = 64 * 1024 * 1024,
    as_json: AsJson = False,
) -> None:
    """Fetch missing pictures from their public addresses, by https or from the hub; run it again where some failed."""
    from indexer.ingest.thumbnails import fetch_thumbnails, missing_thumbnails

    settings = Settings.read()
    with opened(settings) as store, image_progress(total=missing_thumbnails(store)) as advance:
        report = fetch_thumbnails(
            store,
            max_bytes=max_bytes,
            max_pixels=settings.max_pixels,
            image_seconds=settings.image_seconds,
            on_image=advance,
        )
    if report["failed"]:
        save_report(settings.home, "thumbnails", report)
    answer(as_json, report, lambda: tell_thumbnails(report))
    if report["failed"] and not report["fetched"]:
        raise typer.Exit(1)


@app.command("export")
@expected_failures()
def export_command(
    file: Annotated[Path, typer.Argument(help="File to write; what is there is replaced.")],
    without_pictures: Annotated[
        bool, typer.Option(help="No thumbnails, uploads or paths: public addresses alone, vectors in half precision.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write all references with the vectors of every checkpoint to one checksummed file."""
    from indexer.ingest.exchange import export_references

    with (
        opened(Settings.read()) as store,
        image_progress(total=sum(store.references.counts().values())) as advance,
    ):
        report = export_references(store, file, advance, pictures=not without_pictures)
    answer(as_json, report, lambda: print(f"wrote {report['references']:,} references to {file}"))


@app.command("import")
@expected_failures()
def import_command(
    file: Annotated[Path, typer.Argument(help="What `export` has written.")], as_json: AsJson = False
) -> None:
    """Add the references of such a file; those that are known already stay, and get a picture they lack."""
    from indexer.ingest.exchange import import_references

    settings = Settings.read()
    with opened(settings) as store:
        with image_progress(what="checks and additions") as advance:
            report = import_references(store, file, advance)
        for checkpoint in store.checkpoints.list():
            if checkpoint.id not in report["checkpoints"]:
                continue
            renew_snapshot(settings, store, checkpoint.id)
            if checkpoint.find(settings.checkpoint_folder) is None:
                note(
                    f"warning: checkpoint {checkpoint.name} ({checkpoint.id}), which made vectors of this file, is not "
                    f"here: nothing can be compared with them until its folder is at {settings.checkpoint_folder} or "
                    "LINEUP_CHECKPOINT names it"
                )
    if report["conflicts"]:
        save_report(settings.home, "import", report)
    answer(as_json, report, lambda: tell_imported(report))


@app.command("migrate")
@expected_failures()
def migrate_command(
    revision: Annotated[str, typer.Argument(help="Where to; `base` drops everything.")] = "head",
    as_json: AsJson = False,
) -> None:
    """Bring the database's tables to this version (the embedded database does so by itself)."""
    with opened(Settings.read(), check=False) as store:
        migrate(store.engine, revision)
        with store.engine.connect() as connection:
            schema = schema_revision(connection)
    answer(as_json, {"schema": schema}, lambda: print(f"schema at {schema or 'nothing'}"))


@app.command("stop")
@expected_failures()
def stop_command(as_json: AsJson = False) -> None:
    """Stop the embedded database of this home, whoever uses it."""
    settings = Settings.read()
    stopped = stop(settings)
    outcome = "stopped" if stopped else f"no embedded database runs in {settings.home}"
    answer(as_json, {"stopped": stopped}, lambda: print(outcome))


if __name__ == "__main__":
    app()
