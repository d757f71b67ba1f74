"""How soon drift notices a new generator in a simulated stream, and how rarely it notices one for nothing.

A stream has so many images a day: real and fake ones of `test`, and from a known day on a share of one generator of
`unseen`, drawn with replacement; each image has the score and the novelty that a service would give it. Each day of
three weeks is tested as a service tests it. How rarely a day is told for nothing depends on no data: values drawn at
random say it of many more days.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.new_sources import ask, embedded
from indexer.measure.drift import BEFORE, MOST_VERDICTS, RATE, VALUES, WINDOWS, compare, least
from trainer.data.entry import role
from trainer.evaluation.transforms import table_transforms
from trainer.heads.calibration import fit_calibration
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads
from trainer.model.embedder import Embedder

SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)
"""Of a day's images, what the new generator makes."""
FAKES = 0.15
"""Of a day's images, what known generators make."""
HISTORY = max(WINDOWS) + BEFORE
"""Days before the first that is tested."""
TESTED = 21
SOON = 7
QUIET_STREAMS = 100
"""Of random values, for the days that are told for nothing."""


def main(
    checkpoint: Annotated[Path, typer.Option(envvar="LINEUP_CHECKPOINT")],
    data: Annotated[Path, typer.Option(help="With splits train, test and unseen.")],
    k: Annotated[int, typer.Option()] = 10,
    streams: Annotated[int, typer.Option(help="Of each kind.")] = 40,
    size: Annotated[int, typer.Option(help="Images a day.")] = 200,
) -> None:
    """Print a Markdown table."""
    embedder, heads, images = Embedder.load(checkpoint), Heads.load(checkpoint), CalibrationSet.load(checkpoint)
    plain = [one for one in table_transforms(embedder.preprocess.image_size) if one.name == "none"]
    references = embedded(embedder, data, "train", plain)["none"]
    references = references.take(np.array([role(group) == "training" for group in references.groups]))
    judged = embedded(embedder, data, "test,unseen", plain)["none"]
    names = sorted(set(references.generators))

    hidden = np.array(images.groups)[:, None] == np.array(references.groups)  # (n, m)
    asked = ask(references, names, images.embeddings, heads, k, hidden)
    calibration = fit_calibration(
        {"knn": asked.votes.logit} | asked.logits,
        nearest=np.fmax(asked.votes.nearest_real, asked.votes.nearest_fake),
        nearest_fake=asked.votes.nearest_fake,
        labels=images.labels,
        groups=images.groups,
        origins=images.origins,
    )
    answers = ask(references, names, judged.embeddings, heads, k)
    nearest = np.fmax(answers.votes.nearest_real, answers.votes.nearest_fake)
    novelty = [calibration.novelty(float(similarity)) for similarity in nearest]
    values = {
        "score": calibration.combine_many({"knn": answers.votes.logit} | answers.logits),
        "novelty": np.array(novelty, float),
    }
    splits, generators = np.array(judged.splits), np.array(judged.generators)
    real, seen = (np.flatnonzero((splits == "test") & (judged.labels == label)) for label in (0, 1))
    unseen = [np.flatnonzero(generators == name) for name in sorted(set(generators[splits == "unseen"]) - {""})]

    print(f"for nothing: {for_nothing(size)}\n")
    print("| new generator | noticed on its first day | within a week | within three | days told |")
    print("|---:|---:|---:|---:|---:|")
    for share in SHARES:
        told = np.zeros((streams, TESTED), bool)
        for number in track(range(streams), f"{share:.0%}", console=Console(stderr=True)):
            rng = np.random.default_rng(number)
            rows = np.where(
                rng.random((HISTORY + TESTED, size)) < FAKES,
                rng.choice(seen, (HISTORY + TESTED, size)),
                rng.choice(real, (HISTORY + TESTED, size)),
            )
            new = rng.choice(unseen[number % len(unseen)], (TESTED, size))
            rows[HISTORY:] = np.where(rng.random(new.shape) < share, new, rows[HISTORY:])
            for day in range(TESTED):
                told[number, day] = is_told({name: column[rows] for name, column in values.items()}, day)
        noticed = [told[:, :days].any(1).mean() for days in (1, SOON, TESTED)]
        cells = " | ".join(f"{100 * one:.0f} %" for one in noticed)
        print(f"| {share:.0%} | {cells} | {told.sum()} of {told.size} |", flush=True)


def for_nothing(size: int) -> str:
    """How many days of streams that never change are told to be different from the days before."""
    days = streams = 0
    for number in track(range(QUIET_STREAMS), "quiet", console=Console(stderr=True)):
        rng = np.random.default_rng(number)
        columns = {name: rng.random((HISTORY + TESTED, size)) for name in VALUES}
        told = sum(is_told(columns, day) for day in range(TESTED))
        days, streams = days + told, streams + (told > 0)
    return f"{days} of {QUIET_STREAMS * TESTED:,} days, in {streams} of {QUIET_STREAMS} streams"


def is_told(columns: dict[str, np.ndarray], day: int) -> bool:
    """Whether a tested day is different from the days before; columns have the shape (days, images)."""
    part = slice(day + 1, day + 1 + HISTORY)
    most = {name: column[part][-(MOST_VERDICTS // column.shape[1]) :] for name, column in columns.items()}
    days, size = next(iter(most.values())).shape
    ages = np.repeat(np.arange(days, 0, -1.0), size)
    tests = compare(ages, {name: column.ravel() for name, column in most.items()}, np.ones(len(ages), bool), {})
    p_value = least(tests, "before")
    return p_value is not None and p_value < RATE


if __name__ == "__main__":
    typer.run(main)
