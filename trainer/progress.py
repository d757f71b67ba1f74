"""Progress of long work: a bar where the console is a terminal, else a plain line each minute."""

from threading import Event, Thread

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task

PERIOD = 60.0
"""Seconds between two plain lines."""


class Bar(Progress):
    """Tasks as bars; on a console that is no terminal, such as a log file, a plain line for each every minute.

    Args:
        columns: Of a bar.
        console: On stderr.
        transient: Whether a bar disappears at the end.
    """

    def __init__(self, *columns: ProgressColumn, console: Console, transient: bool = True) -> None:
        super().__init__(*columns, console=console, transient=transient, disable=not console.is_terminal)
        self._ended = Event()
        self._teller = Thread(target=self._tell, name="progress", daemon=True)

    def start(self) -> None:
        """Begin to show the tasks."""
        super().start()
        if self.disable:
            self._teller.start()

    def stop(self) -> None:
        """End showing them."""
        self._ended.set()
        if self._teller.is_alive():
            self._teller.join()
        super().stop()

    def _tell(self) -> None:
        while not self._ended.wait(PERIOD):
            for task in self.tasks:
                self.console.print(in_words(task), markup=False, highlight=False, soft_wrap=True)


def in_words(task: Task) -> str:
    """How far a task is: `images: 1,200 of 4,800, 25 %`; a count alone where the total is not known."""
    if task.total is None:
        return f"{task.description}: {task.completed:,.0f}"
    count = f"{task.completed:,.0f} of {task.total:,.0f}, " if task.total > 1 else ""  # of 1: a share by itself
    return f"{task.description}: {count}{task.percentage:.0f} %"
