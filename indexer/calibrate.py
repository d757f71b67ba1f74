"""Refit what depends on the index: the k-NN map, the combination, thresholds and the novelty table."""

import logging

import numpy as np

from indexer.follower import Follower
from indexer.relatives import relatives
from indexer.settings import Settings
from trainer.calibration import Calibration, fit_calibration
from trainer.calibration_set import CALIBRATION_FILE, CalibrationSet
from trainer.embedder import CONFIG_FILE, CheckpointError, checkpoint_id, read_config, read_weights
from trainer.heads import HEADS_FILE, Heads
from trainer.vote import vote

log = logging.getLogger(__name__)


def calibrate(follower: Follower, heads: Heads, images: CalibrationSet, k: int) -> Calibration:
    """Fit on the calibration images at the index's revision, and keep the result in the store under that revision.

    Each image ignores references of its own group, of its own bytes, and near duplicates of it: it stands for images
    that the index has never seen.

    Args:
        follower: A loaded index.
        heads: Of the same checkpoint.
        images: The checkpoint's calibration set.
        k: Neighbours of each label that vote; kept in the parameters as `k`.
    """
    related = relatives(follower.store, images.sha256, images.groups)
    revision = follower.revision  # first: what comes in during the search makes the next calibration
    real, fake = follower.index.search_both(images.embeddings, k, exclude_each=related)
    votes = vote(real.similarities, fake.similarities, fake.generators, k)
    calibration = fit_calibration(
        {"knn": votes.logit} | heads.logits(images.embeddings),
        nearest=np.fmax(votes.nearest_real, votes.nearest_fake),
        nearest_fake=votes.nearest_fake,
        labels=images.labels,
        groups=images.groups,
    )
    params = calibration.to_json() | {"k": k}
    follower.store.save_calibration(follower.checkpoint_id, heads.id, revision, params)
    return calibration


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
