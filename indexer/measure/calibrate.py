"""Refit what depends on the index: the k-NN map, the combination, thresholds and the novelty table."""

import logging
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from hashlib import blake2b
from pathlib import Path

import numpy as np
from sqlalchemy import text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from indexer.follower import Follower
from indexer.index.milvus import EngineAway
from indexer.measure.near_duplicates import related_references
from indexer.settings import Settings
from indexer.store import Store
from trainer.heads.calibration import METHOD, MINIMUM, Calibration, fit_calibration
from trainer.heads.calibration_set import CalibrationSet, refit_command
from trainer.heads.heads import Heads
from trainer.heads.vote import vote
from trainer.model.checkpoint import CheckpointError

log = logging.getLogger(__name__)

COMPARISONS = 1_000_000_000
"""Calibration images times references that one fit may compare; about 12 s on one core."""
LEAST_IMAGES = 500
"""Calibration images that are always asked: a rate of 5 % needs 19 of each label, and more to be steady."""

FITTING = text("select pg_advisory_xact_lock(hashtextextended(:what, 0))")
ENROLLED = text("""
select encode(r.sha256, 'hex') as sha256, r."group", r.source, e.vector from reference_image r
join embedding e on e.image_id = r.id and e.checkpoint_id = :checkpoint
where r.generator_id = :generator order by r.id limit :most
""")


def calibrate(follower: Follower, heads: Heads, images: CalibrationSet, k: int) -> Calibration:
    """Fit on the calibration images at the index's revision, and keep the result in the store under that revision.

    Where the store refuses it, the log says so, and the result holds all the same.

    References of generators that these lack are asked as well (`newcomers`). Each image ignores references of its own
    group, of its own bytes, and near duplicates of it: it stands for images that the index has never seen.

    Args:
        follower: A loaded index.
        heads: Those of the same checkpoint.
        images: The checkpoint's calibration set.
        k: Neighbours that vote, of the label with fewer references; kept in the parameters as `k`.
    """
    revision = follower.revision  # first: what comes in meanwhile makes the next calibration
    known = {name.casefold() for name in (*images.generators, *images.trained)}
    images = affordable(images, len(follower.index))
    of_checkpoint, images = len(images), images.joined(newcomers(follower, images, known))
    related = related_references(follower.store, images.sha256, images.groups)
    real, fake = follower.voters(images.embeddings, k, exclude_each=related)
    votes = vote(real.similarities, fake.similarities, fake.generators, k)
    calibration = fit_calibration(
        {"knn": votes.logit} | heads.logits(images.embeddings),
        nearest=np.fmax(votes.nearest_real, votes.nearest_fake),
        nearest_fake=votes.nearest_fake,
        labels=images.labels,
        groups=images.groups,
        origins=images.origins,
        enrolled=np.arange(len(images)) >= of_checkpoint,
    )
    params = calibration.to_json() | {"k": k, "method": METHOD, "new_sources": calibration.new_sources()}
    try:
        follower.store.calibrations.save(follower.checkpoint_id, heads.id, revision, params)
    except SQLAlchemyError as error:  # a standby, a role that may not write, a full disk: the fit holds all the same
        reason = " ".join(str(getattr(error, "orig", error)).split())
        log.warning("the calibration of revision %d is used and not kept: %s", revision, reason)
    return calibration


def affordable(images: CalibrationSet, references: int) -> CalibrationSet:
    """The images, or so many of them, both labels alike, that comparing them with all references takes seconds.

    Those with the smallest group hashes stay, so that the choice is the same each time and groups stay whole but one.
    """
    most = max(LEAST_IMAGES, COMPARISONS // max(1, references))
    if len(images) <= most:
        return images
    order = sorted(range(len(images)), key=lambda row: blake2b(images.groups[row].encode()).digest())
    real, fake = ([row for row in order if images.labels[row] == label] for label in (0, 1))
    rows = sorted(real[: max(most // 2, most - len(fake))] + fake[: max(most // 2, most - len(real))])
    return images.take(rows)


def newcomers(follower: Follower, images: CalibrationSet, known: Collection[str]) -> CalibrationSet:
    """References of generators that are new to the checkpoint, of each as many as the most frequent has in the images.

    No checkpoint's calibration images can show how well k-NN does on a generator enrolled after its training. These
    can, each asked without itself and its relatives; so the combination learns when to trust the neighbours. Images
    that trained the checkpoint would teach it wrongly: what its heads say of them is too sure.

    Args:
        follower: A loaded index.
        images: The calibration images that are asked.
        known: Generators of all calibration and training images of the checkpoint, in lower case.
    """
    new = {number: name for number, name in follower.generator_names.items() if name.casefold() not in known}
    counts = Counter(name for name, label in zip(images.generators, images.labels, strict=True) if label)
    most = min(max(counts.values(), default=0), len(images) // max(1, len(new)))
    enrolled = images.take([])
    with follower.store.engine.connect() as connection:
        for number, name in new.items():
            values = {"checkpoint": follower.checkpoint_id, "generator": number, "most": max(MINIMUM, most)}
            if rows := connection.execute(ENROLLED, values).all():
                enrolled = enrolled.joined(
                    CalibrationSet(
                        embeddings=np.stack([np.frombuffer(row.vector, "<f4") for row in rows]),  # (n, d)
                        labels=np.ones(len(rows), images.labels.dtype),
                        generators=[name] * len(rows),
                        sources=[row.source for row in rows],
                        sha256=[row.sha256 for row in rows],
                        groups=[row.group for row in rows],
                    )
                )
    return enrolled


def recalibrate(settings: Settings, follower: Follower, folder: Path | None = None) -> Calibration | None:
    """The calibration at the follower's revision: the saved one, else `calibrate` with what its checkpoint holds.

    None where the checkpoint is not on this machine, its heads or calibration images are missing or broken, or the
    search engine is away: references have been changed all the same, and a warning says what mends it.

    Args:
        settings: They hold k, and where checkpoints are looked for.
        follower: A loaded index.
        folder: The checkpoint's folder, where the caller has loaded it from there; None to look for it, which hashes
            the weights that are found.
    """
    folder = folder or follower.store.checkpoints.require(follower.checkpoint_id).find(settings.checkpoint_folder)
    if folder is None:
        return None
    try:
        heads, images = Heads.load(folder), CalibrationSet.load(folder)
    except CheckpointError as error:
        log.warning("not calibrated: %s", error)
        return None
    if not images and saved_calibration(follower, heads, follower.revision, settings.k) is None:
        log.warning("not calibrated: %s holds no calibration images: run `%s`", folder, refit_command(folder))
        return None
    try:
        return shared_calibration(follower, heads, images, settings.k)
    except EngineAway as error:  # services calibrate as soon as it is back
        log.warning("not calibrated: %s", error)
        return None


def shared_calibration(follower: Follower, heads: Heads, images: CalibrationSet, k: int) -> Calibration:
    """The saved calibration at the follower's revision, else `calibrate`: of all processes one fits, others read."""
    if saved := saved_calibration(follower, heads, follower.revision, k):
        return saved
    with follower.store.engine.connect() as connection:  # its transaction holds the lock, until it ends in any way
        with suppress(OperationalError):  # who holds it hangs: better to fit twice than never
            connection.execute(FITTING, {"what": f"calibration {follower.checkpoint_id} {heads.id} {k}"})
        start, revision = time.perf_counter(), follower.revision
        if saved := saved_calibration(follower, heads, revision, k):
            return saved
        calibration = calibrate(follower, heads, images, k)
        log.info("calibrated", extra={"revision": revision, "seconds": round(time.perf_counter() - start, 2)})
        return calibration


def latest_calibration(store: Store, checkpoint_id: str) -> Calibration | None:
    """The latest that is kept of a checkpoint; None where there is none, or one that an earlier version fitted."""
    saved = store.calibrations.load(checkpoint_id)
    return None if saved is None or saved.params.get("method") != METHOD else Calibration.from_json(saved.params)


def saved_calibration(
    follower: Follower, heads: Heads, revision: int | None, k: int, before: datetime | None = None
) -> Calibration | None:
    """What was fitted for the same k and by the same method: at that revision, or at the latest, or latest `before`."""
    saved = follower.store.calibrations.load(follower.checkpoint_id, heads.id, revision, before)
    if saved is None or (saved.params.get("k"), saved.params.get("method")) != (k, METHOD):
        return None
    return Calibration.from_json(saved.params)
