"""Who would wait too long is refused at once, and how long that is is learnt."""

import math
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from api import admission as admission_module
from api.admission import Admission
from api.schemas.problems import ApiError


def test_one_whose_turn_would_come_too_late_is_refused_at_once() -> None:
    admission = Admission(places=2, most=100, things="images")
    deadline = time.monotonic() + 60
    with ExitStack() as work:
        for _ in range(60):  # of 1 s each on 2 places
            work.enter_context(admission.admitted(1.0, deadline))
        assert admission.wait == pytest.approx(30)
        with pytest.raises(ApiError, match="60 images are in work or wait, which takes about 30 s") as refused:
            work.enter_context(admission.admitted(1.0, deadline))
        assert refused.value.headers["retry-after"] == "30"
        work.enter_context(admission.admitted(1.0, math.inf))
    assert (admission.inside, admission.wait) == (0, 0.0)
    assert admission.expected == pytest.approx(0)


def test_no_more_than_a_number_wait() -> None:
    admission = Admission(places=1, most=2, things="enrolments")
    with admission.admitted(0.1, math.inf), admission.admitted(0.1, math.inf):
        assert admission.full
        with pytest.raises(ApiError) as refused, admission.admitted(0.1, math.inf):
            raise AssertionError("let in")
        assert refused.value.status == 503
    with admission.admitted(0.1, math.inf):
        pass


def test_those_who_wait_together_learn_how_slow_the_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(admission_module, "time", SimpleNamespace(monotonic=lambda: now))
    admission = Admission(places=1, most=10, things="images")
    with ExitStack() as work:
        works = [ExitStack() for _ in range(10)]
        for one in works:
            work.enter_context(one)
            one.enter_context(admission.admitted(1.0, math.inf))
        for one in works:
            now += 4.0
            one.close()
    assert admission.slowness == pytest.approx(4 - 3 * 0.8**10)


def test_slow_work_makes_the_wait_longer() -> None:
    admission = Admission(places=1, most=10, things="images")
    for _ in range(30):
        with admission.admitted(0.001, math.inf):
            time.sleep(0.004)
    assert 3 < admission.slowness <= 10
    with admission.admitted(1.0, math.inf):
        assert admission.wait == pytest.approx(admission.slowness)
