"""Whether the promised rate of false alarms holds for real images of sources that nothing was fitted on, and its price.

The checkpoint's calibration images set the thresholds against references: the training-role images of the split
`train`, plain, which vote. Judged are `test` and `unseen`. A source is new where `train` has no real image of
it; a generator is seen where `train` has images of it for training. Four ways to set the threshold of `fake`:

- image by image, and for nine of ten new sources as well (what a service does);
- either with calibration images that are judged as a service judges them, apart from references of their group, or
  without real references of their source: what the neighbours know of a source then raises no score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from trainer.data.datasets import read_dataset
from trainer.data.entry import role
from trainer.evaluation.embedded_set import EmbeddedSet, embed_entries
from trainer.evaluation.metrics import interval, resampled_weights
from trainer.evaluation.transforms import Transform, table_transforms
from trainer.heads.calibration import Calibration, fit_calibration
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads, unit_length
from trainer.heads.vote import Votes, depths, generator_shares, vote
from trainer.model.embedder import Embedder

TOLERATED = 0.07
"""False alarms, as a share of a new source's images, up to which the promise counts as kept there."""
UNKNOWN = 0.05
"""p-value below which a fake is said to come from an unknown generator, as `LINEUP_UNKNOWN`."""
RESAMPLES = 1000
TITLES = {"none": "plain", "equalised": "both labels recompressed alike"}
COLUMNS = (
    *("false alarms", "in new sources", "new sources kept", "seen fakes called fake", "unseen fakes called fake"),
    *("uncertain", "first named right", "unknown, seen", "unknown, unseen"),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What references and heads say of n images."""

    votes: Votes
    generators: np.ndarray
    """Number of the generator of each fake neighbour, shape (n, kf)."""
    logits: dict[str, np.ndarray]
    """Raw scores by head, each (n,)."""


def main(
    checkpoint: Annotated[Path, typer.Option(envvar="LINEUP_CHECKPOINT")],
    data: Annotated[Path, typer.Option(help="With splits train, test and unseen.")],
    k: Annotated[int, typer.Option()] = 10,
    max_false_alarm: Annotated[float, typer.Option()] = 0.05,
    max_miss: Annotated[float, typer.Option()] = 0.05,
) -> None:
    """Print a Markdown table, shares in percent with 95 % bootstrap intervals over groups."""
    embedder, heads, images = Embedder.load(checkpoint), Heads.load(checkpoint), CalibrationSet.load(checkpoint)
    transforms = {one.name: one for one in table_transforms(embedder.preprocess.image_size)}
    references = embedded(embedder, data, "train", [transforms["none"]])["none"]
    known_sources = {source for source, label in zip(references.sources, references.labels, strict=True) if not label}
    references = references.take(np.array([role(group) == "training" for group in references.groups]))
    judged = embedded(embedder, data, "test,unseen", [transforms[name] for name in TITLES])
    names = sorted(set(references.generators))

    same_group = np.array(images.groups)[:, None] == np.array(references.groups)  # (n, m)
    same_source = np.array(images.sources)[:, None] == np.array(references.sources)  # (n, m)
    same_source &= (images.labels[:, None] == 0) & (references.labels == 0)
    print(f"{len(references)} references, {int((images.labels == 0).sum())} real and {int(images.labels.sum())} fake")
    print(f"calibration images of {len(set(np.array(images.sources)[images.labels == 0]))} real sources\n")
    print(f"| | t_fake | {' | '.join(COLUMNS)} |\n|---|---:|{'---:|' * len(COLUMNS)}")
    for name, title in TITLES.items():
        part = judged[name]
        answers = ask(references, names, part.embeddings, heads, k)
        for apart, hidden in {"served": same_group, "without its source": same_group | same_source}.items():
            asked = ask(references, names, images.embeddings, heads, k, hidden)
            for bound, sources in {"by image": [""] * len(images), "by source": images.sources}.items():
                calibration = calibrated(asked, images, sources)
                t_fake, t_real = calibration.thresholds(max_false_alarm, max_miss)
                t_fake, t_real = (np.inf if t_fake is None else t_fake), (-np.inf if t_real is None else t_real)
                scores = calibration.combine_many({"knn": answers.votes.logit} | answers.logits)
                p_values = [calibration.fake_novelty(float(one), t_fake) for one in answers.votes.nearest_fake]
                unknown = np.array([p is not None and p < UNKNOWN for p in p_values])
                values = {
                    "fake": scores >= t_fake,
                    "uncertain": (scores < t_fake) & (scores >= t_real),
                    "right": first_named(answers, names) == np.array(part.generators),
                    "unknown": unknown,
                }
                cells = measured(part, values, known_sources, set(names) - {""})
                print(f"| {title}, {apart}, {bound} | {t_fake:.3f} | {' | '.join(cells)} |")


def embedded(embedder: Embedder, data: Path, split: str, transforms: list[Transform]) -> dict[str, EmbeddedSet]:
    """The images of some splits, by transform."""
    entries = list(read_dataset(data, split=split))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"embedding {split}", total=len(entries))
        work = [(entry, transforms) for entry in entries]
        return embed_entries(embedder, work, seed=0, on_image=lambda: progress.advance(task))[0]


def ask(
    references: EmbeddedSet,
    names: list[str],
    embeddings: np.ndarray,
    heads: Heads,
    k: int,
    hidden: np.ndarray | bool = False,
) -> Asked:
    """Ask references and heads as a service does.

    Args:
        references: m of them.
        names: Of generators; their places number them.
        embeddings: Raw, shape (n, d).
        heads: Linear and SVM.
        k: Neighbours of the label with fewer references.
        hidden: Which references an image must not be compared with, shape (n, m).
    """
    similarity = np.where(hidden, np.nan, unit_length(embeddings) @ unit_length(references.embeddings).T)  # (n, m)
    numbers = np.array([names.index(name) for name in references.generators])
    labels = references.labels
    nearest = []
    for label, depth in enumerate(depths(k, int((labels == 0).sum()), int((labels == 1).sum()))):
        rows = np.flatnonzero(labels == label)
        order = rows[np.argsort(-similarity[:, rows], axis=1)[:, :depth]]  # (n, depth), NaN last
        nearest.append((np.take_along_axis(similarity, order, 1), numbers[order]))
    (real, _), (fake, generators) = nearest
    return Asked(vote(real, fake, generators, k), generators, heads.logits(embeddings))


def calibrated(answers: Asked, images: CalibrationSet, sources: Sequence[str]) -> Calibration:
    """The calibration by what references and heads say of its images, bounded over these sources of theirs."""
    return fit_calibration(
        {"knn": answers.votes.logit} | answers.logits,
        nearest=answers.votes.nearest_fake,
        nearest_fake=answers.votes.nearest_fake,
        labels=images.labels,
        groups=images.groups,
        origins=replace(images, sources=list(sources)).origins,
    )


def first_named(answers: Asked, names: list[str]) -> np.ndarray:
    """The generator with the largest share of each image's fake neighbours, shape (n,), empty where there is none."""
    shares = map(generator_shares, answers.votes.weights_fake, answers.generators)
    return np.array([names[next(iter(share))] if share else "" for share in shares])


def measured(
    part: EmbeddedSet, values: Mapping[str, np.ndarray], known_sources: set[str], known_generators: set[str]
) -> list[str]:
    """The cells of `COLUMNS`."""
    sources, generators, splits = (np.array(column) for column in (part.sources, part.generators, part.splits))
    real = part.labels == 0
    new = real & ~np.isin(sources, list(known_sources))
    seen = ~real & (splits == "test") & np.isin(generators, list(known_generators))
    unseen = ~real & (splits == "unseen")
    weights = resampled_weights(part.labels, part.groups, RESAMPLES, np.random.default_rng(0))

    def share(value: str, rows: np.ndarray) -> str:
        if not rows.any():
            return "-"
        hits, counts = weights[:, rows] @ values[value][rows], weights[:, rows].sum(1)  # (r,), (r,)
        low, high = interval(np.divide(hits, counts, out=np.full(RESAMPLES, np.nan), where=counts > 0))
        return f"{100 * values[value][rows].mean():.1f} ({100 * low:.0f}-{100 * high:.0f})"

    fake = values["fake"]
    rates = [fake[new & (sources == source)].mean() for source in np.unique(sources[new])]
    return [
        share("fake", real),
        share("fake", new),
        f"{sum(rate <= TOLERATED for rate in rates)} of {len(rates)}",
        share("fake", seen),
        share("fake", unseen),
        share("uncertain", real | seen | unseen),
        share("right", seen & fake),
        share("unknown", seen & fake),
        share("unknown", unseen & fake),
    ]


if __name__ == "__main__":
    typer.run(main)
