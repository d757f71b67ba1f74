"""A reference set as one file: rows, thumbnails, kept uploads and the vectors of every checkpoint.

The file is a zip whose members carry checksums: for each page of references `N.json` with their facts and `N.bin` with
the bytes that these point into, at the end `about.json`, which says how many there are. Nothing in it is specific to a
database. Without pictures it is a set that may be published: public addresses in place of thumbnails, and vectors in
half precision.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from datetime import date
from pathlib import Path, PurePath
from typing import Any
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile

import numpy as np
from sqlalchemy import text

from indexer.ingest.thumbnails import missing_thumbnails
from indexer.store import Store
from indexer.store.generators import GENERATOR_FACTS, GeneratorExists
from indexer.store.reference_facts import PUBLIC, ImageFacts, NewReference

FORMAT = "lineup references 2"
FORMATS = ("lineup references 1", FORMAT)
"""What is read; the first has thumbnails always, and vectors in single precision."""
VECTOR_TYPES = ("<f4", "<f2")
EXPORT_PAGE = 250
PAGE_BYTES = 64 * 1024 * 1024
"""A page ends before its thumbnails and kept uploads exceed this, unless it is a single reference."""
ROWS = text("""
select r.*, g.name as generator, f.bytes
from reference_image r left join generator g on g.id = r.generator_id left join reference_file f on f.image_id = r.id
where r.id > :after and r.id <= (
    select max(id) from (
        select id, row_number() over page as place,
               sum(coalesce(octet_length(thumbnail), 0) + coalesce(octet_length(bytes), 0)) over page as total
        from (
            select p.id, p.thumbnail, pf.bytes from reference_image p left join reference_file pf on pf.image_id = p.id
            where p.id > :after order by p.id limit :page
        ) next window page as (order by id)
    ) sized where total <= :bytes or place = 1)
order by r.id
""")
VECTORS = text("select image_id, checkpoint_id, vector from embedding where image_id = any(:ids)")
# What a row of `N.json` holds besides; the rest of it is where its bytes lie.
COLUMNS = tuple(column.name for column in fields(ImageFacts))


class BadExport(ValueError):
    """The file is no export, or is damaged; the message is one line."""


def export_references(
    store: Store, path: Path, on_image: Callable[[], None] = lambda: None, *, pictures: bool = True
) -> dict[str, Any]:
    """Write everything to a file, aside first; references that come or go meanwhile may be in it or not.

    Args:
        store: The references.
        path: The file.
        on_image: Called once for each reference.
        pictures: Include thumbnails and kept uploads. Without them paths of this machine are left out too, and vectors
            are rounded to half precision.

    Returns:
        {"file", "references", "checkpoints": [ids]}.
    """
    vector_type = VECTOR_TYPES[0 if pictures else 1]
    about: dict[str, Any] = {"format": FORMAT, "pages": 0, "references": 0, "vectors": vector_type}
    about["checkpoints"] = [
        {"id": checkpoint.id, "name": checkpoint.name, "dim": checkpoint.dim}
        | {"config": _exported_config(checkpoint.config, pictures)}
        for checkpoint in store.checkpoints.list()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    try:
        # Thumbnails and vectors are as good as incompressible.
        with ZipFile(aside, "w") as archive:
            for rows, data in _pages(store, pictures, vector_type):
                archive.writestr(f"{about['pages']}.json", json.dumps(rows), ZIP_DEFLATED)
                archive.writestr(f"{about['pages']}.bin", data)
                about["pages"] += 1
                about["references"] += len(rows)
                for _ in rows:
                    on_image()
            about["generators"] = [
                {name: getattr(generator, name) for name in GENERATOR_FACTS} for generator in store.generators.list()
            ]
            archive.writestr("about.json", json.dumps(about, default=str))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    checkpoints = [checkpoint["id"] for checkpoint in about["checkpoints"]]
    return {"file": str(path), "references": about["references"], "checkpoints": checkpoints}


def import_references(store: Store, path: Path, on_image: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Add everything from a file, by the same rules as any addition; safe to end at any point and to run again.

    `without_picture` counts all references that lack one afterwards, of this file or not.

    Returns:
        {"references", "without_picture", "added", "embeddings", "conflicts": [{"sha256", "has", "wants"}],
        "blocked": [hashes], "checkpoints": [ids], "enrolment": its id, null where everything was known or blocked}.

    Raises:
        BadExport: The file is no export, or damaged; nothing was added.
    """
    about = _verified(path)
    with ZipFile(path) as archive:
        for checkpoint in about["checkpoints"]:
            store.checkpoints.register(checkpoint["id"], checkpoint["name"], checkpoint["dim"], checkpoint["config"])
        for generator in about["generators"]:
            with suppress(GeneratorExists):
                released_on = generator["released_on"] and date.fromisoformat(generator["released_on"])
                store.generators.create(**generator | {"released_on": released_on})
        checkpoints = [checkpoint["id"] for checkpoint in about["checkpoints"]]
        report: dict[str, Any] = {"references": 0, "added": 0, "embeddings": 0, "conflicts": [], "blocked": []}
        report |= {"without_picture": 0, "checkpoints": checkpoints, "enrolment": None}
        for number in range(about["pages"]):
            rows = json.loads(archive.read(f"{number}.json"))
            if report["enrolment"] is None and _has_new(store, rows):
                report["enrolment"] = store.enrolments.open(None, f"import {path.name}")
            _import_page(store, rows, archive.read(f"{number}.bin"), about["vectors"], report)
            for _ in rows:
                on_image()
    report["without_picture"] = missing_thumbnails(store)
    if report["enrolment"] is not None:
        store.enrolments.finish(report["enrolment"], report)
    return report


def _pages(store: Store, pictures: bool, vector_type: str) -> Iterator[tuple[list[dict[str, Any]], bytes]]:
    """Pages of rows, and the bytes that they point into as [start, end]."""
    after = 0
    while page := store.read(ROWS, {"after": after, "page": EXPORT_PAGE, "bytes": PAGE_BYTES}):
        after = page[-1]["id"]
        vectors = store.read(VECTORS, {"ids": [row["id"] for row in page]})
        data = bytearray()

        def place(part: bytes | None, data: bytearray = data) -> list[int] | None:
            if part is None:
                return None
            data += part
            return [len(data) - len(part), len(data)]

        rows = {}
        for row in page:
            facts = {name: row[name] for name in COLUMNS} | {"sha256": row["sha256"].hex(), "vectors": {}}
            if pictures:
                facts |= {"thumbnail": place(row["thumbnail"]), "data": place(row["bytes"])}
            else:
                public = (row["uri"] or "").startswith(PUBLIC)
                facts |= {"thumbnail": None, "data": None, "uri": row["uri"] if public else None, "mtime": None}
                facts["attributes"] = {
                    name: value
                    for name, value in row["attributes"].items()
                    if not str(value).startswith(("/", "file:"))
                }
            rows[row["id"]] = facts
        for row in vectors:
            vector = np.frombuffer(row["vector"], "<f4").astype(vector_type)  # (d,)
            rows[row["image_id"]]["vectors"][row["checkpoint_id"]] = place(vector.tobytes())
        yield list(rows.values()), bytes(data)


def _exported_config(config: Mapping[str, Any], paths: bool) -> dict[str, Any]:
    """A checkpoint's configuration without its folder here; unless `paths`, places are reduced as on its card."""
    exported = {name: value for name, value in config.items() if name != "folder"}
    for part in () if paths else {"training", "provenance"} & exported.keys():
        exported[part] = {name: _place(name, value) for name, value in exported[part].items()}
    return exported


def _place(name: str, value: Any) -> Any:
    """The name alone of training data, and of a source unless that is one of the hub; other settings as they are."""
    shortened = name == "data" or (name == "source" and PurePath(value).is_absolute())
    return PurePath(value).name if shortened else value


def _has_new(store: Store, rows: list[dict[str, Any]]) -> bool:
    """Whether any row of a page is neither known nor blocked; one without a vector is not added."""
    hashes = [row["sha256"] for row in rows if row["vectors"]]
    return len(store.references.get_many((), hashes)) + len(store.references.blocked_hashes(hashes)) < len(hashes)


def _import_page(
    store: Store, rows: list[dict[str, Any]], data: bytes, vector_type: str, report: dict[str, Any]
) -> None:
    report["references"] += len(rows)
    conflicts: dict[str, dict[str, str]] = {}
    blocked: set[str] = set()
    for checkpoint_id in report["checkpoints"]:
        batch = [
            NewReference(
                **{name: row[name] for name in COLUMNS if name in row},  # older exports lack newer columns
                thumbnail=_slice(data, row["thumbnail"]),
                data=_slice(data, row["data"]),
                vector=np.frombuffer(_slice(data, row["vectors"][checkpoint_id]) or b"", vector_type),
            )
            for row in rows
            if checkpoint_id in row["vectors"]
        ]
        added = store.references.add(batch, checkpoint_id, report["enrolment"])
        report["added"] += added.added
        report["embeddings"] += added.added + added.embedded
        for conflict in added.conflicts:
            conflicts[conflict.sha256] = {name: getattr(conflict, name) for name in ("sha256", "has", "wants")}
        blocked |= set(added.blocked)
    report["conflicts"] += conflicts.values()
    report["blocked"] += sorted(blocked)


def _slice(data: bytes, place: list[int] | None) -> bytes | None:
    return None if place is None else data[place[0] : place[1]]


def _verified(path: Path) -> dict[str, Any]:
    """What `about.json` says, once every member has been found there and whole."""
    try:
        with ZipFile(path) as archive:
            about: dict[str, Any] = json.loads(archive.read("about.json"))
            known = about["format"] in FORMATS
            members = {"about.json", *(f"{n}.{kind}" for n in range(about.get("pages", 0)) for kind in ("json", "bin"))}
            damaged = archive.testzip() or ", ".join(sorted(members ^ set(archive.namelist())))
    except FileNotFoundError as error:
        raise BadExport(f"{path} does not exist") from error
    # What the readers raise at other bytes: a wrong checksum, an unknown method, a password, an early end.
    except (BadZipFile, zlib.error, OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise BadExport(f"{path} is no export, or is damaged ({' '.join(str(error).split())})") from error
    if not known:
        raise BadExport(f"{path} is {about['format']!r}, this version reads {' and '.join(map(repr, FORMATS))}")
    if about.setdefault("vectors", VECTOR_TYPES[0]) not in VECTOR_TYPES:
        raise BadExport(f"{path} has vectors of type {about['vectors']!r}, expected {' or '.join(VECTOR_TYPES)}")
    if damaged:
        raise BadExport(f"{path} is damaged at {damaged}: export it again")
    return about
