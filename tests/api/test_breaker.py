"""A database that hangs or fails is given up on, left alone for a moment, and asked again."""

import threading
import time

import pytest
from psycopg.errors import DiskFull
from sqlalchemy.exc import OperationalError, ProgrammingError

from api import breaker as module
from api.breaker import Breaker, DatabaseSlow, public_detail
from indexer.database.connection import DatabaseUnreachable


def test_an_answer_and_a_bug_come_through() -> None:
    breaker = Breaker()
    assert breaker.ask(int, "ff", base=16) == 255
    with pytest.raises(ZeroDivisionError):
        breaker.ask(lambda: 1 // 0)
    assert breaker.ask(int, "1") == 1
    breaker.close()


def test_a_full_disk_is_no_reason_to_ask_no_more() -> None:
    def write() -> None:
        raise OperationalError("insert", {}, DiskFull("could not extend file"))

    breaker = Breaker(pause=3600)
    with pytest.raises(OperationalError):
        breaker.ask(write)
    assert breaker.ask(int, "1") == 1
    breaker.close()


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (OperationalError("insert secret", {}, DiskFull("could not extend")), "the disk of the database is full"),
        (OperationalError("select secret", {}, Exception("refused")), "the database does not answer"),
        (DatabaseSlow("within 2 seconds"), "the database does not answer"),
        (
            ProgrammingError("select secret", {}, Exception("denied")),
            "the database refused a request; the log says which",
        ),
        (DatabaseUnreachable("no database at\n here"), "no database at here"),
    ],
)
def test_a_failure_is_told_in_one_line_without_sql(error: Exception, detail: str) -> None:
    assert public_detail(error) == detail


def test_a_hanging_call_is_given_up_and_others_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    breaker = Breaker(seconds=0.05, pause=3600, threads=1)
    with pytest.raises(DatabaseSlow, match=r"within 0\.05 seconds"):
        breaker.ask(opened.wait, 60)
    with pytest.raises(DatabaseSlow, match="a moment ago"):
        breaker.ask(int, "1")
    breaker._resume = time.monotonic()  # the pause is over, the call hangs still
    with pytest.raises(DatabaseSlow, match="within"):
        breaker.ask(int, "1")
    opened.set()
    breaker._resume = time.monotonic()
    breaker.seconds = 20
    assert breaker.ask(int, "1") == 1
    breaker.close()


def test_a_slow_call_concerns_only_who_asked_while_the_database_answers() -> None:
    opened = threading.Event()
    breaker = Breaker(probe=lambda: None, seconds=0.05, pause=3600)
    with pytest.raises(DatabaseSlow, match=r"within 0\.05 seconds"):
        breaker.ask(opened.wait, 60)
    breaker.seconds = 20
    assert breaker.ask(int, "1") == 1
    opened.set()
    breaker.close()


@pytest.mark.parametrize("failing", [False, True])
def test_where_nothing_trivial_is_answered_either_only_the_first_wait(
    failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()

    def probe() -> None:
        if failing:
            raise OperationalError("select", {}, Exception("refused"))
        opened.wait(60)

    monkeypatch.setattr(module, "PROBE_SECONDS", 0.05)
    breaker = Breaker(probe=probe, seconds=0.05, pause=3600)
    with pytest.raises(DatabaseSlow, match="within"):
        breaker.ask(opened.wait, 60)
    with pytest.raises(DatabaseSlow, match="a moment ago"):
        breaker.ask(int, "1")
    opened.set()
    breaker.close()


def test_after_a_failure_the_database_is_left_alone_for_a_while() -> None:
    def away() -> None:
        raise OperationalError("select", {}, Exception("refused"))

    breaker = Breaker(pause=3600)
    with pytest.raises(OperationalError):
        breaker.ask(away)
    with pytest.raises(DatabaseSlow):
        breaker.ask(int, "1")
    breaker.close()
