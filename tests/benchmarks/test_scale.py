"""The simulation of writers and replicas, and the sizes of machines, against what can be worked out by hand."""

from functools import partial
from pathlib import Path

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
    # Readings follow each other: a commit comes somewhere in one, 0.125 s before its end, and waits for the next.
    assert slow.lag == pytest.approx(0.125 + 0.25, rel=0.1)
    assert slow.worst_lag < 0.5
    assert slow.rate == quick.rate


def test_costs_grow_by_the_power_of_the_measured_points() -> None:
    assert scale.extrapolated({1.0: 10.0, 10.0: 100.0}, 1_000.0) == pytest.approx(10_000)
    assert scale.extrapolated({1.0: 1.0, 4.0: 2.0}, 16.0) == pytest.approx(4)  # a square root


def test_a_machine_has_the_cores_and_the_memory() -> None:
    assert [scale.machine(cores, 0) for cores in (0.1, 2, 2.1, 5)] == [2, 2, 4, 8]
    assert [scale.machine(1, scale.GIB * memory) for memory in (8, 8.1, 33)] == [2, 4, 16]


def test_a_row_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"VERDICT_SECONDS": 0.024, "ROW_BYTES": 1_000, "THUMBNAIL_BYTES": 9_000, "VERDICT_BYTES": 0}
    for name, value in {**costs, "CORE_DOLLARS": 30}.items():
        monkeypatch.setattr(scale, name, value)
    # 48 cores; 100 million x 792 bytes are 74 GiB, twice in Milvus, x 310 bytes 29; a terabyte on disk for 80 dollars.
    assert scale.verdict_row(100_000_000, 1_000) == [
        "100,000,000",
        "1,000",
        "3 x 16 cores, 64 GiB",
        "64 cores, 256 GiB",
        "8 cores, 32 GiB",
        "1.0 TB",
        "24.0",
        f"{30 * (48 + 64 + 8) + 80:,}",
        "1.42",
    ]


def test_the_page_has_the_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for table in (scale.reference_table(), scale.verdict_table()):
        assert table in page, "python -m benchmarks.scale tables prints what belongs there"
