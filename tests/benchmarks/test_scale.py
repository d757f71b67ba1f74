"""The simulation of writers and replicas against what can be worked out by hand."""

from functools import partial

import pytest

from benchmarks import scale

ROWS = 100
simulate = partial(scale.simulate, rows=ROWS, seconds=20.0)


def test_one_adder_waits_for_nobody() -> None:
    waits = simulate(1, elsewhere=0.1, before=0.06, held=0.04)
    assert waits.rate == pytest.approx(ROWS / (0.1 + 0.06 + 0.04), rel=0.01)
    assert waits.waiting == 0
    assert waits.held == pytest.approx(0.04)


def test_the_lock_bounds_many_adders() -> None:
    waits = simulate(8, elsewhere=0.1, before=0.02, held=0.05, cores=16)
    assert waits.rate == pytest.approx(ROWS / 0.05, rel=0.02)
    assert waits.held == pytest.approx(0.05)
    assert waits.waiting == pytest.approx(8 * 0.05 - (0.1 + 0.02 + 0.05), rel=0.05)  # a round, less what is no waiting


def test_cores_bound_where_the_lock_does_not() -> None:
    waits = simulate(8, before=0.09, held=0.01, cores=2)
    assert waits.rate == pytest.approx(2 * ROWS / 0.1, rel=0.02)
    assert simulate(8, before=0.09, held=0.01, cores=4).rate == pytest.approx(2 * waits.rate, rel=0.02)


def test_whoever_embeds_on_the_same_machine_takes_its_cores() -> None:
    for together, seconds in ((True, 0.2), (False, 0.1)):
        waits = simulate(4, elsewhere=0.1, before=0.05, held=0.05, together=together, cores=1)
        assert waits.rate == pytest.approx(ROWS / seconds, rel=0.02)


def test_a_replica_lags_by_one_reading_unless_commits_outrun_it() -> None:
    quick = simulate(1, 2, before=0.05, held=0.05, load=0.03)
    assert (quick.lag, quick.worst_lag) == pytest.approx((0.03, 0.03))
    slow = simulate(1, 1, before=0.05, held=0.05, load=0.25)
    assert 0.25 <= slow.lag <= slow.worst_lag <= 0.5  # what comes during one reading has to wait for the next
    assert slow.rate == quick.rate
