"""The vote: values by hand, missing neighbours, balance of labels and of generators."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.heads.vote import DEEPEST, depths, generator_shares, vote


def test_two_neighbours_by_hand() -> None:
    result = vote(np.array([[0.5]]), np.array([[0.7]]), np.array([[3]]), k=1, temperature=0.1)
    assert result.logit[0] == pytest.approx(2.0)
    assert result.score[0] == pytest.approx(1 / (1 + math.exp(-2)))
    assert (result.votes_real[0], result.votes_fake[0]) == (0, 1)
    assert result.weights_fake[0, 0] == pytest.approx(result.score[0])
    assert (result.nearest_real[0], result.nearest_fake[0]) == (0.5, 0.7)


def test_votes_count_the_k_nearest_overall() -> None:
    real, fake = np.array([[0.9, 0.2, 0.1]]), np.array([[0.8, 0.7, 0.0]])
    result = vote(real, fake, np.array([[0, 1, 2]]), k=3)
    assert (result.votes_real[0], result.votes_fake[0]) == (1, 2)
    alike = np.repeat([[0.9, 0.5, 0.1]], [6, 7, 7], axis=1)
    equal = vote(alike, alike, np.zeros((1, 20), int), k=20)
    assert (equal.votes_real[0], equal.votes_fake[0]) == (6 + 7, 6 + 1)  # of equals the reals come first


def test_one_label_with_fewer_references_is_not_outvoted() -> None:
    few = vote(np.full((1, 10), 0.5), np.full((1, 3), 0.5), np.array([[0, 1, 2]]), k=10)
    assert few.score[0] == pytest.approx(0.5)


def test_missing_neighbours_have_no_weight() -> None:
    full = vote(np.array([[0.5, 0.4]]), np.array([[0.6]]), np.array([[0]]), k=2)
    padded = vote(np.array([[0.5, 0.4, np.nan]]), np.array([[0.6, np.nan, np.nan]]), np.array([[0, -1, -1]]), k=2)
    assert padded.logit[0] == pytest.approx(full.logit[0])
    assert padded.weights_fake[0, 1] == 0
    np.testing.assert_allclose(padded.weights_real, full.weights_real)
    assert (padded.votes_real[0], padded.votes_fake[0]) == (1, 1)


@pytest.mark.parametrize("width", [0, 2])
def test_without_references_of_a_label_the_vote_is_nan(width: int) -> None:
    none = vote(np.array([[0.5, 0.4]]), np.full((1, width), np.nan), np.full((1, width), -1), k=2)
    assert np.isnan(none.score[0])
    assert np.isnan(none.logit[0])
    assert np.isnan(none.nearest_fake[0])
    assert none.weights_real.sum() == 0
    assert (none.votes_real[0], none.votes_fake[0]) == (2, 0)


def test_logit_stays_finite_where_the_score_saturates() -> None:
    result = vote(np.array([[-1.0]]), np.array([[1.0]]), np.array([[0]]), k=1, temperature=0.001)
    assert result.logit[0] == pytest.approx(2000.0)
    assert result.score[0] == 1.0


def test_a_large_generator_does_not_drown_a_new_one() -> None:
    """Nine neighbours of one generator and one of another: the one counts more once the nine are capped."""
    fake = np.full((1, 10), 0.6)
    generators = np.array([[0] * 9 + [1]])
    free = vote(np.full((1, 10), 0.5), fake, generators, k=10, cap=1.0)
    capped = vote(np.full((1, 10), 0.5), fake, generators, k=10)
    assert generator_shares(free.weights_fake[0], generators[0])[1] == pytest.approx(1 / 10)
    assert generator_shares(capped.weights_fake[0], generators[0])[1] == pytest.approx(1 / 6)
    assert capped.score[0] == pytest.approx(free.score[0])


def test_shares_are_sorted_and_empty_without_fakes() -> None:
    shares = generator_shares(np.array([0.1, 0.2, 0.0, 0.3]), np.array([7, 0, -1, 7]))
    assert list(shares) == [7, 0]
    assert list(shares.values()) == pytest.approx([2 / 3, 1 / 3])
    assert generator_shares(np.zeros(2), np.array([-1, -1])) == {}
    assert generator_shares(np.zeros(2), np.array([1, 2])) == {}  # there is no real to weigh them against


def slow_vote(real: np.ndarray, fake: np.ndarray, generators: np.ndarray, cap: float) -> tuple[float, float, float]:
    """Logit and highest similarities of one query, a neighbour at a time."""
    reals, fakes = real[~np.isnan(real)], fake[~np.isnan(fake)]
    if not len(reals) or not len(fakes):
        return math.nan, max(reals, default=math.nan), max(fakes, default=math.nan)
    most, total, mass = max(1.0, cap * len(fakes)), 0.0, 0.0
    for similarity, generator in zip(fakes, generators, strict=False):
        share = min(1.0, most / (generators[: len(fakes)] == generator).sum())
        total, mass = total + share * math.exp(similarity / 0.1), mass + share
    logit = math.log(total / mass) - math.log(np.mean(np.exp(reals / 0.1)))
    return logit, max(reals), max(fakes)


@pytest.mark.parametrize("cap", [0.0, 0.5, 1.0])
def test_queries_are_weighed_each_by_itself(cap: float) -> None:
    rng = np.random.default_rng(0)
    real, fake = (-np.sort(-rng.uniform(-1, 1, (40, width)), axis=1) for width in (5, 7))
    generators = rng.integers(0, 3, fake.shape)
    for one in (real, fake):
        one[np.arange(one.shape[1]) >= rng.integers(0, one.shape[1] + 1, (len(one), 1))] = np.nan
    generators[np.isnan(fake)] = -1
    result = vote(real, fake, generators, k=3, cap=cap)
    expected = np.array([slow_vote(*row, cap) for row in zip(real, fake, generators, strict=True)])
    np.testing.assert_allclose(np.column_stack([result.logit, result.nearest_real, result.nearest_fake]), expected)


similarities = st.lists(st.one_of(st.floats(-1, 1), st.just(float("nan"))), min_size=1, max_size=6)


@given(similarities, similarities, st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_weights_sum_to_one_and_their_log_odds_are_the_logit(
    real: list[float], fake: list[float], generators: list[int]
) -> None:
    real, fake = (sorted(one, key=lambda value: (math.isnan(value), -value)) for one in (real, fake))
    missing = np.isnan(fake)
    result = vote(np.array([real]), np.array([fake]), np.where(missing, -1, generators[: len(fake)])[None], k=3)
    if np.isnan(real).all() or missing.all():
        assert np.isnan(result.score[0])
        return
    assert result.weights_real.sum() + result.weights_fake.sum() == pytest.approx(1.0)
    assert result.score[0] == pytest.approx(result.weights_fake.sum())
    assert result.logit[0] == pytest.approx(math.log(result.weights_fake.sum() / result.weights_real.sum()))
    assert result.votes_real[0] + result.votes_fake[0] == min(3, (~np.isnan(real)).sum() + (~missing).sum())


@pytest.mark.parametrize(
    ("reals", "fakes", "expected"),
    [
        (100, 100, (10, 10)),
        (100, 400, (10, 40)),
        (400, 100, (40, 10)),
        (5, 8, (5, 8)),  # all there are
        (0, 7, (10, 10)),
        (1, 10_000, (1, DEEPEST)),
        (30, 50_000, (10, DEEPEST)),
    ],
)
def test_depths_reach_the_same_share_of_each_label(reals: int, fakes: int, expected: tuple[int, int]) -> None:
    assert depths(10, reals, fakes) == expected


def test_more_references_of_one_label_do_not_lean_the_vote() -> None:
    """Queries and both labels from one distribution: the vote should not know which label is the larger."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((600, 8))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    queries, real, fake = points[:60], points[60:120], points[120:]
    similarity = [-np.sort(-queries @ one.T, axis=1) for one in (real, fake)]

    def mean_score(columns: tuple[int, int]) -> float:
        near, far = (one[:, :count] for one, count in zip(similarity, columns, strict=True))
        return float(vote(near, far, np.zeros(far.shape, np.int64), k=10).score.mean())

    assert mean_score(depths(10, len(real), len(fake))) == pytest.approx(0.5, abs=0.05)
    assert mean_score((10, 10)) > 0.7


def test_those_shown_carry_the_weight_of_their_label() -> None:
    result = vote(np.array([[0.5]]), np.array([[0.7, 0.6, 0.5, 0.4]]), np.array([[0, 1, 2, 3]]), k=1)
    assert result.weights_fake.shape == (1, 1)
    assert result.weights_fake[0, 0] == pytest.approx(result.score[0])
    fakes = np.mean(np.exp([7.0, 6.0, 5.0, 4.0]))
    assert result.score[0] == pytest.approx(fakes / (fakes + math.exp(5.0)))
