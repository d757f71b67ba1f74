"""What an enrolment changed: how many of its images are recognised without it and with it, verdicts, false alarms."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from math import sqrt
from typing import Any

import numpy as np
from sqlalchemy import text

from indexer.follower import Follower
from indexer.index.milvus import EngineAway
from indexer.measure.audit import fact_warnings
from indexer.measure.calibrate import recalibrate, saved_calibration
from indexer.measure.near_duplicates import related_references
from indexer.settings import Settings
from indexer.store.reference_facts import LABEL_NAMES
from trainer.evaluation.metrics import auroc
from trainer.heads.calibration import Calibration, decisions
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads
from trainer.heads.vote import Votes, vote
from trainer.model.checkpoint import CheckpointError

NEIGHBOUR_HEADS = ("knn", "nn1")
"""Heads that answer from the references alone."""
SAMPLE = 200
"""Images of each kind that are measured, at most; the first by SHA-256, which is as good as random."""
HELD_BACK = 0.2
"""Share of the groups that is left out once more, as if it had not been enrolled with the rest."""
LEAST_AREA = 0.75
"""AUROC of the score against real images below which a checkpoint hardly tells a generator's images."""
LEAST_IMAGES = 10
"""Images below which no such thing is said."""

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
UNMEASURED = (
    "the search engine has not the new references yet, and what they change was not measured: a service, or lineup "
    "index ship, brings them there"
)
BEGINNING = text("select at from enrolment where id = :enrolment")
REVISION = text("""
select coalesce(max(e.revision), 0) as revision
from reference_image r join embedding e on e.image_id = r.id and e.checkpoint_id = :checkpoint
where r.enrolment_id = :enrolment
""")
GROUPS = text('select id, "group" from reference_image where enrolment_id = :enrolment')


@dataclass(frozen=True, slots=True)
class Judges:
    """What makes verdicts of votes.

    Attributes:
        heads: The checkpoint's.
        before: The calibration that was in force before the enrolment; None where there was none.
        after: The one at the index as it is now.
        rates: The settings' greatest shares of false alarms and misses, 0..1.
    """

    heads: Heads
    before: Calibration | None
    after: Calibration | None
    rates: tuple[float, float]


def effect(
    follower: Follower, enrolment: int, calibration: CalibrationSet | None, k: int, judges: Judges | None = None
) -> dict[str, Any] | None:
    """Measure an enrolment at the index as it is now, which must hold it.

    `before` searches with all of the enrolment masked, `after` with only the image's own group, bytes and near
    duplicates, `held_back` with a fifth of the enrolment's groups masked, the image's among them. Recall is the share
    that a head's raw decision gives the right label; for the row `real` that is real.

    Args:
        follower: A loaded index.
        enrolment: Its id.
        calibration: The checkpoint's calibration images, for false alarms among their reals; None without.
        k: Neighbours that vote, of the label with fewer references.
        judges: What makes verdicts; None leaves them out.

    Returns:
        {"recall": [{"generator", "images", "images_held_back", "knn": {"before", "after", "held_back"}, "nn1": {...}}],
        "false_alarms": {"images", "knn": {"before", "after"}, "nn1": {...}} or null,
        "verdicts": [{"generator", "before", "after", "held_back", "auroc"}]}; shares 0..1, null where nothing can be
        said. A verdict's entry is that of `shares`, the last row that of the real calibration images, whose scores are
        by maps fitted without them; `auroc` is that of the score after, against them. None for an enrolment without
        images.
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
    votes = {name: _votes(follower, queries, k, related, mask) for name, mask in masks.items()}
    called_fake = {name: _called_fake(vote) for name, vote in votes.items()}
    recall = []
    for name in sorted(set(names.tolist())):
        of_kind = names == name
        kind_held_back = of_kind & in_held_back
        row: dict[str, Any] = {
            "generator": name,
            "images": int(of_kind.sum()),
            "images_held_back": int(kind_held_back.sum()),
        }
        for head in NEIGHBOUR_HEADS:
            row[head] = {
                when: _share(fakes[head], labels, kind_held_back if when == "held_back" else of_kind)
                for when, fakes in called_fake.items()
            }
        recall.append(row)
    report = {"recall": recall, "false_alarms": _false_alarms(follower, calibration, k, ids)}
    if judges is not None:
        raw = judges.heads.logits(queries)
        logits = {when: {"knn": vote.logit} | raw for when, vote in votes.items()}
        report["verdicts"] = _verdicts(judges, logits, names, in_held_back)
    return report


def consequences(settings: Settings, follower: Follower, enrolment: int) -> dict[str, Any]:
    """What `lineup index add` says at its end: {"effect": see `effect`, "warnings": what to think of it}.

    Nothing is measured while the enrolment has not come into the search engine, where there is one.
    """
    calibration, judges = None, None
    with suppress(CheckpointError):  # missing or broken; the references are added all the same
        folder = settings.checkpoint_folder
        calibration, heads = CalibrationSet.load(folder), Heads.load(folder)
        [beginning] = follower.store.read(BEGINNING, {"enrolment": enrolment})
        earlier = saved_calibration(follower, heads, None, settings.k, before=beginning["at"])
        rates = settings.max_false_alarm, settings.max_miss
        judges = Judges(heads, earlier, recalibrate(settings, follower, folder), rates)
    [written] = follower.store.read(REVISION, {"enrolment": enrolment, "checkpoint": follower.checkpoint_id})
    change, warnings = None, [UNMEASURED]
    if follower.revision >= written["revision"]:
        with suppress(EngineAway):
            change = effect(follower, enrolment, calibration, settings.k, judges)
            warnings = blindness(change)
    return {"effect": change, "warnings": warnings + fact_warnings(follower.store, enrolment)}


def blindness(change: Mapping[str, Any] | None) -> list[str]:
    """A warning of each new generator that the checkpoint hardly tells from real images, however many are enrolled."""
    rows = (change or {}).get("verdicts", [])
    return [
        f"the checkpoint hardly tells {row['generator']} from real images (AUROC {row['auroc']:.2f} of the score): "
        "more of its images will not help, training with them will (lineup train fit)"
        for row in rows
        if row["generator"] != "real"
        and row["auroc"] is not None
        and row["auroc"] < LEAST_AREA
        and row["after"]["images"] >= LEAST_IMAGES
    ]


def _verdicts(
    judges: Judges, logits: Mapping[str, Mapping[str, np.ndarray]], names: np.ndarray, in_held_back: np.ndarray
) -> list[dict[str, Any]]:
    """The rows of `effect`'s verdicts, of images called `names` with the logits of each time."""
    calibrations = {"before": judges.before, "after": judges.after, "held_back": judges.after}
    cuts = {when: one.thresholds(*judges.rates) if one else (None, None) for when, one in calibrations.items()}
    scores = {when: one.combine_many(logits[when]) for when, one in calibrations.items() if one}
    real = {
        when: one.probabilities[table][0].ascending if (table := one.largest()) else np.empty(0)
        for when, one in calibrations.items()
        if one
    }
    rows = []
    for name in sorted(set(names.tolist())):
        of_kind = names == name
        row: dict[str, Any] = {"generator": name, "auroc": None}
        for when in calibrations:
            chosen = of_kind & in_held_back if when == "held_back" else of_kind
            row[when] = shares(scores[when][chosen], *cuts[when]) if when in scores else None
        if name != "real" and "after" in scores:
            row["auroc"] = _area(scores["after"][of_kind], real["after"])
        rows.append(row)
    known = {when: shares(real[when], *cuts[when]) if when in real else None for when in ("before", "after")}
    return [*rows, {"generator": "real calibration images", "auroc": None, **known, "held_back": None}]


def shares(scores: np.ndarray, t_fake: float | None, t_real: float | None) -> dict[str, Any] | None:
    """How images are judged.

    Args:
        scores: Of the images, shape (n,), NaN where there is none.
        t_fake: `fake` from here up; None for never.
        t_real: `real` below, where it is not fake; None for never.

    Returns:
        {"images", "fake", "real", "uncertain", "interval": [low, high]}: shares 0..1, and Wilson's interval of that of
        `fake` at 95 %. None for no images.
    """
    n = len(scores)
    if not n:
        return None
    fake, real = decisions(scores, t_fake, t_real)
    counts = {"fake": fake, "real": real, "uncertain": ~fake & ~real}
    return {
        "images": n,
        **{name: round(float(mask.mean()), 4) for name, mask in counts.items()},
        "interval": [round(end, 4) for end in wilson(int(fake.sum()), n)],
    }


def wilson(count: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of which `count` of `n` were seen (E. B. Wilson 1927, JASA 22)."""
    share, weight = count / n, z * z / n
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * sqrt(share * (1 - share) / n + weight / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _area(fake: np.ndarray, real: np.ndarray) -> float | None:
    """AUROC of scores of fakes against those of real images; None where there are none of a kind."""
    fake = fake[~np.isnan(fake)]
    if not len(fake) or not len(real):
        return None
    return round(float(auroc(np.concatenate([real, fake]), np.repeat([0, 1], [len(real), len(fake)]))), 4)


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
        for head, fakes in _called_fake(_votes(follower, calibration.embeddings[real], k, related, mask)).items():
            report.setdefault(head, {})[when] = _share(fakes, np.ones(len(real), int), np.ones(len(real), bool))
    return report


def _votes(follower: Follower, queries: np.ndarray, k: int, related: list[np.ndarray], masked: np.ndarray) -> Votes:
    real, fake = follower.voters(queries, k, exclude_ids=masked, exclude_each=related)
    return vote(real.similarities, fake.similarities, fake.generators, k)


def _called_fake(votes: Votes) -> dict[str, np.ndarray]:
    """By head, 1 where its raw decision is fake, 0 where it is real, NaN where it cannot answer; shape (n,)."""
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
