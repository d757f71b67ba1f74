"""Work in processes of its own: what takes too much ends alone, and nobody else notices."""

import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from trainer import process_pool
from trainer.process_pool import LARGE_MESSAGE, DeadlinePassed, LimitExceeded, ProcessPool, Task

LIMITS = {"seconds": 60.0, "memory": 2**30}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    pool = ProcessPool(2)
    pool.warm("os")
    yield pool
    for _ in range(2):
        worker = pool._places.get()
        assert worker
        worker.end()


def call(pool: ProcessPool, work: object, *args: object, **limits: float) -> object:
    return pool.call(work, *args, **(LIMITS | limits))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 10, LARGE_MESSAGE + 1])
def test_results_and_errors_come_back(pool: ProcessPool, size: int) -> None:
    data = os.urandom(size)
    assert call(pool, bytes.__add__, data, b"a") == data + b"a"
    with pytest.raises(ZeroDivisionError, match="by zero"):
        call(pool, divmod, 1, 0)
    assert call(pool, os.getpid) != os.getpid()


def test_what_takes_too_long_is_ended_while_others_go_on(pool: ProcessPool) -> None:
    with ThreadPoolExecutor(1) as thread:
        hanging = thread.submit(call, pool, time.sleep, 60, seconds=3.0)
        while pool._places.qsize() == 2:
            time.sleep(0.01)
        others = {call(pool, os.getpid) for _ in range(5)}
        assert not hanging.done()
        assert len(others) == 1  # the warm one
        with pytest.raises(LimitExceeded, match=r"more than 3 seconds to read \(LINEUP_IMAGE_SECONDS\)"):
            hanging.result(30)
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda _: call(pool, time.sleep, 0.2), range(2)))
    assert both == [None, None]  # it was replaced


def test_what_takes_too_much_memory_ends_alone(pool: ProcessPool) -> None:
    with pytest.raises(LimitExceeded, match=r"more memory .* 1,073,741,824 bytes \(by LINEUP_MAX_PIXELS\)"):
        call(pool, bytearray, 2**31)
    assert call(pool, len, bytes(10)) == 10
    assert call(pool, bytearray, 10, memory=2**31) == bytearray(10)


def test_what_breaks_its_process_is_refused_alone(pool: ProcessPool) -> None:
    with pytest.raises(LimitExceeded, match="breaks what reads it"):
        call(pool, os.abort)
    assert call(pool, abs, -1) == 1


def test_work_ends_with_the_time_of_who_waits_for_it(pool: ProcessPool) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlinePassed):
        call(pool, time.sleep, 60, deadline=start + 0.2)
    with ThreadPoolExecutor(2) as threads:
        busy = [threads.submit(call, pool, time.sleep, 60, seconds=1.0) for _ in range(2)]
        while pool._places.qsize():
            time.sleep(0.01)
        with pytest.raises(DeadlinePassed, match="before its turn"):
            call(pool, abs, -1, deadline=time.monotonic() + 0.1)
        assert all(isinstance(one.exception(30), LimitExceeded) for one in busy)
    assert time.monotonic() - start < 30
    assert call(pool, abs, -1, deadline=math.inf) == 1


AFTER_A_WHILE = "__import__('time').sleep(0.3) or __import__('os').getpid()"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_whose_process_others_end_is_worked_on_to_its_end(pool: ProcessPool, sent: signal.Signals) -> None:
    process = call(pool, os.getpid)
    assert isinstance(process, int)
    ending = threading.Timer(0.1, os.kill, (process, sent))
    ending.start()
    result = call(pool, eval, AFTER_A_WHILE)
    ending.join()
    assert (result == process) == (sent == signal.SIGTERM)  # which waits for the work
    assert call(pool, abs, -1) == 1


def test_processes_that_cannot_be_started_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(modules: object) -> None:
        raise OSError("no process can be started")

    pool = ProcessPool(2)
    with monkeypatch.context() as patch:
        patch.setattr(process_pool, "Worker", fail)
        with pytest.raises(OSError, match="no process"):
            pool.warm("os")
    assert pool._places.qsize() == 2


def test_an_orphan_ends_by_itself(pool: ProcessPool) -> None:
    call(pool, abs, -1)
    worker = pool._places.get()
    assert worker
    worker._channel.send(Task(time.sleep, (60,), 0.1 - process_pool.ORPHAN_SECONDS, 2**30))
    worker._process.join(30)
    assert worker._process.exitcode == -signal.SIGALRM
    pool._places.put(worker)
    assert call(pool, abs, -1) == 1


def test_a_process_that_nobody_needs_any_more_ends_without_a_traceback(pool: ProcessPool) -> None:
    call(pool, abs, -1)
    context = get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=process_pool._work, args=(theirs,))
    process.start()
    ours.close()
    theirs.close()
    process.join(30)
    assert process.exitcode == 0


def test_a_smaller_limit_of_the_system_holds(pool: ProcessPool) -> None:
    process = call(pool, os.getpid)
    assert isinstance(process, int)
    resource.prlimit(process, resource.RLIMIT_DATA, (2**29, 2**29))
    with pytest.raises(LimitExceeded, match="more memory"):
        call(pool, bytearray, 2**29)
    assert call(pool, os.getpid) == process
    os.kill(process, signal.SIGKILL)


def test_libraries_print_no_warnings(pool: ProcessPool) -> None:
    assert call(pool, eval, "__import__('warnings').filters[0][0]") == "ignore"


def test_those_who_may_take_all_memory_work_one_at_a_time() -> None:
    pool = ProcessPool(2, memory=1.5 * 2**30)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(call, pool, time.sleep, 0.5)
        while pool._places.qsize() == 2:
            time.sleep(0.01)
        with pytest.raises(DeadlinePassed, match="before its turn"):
            call(pool, abs, -1, deadline=time.monotonic() + 0.1)
        assert call(pool, abs, -1, memory=2**29) == 1
        assert call(pool, abs, -1) == 1
        assert first.done()
    assert call(pool, abs, -1, memory=2**32) == 1  # more than there is, but alone
    for _ in range(2):
        if worker := pool._places.get_nowait():
            worker.end()


def test_a_script_that_calls_us_at_its_top_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import math\n"
        "from trainer.process_pool import decoding_pool\n"
        "print('begins', flush=True)\n"
        "print(decoding_pool().call(math.sqrt, 4.0, seconds=60, memory=2**30))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("begins\n2.0\n", "")
