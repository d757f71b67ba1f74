"""The trainer's tables with the index's heads: what a service that follows this index would say of a data set."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from indexer.follower import Follower
from indexer.measure import NothingToMeasure
from indexer.measure.calibrate import recalibrate
from indexer.measure.near_duplicates import related_references
from indexer.settings import Settings
from trainer.data.datasets import read_dataset
from trainer.evaluation.embedded_set import EmbeddedSet, Rejected
from trainer.evaluation.metrics import RESAMPLES
from trainer.evaluation.splits import LEAVING_OUT, embed_splits, measure_splits, split_mask
from trainer.evaluation.transforms import table_transforms
from trainer.files import write_atomically
from trainer.heads.calibration import METHOD, Calibration, decisions
from trainer.heads.heads import Heads
from trainer.heads.vote import vote
from trainer.model.embedder import Embedder
from trainer.model.seen_images import LeftOut, SeenImages


@dataclass(frozen=True, slots=True)
class IndexEvaluation:
    """What was measured at one revision.

    Attributes:
        revision: The revision of the index.
        rows: See `trainer.evaluation.metrics.measure`; heads knn, nn1, linear, svm and combined.
        verdicts: {"split", "transform", "generator", "images", "fake", "real", "uncertain", "coverage"}, shares.
        thresholds: Those of the combined score, {"fake", "real"}; null where the rate cannot be promised.
        rejected: Images that could not be read.
        left_out: What the checkpoint saw, and so was not measured.
    """

    revision: int
    rows: list[dict[str, Any]]
    verdicts: list[dict[str, Any]]
    thresholds: dict[str, float | None]
    rejected: list[Rejected] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def evaluate_once(
    settings: Settings,
    follower: Follower,
    embedder: Embedder,
    data: Path,
    *,
    split: str,
    seed: int,
    file: Path,
    on_image: Callable[[], None],
) -> tuple[IndexEvaluation, bool]:
    """What `evaluate` gives, which is kept in a file, and whether the file held the answer to this very question."""
    question = evaluation_question(settings, follower, embedder, data, split, seed)
    if (answer := read_answer(file, question)) is not None:
        return answer, True
    evaluation = evaluate(settings, follower, embedder, data, split=split, seed=seed, on_image=on_image)
    write_atomically(file, json.dumps({"question": question, "answer": asdict(evaluation)}).encode())
    return evaluation, False


def evaluation_question(
    settings: Settings, follower: Follower, embedder: Embedder, data: Path, split: str, seed: int
) -> dict[str, Any]:
    """What an evaluation's figures depend on: two equal ones have one answer.

    An image counts by its address, its size and the time of its last change, not by its bytes.

    Raises:
        CheckpointError: The heads are missing or broken.
        DatasetError: The data cannot be read.
    """
    images = blake2b(digest_size=16)
    for entry in read_dataset(data):
        facts = (entry.uri, entry.size, entry.mtime, entry.label, entry.generator, entry.group, entry.split)
        images.update(repr(facts).encode())
    return {
        "images": images.hexdigest(),
        "method": METHOD,
        "split": split,
        "seed": seed,
        "checkpoint": follower.checkpoint_id,
        "engine": embedder.engine,
        "heads": Heads.load(embedder.folder).id,
        "leaving_out": LEAVING_OUT,
        "seen": SeenImages.load(embedder.folder).digest,
        "store": str(follower.store.id()),
        "revision": follower.revision,
        "k": settings.k,
        "max_false_alarm": settings.max_false_alarm,
        "max_miss": settings.max_miss,
    }


def read_answer(file: Path, question: Mapping[str, Any]) -> IndexEvaluation | None:
    """The answer that lies in a file; None where there is no file, or one of another question."""
    try:
        document = json.loads(file.read_text())
        if document["question"] != question:
            return None
        answer = document["answer"]
        rejected = [Rejected(**one) for one in answer["rejected"]]
        return IndexEvaluation(**answer | {"rejected": rejected, "left_out": LeftOut(**answer["left_out"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def evaluate(
    settings: Settings,
    follower: Follower,
    embedder: Embedder,
    data: Path,
    *,
    split: str = "test,unseen",
    seed: int = 0,
    resamples: int = RESAMPLES,
    on_image: Callable[[], None] = lambda: None,
) -> IndexEvaluation:
    """Measure every head on every split, plain, augmented and with both labels recompressed alike.

    Images that trained, calibrated or chose the checkpoint, or whose group did, are left out.
    References of an image's own group, its own bytes, or near duplicates of it do not answer for it.

    Args:
        settings: They hold k and the promised rates.
        follower: A loaded index.
        embedder: Its checkpoint is that of the index.
        data: A data set of any layout.
        split: Comma list. The unseen split borrows the real images of `test`, which are read even if not listed.
        seed: Fixes transforms and bootstraps.
        resamples: How many the bootstraps draw.
        on_image: Called after each image.

    Raises:
        CheckpointError: The heads are missing or broken.
        DatasetError: The data cannot be read.
        NothingToMeasure: No image could be read, or the index is empty.
    """
    if not len(follower.index):
        raise NothingToMeasure("the index is empty: add references first (lineup index add PATH)")
    splits = [part.strip() for part in split.split(",") if part.strip()]
    heads = Heads.load(embedder.folder)
    calibration = recalibrate(settings, follower, embedder.folder)
    tables = table_transforms(embedder.preprocess.image_size)
    sets, rejected, left_out = embed_splits(embedder, data, splits, tables, seed=seed, on_image=on_image)
    if not sets:
        reason = f" ({len(rejected)} unreadable, the first: {rejected[0].file})" if rejected else ""
        reason += f" ({left_out})" if left_out.images else ""
        raise NothingToMeasure(f"{data} holds no readable image of split {split}{reason}: change --data or --split")
    rates = settings.max_false_alarm, settings.max_miss
    t_fake, t_real = calibration.thresholds(*rates) if calibration else (None, None)
    rows, verdicts = [], []
    for name, images in sets.items():  # not always the same images: D3's archive brings its own transformed ones
        related = related_references(follower.store, [facts.sha256 for facts in images.facts], images.groups)
        scores = index_scores(images.embeddings, related, follower, heads, calibration, settings.k)
        rows += measure_splits(images, scores, splits, name, resamples, seed)
        if "combined" in scores:
            for part in splits:
                at = np.flatnonzero(split_mask(images, part, splits[0]))
                shares = verdict_shares(images.take(at), scores["combined"][at], t_fake, t_real)
                verdicts += [{"split": part, "transform": name} | row for row in shares]
    return IndexEvaluation(
        revision=follower.revision,
        rows=rows,
        verdicts=verdicts,
        thresholds={"fake": t_fake, "real": t_real},
        rejected=rejected,
        left_out=left_out,
    )


def index_scores(
    embeddings: np.ndarray,
    related: list[np.ndarray],
    follower: Follower,
    heads: Heads,
    calibration: Calibration | None,
    k: int,
) -> dict[str, np.ndarray]:
    """Scores by head, each of shape (n,), higher for fake; NaN where the head cannot answer.

    knn is the vote's logit, nn1 the similarity of the nearest fake minus that of the nearest real, linear and svm are
    the checkpoint's own, combined is the calibrated probability.

    Args:
        embeddings: Raw, shape (n, d).
        related: Per image, ids that may not answer.
        follower: The index.
        heads: Those of its checkpoint.
        calibration: The one at its revision.
        k: Neighbours that vote, of the label with fewer references.
    """
    real, fake = follower.voters(embeddings, k, exclude_each=related)
    votes = vote(real.similarities, fake.similarities, fake.generators, k)
    logits = {"knn": votes.logit} | heads.logits(embeddings)
    combined = {"combined": calibration.combine_many(logits)} if calibration and calibration.maps else {}
    return logits | {"nn1": votes.nearest_fake - votes.nearest_real} | combined


def verdict_shares(
    images: EmbeddedSet, scores: np.ndarray, t_fake: float | None, t_real: float | None
) -> list[dict[str, Any]]:
    """Shares of the verdicts for reals and for each generator; `coverage` is the share that is not uncertain.

    Args:
        images: n of them.
        scores: The combined scores, shape (n,).
        t_fake: `fake` from here up; None for never.
        t_real: `real` below, where it is not fake; None for never.
    """
    fake, real = decisions(scores, t_fake, t_real)
    names = np.array([name if label else "real" for name, label in zip(images.generators, images.labels, strict=True)])
    rows = []
    for name in ["real", *sorted(set(names.tolist()) - {"real"})]:
        mask = names == name
        if mask.any():
            shares = {"fake": fake[mask].mean(), "real": real[mask].mean()}
            shares |= {"uncertain": (~fake & ~real)[mask].mean(), "coverage": (fake | real)[mask].mean()}
            row = {"generator": name, "images": int(mask.sum())}
            rows.append(row | {key: round(float(value), 6) for key, value in shares.items()})
    return rows
