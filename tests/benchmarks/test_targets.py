"""The table that `make bench` ends with."""

from benchmarks.targets import Target, table


def test_the_table_says_what_is_met_and_what_is_missed() -> None:
    targets = [
        Target("times faster", 3.0, 4),
        Target("times faster", 4.0, 4),
        Target("ms", 4.0, 4, at_most=True),
        Target("ms", 5.0, 4, at_most=True),
    ]
    assert table(targets).splitlines()[2:] == [
        "| times faster | at least 4 | 3 | 0.75 | missed |",
        "| times faster | at least 4 | 4 | 1.00 | met |",
        "| ms | at most 4 | 4 | 1.00 | met |",
        "| ms | at most 4 | 5 | 1.25 | missed |",
    ]
