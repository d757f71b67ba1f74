"""What the indexer's commands show to people: progress on stderr, results on stdout."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from indexer.agreement import Agreement
from indexer.store import Removed
from trainer.datasets import DatasetError

SHOWN = 10
HEADS = ("knn", "nn1")
WHEN = ("before", "after", "held_back")


class Speed(ProgressColumn):
    """Images per second, over the last of them."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s")


@contextmanager
def image_progress(console: Console, again: Callable[[], Iterable[object]] | None) -> Iterator[Callable[[], None]]:
    """A bar that the given function advances by one image; nothing where stderr is no terminal.

    Args:
        console: On stderr.
        again: Gives the images anew, to be counted in the background while the first of them are added.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("images", total=None)

        def count(images: Callable[[], Iterable[object]]) -> None:
            with suppress(DatasetError, OSError):  # adding them says it better
                bar.update(task, total=sum(1 for _ in images()))

        if again is not None and console.is_terminal:
            threading.Thread(target=count, args=(again,), name="count", daemon=True).start()
        yield lambda: bar.advance(task)


def write_report(home: Path, report: Mapping[str, Any]) -> Path:
    """Keep a report with everything that was skipped; returns where."""
    path = home / "reports" / f"add-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def tell_added(console: Console, report: Mapping[str, Any], dry_run: bool) -> None:
    """The result of `add`; what was skipped goes to stderr."""
    for item in report["rejected"][:SHOWN]:
        console.print(f"rejected {item['file']}: {item['reason']}", markup=False)
    for item in report["conflicts"][:SHOWN]:
        console.print(f"conflict {item['file']}: stored as {item['has']}, not as {item['wants']}", markup=False)
    hidden = sum(max(0, len(report[key]) - SHOWN) for key in ("rejected", "conflicts"))
    if hidden:
        console.print(f"... and {hidden} more", markup=False)
    if "report" in report:
        console.print(f"all of them are in {report['report']}", markup=False, soft_wrap=True)
    verb = "would add" if dry_run else "added"
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(report["generators"].items()))
    print(f"{verb} {report['added']} of {report['images']} images" + (f" ({kinds})" if kinds else ""))
    skipped = {key: report[key] for key in ("known", "embedded")} | {
        key: len(report[key]) for key in ("conflicts", "rejected")
    }
    print(", ".join(f"{key} {count}" for key, count in skipped.items()))
    if not dry_run:
        speed = report["images"] / max(report["seconds"], 1e-3)
        enrolment = "" if report["enrolment"] is None else f", enrolment {report['enrolment']}"
        print(f"revision {report['revision']}{enrolment}, {report['seconds']:.1f} s, {speed:,.0f} images/s")
    if report.get("effect"):
        tell_effect(report["effect"])
    for warning in report.get("warnings", []):
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def tell_effect(effect: Mapping[str, Any]) -> None:
    """What an enrolment changed, as a table."""
    columns = [f"{head} {when}".replace("_", " ") for head in HEADS for when in WHEN]
    table = Table("recall", "images", *columns, box=SIMPLE)
    for row in effect["recall"]:
        table.add_row(row["generator"], str(row["images"]), *_shares(row))
    if alarms := effect["false_alarms"]:
        table.add_row("false alarms", str(alarms["images"]), *_shares(alarms))
    Console(highlight=False, width=100).print(table)


def _shares(row: Mapping[str, Any]) -> list[str]:
    return [_share(row[head].get(when)) for head in HEADS for when in WHEN]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def tell_status(status: Mapping[str, Any]) -> None:
    """The result of `status`, as tables."""
    console = Console(highlight=False)
    if status["checkpoint"] is None:
        console.print(f"database {status['database']}: nothing was added yet", markup=False)
        return
    index, references = status["index"], status["references"]
    facts = Table(box=None, show_header=False)
    facts.add_row("database", status["database"])
    facts.add_row("checkpoint", f"{status['name']} {status['checkpoint']}")
    facts.add_row("references", f"{references['real']} real, {references['fake']} fake; revision {status['revision']}")
    facts.add_row(
        "index",
        f"{index['kind']} on {index['device']}, {index['size']} vectors, recall@20 {index['recall']:.4g}; "
        f"revision {index['revision']}",
    )
    calibration = status["calibration"]
    facts.add_row(
        "calibration",
        "none yet"
        if calibration is None
        else f"{calibration['real']} real, {calibration['fake']} fake; revision {calibration['revision']}",
    )
    console.print(facts)
    for title, first, rows in (
        ("generators", "generator", [(row["name"], row["references"]) for row in status["generators"]]),
        ("sources", "source", [(row["name"], row["references"]) for row in status["sources"]]),
    ):
        if rows:
            table = Table(first, "references", title=title, title_justify="left", box=SIMPLE)
            for name, count in rows:
                table.add_row(name, f"{count:,}")
            console.print(table)
    if status["enrolments"]:
        table = Table("id", "at", "added", "recall by knn", title="latest enrolments", title_justify="left", box=SIMPLE)
        for row in status["enrolments"]:
            added = "unfinished" if row["added"] is None else f"{row['added']:,}"
            recall = row["effect"]["recall"] if row["effect"] else []
            changes = [
                f"{one['generator']} {_share(one['knn']['before'])} to {_share(one['knn']['after'])}" for one in recall
            ]
            table.add_row(str(row["id"]), row["at"], added, ", ".join(changes))
        console.print(table)


def tell_removed(removed: Removed, forget: bool) -> None:
    """The result of `remove`."""
    blocked = ", which may not come back" if forget else ""
    print(f"removed {removed.references:,} references with thumbnails and embeddings{blocked}")
    for checkpoint_id, revision in removed.revisions.items():
        print(f"index of {checkpoint_id}: revision {revision}")


def tell_agreement(results: Sequence[Agreement]) -> None:
    """The result of `check`, a line for each checkpoint."""
    for result in results:
        print(result)
    if not results:
        print("nothing was added yet")


def tell_rebuilt(console: Console, report: Mapping[str, Any]) -> None:
    """The result of `rebuild`; what cannot be read any more goes to stderr."""
    for item in report.get("unreadable", [])[:SHOWN]:
        console.print(f"cannot read {item['id']} {item['uri'] or ''}: {item['reason']}", markup=False, soft_wrap=True)
    if "checkpoint" in report:
        state = "it is the active one now" if report["active"] else "the active one stays"
        print(f"embedded {report['embedded']:,} references with {report['checkpoint']}; {state}")
        if report["unreadable"] and not report["active"]:
            print(f"{len(report['unreadable'])} cannot be read; --partial switches without them")
    for index in report["indexes"]:
        print(f"index of {index['checkpoint']}: {index['size']:,} vectors, snapshot written")
