"""Whether what is judged has changed: each complete day is compared with the days before and with the calibration.

A verdict's score and its novelty, the distance to its nearest reference as a rank among calibration images, are
compared as distributions by Kolmogorov and Smirnov's two-sample test, over the last day and over the last seven. Where
nothing has changed, no more than one day in a thousand is told to be different from the days before; the same holds of
the calibration, whose real and fake images may be mixed in any proportion to explain a day.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import Any

import numpy as np
from sqlalchemy import text

from indexer.store import Store
from trainer.heads.calibration import Calibration

RATE = 0.001
"""Share of days, 0..1, that are told to be different although nothing has changed, at most."""
WINDOWS = (1, 7)
"""Days that are compared together: one shows a sudden change soon, seven a slow or small one."""
BEFORE = 28
"""Days before a window that it is compared with."""
FEWEST = 50
"""Fewer images than this on either side say nothing."""
MOST_VERDICTS = 20_000
"""The latest verdicts of all these days, which are read."""
VALUES = ("score", "novelty")
SHARES = np.linspace(0, 1, 101)
"""Proportions of fakes with which the calibration is tried."""

# An image that comes again says nothing new.
JUDGED = text("""
with latest as (
    select at, sha256, result from detection
    where checkpoint_id = :checkpoint and at >= :start and at < :end order by at desc, id desc limit :most
)
select distinct on (d.sha256) d.at, r.score, r.novelty, (r.calibration->>'revision')::bigint as revision
from latest d
cross join lateral jsonb_to_record(d.result)
    as r (basis text, score double precision, novelty double precision, image jsonb, calibration jsonb)
where r.basis = 'score' and r.score is not null and r.image->>'shortfall' is null
order by d.sha256, d.at
""")


def drift(
    store: Store, checkpoint_id: str, calibration: Calibration | None, now: datetime | None = None
) -> dict[str, Any]:
    """Compare the last complete day (UTC) and the last seven with the 28 before, and with the calibration.

    With the days before are compared only verdicts of one calibration, the latest: another one gives other scores.

    Args:
        store: The verdicts.
        checkpoint_id: Whose verdicts.
        calibration: The one in use; None to compare with the days before alone.
        now: A time of today, for which the day before is told; None is now.

    Returns:
        {"day", "images", "rate", "p_values": {"before", "calibration"}, "tests": [{"against", "value", "days",
        "images", "compared", "p_value"}]}. A day is different where its one of `p_values`, 0..1, is below the rate: the
        least of the tests' times their number (Bonferroni), null where there are too few images.
    """
    today = datetime.combine((now or datetime.now(UTC)).date(), time(), UTC)
    start = today - timedelta(days=max(WINDOWS) + BEFORE)
    values = {"checkpoint": checkpoint_id, "start": start, "end": today, "most": MOST_VERDICTS}
    rows = sorted(store.read(JUDGED, values), key=lambda row: row["at"])
    ages = np.array([(today - row["at"]) / timedelta(days=1) for row in rows])  # (n,)
    columns = {value: np.array([row[value] for row in rows], float) for value in VALUES}  # NaN where there is none
    revisions = np.array([row["revision"] or 0 for row in rows])
    latest = revisions == (revisions[-1] if len(rows) else 0)
    tests = compare(ages, columns, latest, calibrated_values(calibration))
    return {
        "day": (today - timedelta(days=1)).date().isoformat(),
        "images": int((ages <= 1).sum()),
        "rate": RATE,
        "p_values": {against: least(tests, against) for against in ("before", "calibration")},
        "tests": tests,
    }


def compare(
    ages: np.ndarray, columns: Mapping[str, np.ndarray], latest: np.ndarray, calibrated: Mapping[str, list[np.ndarray]]
) -> list[dict[str, Any]]:
    """The tests of one day, see `drift`.

    Args:
        ages: Days before the end of that day, of n images, shape (n,).
        columns: Their values by name, shape (n,), NaN where there is none.
        latest: Which of them may be compared with each other, shape (n,), bool.
        calibrated: See `calibrated_values`.
    """
    tests = []
    for days in WINDOWS:
        new, old = ages <= days, (ages > days) & (ages <= days + BEFORE)
        for value, column in columns.items():
            tests.append(_test("before", value, days, column[new & latest], [column[old & latest]]))
            if value in calibrated:
                tests.append(_test("calibration", value, days, column[new], calibrated[value]))
    return tests


def least(tests: Sequence[dict[str, Any]], against: str) -> float | None:
    """The p-value of all tests against one side, 0..1, None where none has one."""
    p_values = [test["p_value"] for test in tests if test["against"] == against and test["p_value"] is not None]
    return min(1.0, min(p_values) * len(VALUES) * len(WINDOWS)) if p_values else None


def calibrated_values(calibration: Calibration | None) -> dict[str, list[np.ndarray]]:
    """The same values of real and of fake calibration images, by name; those that it does not have are left out."""
    values = {}
    if calibration is not None and (name := calibration.largest()) is not None:
        values["score"] = [one.ascending for one in calibration.probabilities[name]]
        nearest, labels = calibration.nearest, calibration.nearest_labels
        if len(labels) == len(nearest):  # an earlier version did not keep them
            ranks = (1 + np.searchsorted(nearest, nearest, side="right")) / (len(nearest) + 1)  # (n,)
            values["novelty"] = [ranks[labels == label] for label in (0, 1)]
    return values


def p_value(new: np.ndarray, old: Sequence[np.ndarray]) -> float:
    """Of Kolmogorov and Smirnov's two-sample test, 0..1; of samples that differ, a small one.

    Where the old sample has two parts, the new one may be a mixture of both in any proportion: the proportion that
    explains it best counts, so that the p-value is none too small.

    Args:
        new: Shape (n,).
        old: One or two samples, shape (m,) each.
    """
    grid = np.concatenate([new, *old])  # (g,)
    first, *rest = (np.searchsorted(np.sort(part), grid, side="right") / len(part) for part in (*old, new))
    second, of_new = rest[0], rest[-1]  # of one old part the second is never used
    shares = SHARES if len(old) == 2 else SHARES[:1]
    mixtures = np.outer(1 - shares, first) + np.outer(shares, second)  # (s, g)
    distances = np.abs(mixtures - of_new).max(1)  # (s,)
    sizes = 1 / (1 / len(new) + (1 - shares) ** 2 / len(old[0]) + shares**2 / len(old[-1]))  # (s,)
    return float(kolmogorov(distances, sizes).max())


def kolmogorov(distances: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How likely so large a distance between two distribution functions is by chance, 0..1, shape (s,).

    The limit distribution with Stephens's (1970) correction for small samples.

    Args:
        distances: The largest difference, 0..1, shape (s,).
        sizes: n m / (n + m) of samples of n and m, shape (s,).
    """
    roots = np.sqrt(sizes)
    x = (roots + 0.12 + 0.11 / roots) * distances  # (s,)
    j = np.arange(1, 101)[:, None]  # (100, 1)
    terms = 2 * (-1.0) ** (j - 1) * np.exp(-2 * j**2 * x**2)  # (100, s)
    # Near zero the series alternates without end; there the probability is 1 to many digits.
    return np.where(x < 0.2, 1.0, terms.sum(0).clip(0, 1))


def _test(against: str, value: str, days: int, new: np.ndarray, old: Sequence[np.ndarray]) -> dict[str, Any]:
    new, *old = (part[~np.isnan(part)] for part in (new, *old))
    enough = len(new) >= FEWEST and sum(map(len, old)) >= FEWEST and all(map(len, old))
    test: dict[str, Any] = {"against": against, "value": value, "days": days, "images": len(new)}
    return test | {"compared": sum(map(len, old)), "p_value": p_value(new, old) if enough else None}
