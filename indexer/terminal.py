"""What the indexer's commands show to people: progress on stderr, results on stdout."""

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from indexer.measure.audit import RINGS
from indexer.measure.check import Agreement, BlobAgreement
from indexer.measure.enrolment_effect import NEIGHBOUR_HEADS
from indexer.store.generators import GENERATOR_FACTS
from trainer.data.entry import DatasetError
from trainer.files import write_atomically
from trainer.progress import Bar

if TYPE_CHECKING:  # its module needs libraries that only measuring uses
    from indexer.measure.index_evaluation import IndexEvaluation

console = Console(stderr=True, highlight=False)

SKIPPED_LINES = 10
"""Skipped images that are told one by one; the report has all of them."""
NAMED_IMAGES = 5
"""Of a candidate, for who looks at them before enrolling it."""
WHEN = ("before", "after", "held_back")
EVALUATED_HEADS = ("knn", "nn1", "linear", "svm", "combined")
TRANSFORMS = {"none": "plain", "transformed": "transformed", "equalised": "both labels recompressed alike"}


class Speed(ProgressColumn):
    """Images per second, over the last of them."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s")


def results() -> Console:
    """For tables on stdout: as wide as the terminal, or as the widest table needs where there is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 150)


def answer(as_json: bool, document: Any, tell: Callable[[], None]) -> None:
    """Print the result of a command: one JSON document, or what `tell` prints for people."""
    if as_json:
        print(json.dumps(document, default=str))
    else:
        tell()


def note(line: str) -> None:
    """One line on stderr, unbroken, in which brackets are no markup."""
    console.print(line, markup=False, soft_wrap=True)


@contextmanager
def image_progress(
    again: Callable[[], Iterable[object]] | None = None, total: int | None = None, what: str = "images"
) -> Iterator[Callable[..., None]]:
    """A bar, see `Bar`, that the given function advances by one image, or as many as it is told.

    Args:
        again: Gives the images anew, to be counted in the background while the first of them are added.
        total: How many there are, where that is known.
        what: What is counted.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)

        def count(images: Callable[[], Iterable[object]]) -> None:
            with suppress(DatasetError, OSError):  # adding them says it better
                bar.update(task, total=sum(1 for _ in images()))

        if again is not None and console.is_terminal:
            threading.Thread(target=count, args=(again,), name="count", daemon=True).start()
        yield lambda images=1: bar.advance(task, images)


def save_report(home: Path, command: str, report: dict[str, Any]) -> None:
    """Keep a command's report with everything that was skipped, and note in it where; or say that it cannot be kept."""
    path = home / "reports" / f"{command}-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    try:
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    except OSError as error:
        note(f"warning: the report is not kept ({error}): look at LINEUP_HOME, or take --json")
    else:
        report["report"] = str(path)


def tell_added(report: Mapping[str, Any], dry_run: bool) -> None:
    """The result of `add`; what was skipped goes to stderr."""
    _tell_skipped(report, [f"rejected {item['file']}: {item['reason']}" for item in report["rejected"]])
    _tell_skipped(report, [_conflict(item["file"], item) for item in report["conflicts"]])
    verb = "would add" if dry_run else "added"
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(report["generators"].items()))
    print(f"{verb} {report['added']} of {report['images']} images" + (f" ({kinds})" if kinds else ""))
    conflicts, rejected = len(report["conflicts"]), len(report["rejected"])
    print(f"known {report['known']}, embedded {report['embedded']}, conflicts {conflicts}, rejected {rejected}")
    if not dry_run:
        speed = report["images"] / max(report["seconds"], 1e-3)
        enrolment = "" if report["enrolment"] is None else f", enrolment {report['enrolment']}"
        print(f"revision {report['revision']}{enrolment}, {report['seconds']:.1f} s, {speed:,.0f} images/s")
    if left := report.get("parts_left"):
        print(f"{left} parts are still to come; the last of them renews index and calibration and says what changed")
    if report.get("effect"):
        tell_effect(report["effect"])
    for warning in report.get("warnings", []):
        note(f"warning: {warning}")


def tell_effect(effect: Mapping[str, Any]) -> None:
    """What an enrolment changed, as a table."""
    columns = [f"{head} {when}".replace("_", " ") for head in NEIGHBOUR_HEADS for when in WHEN]
    table = Table("recall", "images", *columns, box=SIMPLE)
    for row in effect["recall"]:
        table.add_row(row["generator"], str(row["images"]), *_shares(row))
    if alarms := effect["false_alarms"]:
        table.add_row("false alarms", str(alarms["images"]), *_shares(alarms))
    results().print(table)
    if verdicts := effect.get("verdicts"):
        table = Table("called fake / uncertain / real, %", *(when.replace("_", " ") for when in WHEN), box=SIMPLE)
        for row in verdicts:
            table.add_row(row["generator"], *(_judged(row[when]) for when in WHEN))
        results().print(table)


def _judged(shares: Mapping[str, Any] | None) -> str:
    """How images are judged, with the interval of the first share."""
    if shares is None:
        return "-"
    low, high = (f"{100 * end:.0f}" for end in shares["interval"])
    fake, uncertain, real = (f"{100 * shares[name]:.0f}" for name in ("fake", "uncertain", "real"))
    return f"{fake} ({low}-{high}) / {uncertain} / {real} of {shares['images']:,}"


def _shares(row: Mapping[str, Any]) -> list[str]:
    return [_share(row[head].get(when)) for head in NEIGHBOUR_HEADS for when in WHEN]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _conflict(name: str, item: Mapping[str, str]) -> str:
    return f"conflict {name}: stored as {item['has']}, not as {item['wants']}"


def _tell_skipped(report: Mapping[str, Any], lines: Sequence[str]) -> None:
    """The first of these, and where all of them are."""
    for line in lines[:SKIPPED_LINES]:
        note(line)
    if len(lines) > SKIPPED_LINES:
        note(f"... and {len(lines) - SKIPPED_LINES} more, see {report.get('report', '--json')}")


def tell_status(status: Mapping[str, Any]) -> None:
    """The result of `status`, as tables."""
    stdout = results()
    if status["checkpoint"] is None:
        stdout.print(f"database {status['database']}: nothing was added yet", markup=False, soft_wrap=True)
        return
    index, references, calibration = status["index"], status["references"], status["calibration"]
    facts = Table(box=None, show_header=False)
    facts.add_row("database", status["database"])
    facts.add_row("checkpoint", _checkpoint(status["name"], status["checkpoint"], status["active"]))
    for one in status["checkpoints"]:
        if one["id"] != status["checkpoint"]:
            facts.add_row("beside it", _checkpoint(one["name"], one["id"], one["active"]))
    kinds = f"{references['real']:,} real, {references['fake']:,} fake"
    facts.add_row("references", f"{kinds}; revision {status['revision']}")
    if status["not_embedded"]:
        facts.add_row("not embedded", f"{status['not_embedded']} references, which its searches do not find")
    vectors = f"{index['kind']} on {index['device']}, {index['size']:,} vectors, recall@20 {index['recall']:.4g}"
    facts.add_row("index", f"{vectors}; revision {index['revision']}")
    fitted = "none yet"
    if calibration is not None:
        fitted = f"{calibration['real']} real, {calibration['fake']} fake; revision {calibration['revision']}"
    facts.add_row("calibration", fitted)
    if calibration is not None:
        facts.add_row("promise", _promise(calibration["new_sources"]))
    facts.add_row("drift", _drift(status["drift"]))
    stdout.print(facts)
    if status["not_embedded"]:
        stdout.print("to embed them, with its folder: lineup index rebuild --checkpoint FOLDER", soft_wrap=True)
    for kind in ("generator", "source"):
        if rows := status[f"{kind}s"]:
            columns = [name for name in GENERATOR_FACTS[1:] if any(row.get(name) for row in rows)]
            table = _table(f"{kind}s", kind, "references", *columns)
            for row in rows:
                table.add_row(row["name"], f"{row['references']:,}", *(str(row[name] or "") for name in columns))
            stdout.print(table)
    if status["enrolments"]:
        table = _table("latest enrolments", "id", "at", "added", "still there", "recall by knn")
        for row in status["enrolments"]:
            added = "unfinished" if row["added"] is None else f"{row['added']:,}"
            changes = [
                f"{one['generator']} {_share(one['knn']['before'])} to {_share(one['knn']['after'])}"
                for one in (row["effect"] or {"recall": []})["recall"]
            ]
            table.add_row(str(row["id"]), row["at"], added, f"{row['references']:,}", ", ".join(changes))
        stdout.print(table)


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=SIMPLE)


def _checkpoint(name: str, checkpoint_id: str, active: bool) -> str:
    return f"{name} {checkpoint_id}" + (", the active one" if active else "")


def _promise(new_sources: int | None) -> str:
    """To which real images the rate of false alarms is promised; None where an earlier version did not keep it."""
    if new_sources is None:
        return "to new sources not known yet: it was fitted by an earlier version, and serving fits it anew"
    if new_sources:
        return f"to real images of known sources, and to nine of ten new sources (judging by {new_sources} sources)"
    return "to real images of known sources alone (under 9 sources say nothing of a new one)"


def _drift(drift: Mapping[str, Any]) -> str:
    """Whether the last complete day was like the days before and like the calibration."""
    words = {"before": "the days before", "calibration": "the calibration"}
    told = []
    for against, p_value in drift["p_values"].items():
        if p_value is not None:
            like = "UNLIKE" if p_value < drift["rate"] else "like"
            told.append(f"{like} {words[against]} (p {p_value:.2g})")
    return f"{drift['day']}, {drift['images']} images: {', '.join(told) or 'too few verdicts kept to say'}"


def tell_removed(report: Mapping[str, Any]) -> None:
    """The result of `remove`."""
    blocked = ", which may not come back" if report["forgotten"] else ""
    print(f"removed {report['removed']:,} references with their thumbnails{blocked}")
    for index in report["indexes"]:
        _tell_index(index, f"{index['removed']:,} vectors removed, {index['size']:,} left")


def tell_relabelled(report: Mapping[str, Any]) -> None:
    """The result of `relabel`: the first new ids, and what each index has now."""
    print(f"relabelled {report['relabelled']:,} references")
    for before, now in list(report["ids"].items())[:SKIPPED_LINES]:
        print(f"  {before} is {now} now")
    if (more := report["relabelled"] - SKIPPED_LINES) > 0:
        print(f"  ... and {more:,} more, see --json")
    for index in report["indexes"]:
        _tell_index(index, f"{index['relabelled']:,} vectors relabelled among {index['size']:,}")


def tell_discovery(report: Mapping[str, Any]) -> None:
    """The result of `discover`: a row for each candidate, and some of its images."""
    stdout = results()
    candidates = report["candidates"]
    if candidates:
        columns = ("candidate", "images", "first seen", "last seen", "verdicts", "nearest references", "novelty p")
        table = _table("", *columns)
        for one in candidates:
            nearest = (f"{near['generator'] or near['label']} {near['images']}" for near in one["nearest"][:3])
            novelty = "-" if one["novelty"] is None else f"{one['novelty']:.3f}"
            verdicts = (f"{verdict} {count}" for verdict, count in one["verdicts"].items())
            seen = (f"{one[when]:%Y-%m-%d %H:%M}" for when in ("first", "last"))
            table.add_row(one["name"], f"{one['images']:,}", *seen, ", ".join(verdicts), ", ".join(nearest), novelty)
        stdout.print(table)
    for one in candidates:
        files = [example["file"] for example in one["examples"][:NAMED_IMAGES]]
        more = f" and {one['images'] - len(files):,} more" if one["images"] > len(files) else ""
        print(f"{one['name']}: {', '.join(files)}{more}")
    left_out = f"; {report['left_out']:,} older ones were not looked at" if report["left_out"] else ""
    groups = "1 candidate" if len(candidates) == 1 else f"{len(candidates)} candidates"
    found = f"{groups} among {report['images']:,} images that no reference explains"
    print(f"{found}, {report['ungrouped']:,} of them in none{left_out}")
    if candidates:
        print(f"to enrol one: lineup index discover --enrol {candidates[0]['name']} --generator NAME")


def tell_agreement(results: Sequence[Agreement], miscounts: Sequence[str], blobs: BlobAgreement | None) -> None:
    """The result of `check`, a line for each checkpoint, for each count that is wrong, and for object storage."""
    for result in results:
        print(result)
    for miscount in miscounts:
        print(f"{miscount}: run lineup index rebuild")
    if not results:
        print("nothing was added yet")
    if blobs is not None:
        print(blobs)


def tell_rebuilt(report: Mapping[str, Any]) -> None:
    """The result of `rebuild`; what cannot be read any more goes to stderr."""
    unreadable = report.get("unreadable", [])
    lines = [f"cannot read {item['id']} {item['uri'] or ''}: {item['reason']}" for item in unreadable]
    _tell_skipped(report, lines)
    if "checkpoint" in report:
        state = "it is the active one" if report["active"] else "the active one stays"
        print(f"embedded {report['embedded']:,} references with {report['checkpoint']}; {state}")
        if unreadable and not report["active"]:
            print(f"{len(unreadable)} cannot be read; --partial switches without them")
    for index in report["indexes"]:
        _tell_index(index, f"{index['size']:,} vectors")


def _tell_index(index: Mapping[str, Any], vectors: str) -> None:
    """What an index has now; a search engine keeps no snapshot here."""
    written = "" if index["snapshot"] is None else f", snapshot of revision {index['snapshot']} written"
    print(f"index of {index['checkpoint']}: {vectors}{written}")


def tell_imported(report: Mapping[str, Any]) -> None:
    """The result of `import`; conflicts go to stderr."""
    _tell_skipped(report, [_conflict(item["sha256"], item) for item in report["conflicts"]])
    if not any(report[name] for name in ("added", "embeddings", "conflicts", "blocked")):
        print(f"all {report['references']:,} references are there already")
    else:
        print(f"added {report['added']:,} of {report['references']:,} references, {report['embeddings']:,} embeddings")
    print(f"conflicts {len(report['conflicts'])}, blocked {len(report['blocked'])}")
    if report["without_picture"]:
        print(
            f"{report['without_picture']:,} references have no picture: `lineup index thumbnails` fetches public ones"
        )


def tell_thumbnails(report: Mapping[str, Any]) -> None:
    """The result of `thumbnails`; which ones failed goes to stderr."""
    _tell_skipped(report, [f"failed {one['id']} {one['uri'] or ''}: {one['reason']}" for one in report["failed"]])
    print(f"fetched {report['fetched']:,} of {report['missing']:,} missing pictures")
    for reason, count in report["reasons"].items():
        print(f"  {count:,} failed: {reason}")


def tell_evaluation(evaluation: "IndexEvaluation") -> None:
    """A table per split and transform: accuracy and AUROC of each head by generator, and the verdicts."""
    stdout = results()
    cells = {(row["split"], row["transform"], row["generator"], row["head"]): row for row in evaluation.rows}
    verdicts = {(row["split"], row["transform"], row["generator"]): row for row in evaluation.verdicts}
    for split, transform in dict.fromkeys((split, transform) for split, transform, _, _ in cells):
        names = [name for at, how, name, _ in cells if (at, how) == (split, transform)]
        heads = [head for head in EVALUATED_HEADS if any((split, transform, name, head) in cells for name in names)]
        title = f"{split}, {TRANSFORMS.get(transform, transform)}: accuracy (AUROC), %"
        table = _table(title, "generator", "images", *heads, "called fake", "called real", "uncertain")
        for name in dict.fromkeys(names):
            rows = [cells.get((split, transform, name, head)) for head in heads]
            images = max(row["images"] for row in rows if row)
            verdict = verdicts.get((split, transform, name))
            shares = [_percent(verdict[key] if verdict else None) for key in ("fake", "real", "uncertain")]
            table.add_row(name, str(images), *map(_cell, rows), *shares)
        stdout.print(table)
    if str(evaluation.left_out):
        stdout.print(str(evaluation.left_out), soft_wrap=True)
    thresholds = ", ".join(
        f"{name} {'cannot be promised' if value is None else f'{value:.3f}'}"
        for name, value in evaluation.thresholds.items()
    )
    stdout.print(f"index at revision {evaluation.revision}; thresholds of the combined score: {thresholds}")


def tell_audit(report: Mapping[str, Any]) -> None:
    """AUROC of all facts together and of each, by generator; then warnings and near duplicates."""
    stdout = results()
    facts = list(report["facts"])
    title = f"how well files alone tell real from fake: AUROC, above {RINGS} rings"
    table = _table(title, "fakes", "images", "all facts", *facts)
    fakes = sum(row["images"] for row in report["generators"])
    for row in ({**report, "name": "all", "images": fakes}, *report["generators"]):
        areas = [row["auroc"], *(row["facts"].get(fact) for fact in facts)]
        table.add_row(row["name"] or "(unnamed)", str(row["images"]), *map(_area, areas))
    stdout.print(table)
    for warning in report["warnings"]:
        stdout.print(f"warning: {warning}", markup=False, soft_wrap=True)
    duplicates = report["near_duplicates"]
    chance = ", some by chance perhaps: plain images are alike when they are small" if duplicates["count"] else ""
    print(f"{duplicates['count']} near duplicates across labels{chance}")
    for pair in duplicates["listed"]:
        line = f"  {_name(pair['real'])} and {_name(pair['fake'])}: {pair['bits']} bits apart"
        stdout.print(line, markup=False, soft_wrap=True)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return _percent(row["accuracy"]) + ("" if row["auroc"] is None else f" ({_percent(row['auroc'])})")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _area(area: float | None) -> str:
    if area is None:
        return "-"
    return f"[bold]{area:.2f}[/bold]" if area > RINGS else f"{area:.2f}"


def _name(reference: Mapping[str, Any]) -> str:
    kind = "real" if reference["generator"] is None else reference["generator"]
    return f"{kind} {reference['id']}" + (f" {reference['uri']}" if reference["uri"] else "")
