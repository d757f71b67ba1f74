"""The paper's table of training losses: each ablation trained alike, one after the other, and evaluated.

    python -m benchmarks.ablation DATA OUT --image-size 64 --updates 300

A run that was interrupted goes on where it stopped. `pre-trained` fetches timm's weights, and is left out by default.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.evaluation.head_evaluation import evaluate
from trainer.evaluation.report_tables import Rows, seen_table, unseen_tables
from trainer.evaluation.splits import UNSEEN
from trainer.fit.fit_settings import FitSettings
from trainer.fit.train import fit

ABLATIONS: dict[str, dict[str, Any]] = {
    "CoDE": {},
    "global only, real anchors": {"terms": "global", "anchors": "real"},
    "global only": {"terms": "global"},
    "multi-scale only": {"terms": "multi-scale"},
    "cross-entropy": {"loss": "bce"},
    "global only, pre-trained": {"terms": "global", "pretrained": True},
}
"""Settings that differ from the recipe's, by name."""


def short_run(data: Path, out: Path, updates: int) -> FitSettings:
    """The paper's recipe for about so many updates, in four epochs whose last weights are kept."""
    return FitSettings(data=data, output=out, epochs=4, epoch_steps=max(1, updates // 4), warmup_epochs=0.2, patience=0)


def main(
    data: Annotated[Path, typer.Argument(help="Data set with the splits train and test, and perhaps unseen.")],
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoints.")],
    image_size: Annotated[int, typer.Option(help="Pixels.")] = 64,
    updates: Annotated[int, typer.Option(help="Of each training.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Records.")] = 32,
    seed: Annotated[int, typer.Option()] = 42,
    pretrained: Annotated[bool, typer.Option(help="Also from timm's weights, fetched from the network.")] = False,
) -> None:
    """Train and evaluate each ablation, and print the tables in the poster's form."""
    base = replace(short_run(data, out, updates), image_size=image_size, batch_size=batch_size, seed=seed)
    models: dict[str, Rows] = {}
    splits: list[str] = []
    for name, change in ABLATIONS.items():
        if change.get("pretrained") and not pretrained:
            continue
        settings = replace(base, **change, name=name, output=out / name.replace(", ", "-").replace(" ", "-"))
        typer.echo(name, err=True)
        fit(settings, say=partial(typer.echo, err=True))
        evaluation = evaluate(settings.output, data)
        models[name], splits = Rows(evaluation.rows), evaluation.splits
    tables = [seen_table(models, split, published=False) for split in splits if split != UNSEEN]
    for table in [*tables, *unseen_tables(models, published=False)]:
        print(table.markdown())


if __name__ == "__main__":
    typer.run(main)
