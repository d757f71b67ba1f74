"""The enrolment curve: how well an unseen generator is found once a few of its images are among the references.

The references are the embeddings that the checkpoint's heads were fitted on; nothing is trained. The first images of a
generator by SHA-256 are enrolled, at most half of them and at most 30; the rest is tested, whatever the step.
"""

from typing import Any

import numpy as np

from trainer.evaluation.embedded_set import EmbeddedSet
from trainer.evaluation.metrics import RESAMPLES, measure
from trainer.heads.heads import NearestHead, nearest_similarities, unit_length
from trainer.heads.vote import depths, vote

ENROLMENT_STEPS = (0, 5, 10, 20, 30)
"""Images enrolled of the generator."""
K = 10
"""Neighbours in the k-NN vote; of each label as many as `depths` says."""


def knn_logits(nearest: NearestHead, embeddings: np.ndarray) -> np.ndarray:
    """The k-NN vote among what the heads were fitted on, shape (n,), above 0 for fake; NaN where a label is missing.

    `nearest` holds the references; the embeddings are raw, shape (n, d).
    """
    counts = [int((nearest.labels == label).sum()) for label in (0, 1)]
    real, fake = (
        nearest_similarities(unit_length(embeddings), nearest.embeddings[nearest.labels == label], depth)
        for label, depth in zip((0, 1), depths(K, *counts), strict=True)
    )  # (n, kr), (n, kf)
    return vote(real, fake, np.zeros(fake.shape, np.int64), K).logit


def enrolment_curve(nearest: NearestHead, images: EmbeddedSet, *, resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """Recall and false alarms of nn1 and knn by generator and number of enrolled images.

    Args:
        nearest: The references before enrolment.
        images: The unseen split: real images and those of every unseen generator, plain.
        resamples: How many the bootstrap draws.

    Returns:
        Rows {"generator", "enrolled", "tested", "head", "recall", "recall_low", "recall_high", "false_alarms",
        "auroc", "recall_at_5", ...}; a generator whose enrolled images leave none to test is left out.
    """
    rows = []
    references = [nearest.embeddings[nearest.labels == label] for label in (0, 1)]
    reals, fakes = map(len, references)
    deepest = np.max([depths(K, reals, fakes + step) for step in ENROLMENT_STEPS], axis=0)
    queries = unit_length(images.embeddings)
    real, fake = map(nearest_similarities, (queries, queries), references, deepest.tolist())  # (n, kr), (n, kf)
    names = np.array(images.generators)
    hashes = np.array([facts.sha256 for facts in images.facts])
    for generator in sorted(set(names[images.labels == 1].tolist())):
        fakes_by_hash = np.flatnonzero(names == generator)
        fakes_by_hash = fakes_by_hash[np.argsort(hashes[fakes_by_hash])]
        most = min(ENROLMENT_STEPS[-1], len(fakes_by_hash) // 2)
        groups = {images.groups[i] for i in fakes_by_hash[:most]}
        others = [*np.flatnonzero(images.labels == 0), *fakes_by_hash[most:]]
        test_rows = [i for i in others if images.groups[i] not in groups]
        part = images.take(np.array(test_rows, np.int64))
        if not part.labels.any():
            continue
        for step in [step for step in ENROLMENT_STEPS if step <= most]:
            to_enrolled = queries[test_rows] @ queries[fakes_by_hash[:step]].T  # (t, step)
            kr, kf = depths(K, reals, fakes + step)
            to_fakes = -np.sort(-np.concatenate([fake[test_rows], to_enrolled], axis=1), axis=1)[:, :kf]  # NaN last
            votes = vote(real[test_rows, :kr], to_fakes, np.zeros(to_fakes.shape, np.int64), K)
            for head, scores in (("nn1", votes.nearest_fake - votes.nearest_real), ("knn", votes.logit)):
                measures = measure(scores, part.labels, part.generators, part.groups, 0.0, resamples=resamples)
                by_name = {row["generator"]: row for row in measures}
                rows.append(_row(generator, step, head, by_name["real"], by_name[generator]))
    return rows


def _row(generator: str, enrolled: int, head: str, real: dict[str, Any], fake: dict[str, Any]) -> dict[str, Any]:
    row = {"generator": generator, "enrolled": enrolled, "head": head, "tested": fake["images"]}
    for end in ("", "_low", "_high"):
        row[f"recall{end}"] = fake[f"accuracy{end}"]
        row |= {f"{key}{end}": fake[f"{key}{end}"] for key in ("auroc", "recall_at_5")}
    ends = (("", ""), ("_low", "_high"), ("_high", "_low"))
    row |= {
        f"false_alarms{end}": None if (value := real[f"accuracy{other}"]) is None else round(1 - value, 6)
        for end, other in ends
    }
    return row
