"""What each choice of a recipe is worth: variants trained alike long from several seeds, judged on validation images.

    python -m benchmarks.recipe little IMAGES OUT --minutes 5 --teacher FILE
    python -m benchmarks.recipe optimiser IMAGES OUT --updates 200

`little` puts each choice for few images beside the paper's recipe, alone and left out of all together; `optimiser` is
about the clipping of the gradient. A run that was interrupted goes on where it stopped; test images are not looked at.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from scipy.stats import t

from benchmarks.ablation import short_run
from trainer.fit.fit_settings import FitSettings
from trainer.fit.train import fit

LITTLE: dict[str, dict[str, Any]] = {
    "native windows": {"scale": "native", "preprocess": "center_crop"},
    "five windows judged": {"scale": "native", "preprocess": "center_crop", "windows": 5},
    "recompression": {"recompress": 0.5},
    "one augmentation": {"augmentations": 1},
    "balance": {"balance": True},
    "generators": {"positives": "generator"},
    "centres": {"proxies": 1.0},
    "average of weights": {"ema": 0.99},
    "convolutions": {"architecture_args": '{"depth": 6, "stem": "conv"}'},
    "convolutions on the residual": {"architecture_args": '{"depth": 6, "stem": "residual"}'},
    "teacher": {"teacher_weight": 5.0},
}
"""Settings of a choice, by its name. The windows of one contain those of another, so either may be left out alone."""
LOSSES: dict[str, dict[str, Any]] = {
    "reference loss": {"loss": "reference"},
    "cross entropy": {"loss": "bce"},
}
"""Other losses beside the paper's, on its own recipe."""
OPTIMISER: dict[str, dict[str, Any]] = {"clipped at norm 1": {}, "as the reference": {"clip": 0.0}}


def little(base: FitSettings, teacher: str | None) -> dict[str, FitSettings]:
    """The variants of `little`: the paper's recipe, one choice more, all, one choice less."""
    choices = {
        name: change | ({"teacher": teacher} if name == "teacher" else {})
        for name, change in LITTLE.items()
        if teacher or name != "teacher"
    }

    def joined(left_out: str = "") -> FitSettings:
        settings = base
        for name, change in choices.items():
            settings = replace(settings, **change) if name != left_out else settings
        return settings

    single = {f"+ {name}": replace(base, **change) for name, change in choices.items()}
    losses = {name: replace(base, **change) for name, change in LOSSES.items()}
    less = {f"all, - {name}": joined(name) for name in choices if name != "native windows"}
    return {"CoDE": base} | losses | single | {"all": joined()} | less


def main(
    study: Annotated[Literal["little", "optimiser"], typer.Argument(help="Which variants.")],
    data: Annotated[Path, typer.Argument(help="Data set; its split train is trained and judged on.")],
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoints.")],
    only: Annotated[str, typer.Option(help="Comma list of variants; empty: all.")] = "",
    seeds: Annotated[int, typer.Option(help="Trainings of each variant.")] = 3,
    minutes: Annotated[
        float | None, typer.Option(help="Wall time of each training; takes the place of --updates.")
    ] = None,
    updates: Annotated[int, typer.Option(help="Of each training.")] = 200,
    image_size: Annotated[int, typer.Option(help="Pixels.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Records.")] = 16,
    architecture_args: Annotated[str, typer.Option(help="JSON of the small backbone.")] = '{"depth": 6}',
    teacher: Annotated[str | None, typer.Option(help="As --teacher of fit.")] = None,
) -> None:
    """Train the variants; print the validation AUROC of the linear head by seed, and the gain over the first one."""
    base = replace(
        short_run(data, out, updates),
        image_size=image_size,
        local_size=image_size,
        batch_size=batch_size,
        architecture_args=architecture_args,
        max_minutes=minutes,
    )
    if minutes is not None:
        base = replace(base, epochs=1_000, epoch_steps=100, warmup_epochs=50)
    variants = little(base, teacher) if study == "little" else {n: replace(base, **c) for n, c in OPTIMISER.items()}
    names = only.split(",") if only else list(variants)
    if unknown := set(names) - set(variants):
        raise typer.BadParameter(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(variants)}")
    print(f"| variant | updates | {' | '.join(f'seed {seed}' for seed in range(seeds))} | mean | against {names[0]} |")
    print(f"|---|---:|{'---:|' * (seeds + 2)}")
    first: np.ndarray | None = None
    for name in names:
        runs = [train(variants[name], name, seed) for seed in range(seeds)]
        areas = np.array([100 * run["validation"]["linear"]["auroc"] for run in runs])
        count = round(np.mean([run["training"]["updates"] for run in runs]))
        gain = "-" if first is None else gain_of(areas - first)
        first = areas if first is None else first
        print(
            f"| {name} | {count} | {' | '.join(f'{a:.1f}' for a in areas)} | {areas.mean():.1f} | {gain} |",
            flush=True,
        )


def gain_of(differences: np.ndarray) -> str:
    """The mean of differences, seed by seed, shape (s,), with its 95 % interval by Student's distribution."""
    if len(differences) < 2:
        return f"{differences.mean():+.1f}"
    half = t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / math.sqrt(len(differences))
    return f"{differences.mean():+.1f} ({differences.mean() - half:+.1f}..{differences.mean() + half:+.1f})"


def train(settings: FitSettings, name: str, seed: int) -> dict[str, Any]:
    """The metrics of a variant's checkpoint, trained now unless it was before."""
    folder = settings.output / f"{name.replace(' ', '-').replace(',', '').replace('+', 'with')}-{seed}"
    typer.echo(folder.name, err=True)
    return fit(replace(settings, name=name, seed=seed, output=folder), say=partial(typer.echo, err=True))


if __name__ == "__main__":
    typer.run(main)
