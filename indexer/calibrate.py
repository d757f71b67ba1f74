"""Refit what depends on the index: the k-NN map, the combination, thresholds and the novelty table."""

import numpy as np

from indexer.follower import Follower
from indexer.relatives import relatives
from indexer.settings import Settings
from trainer.calibration import Calibration, fit_calibration
from trainer.calibration_set import CALIBRATION_FILE, CalibrationSet
from trainer.embedder import CONFIG_FILE, checkpoint_id, read_config, read_weights
from trainer.heads import HEADS_FILE, Heads
from trainer.vote import vote


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
    """`calibrate` with the checkpoint folder of the settings.

    None where that is another checkpoint, or where heads or calibration images are missing: then there is nothing to
    fit, and whoever serves it says so.

    Raises:
        CheckpointError: The folder's files are broken.
    """
    folder = settings.checkpoint_folder
    if not all((folder / name).exists() for name in (CONFIG_FILE, HEADS_FILE, CALIBRATION_FILE)):
        return None
    if checkpoint_id(read_weights(folder), read_config(folder).preprocess) != follower.checkpoint_id:
        return None
    heads, images = Heads.load(folder), CalibrationSet.load(folder)
    return calibrate(follower, heads, images, settings.k) if len(images) else None
