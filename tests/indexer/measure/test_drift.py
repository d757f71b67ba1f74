"""Drift of what is judged: the test against slower ways to the same answer, and days that changed and did not."""

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from scipy.stats import kstwo
from sqlalchemy import text

from indexer.database.connection import connect
from indexer.measure.drift import RATE, drift, kolmogorov, p_value
from indexer.settings import Settings
from indexer.store import Store
from trainer.heads.calibration import Calibration, fit_calibration

CHECKPOINT = "c" * 32
NOW = datetime(2026, 3, 15, 9, tzinfo=UTC)


def test_the_distribution_is_kolmogorovs() -> None:
    distances, sizes = np.array([0.0, 0.1, 0.2, 0.3, 0.05]), np.array([50.0, 50.0, 50.0, 50.0, 2000.0])
    np.testing.assert_allclose(kolmogorov(distances, sizes), kstwo.sf(distances, sizes), rtol=0.03)
    # The table of every textbook: 1.358 for 5 % and 1.628 for 1 % of large samples.
    np.testing.assert_allclose(kolmogorov(np.array([1.358, 1.628]) / 1e4, np.full(2, 1e8)), [0.05, 0.01], atol=2e-4)


def test_the_distance_is_the_largest_difference_of_shares() -> None:
    rng = np.random.default_rng(0)
    new, old = rng.normal(0.3, 1, 60).round(1), rng.normal(0, 1, 90).round(1)  # with ties
    largest = max(abs((new <= x).mean() - (old <= x).mean()) for x in np.linspace(-5, 5, 1001).round(2))
    expected = kolmogorov(np.array([largest]), np.array([60 * 90 / 150]))[0]
    assert p_value(new, [old]) == pytest.approx(expected)

    # By permutation: how often a random division of all values is as far apart.
    def distance(values: np.ndarray) -> float:
        grid = np.sort(values)
        shares = [np.searchsorted(np.sort(part), grid, side="right") / len(part) for part in (values[:60], values[60:])]
        return float(np.abs(shares[0] - shares[1]).max())

    everything = np.concatenate([new, old])
    by_chance = np.mean([distance(rng.permutation(everything)) >= largest - 1e-9 for _ in range(2000)])
    assert p_value(new, [old]) == pytest.approx(by_chance, abs=0.05)


def test_any_mixture_of_real_and_fake_explains_a_day_and_nothing_else_does() -> None:
    rng = np.random.default_rng(1)

    def day(fakes: int) -> np.ndarray:
        return np.concatenate([rng.normal(0, 1, 200 - fakes), rng.normal(3, 1, fakes)])

    p_values = []
    for number in range(300):
        real, fake = rng.normal(0, 1, 150), rng.normal(3, 1, 100)
        p_values.append(p_value(day(number % 201), [real, fake]))
    assert np.mean(np.array(p_values) < 0.05) <= 0.05
    assert np.mean(np.array(p_values) < 0.5) <= 0.5
    between = np.concatenate([day(40), rng.normal(6, 1, 60)])
    assert p_value(between, [real, fake]) < 1e-3
    assert p_value(day(100), [real]) < 1e-4  # no mixture of one


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    engine = connect(settings)
    store = Store(engine)
    yield store
    engine.dispose()


def judge(store: Store, ages: Sequence[float], scores: np.ndarray, novelty: np.ndarray, revision: int = 7) -> None:
    """Keep a verdict on an image of its own for each: so many days before the last midnight."""
    midnight = NOW.replace(hour=0)
    rows = [
        {
            "id": uuid.uuid4(),
            "at": midnight - timedelta(days=age),
            "sha256": hashlib.sha256(f"{age} {score} {revision}".encode()).digest(),
            "result": json.dumps(
                {"basis": "score", "score": score, "novelty": new, "calibration": {"revision": revision}}
                | {"image": {"shortfall": None}}
            ),
        }
        for age, score, new in zip(ages, scores.tolist(), novelty.tolist(), strict=True)
    ]
    query = """insert into detection
    (id, at, sha256, result, checkpoint_id, file_bytes, width, height, vector, revision)
    values (:id, :at, :sha256, cast(:result as jsonb), :checkpoint, 1, 1, 1, '', 1)"""
    with store.engine.begin() as connection:
        connection.execute(text(query), [row | {"checkpoint": CHECKPOINT} for row in rows])


def calibration() -> Calibration:
    """100 real images that score low and 100 fakes that score high; the real ones lie nearer to their references."""
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], 100)
    return fit_calibration(
        {"linear": rng.normal(4 * labels - 2, 1)},
        nearest=rng.uniform(0.5, 1, 200) - 0.3 * labels,
        nearest_fake=rng.uniform(0.5, 1, 200),
        labels=labels,
        groups=[str(number) for number in range(200)],
        origins=["tests"] * 200,
    )


def test_a_day_is_compared_with_the_days_before_and_with_the_calibration(store: Store) -> None:
    rng, fitted = np.random.default_rng(2), calibration()
    kept = Calibration.from_json(json.loads(json.dumps(fitted.to_json())))
    np.testing.assert_array_equal(kept.nearest_labels, fitted.nearest_labels)
    reals, fakes = (one.ascending for one in fitted.probabilities["linear"])
    real = {name: fitted.nearest_labels == label for label, name in enumerate(("real", "fake"))}

    def like_calibration(count: int) -> tuple[np.ndarray, np.ndarray]:
        """Nine real images and a fake, again and again."""
        is_fake = np.arange(count) % 10 == 0
        scores = np.where(is_fake, rng.choice(fakes, count), rng.choice(reals, count))
        nearest = np.where(is_fake, *(rng.choice(fitted.nearest[real[name]], count) for name in ("fake", "real")))
        scores += rng.normal(0, 1e-6, count)
        return scores, np.array([fitted.novelty(float(similarity)) for similarity in nearest])

    assert drift(store, CHECKPOINT, fitted, NOW)["p_values"] == {"before": None, "calibration": None}
    ages = np.repeat(np.arange(1.5, 15), 60)  # the last day is still empty
    judge(store, ages.tolist(), *like_calibration(len(ages)))
    quiet = drift(store, CHECKPOINT, kept, NOW)
    assert (quiet["day"], quiet["images"], quiet["rate"]) == ("2026-03-14", 0, RATE)
    assert {(test["days"], test["images"]) for test in quiet["tests"]} == {(1, 0), (7, 360)}
    assert all(p > 0.05 for p in quiet["p_values"].values())
    # A generator begins: far from everything, and not called fake.
    scores, novelty = like_calibration(60)
    judge(store, [0.5] * 60, scores, np.where(np.arange(60) < 40, 0.005, novelty))
    judge(store, [-0.2] * 60, scores + 5, novelty)  # today is not over
    told = drift(store, CHECKPOINT, kept, NOW)
    assert told["images"] == 60
    assert told["p_values"]["before"] < RATE
    assert told["p_values"]["calibration"] < RATE
    least = min(told["tests"], key=lambda test: 1.0 if test["p_value"] is None else test["p_value"])
    assert (least["value"], least["days"]) == ("novelty", 1)
    assert told["p_values"][least["against"]] == pytest.approx(min(1.0, 4 * least["p_value"]))
    assert drift(store, CHECKPOINT, None, NOW)["p_values"]["calibration"] is None
    assert drift(store, "d" * 32, kept, NOW)["images"] == 0
    # The next day everything is as before, under another calibration, whose scores are not those of the one before.
    later = NOW + timedelta(days=1)
    assert drift(store, CHECKPOINT, kept, later)["images"] == 60
    judge(store, [-0.3] * 60, scores / 2, novelty, revision=8)
    changed = drift(store, CHECKPOINT, kept, later)
    assert changed["images"] == 120
    assert changed["p_values"]["before"] is None
