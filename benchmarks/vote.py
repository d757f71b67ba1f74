"""How the vote should be held: temperature and cap, how deep to ask each label, and whether to index augmented views.

Measured on images that trained nothing and test nothing: references are the training-role images of the split, queries
its calibration- and validation-role images; all plain unless said. Three tables:

- Temperature and cap. `seen`: every generator is among the references. `new`: in turn, of one generator only a few
  references are kept, and its own queries are asked; good settings find these as well.
- Depth. With uneven numbers of references, the k nearest of each label against the same share of each label.
- Augmented views of each reference beside the plain one, the nearest counting: for references that trained the
  checkpoint, and for references that did not (one half of the queries answers the other), as an enrolled generator's.
"""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from trainer.data.datasets import read_dataset
from trainer.data.entry import role
from trainer.evaluation.embedded_set import EmbeddedSet, embed_entries
from trainer.evaluation.metrics import auroc
from trainer.evaluation.transforms import table_transforms
from trainer.heads.heads import unit_length
from trainer.heads.logistic import balanced_weights, fit_logistic
from trainer.heads.vote import CAP, TEMPERATURE, depths, vote
from trainer.model.embedder import Embedder

TEMPERATURES = (0.01, 0.05, 0.1, 0.5)
CAPS = (1.0, 0.5, 0.2)
KEPT = 5
"""References left of a generator that stands for a new one."""
NUMBERS = ((200, 200), (50, 200), (200, 50), (13, 200), (200, 13))
"""References of each label, real and fake."""
DRAWS = 20
VIEWS = (0, 3, 8)
"""Augmented views of each reference."""

Depths = tuple[int, int]


def main(
    checkpoint: Annotated[Path, typer.Option(envvar="LINEUP_CHECKPOINT")],
    data: Annotated[Path, typer.Option()],
    split: Annotated[str, typer.Option()] = "train",
    k: Annotated[int, typer.Option()] = 10,
) -> None:
    """Print three Markdown tables."""
    embedder = Embedder.load(checkpoint)
    transforms = {transform.name: transform for transform in table_transforms(embedder.preprocess.image_size)}
    entries = list(read_dataset(data, split=split))

    def embedded(transform: str, seed: int) -> EmbeddedSet:
        return next(
            iter(embed_entries(embedder, [(e, [transforms[transform]]) for e in entries], seed=seed)[0].values())
        )

    plain = embedded("none", 0)
    augmented = [embedded("transformed", seed).embeddings for seed in range(max(VIEWS))]
    trained = np.array([role(group) == "training" for group in plain.groups])
    references, queries = plain.take(np.flatnonzero(trained)), plain.take(np.flatnonzero(~trained))
    print(f"{len(references)} references, {len(queries)} queries, k {k}; {KEPT} of a new generator\n")
    print_settings(references, queries, k)
    print_depths(references, queries, k)
    print_views(plain, augmented, trained, k)


def print_settings(references: EmbeddedSet, queries: EmbeddedSet, k: int) -> None:
    """AUROC and balanced log loss after calibration by temperature and cap."""
    print("| temperature | cap | seen AUROC, % | seen log loss | new AUROC, % | new log loss |")
    print("|---:|---:|---:|---:|---:|---:|")
    for temperature in TEMPERATURES:
        for cap in CAPS:
            logits = vote_logits(references, queries, k, temperature, cap)
            calibrated = fit_logistic(("knn",), logits[:, None], queries.labels)
            cells = [(float(auroc(logits, queries.labels)), log_loss(calibrated(logits[:, None]), queries.labels))]
            new = []
            for name in sorted(set(queries.generators) - {""}):
                own = np.flatnonzero(np.array(references.generators) == name)
                known = references.take(np.setdiff1d(np.arange(len(references)), own[KEPT:]))
                part = queries.take(np.flatnonzero([generator in ("", name) for generator in queries.generators]))
                asked = vote_logits(known, part, k, temperature, cap)
                new.append((float(auroc(asked, part.labels)), log_loss(calibrated(asked[:, None]), part.labels)))
            cells.append(tuple(np.mean(new, axis=0)))
            print(f"| {temperature} | {cap} | " + " | ".join(f"{100 * a:.1f} | {loss:.3f}" for a, loss in cells) + " |")


def print_depths(references: EmbeddedSet, queries: EmbeddedSet, k: int) -> None:
    """How many of each label are called rightly by the raw vote, at uneven numbers of references."""
    print("\n| reals, fakes | k of each: reals right, fakes right, AUROC, % | equally deep: the same |")
    print("|---:|---:|---:|")
    rng = np.random.default_rng(0)
    by_label = [np.flatnonzero(references.labels == label) for label in (0, 1)]
    for numbers in NUMBERS:
        cells: dict[bool, list[list[float]]] = {False: [], True: []}
        for _ in range(DRAWS):
            drawn = [rng.choice(rows, min(n, len(rows)), False) for rows, n in zip(by_label, numbers, strict=True)]
            known = references.take(np.concatenate(drawn))
            for deep, found in cells.items():
                logits = vote_logits(known, queries, k, depth=None if deep else (k, k))
                right = [float(((logits >= 0) == label)[queries.labels == label].mean()) for label in (0, 1)]
                found.append([*right, float(auroc(logits, queries.labels))])
        shown = [", ".join(f"{100 * value:.0f}" for value in np.mean(found, axis=0)) for found in cells.values()]
        print(f"| {numbers[0]}, {numbers[1]} | {' | '.join(shown)} |")


def print_views(plain: EmbeddedSet, augmented: list[np.ndarray], trained: np.ndarray, k: int) -> None:
    """AUROC of the vote and of 1-NN with augmented views of the references."""
    print("\n| views | trained on: vote, 1-NN, AUROC, % | not trained on: the same |\n|---|---:|---:|")
    others = np.flatnonzero(~trained)
    odd = np.array([hash_of(plain.groups[row]) for row in others]) < 0.5
    parts = [[(np.flatnonzero(trained), others)], [(others[odd], others[~odd]), (others[~odd], others[odd])]]
    for views in VIEWS:
        cells = []
        for pairs in parts:
            found = []
            for known, asked in pairs:
                votes = [
                    vote_logits(plain.take(known), plain.take(asked), n, views=[x[known] for x in augmented[:views]])
                    for n in (k, 1)
                ]
                found.append([float(auroc(logits, plain.labels[asked])) for logits in votes])
            cells.append(", ".join(f"{100 * value:.1f}" for value in np.mean(found, axis=0)))
        print(f"| plain{f' and {views} augmented' if views else ''} | {' | '.join(cells)} |")


def hash_of(group: str) -> float:
    """0..1."""
    return int.from_bytes(blake2b(group.encode(), digest_size=8).digest(), "big") / 2**64


def vote_logits(
    references: EmbeddedSet,
    queries: EmbeddedSet,
    k: int,
    temperature: float = TEMPERATURE,
    cap: float = CAP,
    *,
    depth: Depths | None = None,
    views: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """The vote's logit of every query, shape (n,).

    Args:
        references: m of them.
        queries: n of them.
        k: Neighbours.
        temperature: See `trainer.heads.vote`.
        cap: See `trainer.heads.vote`.
        depth: Reals and fakes that are asked; None for the same share of each.
        views: More raw embeddings of the references, each (m, d); of one reference the nearest counts.
    """
    asked = unit_length(queries.embeddings)
    similarity = np.max([asked @ unit_length(x).T for x in (references.embeddings, *views)], axis=0)  # (n, m)
    names = sorted(set(references.generators))
    numbers = np.array([names.index(name) for name in references.generators])
    rows = [np.flatnonzero(references.labels == label) for label in (0, 1)]
    found = []
    for own, deep in zip(rows, depth or depths(k, *map(len, rows)), strict=True):
        order = np.argsort(-similarity[:, own], axis=1)[:, :deep]  # (n, deep)
        found.append((np.take_along_axis(similarity[:, own], order, 1), numbers[own][order]))
    (real, _), (fake, generators) = found
    return vote(real, fake, generators, k, temperature=temperature, cap=cap).logit


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """In nats, both labels weighted alike."""
    losses = np.logaddexp(0, logits) - labels * logits
    return float(np.average(losses, weights=balanced_weights(labels)))


if __name__ == "__main__":
    typer.run(main)
