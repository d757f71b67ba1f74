"""What an enrolment changed: how many of its images are recognised without it and with it, and false alarms."""

from contextlib import suppress
from hashlib import blake2b
from typing import Any

import numpy as np
from sqlalchemy import text

from indexer.follower import Follower
from indexer.measure.audit import fact_warnings
from indexer.measure.near_duplicates import related_references
from indexer.settings import Settings
from indexer.store.reference_facts import LABEL_NAMES
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.vote import vote
from trainer.model.checkpoint import CheckpointError

NEIGHBOUR_HEADS = ("knn", "nn1")
"""Heads that answer from the references alone."""
SAMPLE = 200
"""Images of each kind that are measured, at most; the first by SHA-256, which is as good as random."""
HELD_BACK = 0.2
"""Share of the groups that is left out once more, as if it had not been enrolled with the rest."""

NEW = text("""
select image_id, vector, label, generator, "group", sha256 from (
    select e.image_id, e.vector, r.label, coalesce(g.name, '') as generator, r."group",
           encode(r.sha256, 'hex') as sha256,
           row_number() over (partition by r.label, r.generator_id order by r.sha256) as place
    from reference_image r
    join embedding e on e.image_id = r.id and e.checkpoint_id = :checkpoint
    left join generator g on g.id = r.generator_id
    where r.enrolment_id = :enrolment
) ranked
where place <= :sample order by sha256
""")
GROUPS = text('select id, "group" from reference_image where enrolment_id = :enrolment')


def effect(follower: Follower, enrolment: int, calibration: CalibrationSet | None, k: int) -> dict[str, Any] | None:
    """Measure an enrolment at the index as it is now, which must hold it.

    `before` searches with all of the enrolment masked, `after` with only the image's own group, bytes and near
    duplicates, `held_back` with a fifth of the enrolment's groups masked, the image's among them. Recall is the share
    that a head's raw decision gives the right label; for the row `real` that is real.

    Args:
        follower: A loaded index.
        enrolment: Its id.
        calibration: The checkpoint's calibration images, for false alarms among their reals; None without.
        k: Neighbours that vote, of the label with fewer references.

    Returns:
        {"recall": [{"generator", "images", "knn": {"before", "after", "held_back"}, "nn1": {...}}],
        "false_alarms": {"images", "knn": {"before", "after"}, "nn1": {...}} or null}; shares 0..1, null where nothing
        can be said. None for an enrolment without images.
    """
    values = {"enrolment": enrolment, "checkpoint": follower.checkpoint_id, "sample": SAMPLE}
    with follower.store.engine.connect() as connection:
        rows = connection.execute(NEW, values).all()
        all_new = connection.execute(GROUPS, values).all()
    if not rows:
        return None
    ids = np.array([row.id for row in all_new], np.int64)
    held_back = np.array([_is_held_back(row.group) for row in all_new], bool)
    labels = np.array([row.label for row in rows])
    names = np.array([row.generator or LABEL_NAMES[row.label] for row in rows])
    queries = np.stack([np.frombuffer(row.vector, "<f4") for row in rows])  # (n, d)
    related = related_references(follower.store, [row.sha256 for row in rows], [row.group for row in rows])
    in_held_back = np.array([_is_held_back(row.group) for row in rows])
    masks = {"before": ids, "after": ids[:0], "held_back": ids[held_back]}
    called_fake = {name: _called_fake(follower, queries, k, related, mask) for name, mask in masks.items()}
    recall = []
    for name in sorted(set(names.tolist())):
        of_kind = names == name
        row: dict[str, Any] = {"generator": name, "images": int(of_kind.sum())}
        for head in NEIGHBOUR_HEADS:
            row[head] = {
                when: _share(fakes[head], labels, of_kind & in_held_back if when == "held_back" else of_kind)
                for when, fakes in called_fake.items()
            }
        recall.append(row)
    return {"recall": recall, "false_alarms": _false_alarms(follower, calibration, k, ids)}


def consequences(settings: Settings, follower: Follower, enrolment: int) -> dict[str, Any]:
    """What `lineup index add` says at its end: {"effect": see `effect`, "warnings": about facts of the files}."""
    calibration = None
    with suppress(CheckpointError):  # missing or broken; the references are added all the same
        calibration = CalibrationSet.load(settings.checkpoint_folder)
    change = effect(follower, enrolment, calibration, settings.k)
    return {"effect": change, "warnings": fact_warnings(follower.store)}


def _false_alarms(
    follower: Follower, calibration: CalibrationSet | None, k: int, new: np.ndarray
) -> dict[str, Any] | None:
    if calibration is None:
        return None
    real = np.flatnonzero(calibration.labels == 0)[: 5 * SAMPLE]
    if not len(real):
        return None
    hashes, groups = ([column[row] for row in real] for column in (calibration.sha256, calibration.groups))
    related = related_references(follower.store, hashes, groups)
    report: dict[str, Any] = {"images": len(real)}
    for when, mask in (("before", new), ("after", new[:0])):
        for head, fakes in _called_fake(follower, calibration.embeddings[real], k, related, mask).items():
            report.setdefault(head, {})[when] = _share(fakes, np.ones(len(real), int), np.ones(len(real), bool))
    return report


def _called_fake(
    follower: Follower, queries: np.ndarray, k: int, related: list[np.ndarray], masked: np.ndarray
) -> dict[str, np.ndarray]:
    """By head, 1 where its raw decision is fake, 0 where it is real, NaN where it cannot answer; shape (n,)."""
    real, fake = follower.voters(queries, k, exclude_ids=masked, exclude_each=related)
    votes = vote(real.similarities, fake.similarities, fake.generators, k)
    scores = {"knn": votes.logit, "nn1": votes.nearest_fake - votes.nearest_real}
    return {head: np.where(np.isnan(score), np.nan, score > 0) for head, score in scores.items()}


def _share(called_fake: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> float | None:
    """The share of these rows that got their label."""
    answers = called_fake[rows]
    if not len(answers) or np.isnan(answers).any():
        return None
    return round(float((answers == labels[rows]).mean()), 4)


def _is_held_back(group: str) -> bool:
    digest = blake2b(("lineup held back" + group).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < HELD_BACK
