"""Whether facts of the files alone tell real from fake in the reference set, and what lies on both sides of the line.

An index of such a set indexes file types: it answers well on its like, and wrongly on everything else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sqlalchemy import text

from indexer.measure import NothingToMeasure
from indexer.measure.near_duplicates import all_fingerprints, near_duplicates
from indexer.store import Store
from trainer.evaluation.metrics import auroc
from trainer.images import FileFacts

RINGS = 0.7
"""An AUROC above this is a warning: half of the fakes could be told by their files alone."""
ENOUGH = 20
"""Fewer images of a side ring nothing: among so few, chance alone ranks this well."""
SAMPLE_REAL = 10_000
"""Real references that are looked at, at most; the first by SHA-256, which is as good as random."""
SAMPLE_FAKE = 2_000
"""Fake references of each generator that are looked at, at most; chosen in the same way."""
LISTED_PAIRS = 100
"""Near duplicates that are listed, the nearest first; all are counted."""

WARNING_SAMPLE_REAL = 300
"""The same for the warnings at the end of an addition, which is not to take longer because many were added before."""
WARNING_SAMPLE_FAKE = 60
"""The same for the warnings at the end of an addition."""

# One short range of an index for each label and generator.
SAMPLED_FACTS = text("""
select r.label, coalesce(g.name, '') as generator, r."group", encode(r.sha256, 'hex') as sha256,
       r.file_bytes, r.width, r.height, r.format, r.jpeg_quality
from (select distinct label, coalesce(generator_id, 0) as generator_id from reference_count) c
cross join lateral (
    select * from reference_image i where i.label = c.label and coalesce(i.generator_id, 0) = c.generator_id
    order by i.sha256 limit case c.label when 0 then :reals else :fakes end
) r
left join generator g on g.id = r.generator_id
order by r.sha256
""")

ENROLLED = text("""
select distinct coalesce(g.name, '') as name
from reference_image r left join generator g on g.id = r.generator_id
where r.enrolment_id = :enrolment and r.label = 1
""")


def audit(store: Store) -> dict[str, Any]:
    """What `lineup index audit --json` prints.

    Returns:
        {"images", "auroc", "facts": {fact: auroc}, "generators": [{"name", "images", "reals", "auroc", "facts"}],
        "warnings": [text], "near_duplicates": {"count", "listed": [{"real", "fake", "bits"}]}}. `auroc` is that of a
        random forest on all facts together, cross-validated by group; null where a label has too few groups for that.

    Raises:
        NothingToMeasure: References of one label are missing.
    """
    facts, labels, generators, groups = _sample(store, SAMPLE_REAL, SAMPLE_FAKE)
    if len(np.unique(labels)) < 2:
        raise NothingToMeasure("an audit compares real with fake references: add both first")
    from trainer.evaluation.file_facts import file_fact_scores

    scores = file_fact_scores(facts, labels, groups)
    overall, *rows = _generator_rows(facts, labels, generators, scores)
    return {
        "images": len(facts),
        "auroc": overall["auroc"],
        "facts": overall["facts"],
        "generators": rows,
        "warnings": _warnings([overall, *rows]),
        "near_duplicates": near_duplicates_across(store),
    }


def fact_aurocs(facts: Sequence[FileFacts], labels: np.ndarray) -> dict[str, float]:
    """How well each fact alone ranks real against fake, 0.5 (not at all) .. 1, in whichever direction; numpy only.

    Args:
        facts: n files.
        labels: 0 real, 1 fake, shape (n,); both must occur.
    """
    pixels = np.array([fact.width * fact.height for fact in facts], np.float64)
    size = np.array([fact.bytes for fact in facts], np.float64)
    columns = {
        "file size": size,
        "pixels": pixels,
        "aspect": np.array([fact.width / fact.height for fact in facts]),
        "bytes per pixel": size / pixels,
        "jpeg quality": np.array([-1.0 if fact.jpeg_quality is None else fact.jpeg_quality for fact in facts]),
    }
    formats = np.array([fact.format for fact in facts])
    columns |= {f"format {name}": (formats == name).astype(np.float64) for name in sorted(set(formats.tolist()))}
    areas = {name: float(auroc(column, labels)) for name, column in columns.items()}
    return {name: round(max(area, 1 - area), 4) for name, area in areas.items()}


def fact_warnings(store: Store, enrolment: int | None = None) -> list[str]:
    """Warnings about single facts, for the end of `lineup index add`; numpy only, and of a small sample.

    Args:
        store: The references.
        enrolment: Of the generators, only those whose images this added; None for all.
    """
    facts, labels, generators, _ = _sample(store, WARNING_SAMPLE_REAL, WARNING_SAMPLE_FAKE)
    if len(np.unique(labels)) < 2:
        return []
    rows = _generator_rows(facts, labels, generators)
    if enrolment is not None:
        enrolled = {None} | {row["name"] for row in store.read(ENROLLED, {"enrolment": enrolment})}
        rows = [row for row in rows if row["name"] in enrolled]
    return _warnings(rows)


def near_duplicates_across(store: Store) -> dict[str, Any]:
    """Real and fake references whose pictures are nearly the same: {"count", "listed": [{"real", "fake", "bits"}]}."""
    ids, fingerprints = all_fingerprints(store)
    with store.engine.connect() as connection:
        fakes = np.array(list(connection.scalars(text("select id from reference_image where label = 1"))), np.int64)
    is_fake = np.isin(ids, fakes)
    real_ids, fake_ids = ids[~is_fake], ids[is_fake]
    pairs = near_duplicates(fingerprints[~is_fake], fingerprints[is_fake])
    nearest = pairs[np.argsort(pairs[:, 2], kind="stable")[:LISTED_PAIRS]].tolist()
    nearest = [(int(real_ids[real]), int(fake_ids[fake]), bits) for real, fake, bits in nearest]
    rows = store.references.get_many({number for real, fake, _ in nearest for number in (real, fake)})
    sides = {id: {"id": id, "uri": row.uri, "generator": row.generator} for id, row in rows.items()}
    listed = [
        {"real": sides[real], "fake": sides[fake], "bits": bits}
        for real, fake, bits in nearest
        if real in sides and fake in sides
    ]
    return {"count": len(pairs), "listed": listed}


def _sample(store: Store, reals: int, fakes: int) -> tuple[list[FileFacts], np.ndarray, np.ndarray, list[str]]:
    """Facts, labels (n,), generators' names (n,) and groups of so many reals, and fakes of each generator, at most."""
    with store.engine.connect() as connection:
        rows = connection.execute(SAMPLED_FACTS, {"reals": reals, "fakes": fakes}).all()
    facts = [FileFacts(r.sha256, r.file_bytes, r.width, r.height, r.format, r.jpeg_quality) for r in rows]
    labels = np.array([row.label for row in rows], np.int64)
    return facts, labels, np.array([row.generator for row in rows], str), [row.group for row in rows]


def _generator_rows(
    facts: Sequence[FileFacts], labels: np.ndarray, generators: np.ndarray, scores: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """All fakes, then those of each generator, against all reals; `scores` are the random forest's, if there is one."""
    rows = []
    for name in (None, *sorted(set(generators[labels == 1].tolist()))):
        at = np.flatnonzero((labels == 0) | (generators == name) if name is not None else labels >= 0)
        judged = scores is not None and not np.isnan(scores).any()
        row = {"name": name, "images": int((labels[at] == 1).sum()), "reals": int((labels == 0).sum())}
        row["auroc"] = round(float(auroc(scores[at], labels[at])), 4) if judged and scores is not None else None
        row["facts"] = fact_aurocs([facts[i] for i in at.tolist()], labels[at])
        rows.append(row)
    return rows


def _warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    warnings = []
    for row in rows:
        if min(row["images"], row["reals"]) < ENOUGH:
            continue
        who = {None: "the fakes", "": "the fakes of no named generator"}.get(row["name"], row["name"])
        best = max(row["facts"], key=row["facts"].__getitem__)
        if row["auroc"] is not None and row["auroc"] > RINGS:
            warnings.append(f"file facts alone tell {who} from the real images (AUROC {row['auroc']:.2f})")
        if row["facts"][best] > RINGS:
            warnings.append(f"{best} alone tells {who} from the real images (AUROC {row['facts'][best]:.2f})")
    return warnings
