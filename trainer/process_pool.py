"""Processes of their own for work on files that anybody may have made: one that takes too much ends alone."""

import math
import os
import pickle
import queue
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from mmap import MADV_REMOVE, mmap
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from types import ModuleType
from typing import Any, TypeVar

from trainer.cores import usable_cores, usable_memory

T = TypeVar("T")
_starting = threading.Lock()

LARGEST_MESSAGE = 2**32
"""Bytes of address space for what is sent; memory is taken for as much as was written."""
LARGE_MESSAGE = 2**24
"""Bytes of a message above which its memory is given back once it is read."""
DECODING_SHARE = 0.75
"""Of the memory that there is, what all processes together may be allowed; the rest is for who started them."""
ORPHAN_SECONDS = 1.0
"""How much longer than allowed work may take where nobody is left to end it."""


class LimitExceeded(ValueError):
    """The work took more time or memory than it may, or broke its process, which has ended."""


class DeadlinePassed(RuntimeError):
    """Nobody waits for the result any more; the process that worked on it has ended."""


class WorkerEnded(RuntimeError):
    """The process ended before it gave a result: by the work, by a signal, or for memory that others took."""


class Channel:
    """A connection between two processes whose messages lie in memory that both see: a pipe would copy them in pieces.

    Args:
        connection: It tells when a message is there, and how long it is.
        handle: Of the memory.
    """

    def __init__(self, connection: Connection, handle: int) -> None:
        self.connection, self.memory = connection, mmap(handle, LARGEST_MESSAGE)
        os.close(handle)

    def send(self, message: object) -> None:
        """Send what can be pickled, once the other side has read what was sent before."""
        self.memory.seek(0)
        pickle.dump(message, self.memory, pickle.HIGHEST_PROTOCOL)
        self.connection.send(self.memory.tell())

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            EOFError: The other process has ended.
        """
        size = self.connection.recv()
        with memoryview(self.memory) as memory:
            message = pickle.loads(memory[:size])
        if size > LARGE_MESSAGE:
            self.memory.madvise(MADV_REMOVE)
        return message


@dataclass(frozen=True, slots=True)
class Task:
    """What a process is to do, and the seconds and bytes of data that it may take."""

    work: Callable[..., Any]
    args: tuple[Any, ...]
    seconds: float
    memory: int


@contextmanager
def _without_main() -> Iterator[None]:
    """Let a process start without the program's main module, which it would run once more, and has no need of.

    A script that calls us at its top, as scripts do, would begin all over in each process.
    """
    with _starting:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


class Worker:
    """One process, which works on one thing after the other.

    It is forked from a server process that has imported the modules already, and so starts in some milliseconds.

    Args:
        modules: What the server process imports, if it does not run yet.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, *modules])
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), name="worker", daemon=True)
        with _without_main():
            self._process.start()
        theirs.close()
        handle = os.memfd_create("messages")
        os.truncate(handle, LARGEST_MESSAGE)
        send_handle(ours, handle, self._process.pid)
        self._channel = Channel(ours, handle)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.is_alive()

    def ask(self, task: Task, deadline: float) -> Any:
        """What a task gives; see `ProcessPool.call`. What is raised but by the task ends the process.

        Raises:
            WorkerEnded: The process ended before.
        """
        until = min(time.monotonic() + task.seconds, deadline)
        try:
            self._channel.send(task)
            if (left := until - time.monotonic()) <= 0 or not self._channel.connection.poll(left):
                if until == deadline:
                    raise DeadlinePassed("the time for it has passed")
                raise LimitExceeded(f"it takes more than {task.seconds:g} seconds to read (LINEUP_IMAGE_SECONDS)")
            succeeded, result = self._channel.receive()
        except (EOFError, OSError) as error:
            self.end()
            raise WorkerEnded from error
        except BaseException:
            self.end()
            raise
        if succeeded:
            return result
        if isinstance(result, MemoryError):
            raise LimitExceeded(f"it takes more memory to read than an image may, {_limit(task.memory)}")
        raise result

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._channel.connection.close()
        self._channel.memory.close()


def _limit(memory: int) -> str:
    return f"{memory:,} bytes (by LINEUP_MAX_PIXELS)"


def _work(connection: Connection) -> None:
    """What a process does until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides when this ends
    warnings.simplefilter("ignore")  # a broken image makes libraries print thousands
    with suppress(EOFError, ConnectionError):  # the other end closed it, or was killed
        channel = Channel(connection, recv_handle(connection))
        while True:
            _answer(channel)


def _answer(channel: Channel) -> None:
    """Do the next task, within its limits."""
    task: Task = channel.receive()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # who stops a service stops this: not amid work
    signal.setitimer(signal.ITIMER_REAL, task.seconds + ORPHAN_SECONDS)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    memory = task.memory if most == resource.RLIM_INFINITY else min(task.memory, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, most))
    try:
        answer = True, task.work(*task.args)
    except Exception as error:
        answer = False, error
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    signal.setitimer(signal.ITIMER_REAL, 0)
    channel.send(answer)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


class ProcessPool:
    """Processes that are started when they are needed first, and kept. Threads may share it.

    Args:
        processes: At most so many; further callers wait.
        memory: Bytes that those at work may be allowed in all; one alone may always be.
    """

    def __init__(self, processes: int, memory: float = math.inf) -> None:
        self._memory, self._free, self._freed = memory, memory, threading.Condition()
        self._places: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(processes):
            self._places.put(None)

    def warm(self, module: str) -> None:
        """Start every process that is not in use, once their server has imported a module."""
        places = []
        with suppress(queue.Empty):
            while True:
                places.append(self._places.get_nowait())
        try:
            while places:
                self._places.put(places[-1] or Worker([module]))
                places.pop()
        finally:
            for place in places:
                self._places.put(place)  # those that could not be started

    def call(self, work: Callable[..., T], *args: Any, seconds: float, memory: int, deadline: float = math.inf) -> T:
        """What a function of a module returns, or raises, in one of the processes.

        Args:
            work: The function. The first one's module is imported once for all processes.
            args: For it; they, and what it returns, are pickled.
            seconds: It may take so long.
            memory: Bytes of data that the process may have, its own included.
            deadline: When the caller stops waiting, by `time.monotonic`.

        Raises:
            LimitExceeded: It took longer, or more memory, or broke two processes.
            DeadlinePassed: The caller has stopped waiting.
        """
        with self._reserved(memory, deadline):
            try:
                worker = self._places.get(timeout=_left(deadline))
            except queue.Empty:
                raise DeadlinePassed("the time for it passed before its turn") from None
            task = Task(work, args, seconds, memory)
            try:
                try:
                    worker = worker if worker and worker.alive else Worker([work.__module__])
                    result: T = worker.ask(task, deadline)
                except WorkerEnded:  # perhaps others ended it; a second time it is the work's doing
                    worker = Worker([work.__module__])
                    result = worker.ask(task, deadline)
                return result
            except WorkerEnded as error:
                reason = f"it takes more memory to read than an image may, {_limit(memory)}, or breaks what reads it"
                raise LimitExceeded(reason) from error
            finally:
                self._places.put(worker)

    @contextmanager
    def _reserved(self, memory: int, deadline: float) -> Iterator[None]:
        """Have so much of the memory, once it is free."""
        size = min(memory, self._memory)
        with self._freed:
            if not self._freed.wait_for(lambda: self._free >= size, _left(deadline)):
                raise DeadlinePassed("the time for it passed before its turn")
            self._free -= size
        try:
            yield
        finally:
            with self._freed:
                self._free += size
                self._freed.notify_all()


def _left(deadline: float) -> float | None:
    """Seconds until then; None where there is no end."""
    return None if deadline == math.inf else max(0.0, deadline - time.monotonic())


@cache
def decoding_pool() -> ProcessPool:
    """The processes in which all of this process's uploads and references are decoded: for each core one.

    Where memory is short fewer of them work at a time.
    """
    return ProcessPool(usable_cores(), DECODING_SHARE * usable_memory())
