"""README.md of a checkpoint in the hub's form, made of `config.json`, `metrics.json` and `evaluation.json`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from trainer.files import write_atomically
from trainer.model.checkpoint import CheckpointConfig, CheckpointError, check_file, read_config, write_file

METRICS_FILE = "metrics.json"
EVALUATION_FILE = "evaluation.json"
CARD_FILE = "README.md"


def write_card(folder: Path) -> None:
    """Write README.md of a checkpoint folder anew.

    Raises:
        CheckpointError: The folder holds no checkpoint, or its metrics or its evaluation do not read.
    """
    metrics = read_metrics(folder)
    if evaluation := _read(folder, EVALUATION_FILE):
        metrics["evaluation"] = evaluation
    write_atomically(folder / CARD_FILE, model_card(read_config(folder), metrics).encode())


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `metrics.json` says of a checkpoint; nothing where there is none, as in an imported one.

    Raises:
        CheckpointError: It is damaged or not JSON.
    """
    return _read(folder, METRICS_FILE)


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Replace `metrics.json` of a checkpoint atomically.

    Raises:
        CheckpointError: The folder holds no checkpoint.
    """
    _write(folder, METRICS_FILE, metrics)


def add_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Put figures measured on other images into `evaluation.json` of a checkpoint, and into its card.

    The file holds nothing else, so that this, run again, mends what a kill has left of it.

    Args:
        folder: Of the checkpoint.
        evaluation: {"data", "head", "rows", "sources", "left_out"} as `head_evaluation.card_figures` gives them; they
            replace those that were there.

    Raises:
        CheckpointError: The folder holds no checkpoint, or its metrics do not read.
    """
    _write(folder, EVALUATION_FILE, evaluation)
    write_card(folder)


def _read(folder: Path, name: str) -> dict[str, Any]:
    path, remedy = folder / name, "restore it, or delete it to do without"
    check_file(folder, name, remedy)
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): {remedy}") from error


def _write(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    write_file(folder, name, (json.dumps(values, indent=2) + "\n").encode())


def model_card(config: CheckpointConfig, metrics: Mapping[str, Any]) -> str:
    """The card; a section of which nothing is known is left out, or says how to measure it."""
    trained = bool(config.training)
    windows = config.preprocess.windows
    several = f", in up to {windows} windows whose embeddings are averaged" if windows > 1 else ""
    parts = [
        f"---\nlicense: {config.licence.lower()}\nlibrary_name: lineup\n"
        "tags: [deepfake-detection, image-embedding]\n---",
        f"# {config.name}",
        _origin(config),
        f"It reads {config.image_size} pixels a side, to which `{config.preprocess.mode}` brings images{several}.",
    ]
    if images := metrics.get("images"):
        rows = [(role, sum(of.values()), ", ".join(f"{k} {n}" for k, n in of.items())) for role, of in images.items()]
        parts += ["## Data", _table(("role", "images", "of"), rows)]
    if sources := metrics.get("sources"):
        parts += [
            "By source, with what the data set says of its licence; none of the images is part of this checkpoint.",
            _table(
                ("source", "real", "generated", "from", "licence"),
                (
                    (one["source"], one["real"], one["fake"], _links(one["repositories"]), ", ".join(one["licences"]))
                    for one in sources
                ),
            ),
        ]
    if validation := metrics.get("validation"):
        parts += [
            "## On validation images",
            "Balanced accuracy and AUROC on images that trained neither embedding nor heads, but chose between them.",
            _table(
                ("head", "accuracy", "AUROC"), ((head, v["accuracy"], v["auroc"]) for head, v in validation.items())
            ),
        ]
    if groups := metrics.get("validation_groups"):
        parts += [
            "By the linear head; the AUROC of a generator is against all real images.",
            _table(
                ("generator or source", "images", "accuracy", "AUROC"),
                ((one["generator"] or one["source"], one["images"], one["accuracy"], one["auroc"]) for one in groups),
            ),
        ]
    if evaluation := metrics.get("evaluation"):
        parts += _evaluation(evaluation)
    elif not metrics:
        parts += ["## Figures", "None have been measured: `lineup train evaluate --data IMAGES --card` puts them here."]
    parts += [
        "## Limits",
        "An unknown generator is recognised less well than those it was trained on; compression, resizing and content "
        "that differ between real and generated training images can be mistaken for the trace of a generator. Edited "
        "photographs are outside the question. A verdict is evidence, no proof.",
    ]
    if trained:
        settings = {name: PurePath(value).name if name == "data" else value for name, value in config.training.items()}
        parts += ["## Settings", "\n".join(f"- `{name}`: {value}" for name, value in sorted(settings.items()))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(config: CheckpointConfig) -> str:
    token = "mean token" if config.architecture_args.get("global_pool") == "avg" else "CLS token"
    backbone = (
        f"A CoDE embedding (Contrastive Deepfake Embeddings, ECCV 2024, arXiv 2407.20337): {config.architecture}, "
        f"{token}, {config.dim} dimensions"
    )
    if config.training:
        stem = config.architecture_args.get("stem")
        official = f"timm's weights of {stem}, its stem," if stem else "timm's weights"
        start = official if config.training.get("pretrained") else "scratch"
        teacher = config.provenance.get("teacher")
        taught = f" with the features of {teacher['name']} to learn from" if teacher else ""
        made = f"trained from {start} by `lineup train fit`{taught}"
    else:
        place = PurePath(config.provenance.get("source", "elsewhere"))
        source = place.name if place.is_absolute() else place.as_posix()
        revision = str(config.provenance.get("revision", ""))
        made = f"imported from {source}" + (f" at {revision}" if revision else "")
    purpose = "It tells images made by generators from photographs by their neighbours and by its heads."
    return f"{backbone}, {made}. {purpose}"


def _evaluation(evaluation: Mapping[str, Any]) -> list[str]:
    """Figures plain and with both labels recompressed alike, and of real images by source."""
    sources, recompressed = evaluation["sources"], {"none": "no", "equalised": "yes"}
    columns = ("split", "generator", "images", "recompressed alike", "accuracy", "AUROC", "95 % interval")
    figures = [
        (
            *(row["split"], row["generator"], row["images"], recompressed[row["transform"]]),
            *(row["accuracy"], row["auroc"], _interval(row)),
        )
        for row in evaluation["rows"]
    ]
    parts = [
        "## On other images",
        f"Of `{evaluation['data']}`, by this checkpoint's own heads ({evaluation['head']}), without an index; "
        f"{evaluation['left_out']} images that it had seen are left out.",
        _table(columns, figures),
    ]
    if sources:
        shares = ((name, one["images"], one["accuracy"]) for name, one in sources.items())
        parts += ["Real images by source, with the share that is judged rightly:"]
        parts += [_table(("source", "images", "accuracy"), shares)]
    return parts


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row.get("auroc_low"), row.get("auroc_high")
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _links(repositories: Sequence[str]) -> str:
    return ", ".join(f"[{name}](https://github.com/{name})" for name in repositories)


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
