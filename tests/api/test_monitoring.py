"""Measures against scikit-learn and values by hand, and what a bootstrap of them says."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from trainer.evaluation.metrics import (
    accuracy,
    auroc,
    average_precision,
    expected_calibration_error,
    interval,
    measure,
    recall_at,
    resampled_weights,
    roc_curve,
)

samples = st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40).filter(
    lambda rows: all(sum(w for _, y, w in rows if y == label) > 0 for label in (False, True))
)


@given(samples)
def test_ranking_measures_equal_scikit_learn(rows: list[tuple[int, bool, int]]) -> None:
    """With ties and weights, one weighting and two at once."""
    scores, labels, weights = (np.array(column, float) for column in zip(*rows, strict=True))
    both = np.stack([np.ones(len(rows)), weights])
    for ours, oracle in ((auroc, roc_auc_score), (average_precision, average_precision_score)):
        expected = [oracle(labels, scores), oracle(labels, scores, sample_weight=weights)]
        np.testing.assert_allclose(ours(scores, labels, both), expected, atol=1e-9)
        assert float(ours(scores, labels)) == pytest.approx(expected[0])


@given(samples)
def test_recall_and_curve_equal_scikit_learn(rows: list[tuple[int, bool, int]]) -> None:
    scores, labels, _ = (np.array(column, float) for column in zip(*rows, strict=True))
    alarms, recall, _ = sklearn_roc_curve(labels, scores, drop_intermediate=False)
    ours = roc_curve(scores, labels)
    np.testing.assert_allclose(ours[0], alarms)
    np.testing.assert_allclose(ours[1], recall)
    for rate in (0.0, 0.3, 1.0):
        assert float(recall_at(scores, labels, rate)) == pytest.approx(recall[alarms <= rate].max())


def test_one_label_alone_ranks_nothing() -> None:
    scores, labels = np.array([1.0, 2.0]), np.array([1, 1])
    assert math.isnan(auroc(scores, labels))
    assert math.isnan(recall_at(scores, labels, 0.05))
    assert math.isnan(average_precision(scores, np.array([0, 0])))


def test_accuracy_by_hand() -> None:
    correct = np.array([True, False, True, True])
    assert accuracy(correct) == 0.75
    np.testing.assert_allclose(accuracy(correct, np.array([[1.0, 1, 0, 0], [0, 2, 1, 1]])), [0.5, 0.5])


def test_calibration_error_by_hand() -> None:
    """Two bins: 0.1 with no fake, and 0.6 where half are; weights count."""
    p, labels = np.array([0.1, 0.1, 0.6, 0.6]), np.array([0, 0, 1, 0])
    assert float(expected_calibration_error(p, labels, bins=2)) == pytest.approx((0.2 + 0.2) / 4)
    heavier = expected_calibration_error(p, labels, np.array([1.0, 1, 3, 1]), bins=2)
    assert float(heavier) == pytest.approx((0.2 + abs(3 * 0.4 - 0.6)) / 6)


def test_resamples_keep_groups_whole_and_labels_balanced() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    groups = ["a", "a", "b", "c", "d", "d"]
    weights = resampled_weights(labels, groups, 500, np.random.default_rng(0))
    assert weights.shape == (500, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    np.testing.assert_array_equal(weights[:, 4], weights[:, 5])
    np.testing.assert_array_equal(weights[:, 0] + weights[:, 2], 2)  # two groups of reals, two drawn
    np.testing.assert_array_equal(weights[:, 3] + weights[:, 4], 2)
    assert weights[:, 0].mean() == pytest.approx(1, abs=0.15)


def test_bootstrap_interval_covers_as_often_as_it_says() -> None:
    """The accuracy of a coin that is right in 70 %: 95 % intervals hold 0.7 in about 95 % of 200 experiments."""
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(200):
        labels = np.arange(120) % 2
        right = rng.random(120) < 0.7
        scores = np.where(right, labels, 1 - labels) - 0.5
        rows = measure(
            scores, labels, ["g" if y else "" for y in labels], [str(i) for i in range(120)], 0.0, resamples=200
        )
        inside += rows[0]["accuracy_low"] <= 0.7 <= rows[0]["accuracy_high"]
    assert 0.88 <= inside / 200 <= 0.99


def test_interval_ignores_what_could_not_be_measured() -> None:
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert all(math.isnan(end) for end in interval(np.array([np.nan])))


def test_rows_by_hand() -> None:
    scores = np.array([-1.0, 1.0, -2.0, 2.0, -0.5, 0.5, np.nan])
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    names = ["", "", "", "a", "a", "b", "b"]
    rows = measure(
        scores, labels, names, list("1234567"), 0.0, resamples=50, split="test", transform="none", head="svm"
    )
    json.dumps(rows, allow_nan=False)
    by_name = {row["generator"]: row for row in rows}
    assert list(by_name) == ["all", "real", "a", "b"]
    assert [row["images"] for row in rows] == [6, 3, 2, 1]
    assert [row["accuracy"] for row in rows] == pytest.approx([4 / 6, 2 / 3, 1 / 2, 1.0], abs=1e-6)
    assert [row["auroc"] for row in rows] == [
        pytest.approx(7 / 9, abs=1e-6),
        None,
        pytest.approx(5 / 6, abs=1e-6),
        pytest.approx(2 / 3, abs=1e-6),
    ]
    assert by_name["a"]["balanced"] == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-6)
    assert by_name["a"]["recall_at_1"] == 0.5
    assert by_name["real"]["balanced"] is None
    assert all(row["split"] == "test" and row["head"] == "svm" for row in rows)
    assert by_name["all"]["accuracy_low"] <= by_name["all"]["accuracy"] <= by_name["all"]["accuracy_high"]


def test_rows_of_one_label() -> None:
    rows = measure(np.array([1.0, -1.0]), np.array([0, 0]), ["", ""], ["1", "2"], 0.0, resamples=20)
    assert [(row["generator"], row["accuracy"], row["auroc"]) for row in rows] == [
        ("all", 0.5, None),
        ("real", 0.5, None),
    ]
