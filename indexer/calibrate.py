"""Refit what depends on the index: the k-NN map, the combination, thresholds and the novelty table."""

import logging
from collections import Counter
from hashlib import blake2b

import numpy as np
from sqlalchemy import text

from indexer.follower import Follower
from indexer.relatives import relatives
from indexer.settings import Settings
from trainer.calibration import MINIMUM, Calibration, fit_calibration
from trainer.calibration_set import CALIBRATION_FILE, CalibrationSet
from trainer.embedder import CONFIG_FILE, CheckpointError, checkpoint_id, read_config, read_weights
from trainer.heads import HEADS_FILE, Heads
from trainer.vote import vote

log = logging.getLogger(__name__)

COMPARISONS = 1_000_000_000
"""Calibration images times references that one fit may compare; about 12 s on one core."""
LEAST = 500
"""Calibration images that are always asked: a rate of 5 % needs 19 of each label, and more to be steady."""

ENROLLED = text("""
select encode(r.sha256, 'hex') as sha256, r."group", r.source, e.vector from reference_image r
join embedding e on e.image_id = r.id and e.checkpoint_id = :checkpoint
where r.generator_id = :generator order by r.id limit :most
""")


def calibrate(follower: Follower, heads: Heads, images: CalibrationSet, k: int) -> Calibration:
    """Fit on the calibration images at the index's revision, and keep the result in the store under that revision.

    References of generators that these lack are asked as well (`newcomers`). Each image ignores references of its own
    group, of its own bytes, and near duplicates of it: it stands for images that the index has never seen.

    Args:
        follower: A loaded index.
        heads: Of the same checkpoint.
        images: The checkpoint's calibration set.
        k: Neighbours of each label that vote; kept in the parameters as `k`.
    """
    images = affordable(images, len(follower.index))
    own, images = len(images), images.joined(newcomers(follower, images))
    related = relatives(follower.store, images.sha256, images.groups)
    revision = follower.revision  # first: what comes in during the search makes the next calibration
    real, fake = follower.voters(images.embeddings, k, exclude_each=related)
    votes = vote(real.similarities, fake.similarities, fake.generators, k)
    calibration = fit_calibration(
        {"knn": votes.logit} | heads.logits(images.embeddings),
        nearest=np.fmax(votes.nearest_real, votes.nearest_fake),
        nearest_fake=votes.nearest_fake,
        labels=images.labels,
        groups=images.groups,
        enrolled=np.arange(len(images)) >= own,
    )
    params = calibration.to_json() | {"k": k}
    follower.store.save_calibration(follower.checkpoint_id, heads.id, revision, params)
    return calibration


def affordable(images: CalibrationSet, references: int) -> CalibrationSet:
    """The images, or so many of them, both labels alike, that comparing them with all references takes seconds.

    Those with the smallest group hashes stay, so that the choice is the same each time and groups stay whole but one.
    """
    most = max(LEAST, COMPARISONS // max(1, references))
    if len(images) <= most:
        return images
    order = sorted(range(len(images)), key=lambda row: blake2b(images.groups[row].encode()).digest())
    kept = [[row for row in order if images.labels[row] == label] for label in (0, 1)]
    rows = sorted(kept[0][: max(most // 2, most - len(kept[1]))] + kept[1][: max(most // 2, most - len(kept[0]))])
    return images.take(rows)


def newcomers(follower: Follower, images: CalibrationSet) -> CalibrationSet:
    """References of generators that the calibration images lack, each with as many as the most frequent has there.

    No checkpoint's calibration images can show how well k-NN does on a generator enrolled after its training. These
    can, each asked without itself and its relatives; so the combination learns when to trust the neighbours.
    """
    known = Counter(name.casefold() for name, label in zip(images.generators, images.labels, strict=True) if label)
    new = {number: name for number, name in follower.generator_names.items() if name.casefold() not in known}
    most = min(max(known.values(), default=0), len(images) // max(1, len(new)))
    found = images.take([])
    with follower.store.engine.connect() as connection:
        for number, name in new.items():
            values = {"checkpoint": follower.checkpoint_id, "generator": number, "most": max(MINIMUM, most)}
            if rows := connection.execute(ENROLLED, values).all():
                found = found.joined(
                    CalibrationSet(
                        embeddings=np.stack([np.frombuffer(row.vector, "<f4") for row in rows]),  # (n, d)
                        labels=np.ones(len(rows), images.labels.dtype),
                        generators=[name] * len(rows),
                        sources=[row.source for row in rows],
                        sha256=[row.sha256 for row in rows],
                        groups=[row.group for row in rows],
                    )
                )
    return found


def recalibrate(settings: Settings, follower: Follower) -> Calibration | None:
    """`calibrate` with the checkpoint folder of the settings, at the end of commands that change references.

    None where that is another checkpoint, or its heads or calibration images are missing or broken: references have
    been changed all the same, and whoever serves the checkpoint says what is wrong with it.
    """
    folder = settings.checkpoint_folder
    if not all((folder / name).exists() for name in (CONFIG_FILE, HEADS_FILE, CALIBRATION_FILE)):
        return None
    try:
        if checkpoint_id(read_weights(folder), read_config(folder).preprocess) != follower.checkpoint_id:
            return None
        heads, images = Heads.load(folder), CalibrationSet.load(folder)
    except CheckpointError as error:
        log.warning("not calibrated: %s", error)
        return None
    saved = follower.store.load_calibration(follower.checkpoint_id, heads.id, follower.revision)
    if saved is not None and saved.params["k"] == settings.k:
        return Calibration.from_json(saved.params)
    return calibrate(follower, heads, images, settings.k) if len(images) else None
