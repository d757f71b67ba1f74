"""Learn the embedding and its heads, measure them, and bring them in and out."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from trainer.fit.fit_settings import SPLIT_HELP, FitSettings
from trainer.progress import Bar

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)
TRAINING = "cv2 huggingface_hub joblib matplotlib scipy sklearn tensorboard timm torch torchvision webdataset"
EXTRAS = dict.fromkeys(TRAINING.split(), "train") | dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export")
"""The extra that brings a library which serving does without."""
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
FIRST_BATCH = 32
"""Images after which the time for all of them is estimated."""


def default_checkpoint() -> Path:
    """`LINEUP_HOME/checkpoint`, for where neither --checkpoint nor LINEUP_CHECKPOINT is given."""
    return Path(os.environ.get("LINEUP_HOME", "lineup-data")) / "checkpoint"


def tell(line: str) -> None:
    """Say it on stderr as it is: paths are no markup, and a command can be copied where the output is piped."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def expected_failures() -> Iterator[None]:
    """What can go wrong without a fault of the program ends as one line on stderr and exit code 1."""
    try:
        yield
    except ImportError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        reason = f'this command needs {library}, which is not installed: pip install "lineup[{EXTRAS[library]}]"'
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
    else:
        return
    print(f"error: {reason}", file=sys.stderr)
    raise typer.Exit(1)


def report(as_json: bool, document: object, *lines: str) -> None:
    """Print what a command did: as one JSON document on stdout, or in lines on stderr."""
    if as_json:
        print(json.dumps(document))
        return
    for line in lines:
        tell(line)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="Folder to write images and manifest.csv into.")],
    records: Annotated[int, typer.Option(min=1, help="Real images; each generator makes as many fakes in turn.")] = 240,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 42,
    as_json: Json = False,
) -> None:
    """Write a set of SIMULATED photographs and generated images, for demonstrations and tests."""
    with expected_failures():
        from trainer.simulation.simulate import simulate as write_images

        images = write_images(out, records=records, seed=seed)
    splits = ", ".join(f"{count} {split}" for split, count in images.items())
    report(as_json, images, f"wrote {out}: {splits} images, all of them simulated")


@app.command()
def align(
    data: Annotated[Path, typer.Argument(help="Data set of any layout.")],
    out: Annotated[Path, typer.Argument(help="Folder to write images and manifest.csv into.")],
    encoder: Annotated[Path, typer.Option(help="Safetensors file of a tiny autoencoder (TAESD and its kin).")],
    decoder: Annotated[Path, typer.Option(help="Its other half.")],
    split: Annotated[str, typer.Option(help=SPLIT_HELP)] = "train",
    generator: Annotated[str, typer.Option(help="Name of the reconstructions.")] = "reconstruction",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Copy a split and add a reconstruction of each real training image: a fake of the same content."""
    with expected_failures():
        from trainer.model.embedder import pick_device
        from trainer.simulation.reconstructions import align as write_reconstructions

        with counting_bar("reconstructing") as advance:
            images = write_reconstructions(
                data,
                out,
                encoder,
                decoder,
                split=split,
                generator=generator,
                device=pick_device(device),
                on_image=advance,
            )
    report(as_json, images, f"wrote {out}: " + ", ".join(f"{count} {kind}" for kind, count in images.items()))


def options_of(settings: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command an option for each field of a dataclass that names one, before its own."""
    annotations = get_type_hints(settings, include_extras=True)
    options = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=annotations[field.name],
        )
        for field in fields(settings)
        if get_origin(annotations[field.name]) is Annotated
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        rest = [one for one in signature(command).parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        command.__signature__ = Signature([*options, *rest])  # type: ignore[attr-defined]
        return command

    return decorate


@app.command()
@options_of(FitSettings)
def fit(
    *,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint of other settings.")] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train the embedding and its heads. Interrupted, the same command resumes; finished, it changes nothing."""
    try:
        with expected_failures():
            from trainer.fit.train import fit as train

            settings = FitSettings(**options)
            metrics = train(settings, overwrite=overwrite, show=training_bar, say=console.log)
    except KeyboardInterrupt:
        tell("interrupted: the same command resumes at the last finished epoch")
        raise typer.Exit(1) from None
    if "checkpoint" not in metrics:
        return  # one of several processes, of which the first reports
    folder = settings.output
    scores = ", ".join(f"{head} {values['auroc']:.3f}" for head, values in metrics["validation"].items())
    lines = [f"{'reused' if metrics['reused'] else 'wrote'} {folder}; validation AUROC: {scores or 'no images'}"]
    if metrics.get("unreadable"):
        lines.insert(0, f"left out {metrics['unreadable']} unreadable images, named in {folder / 'unreadable.csv'}")
    report(as_json, {"output": str(folder)} | metrics, *lines)


CHECKPOINT_HELP = "Checkpoint folder; unset: `checkpoint` in LINEUP_HOME, whichever is the active one."
Checkpoint = Annotated[
    Path, typer.Option(envvar="LINEUP_CHECKPOINT", default_factory=default_checkpoint, help=CHECKPOINT_HELP)
]


@app.command()
def heads(
    data: Annotated[Path, typer.Option(help="Data set of any layout.")],
    checkpoint: Checkpoint,
    split: Annotated[str, typer.Option(help=SPLIT_HELP)] = "train",
    images: Annotated[int, typer.Option(min=4, help="Embeddings to fit on, at most.")] = 50_000,
    views: Annotated[int, typer.Option(min=1, help="Embeddings per image, at most, the plain one included.")] = 8,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the embeddings for the next call.")] = None,
    seed: Annotated[int, typer.Option(help="Of the augmentations.")] = 42,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Fit heads and calibration of a checkpoint again, from training and calibration images."""
    with expected_failures():
        from trainer.fit.fit_heads import refit

        with counting_bar("embedding") as advance:
            fitted, rejected = refit(
                checkpoint,
                data,
                split=split,
                images=images,
                views=views,
                seed=seed,
                device=device,
                cache=cache,
                on_image=advance,
            )
    counts = fitted.settings["images"]
    document = {"heads": fitted.id, "images": counts, "rejected": [asdict(image) for image in rejected]}
    line = f"wrote heads {fitted.id} to {checkpoint}, fitted on {counts}; {len(rejected)} rejected"
    report(as_json, document, line)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="Data set of any layout.")],
    checkpoint: Checkpoint,
    split: Annotated[str, typer.Option(help="Comma list of splits.")] = "test,unseen",
    output: Annotated[Path | None, typer.Option(help="Folder for the report, which adds curves and plots.")] = None,
    beside: Annotated[list[Path] | None, typer.Option(help="report.json of another checkpoint; repeatable.")] = None,
    card: Annotated[bool, typer.Option(help="Put the figures into the checkpoint's README.md as well.")] = False,
    published: Annotated[bool, typer.Option(help="Print the paper's figures: right on D3's test set only.")] = False,
    seed: Annotated[int, typer.Option(help="Fixes transforms and bootstraps.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the checkpoint's own heads: plain, augmented, and with both labels recompressed alike.

    Images that it was trained, calibrated or chosen on, and all others of their groups, are left out and counted.
    """
    with expected_failures():
        from trainer.evaluation.head_evaluation import card_figures
        from trainer.evaluation.head_evaluation import evaluate as measure_heads
        from trainer.evaluation.report import print_summary, write_report
        from trainer.model.model_card import add_evaluation, read_metrics

        if card:
            read_metrics(checkpoint)  # first: what hinders the card is told before all is measured
        with counting_bar("embedding") as advance:
            result = measure_heads(
                checkpoint,
                data,
                split=split,
                device=device,
                seed=seed,
                with_curves=output is not None,
                on_image=advance,
            )
        if output is not None:
            write_report(result, output, beside=beside or [], published=published)
        if card:
            add_evaluation(checkpoint, {"data": data.resolve().name} | card_figures(result))
    for rejected in result.rejected:
        tell(f"rejected {rejected.file}: {rejected.reason}")
    if as_json:
        print(json.dumps({"rows": result.rows, "left_out": asdict(result.left_out)}))
        return
    print_summary(result, console)
    if output is not None:
        tell(f"wrote {output / 'report.html'} and the tables beside it")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="Folder of a transformers ViTModel, or a hub id: aimagelab/CoDE.")],
    output: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    name: Annotated[str | None, typer.Option(help="Of the checkpoint; default: the source's.")] = None,
    preprocess: Annotated[
        Literal["center_crop", "resize_crop"], typer.Option(help="Of images; center_crop is the official inference.")
    ] = "center_crop",
    as_json: Json = False,
) -> None:
    """Turn weights in the hub's layout, the official ones among them, into a checkpoint."""
    with expected_failures():
        from trainer.heads.calibration_set import refit_command
        from trainer.hub.importer import import_checkpoint

        imported = import_checkpoint(source, output, name=name, preprocess=preprocess)
    lines = [f"wrote checkpoint {imported.checkpoint} to {output}"]
    lines.append(f"no heads: fit them with `{refit_command(output)}`")
    if imported.refused:
        lines.append(f"left out pickled heads, which can run any code: {', '.join(imported.refused)}")
    report(as_json, {"output": str(output)} | asdict(imported), *lines)


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="Folder to write; gets onnx/, openvino/ and hub/.")],
    checkpoint: Checkpoint,
    kinds: Annotated[str, typer.Option("--format", help="Comma list of onnx, openvino, hub.")] = "onnx,openvino,hub",
    as_json: Json = False,
) -> None:
    """Write the backbone for other runtimes."""
    formats = [kind.strip() for kind in kinds.split(",")]
    if unknown := [kind for kind in formats if kind not in ("onnx", "openvino", "hub")]:
        raise typer.BadParameter(f"{', '.join(unknown)} is not known; expected onnx, openvino or hub")
    with expected_failures():
        from trainer.hub.exporter import export_hub, export_onnx, export_openvino

        writers = {"onnx": export_onnx, "openvino": export_openvino, "hub": export_hub}
        for kind in formats:
            writers[kind](checkpoint, output / kind)
    folders = {kind: str(output / kind) for kind in formats}
    report(as_json, folders, f"wrote {', '.join(folders.values())}")


@contextmanager
def counting_bar(description: str) -> Iterator[Callable[..., None]]:
    """A bar over images; each call counts one, and may say how many there are in all.

    Then a line after the first batch says how long all will take, also where no bar can be drawn.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} images"))
    with Bar(*columns, TimeRemainingColumn(), console=console) as bar:
        bar.add_task(description, total=None)
        (task,), begin = bar.tasks, time.monotonic()

        def advance(total: int | None = None) -> None:
            bar.update(task.id, advance=1, total=total)
            if total and task.completed == FIRST_BATCH:
                minutes = (time.monotonic() - begin) * total / FIRST_BATCH / 60
                console.print(f"{description} {total:,} images: about {minutes:.1f} minutes in all", soft_wrap=True)

        yield advance


@contextmanager
def training_bar() -> Iterator[Callable[[float, int, float, float], None]]:
    """A bar over the schedule, with updates, loss and speed."""
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=console, transient=False) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda share, updates, loss, speed: bar.update(
            task, completed=share, description=f"update {updates}, loss {loss:.3f}, {speed:.1f} records/s"
        )
        bar.update(task, completed=1.0)


if __name__ == "__main__":
    app()
