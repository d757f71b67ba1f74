"""Refit what depends on the index: the k-NN map, the combination, thresholds and the novelty table."""

from indexer.follower import Follower
from trainer.calibration import Calibration
from trainer.calibration_set import CalibrationSet
from trainer.heads import Heads


def calibrate(follower: Follower, heads: Heads, images: CalibrationSet, k: int) -> Calibration:
    """Fit on the calibration images at the index's revision, and keep the result in the store under that revision.

    Each image ignores references of its own group, of its own bytes, and near duplicates of it.

    Args:
        follower: A loaded index.
        heads: Of the same checkpoint.
        images: The checkpoint's calibration set.
        k: Neighbours of each label that vote.
    """
    raise NotImplementedError
