"""What enrolling a few images of a generator that nothing was trained on brings, and what it costs real images.

One generator of the split `unseen` at a time: 5, 10, 20 and 40 of its images, drawn several times, become references;
no weight changes, the calibration is fitted anew as a service does. Judged are its images of other groups and the real
images of `test`.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.new_sources import TITLES, ask, calibrated, embedded, first_named
from trainer.evaluation.embedded_set import EmbeddedSet
from trainer.evaluation.metrics import recall_at
from trainer.evaluation.transforms import table_transforms
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads
from trainer.model.embedder import Embedder

ENROLLED = (0, 5, 10, 20, 40)
FEWEST = 10
"""Fewer images of other groups than this are not judged: the generator is left out at that number."""
COLUMNS = ("vote's recall at 5 % false alarms", "combined recall", "called fake", "false alarms", "first named right")


def main(
    checkpoint: Annotated[Path, typer.Option(envvar="LINEUP_CHECKPOINT")],
    data: Annotated[Path, typer.Option(help="With splits train, test and unseen.")],
    k: Annotated[int, typer.Option()] = 10,
    max_false_alarm: Annotated[float, typer.Option()] = 0.05,
    draws: Annotated[int, typer.Option()] = 5,
) -> None:
    """Print Markdown tables in percent: the curve, and each generator's recall.

    The curve has means over generators and draws and, in brackets, how far the same generators rose.
    """
    embedder, heads, images = Embedder.load(checkpoint), Heads.load(checkpoint), CalibrationSet.load(checkpoint)
    transforms = {one.name: one for one in table_transforms(embedder.preprocess.image_size)}
    references = embedded(embedder, data, "train", [transforms["none"]])["none"]
    judged = embedded(embedder, data, "test,unseen", [transforms[name] for name in TITLES])
    splits, groups, generators = (
        np.array(getattr(judged["none"], name)) for name in ("splits", "groups", "generators")
    )
    real = (judged["none"].labels == 0) & (splits == "test")
    unseen = sorted(set(generators[splits == "unseen"]) - {""})

    for transform, title in TITLES.items():
        curve = np.full((len(unseen), len(ENROLLED), draws, len(COLUMNS)), np.nan)
        for place in np.ndindex(curve.shape[:3]):
            generator, count, draw = unseen[place[0]], ENROLLED[place[1]], place[2]
            rows = np.flatnonzero(generators == generator)
            chosen = np.random.default_rng(draw).permutation(rows)[:count]
            others = rows[~np.isin(groups[rows], groups[chosen])]
            if count == 0 and draw > 0:
                curve[place] = curve[place[0], place[1], 0]  # nothing was drawn
            elif len(chosen) == count and len(others) >= FEWEST:
                everything = EmbeddedSet.joined([references, judged["none"].take(chosen)])
                queries = EmbeddedSet.joined([judged[transform].take(part) for part in (real, others)])
                curve[place] = verdicts(everything, queries, heads, images, k, max_false_alarm)
        print(f"\n**{title}**, {int(real.sum())} real images, {draws} draws\n")
        print(f"| enrolled | generators | {' | '.join(COLUMNS)} |\n|---:|---:|{'---:|' * len(COLUMNS)}")
        for number, count in enumerate(ENROLLED):
            judgeable = np.isfinite(curve[:, number, 0, 0])
            means, before = np.nanmean(curve[judgeable][:, [number, 0]], axis=(0, 2))  # (columns,), (columns,)
            cells = " | ".join(
                f"{100 * new:.1f} ({100 * (new - old):+.1f})" for new, old in zip(means, before, strict=True)
            )
            print(f"| {count} | {int(judgeable.sum())} | {cells} |")
        print(f"\n| called fake | {' | '.join(map(str, ENROLLED))} |\n|---|{'---:|' * len(ENROLLED)}")
        for generator, recalls in zip(unseen, curve[..., 2], strict=True):
            cells = " | ".join("-" if np.isnan(row).any() else f"{100 * row.mean():.0f}" for row in recalls)
            print(f"| {generator} | {cells} |")


def verdicts(
    references: EmbeddedSet,
    queries: EmbeddedSet,
    heads: Heads,
    images: CalibrationSet,
    k: int,
    max_false_alarm: float,
) -> list[float]:
    """The cells of `COLUMNS`, as shares.

    Args:
        references: Plain, those enrolled among them.
        queries: Real images and those of one generator.
        heads: Linear and SVM.
        images: The calibration images, which are not compared with references of their groups.
        k: Neighbours of the label with fewer references.
        max_false_alarm: The promised rate.
    """
    names = sorted(set(references.generators))
    same_group = np.array(images.groups)[:, None] == np.array(references.groups)  # (n, m)
    calibrating = ask(references, names, images.embeddings, heads, k, same_group)
    calibration = calibrated(calibrating, images, images.sources)
    t_fake, _ = calibration.thresholds(max_false_alarm, max_false_alarm)
    answers = ask(references, names, queries.embeddings, heads, k)
    scores = calibration.combine_many({"knn": answers.votes.logit} | answers.logits)
    called = scores >= (np.inf if t_fake is None else t_fake)
    fake = queries.labels == 1
    right = first_named(answers, names) == np.array(queries.generators)
    return [
        float(recall_at(answers.votes.logit, queries.labels, 0.05)),
        float(recall_at(scores, queries.labels, 0.05)),
        called[fake].mean(),
        called[~fake].mean(),
        right[fake & called].mean() if (fake & called).any() else np.nan,
    ]


if __name__ == "__main__":
    typer.run(main)
