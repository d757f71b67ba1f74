"""Which temperature and cap the vote should have: measured on images that trained nothing and test nothing.

References are the training-role images of the split, queries its calibration- and validation-role images; both plain.
`seen`: every generator is among the references. `new`: in turn, of one generator only a few references are kept, and
its own queries are asked; a temperature and cap are good when these are found as well.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from trainer.datasets import read_dataset, role
from trainer.embedded_set import EmbeddedSet, embed_entries
from trainer.embedder import Embedder
from trainer.enrolment import nearest_similarities
from trainer.heads import unit_length
from trainer.logistic import balanced_weights, fit_logistic
from trainer.metrics import auroc
from trainer.transforms import basic
from trainer.vote import vote

TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.5)
CAPS = (1.0, 0.7, 0.5, 0.3, 0.2)
KEPT = 5
"""References left of a generator that stands for a new one."""


def main(
    checkpoint: Annotated[Path, typer.Option(envvar="LINEUP_CHECKPOINT")],
    data: Annotated[Path, typer.Option()],
    split: Annotated[str, typer.Option()] = "train",
    k: Annotated[int, typer.Option()] = 10,
    transform: Annotated[str, typer.Option(help="none, transformed or equalised, of the queries.")] = "none",
) -> None:
    """Print a Markdown table."""
    embedder = Embedder.load(checkpoint)
    plain, changed = (
        basic(embedder.preprocess.image_size)[0],
        {t.name: t for t in basic(embedder.preprocess.image_size)}[transform],
    )
    entries = [(entry, role(entry.group)) for entry in read_dataset(data, split=split)]
    references, queries = (
        next(iter(embed_entries(embedder, work, seed=0)[0].values()))
        for work in (
            [(entry, [plain]) for entry, of in entries if of == "training"],
            [(entry, [changed]) for entry, of in entries if of != "training"],
        )
    )
    print(f"{len(references)} references, {len(queries)} queries ({transform}), k {k}; {KEPT} of a new generator\n")
    print("| temperature | cap | seen AUROC, % | seen log loss | new AUROC, % | new log loss |")
    print("|---:|---:|---:|---:|---:|---:|")
    for temperature in TEMPERATURES:
        for cap in CAPS:
            seen, new = measure(references, queries, k, temperature, cap)
            print(
                f"| {temperature} | {cap} | {100 * seen[0]:.1f} | {seen[1]:.3f} | {100 * new[0]:.1f} | {new[1]:.3f} |"
            )


def measure(
    references: EmbeddedSet, queries: EmbeddedSet, k: int, temperature: float, cap: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(AUROC, balanced log loss after calibration), with every generator known, then with each in turn as a new one."""
    logits = vote_logits(references, queries, k, temperature, cap)
    calibrated = fit_logistic(("knn",), logits[:, None], queries.labels)
    new = []
    for name in sorted(set(queries.generators) - {""}):
        own = np.flatnonzero(np.array(references.generators) == name)
        known = np.setdiff1d(np.arange(len(references)), own[KEPT:])
        part = queries.take(np.array([generator in ("", name) for generator in queries.generators]))
        asked = vote_logits(references.take(known), part, k, temperature, cap)
        new.append((float(auroc(asked, part.labels)), log_loss(calibrated(asked[:, None]), part.labels)))
    seen = (float(auroc(logits, queries.labels)), log_loss(calibrated(logits[:, None]), queries.labels))
    return seen, (float(np.mean([a for a, _ in new])), float(np.mean([loss for _, loss in new])))


def vote_logits(references: EmbeddedSet, queries: EmbeddedSet, k: int, temperature: float, cap: float) -> np.ndarray:
    """The vote's logit of every query, shape (n,)."""
    asked, known = unit_length(queries.embeddings), unit_length(references.embeddings)
    names = sorted(set(references.generators))
    numbers = np.array([names.index(name) for name in references.generators])
    real = nearest_similarities(asked, known[references.labels == 0], k)
    similarity = asked @ known[references.labels == 1].T  # (n, fakes)
    order = np.argsort(-similarity, axis=1)[:, :k]
    fake = np.take_along_axis(similarity, order, 1)
    return vote(real, fake, numbers[references.labels == 1][order], k, temperature=temperature, cap=cap).logit


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """In nats, both labels weighted alike."""
    losses = np.logaddexp(0, logits) - labels * logits
    return float(np.average(losses, weights=balanced_weights(labels)))


if __name__ == "__main__":
    typer.run(main)
