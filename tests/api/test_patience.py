"""A database that hangs or fails is given up on, left alone for a moment, and asked again."""

import threading
import time

import pytest
from sqlalchemy.exc import OperationalError

from api.patience import DatabaseSlow, Patience


def test_an_answer_and_a_bug_come_through() -> None:
    patience = Patience()
    assert patience.ask(int, "ff", base=16) == 255
    with pytest.raises(ZeroDivisionError):
        patience.ask(lambda: 1 // 0)
    assert patience.ask(int, "1") == 1
    patience.close()


def test_a_hanging_call_is_given_up_and_others_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    patience = Patience(seconds=0.05, pause=3600, threads=1)
    with pytest.raises(DatabaseSlow, match=r"within 0\.05 seconds"):
        patience.ask(opened.wait, 60)
    with pytest.raises(DatabaseSlow, match="a moment ago"):
        patience.ask(int, "1")
    patience._resume = time.monotonic()  # the pause is over, the call hangs still
    with pytest.raises(DatabaseSlow, match="within"):
        patience.ask(int, "1")
    opened.set()
    patience._resume = time.monotonic()
    patience.seconds = 20
    assert patience.ask(int, "1") == 1
    patience.close()


def test_after_a_failure_the_database_is_left_alone_for_a_while() -> None:
    def away() -> None:
        raise OperationalError("select", {}, Exception("refused"))

    patience = Patience(pause=3600)
    with pytest.raises(OperationalError):
        patience.ask(away)
    with pytest.raises(DatabaseSlow):
        patience.ask(int, "1")
    patience.close()
