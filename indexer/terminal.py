"""What the indexer's commands show to people: progress on stderr, results on stdout."""

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from indexer.measure.check import Agreement
from indexer.store.generators import GENERATOR_FACTS
from trainer.data.entry import DatasetError
from trainer.progress import Bar

SHOWN = 10
HEADS = ("knn", "nn1")
WHEN = ("before", "after", "held_back")


class Speed(ProgressColumn):
    """Images per second, over the last of them."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s")


def results() -> Console:
    """For tables on stdout: as wide as the terminal, or as the widest table needs where there is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 150)


@contextmanager
def image_progress(
    console: Console, again: Callable[[], Iterable[object]] | None = None, total: int | None = None
) -> Iterator[Callable[[], None]]:
    """A bar, see `Bar`, that the given function advances by one image.

    Args:
        console: On stderr.
        again: Gives the images anew, to be counted in the background while the first of them are added.
        total: How many there are, where that is known.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("images", total=total)

        def count(images: Callable[[], Iterable[object]]) -> None:
            with suppress(DatasetError, OSError):  # adding them says it better
                bar.update(task, total=sum(1 for _ in images()))

        if again is not None and console.is_terminal:
            threading.Thread(target=count, args=(again,), name="count", daemon=True).start()
        yield lambda: bar.advance(task)


def write_report(home: Path, command: str, report: Mapping[str, Any]) -> Path:
    """Keep a command's report with everything that was skipped; returns where."""
    path = home / "reports" / f"{command}-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def tell_added(console: Console, report: Mapping[str, Any], dry_run: bool) -> None:
    """The result of `add`; what was skipped goes to stderr."""
    _tell_skipped(console, report, [f"rejected {item['file']}: {item['reason']}" for item in report["rejected"]])
    _tell_skipped(console, report, [_conflict(item["file"], item) for item in report["conflicts"]])
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
    results().print(table)


def _shares(row: Mapping[str, Any]) -> list[str]:
    return [_share(row[head].get(when)) for head in HEADS for when in WHEN]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _conflict(name: str, item: Mapping[str, str]) -> str:
    return f"conflict {name}: stored as {item['has']}, not as {item['wants']}"


def _tell_skipped(console: Console, report: Mapping[str, Any], lines: Sequence[str]) -> None:
    """The first of these, and where all of them are."""
    for line in lines[:SHOWN]:
        console.print(line, markup=False, soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(f"... and {len(lines) - SHOWN} more, see {report['report']}", markup=False, soft_wrap=True)


def tell_status(status: Mapping[str, Any]) -> None:
    """The result of `status`, as tables."""
    console = results()
    if status["checkpoint"] is None:
        console.print(f"database {status['database']}: nothing was added yet", markup=False, soft_wrap=True)
        return
    index, references = status["index"], status["references"]
    facts = Table(box=None, show_header=False)
    facts.add_row("database", status["database"])
    others = [one for one in status["checkpoints"] if one["id"] != status["checkpoint"]]
    facts.add_row("checkpoint", _checkpoint(status["name"], status["checkpoint"], status["active"]))
    for one in others:
        facts.add_row("beside it", _checkpoint(one["name"], one["id"], one["active"]))
    facts.add_row("references", f"{references['real']} real, {references['fake']} fake; revision {status['revision']}")
    if status["not_embedded"]:
        facts.add_row("not embedded", f"{status['not_embedded']} references, which its searches do not find")
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
    if status["not_embedded"]:
        console.print("to embed them, with its folder: lineup index rebuild --checkpoint FOLDER", soft_wrap=True)
    for kind in ("generator", "source"):
        if rows := status[f"{kind}s"]:
            facts_of = [name for name in GENERATOR_FACTS[1:] if any(row.get(name) for row in rows)]
            table = Table(kind, "references", *facts_of, title=f"{kind}s", title_justify="left", box=SIMPLE)
            for row in rows:
                table.add_row(row["name"], f"{row['references']:,}", *(str(row[name] or "") for name in facts_of))
            console.print(table)
    if status["enrolments"]:
        columns = ("id", "at", "added", "still there", "recall by knn")
        table = Table(*columns, title="latest enrolments", title_justify="left", box=SIMPLE)
        for row in status["enrolments"]:
            added = "unfinished" if row["added"] is None else f"{row['added']:,}"
            recall = row["effect"]["recall"] if row["effect"] else []
            changes = [
                f"{one['generator']} {_share(one['knn']['before'])} to {_share(one['knn']['after'])}" for one in recall
            ]
            table.add_row(str(row["id"]), row["at"], added, f"{row['references']:,}", ", ".join(changes))
        console.print(table)


def _checkpoint(name: str, checkpoint_id: str, active: bool) -> str:
    return f"{name} {checkpoint_id}" + (", the active one" if active else "")


def tell_removed(report: Mapping[str, Any]) -> None:
    """The result of `remove`."""
    blocked = ", which may not come back" if report["forgotten"] else ""
    print(f"removed {report['removed']:,} references with their thumbnails{blocked}")
    for index in report["indexes"]:
        left = f"{index['removed']:,} vectors removed, {index['size']:,} left"
        print(f"index of {index['checkpoint']}: {left}, snapshot of revision {index['snapshot']} written")


def tell_agreement(results: Sequence[Agreement]) -> None:
    """The result of `check`, a line for each checkpoint."""
    for result in results:
        print(result)
    if not results:
        print("nothing was added yet")


def tell_rebuilt(console: Console, report: Mapping[str, Any]) -> None:
    """The result of `rebuild`; what cannot be read any more goes to stderr."""
    unreadable = report.get("unreadable", [])
    lines = [f"cannot read {item['id']} {item['uri'] or ''}: {item['reason']}" for item in unreadable]
    _tell_skipped(console, report, lines)
    if "checkpoint" in report:
        state = "it is the active one" if report["active"] else "the active one stays"
        print(f"embedded {report['embedded']:,} references with {report['checkpoint']}; {state}")
        if unreadable and not report["active"]:
            print(f"{len(unreadable)} cannot be read; --partial switches without them")
    for index in report["indexes"]:
        print(f"index of {index['checkpoint']}: {index['size']:,} vectors, snapshot written")


def tell_imported(console: Console, report: Mapping[str, Any]) -> None:
    """The result of `import`; conflicts go to stderr."""
    _tell_skipped(console, report, [_conflict(item["sha256"], item) for item in report["conflicts"]])
    print(f"added {report['added']:,} of {report['references']:,} references, {report['embeddings']:,} embeddings")
    print(f"conflicts {len(report['conflicts'])}, blocked {len(report['blocked'])}")
