"""Several workers that add parts of one data set: their enrolment, and their reports as one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import Any

from indexer.ingest.ingest import Report
from indexer.store import Store
from trainer.data.datasets import is_remote
from trainer.data.parts import DatasetPart
from trainer.model.embedder import Embedder


def join_workers(store: Store, embedder: Embedder, path: Path, part: DatasetPart, choice: Mapping[str, Any]) -> int:
    """The enrolment that the parts of an addition share: of the same data set, choice, checkpoint and count.

    Args:
        store: Where it is.
        embedder: The checkpoint.
        path: The data set, which has the same place on each worker's machine.
        part: This worker's.
        choice: The other arguments of `read_dataset`.
    """
    place = path if is_remote(path) else path.absolute()
    job = blake2b(json.dumps([str(place), dict(choice), embedder.id, part.count], sort_keys=True).encode()).hexdigest()
    return store.enrolments.join(job, part.number, part.count, choice["generator"], choice["source"])


def leave_workers(store: Store, enrolment: int, part: DatasetPart, report: dict[str, Any]) -> dict[str, Any]:
    """What is to be told once a part has been added: `parts_left` with its own report, of the last the report of all.

    The caller keeps that one, which ends the enrolment; one to which no part brought anything is forgotten.
    """
    parts_left, reports = store.enrolments.finish_part(enrolment, part.number, report)
    if parts_left:
        return report | {"parts_left": parts_left}
    whole = joined(reports)
    for row in store.enrolments.additions(enrolment):  # also what a part added that was killed and begun again
        whole.added += row["images"]
        whole.generators[row["name"]] = whole.generators.get(row["name"], 0) + row["images"]
        if row["source"]:
            whole.sources[row["source"]] = whole.sources.get(row["source"], 0) + row["images"]
    whole.known -= whole.added - sum(part_report["added"] for part_report in reports)
    if whole.added + whole.embedded:
        whole.enrolment = enrolment
    else:
        store.enrolments.discard(enrolment)
    return asdict(whole)


def joined(reports: Sequence[Mapping[str, Any]]) -> Report:
    """What several workers read, without what is new."""
    return Report(
        **{name: sum(report[name] for report in reports) for name in ("images", "known", "embedded")},
        conflicts=[conflict for report in reports for conflict in report["conflicts"]],
        rejected=sorted((file for report in reports for file in report["rejected"]), key=itemgetter("file")),
        revision=max(report["revision"] for report in reports),
        seconds=max(report["seconds"] for report in reports),
    )
