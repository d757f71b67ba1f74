"""A reference set as one file: rows, thumbnails, kept uploads and the vectors of every checkpoint.

The file is a zip whose members carry checksums: for each page of references `N.json` with their facts and `N.bin` with
the bytes that these point into, at the end `about.json`, which says how many there are. Nothing in it is specific to a
database. Without pictures it is a set that may be published: public addresses in place of thumbnails, and vectors in
half precision.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from datetime import date
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, Any, Self
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from sqlalchemy import RowMapping, text

from indexer.database.transactions import TRANSACTION_IMAGES
from indexer.index.vector_checks import unit_vectors
from indexer.ingest.thumbnails import missing_thumbnails
from indexer.store import Store
from indexer.store.blobs import BlobsAway, Kept
from indexer.store.generators import GENERATOR_FACTS, GeneratorExists, check_generator_name
from indexer.store.reference_facts import PUBLIC, ImageFacts, NewReference
from trainer.data.entry import check_source
from trainer.files import whole_file

FORMAT = "lineup references 2"
FORMATS = ("lineup references 1", FORMAT)
"""What is read; the first has thumbnails always, and vectors in single precision."""
VECTOR_TYPES = ("<f4", "<f2")
EXPORT_PAGE = 250
PAGE_BYTES = 64 * 1024 * 1024
"""A page ends before its thumbnails and kept uploads exceed this, unless it is a single reference."""
ROWS = text("""
select r.*, g.name as generator, f.bytes, f.sha256 as file_sha256
from reference_image r left join generator g on g.id = r.generator_id left join reference_file f on f.image_id = r.id
where r.id > :after and r.id <= (
    select max(id) from (
        select id, row_number() over page as place,
               sum(coalesce(octet_length(thumbnail), 0) + coalesce(octet_length(bytes), stored, 0)) over page as total
        from (
            select p.id, p.thumbnail, pf.bytes, case when pf.sha256 is not null then p.file_bytes end as stored
            from reference_image p left join reference_file pf on pf.image_id = p.id
            where p.id > :after order by p.id limit :page
        ) next window page as (order by id)
    ) sized where total <= :bytes or place = 1)
order by r.id
""")
VECTORS = text("select image_id, checkpoint_id, vector from embedding where image_id = any(:ids)")
# What a row of `N.json` holds besides; the rest of it is where its bytes lie.
COLUMNS = tuple(column.name for column in fields(ImageFacts))
FACTS_BYTES = 32 * 1024 * 1024
"""The most that `about.json`, or the facts of a page, may take once they are unpacked."""
BINARY_BYTES = 512 * 1024 * 1024
"""The most that the bytes of a page may take; they are not packed."""


class BadExport(ValueError):
    """The file is no export, or is damaged; the message is one line."""


# What Postgres can hold: no NUL in a text, integers of 16, 32 and 64 bits.
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
GeneratorName = Annotated[Text, AfterValidator(check_generator_name)]
Place = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
Pixels = Annotated[int, Field(ge=1, lt=2**31)]


class ExportPart(BaseModel):
    """What an export says in JSON; types are not converted, and what is not known is passed over."""

    model_config = ConfigDict(strict=True)


class ExportedCheckpoint(ExportPart):
    """A checkpoint in `about.json`."""

    id: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
    """Names a folder."""
    name: Text
    dim: Annotated[int, Field(ge=1, le=65_536)]
    config: dict[str, Any]


class ExportedGenerator(ExportPart):
    """A generator in `about.json`."""

    name: GeneratorName
    family: Text | None
    vendor: Text | None
    version: Text | None
    released_on: date | None
    notes: Text | None


class About(ExportPart):
    """What `about.json` says."""

    format: str
    pages: Annotated[int, Field(ge=0)]
    references: Annotated[int, Field(ge=0)]
    vectors: Any = VECTOR_TYPES[0]
    checkpoints: Annotated[list[ExportedCheckpoint], Field(max_length=1000)]
    generators: Annotated[list[ExportedGenerator], Field(max_length=10_000)]


class ExportedReference(ExportPart):
    """A reference in `N.json`; ranges of `N.bin` are [start, end]."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    label: Annotated[int, Field(ge=0, le=1)]
    generator: GeneratorName | None
    source: Annotated[str, AfterValidator(partial(check_source, where="source"))]
    group: str
    uri: str | None
    file_bytes: Annotated[int, Field(ge=0, lt=2**63)]
    mtime: FiniteFloat | None
    width: Pixels
    height: Pixels
    format: str
    jpeg_quality: Annotated[int, Field(ge=0, le=100)] | None
    fingerprint: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    attributes: dict[str, str]
    thumbnail: Place | None
    data: Place | None
    vectors: dict[str, Place]

    @model_validator(mode="after")
    def _real_has_no_generator(self) -> Self:
        if self.label == 0 and self.generator is not None:
            raise ValueError(f"a real image has the generator {self.generator!r}")
        return self


PAGE = TypeAdapter(Annotated[list[ExportedReference], Field(max_length=TRANSACTION_IMAGES)])


def export_references(
    store: Store, path: Path, on_image: Callable[[], None] = lambda: None, *, pictures: bool = True
) -> dict[str, Any]:
    """Write everything to a file, replaced as a whole; references that come or go meanwhile may be in it or not.

    Args:
        store: The references.
        path: The file.
        on_image: Called once for each reference.
        pictures: Include thumbnails and kept uploads. Without them paths of this machine are left out too, and vectors
            are rounded to half precision.

    Returns:
        {"file", "references", "checkpoints": [ids]}.

    Raises:
        BlobsAway: A picture lies in object storage, which cannot be used or lacks it; nothing was written.
    """
    vector_type = VECTOR_TYPES[0 if pictures else 1]
    about: dict[str, Any] = {"format": FORMAT, "pages": 0, "references": 0, "vectors": vector_type}
    about["checkpoints"] = [
        {"id": checkpoint.id, "name": checkpoint.name, "dim": checkpoint.dim}
        | {"config": _exported_config(checkpoint.config, pictures)}
        # The active one first, which an empty store makes its own active one.
        for checkpoint in sorted(store.checkpoints.list(), key=lambda checkpoint: not checkpoint.active)
    ]
    # Thumbnails and vectors are as good as incompressible.
    with whole_file(path) as file, ZipFile(file, "w") as archive:
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
    checkpoints = [checkpoint["id"] for checkpoint in about["checkpoints"]]
    return {"file": str(path), "references": about["references"], "checkpoints": checkpoints}


def import_references(store: Store, path: Path, on_image: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Add everything from a file, by the same rules as any addition; safe to end at any point and to run again.

    `without_picture` counts all references that lack one afterwards, of this file or not.

    Args:
        store: Where to.
        path: The file.
        on_image: Called twice for each reference: when it has been checked, which all are first, and when it is done.

    Returns:
        {"references", "without_picture", "added", "embeddings", "conflicts": [{"sha256", "has", "wants"}],
        "blocked": [hashes], "checkpoints": [ids], "enrolment": its id, null where everything was known or blocked}.

    Raises:
        BadExport: The file is no export, damaged, or says what cannot be; nothing was added.
        BlobsAway: Pictures are to be kept in object storage, which cannot be used.
    """
    store.blobs.claim()
    about = _verified(path, on_image)
    checkpoints = [checkpoint.id for checkpoint in about.checkpoints]
    dims = {known.id: known.dim for known in store.checkpoints.list()}
    for checkpoint in about.checkpoints:
        if (dim := dims.get(checkpoint.id, checkpoint.dim)) != checkpoint.dim:
            raise BadExport(f"{path} gives checkpoint {checkpoint.id} {checkpoint.dim} dimensions, it has {dim} here")
    with ZipFile(path) as archive:
        for checkpoint in about.checkpoints:
            store.checkpoints.register(checkpoint.id, checkpoint.name, checkpoint.dim, checkpoint.config)
        for generator in about.generators:
            with suppress(GeneratorExists):
                store.generators.create(**generator.model_dump())
        report: dict[str, Any] = {"references": 0, "added": 0, "embeddings": 0, "conflicts": [], "blocked": []}
        report |= {"without_picture": 0, "checkpoints": checkpoints, "enrolment": None}
        for number in range(about.pages):
            rows, data = _page(archive, number, about)
            if report["enrolment"] is None and _has_new(store, rows):
                report["enrolment"] = store.enrolments.open(None, f"import {path.name}")
            _import_page(store, rows, data, about.vectors, report)
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
        thumbnails = _loaded(store, page, "thumbnail", "thumbnail_sha256") if pictures else {}
        files = _loaded(store, page, "bytes", "file_sha256") if pictures else {}
        if pictures:  # rows that were removed meanwhile are left out
            page = [row for row in page if row["id"] in thumbnails and row["id"] in files]
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
                facts |= {"thumbnail": place(thumbnails[row["id"]]), "data": place(files[row["id"]])}
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


def _loaded(store: Store, page: Sequence[RowMapping], data: str, sha256: str) -> dict[int, bytes | None]:
    """The bytes of a page's rows by their ids, from these columns, without those whose object went with its rows."""
    loaded = store.blobs.load_all([Kept(row[data], row[sha256]) for row in page])
    parts = {row["id"]: part for row, part in zip(page, loaded, strict=True)}
    lost = {row["id"]: row[sha256] for row in page if parts[row["id"]] is None and row[sha256] is not None}
    named = store.blobs.named(lost.values())
    for image_id, name in lost.items():
        if name in named:
            raise BlobsAway(
                f"reference {image_id} has lost an object: `lineup index check --blobs` names all that are missing, "
                "and --without-pictures exports without any"
            )
    return {image_id: part for image_id, part in parts.items() if image_id not in lost}


def _exported_config(config: Mapping[str, Any], paths: bool) -> dict[str, Any]:
    """A checkpoint's configuration without its folder here; unless `paths`, places are reduced as on its card."""
    exported = {name: value for name, value in config.items() if name != "folder"}
    for part in () if paths else {"training", "provenance"} & exported.keys():
        exported[part] = {name: _place(name, value) for name, value in exported[part].items()}
    return exported


def _place(name: str, value: Any) -> Any:
    """The name alone of training data, and of a source unless that is one of the hub; other settings as they are."""
    shortened = isinstance(value, str) and (name == "data" or (name == "source" and PurePath(value).is_absolute()))
    return PurePath(value).name if shortened else value


def _has_new(store: Store, rows: list[ExportedReference]) -> bool:
    """Whether any row of a page is neither known nor blocked; one without a vector is not added."""
    hashes = [row.sha256 for row in rows if row.vectors]
    return len(store.references.get_many((), hashes)) + len(store.references.blocked_hashes(hashes)) < len(hashes)


def _import_page(
    store: Store, rows: list[ExportedReference], data: bytes, vector_type: str, report: dict[str, Any]
) -> None:
    report["references"] += len(rows)
    conflicts: dict[str, dict[str, str]] = {}
    blocked: set[str] = set()
    for checkpoint_id in report["checkpoints"]:
        batch = [
            NewReference(
                **{name: getattr(row, name) for name in COLUMNS},
                thumbnail=_slice(data, row.thumbnail),
                data=_slice(data, row.data),
                vector=np.frombuffer(_slice(data, row.vectors[checkpoint_id]) or b"", vector_type),
            )
            for row in rows
            if checkpoint_id in row.vectors
        ]
        added = store.references.add(batch, checkpoint_id, report["enrolment"])
        report["added"] += added.added
        report["embeddings"] += added.added + added.embedded
        for conflict in added.conflicts:
            conflicts[conflict.sha256] = {name: getattr(conflict, name) for name in ("sha256", "has", "wants")}
        blocked |= set(added.blocked)
    report["conflicts"] += conflicts.values()
    report["blocked"] += sorted(blocked)


def _slice(data: bytes, place: Place | None) -> bytes | None:
    return None if place is None else data[place[0] : place[1]]


def _verified(path: Path, on_image: Callable[[], None] = lambda: None) -> About:
    """What `about.json` says, once every member has been found there, whole, and saying what can be."""
    try:
        with ZipFile(path) as archive:
            about = About.model_validate_json(_read(archive, "about.json", FACTS_BYTES))
            if about.format not in FORMATS:
                raise BadExport(f"{path} is {about.format!r}, this version reads {' and '.join(map(repr, FORMATS))}")
            if about.vectors not in VECTOR_TYPES:
                raise BadExport(f"{path} has vectors of type {about.vectors!r}, expected {' or '.join(VECTOR_TYPES)}")
            names = archive.namelist()
            if len(names) != 2 * about.pages + 1:
                raise ValueError(f"it has {len(names)} members, and {about.pages} pages need {2 * about.pages + 1}")
            references = 0
            for number in range(about.pages):
                for _ in _page(archive, number, about)[0]:
                    references += 1
                    on_image()
            if references != about.references:
                raise ValueError(f"it has {references} references, and about.json says {about.references}")
            for checkpoint in about.checkpoints:
                _check_config(checkpoint)
    except FileNotFoundError as error:
        raise BadExport(f"{path} does not exist") from error
    except BadExport:
        raise
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, fault['loc']))} is {fault['input']!r:.100}: {fault['msg']}"
        raise BadExport(f"{path} is no export, or is damaged ({error.title}: {' '.join(reason.split())})") from error
    # What the readers raise at other bytes: a wrong checksum, an unknown method, a password, an early end.
    except (BadZipFile, zlib.error, OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise BadExport(f"{path} is no export, or is damaged ({' '.join(str(error).split())})") from error
    return about


def _check_config(checkpoint: ExportedCheckpoint) -> None:
    """Refuse a configuration that Postgres cannot hold as JSON, or that no later export could read."""
    if "\\u0000" in json.dumps(checkpoint.config, allow_nan=False):
        raise ValueError(f"the configuration of checkpoint {checkpoint.id} holds a NUL")
    for part in ("training", "provenance"):
        if not isinstance(checkpoint.config.get(part, {}), dict):
            raise ValueError(f"{part} of checkpoint {checkpoint.id} is {checkpoint.config[part]!r:.100}, no object")


def _page(archive: ZipFile, number: int, about: About) -> tuple[list[ExportedReference], bytes]:
    """References of a page and the bytes that they point into, checked."""
    name = f"{number}.bin"
    data = _read(archive, name, BINARY_BYTES)
    rows = PAGE.validate_json(_read(archive, f"{number}.json", FACTS_BYTES))
    vectors: dict[str, list[bytes]] = {checkpoint.id: [] for checkpoint in about.checkpoints}
    for row in rows:
        for start, end in filter(None, (row.thumbnail, row.data, *row.vectors.values())):
            if not start <= end <= len(data):
                raise ValueError(f"{row.sha256} has bytes {start} to {end} of {name}, which has {len(data)}")
        for checkpoint_id, (start, end) in row.vectors.items():
            if checkpoint_id not in vectors:
                raise ValueError(
                    f"{row.sha256} has a vector of checkpoint {checkpoint_id!r:.100}, which it does not name"
                )
            vectors[checkpoint_id].append(data[start:end])
    for checkpoint in about.checkpoints:
        parts, size = vectors[checkpoint.id], checkpoint.dim * np.dtype(about.vectors).itemsize
        if wrong := [part for part in parts if len(part) != size]:
            raise ValueError(f"a vector of {name} has {len(wrong[0])} bytes, checkpoint {checkpoint.id} needs {size}")
        unit_vectors(np.frombuffer(b"".join(parts), about.vectors).reshape(-1, checkpoint.dim), checkpoint.dim)
    return rows, data


def _read(archive: ZipFile, name: str, most: int) -> bytes:
    """A member, unless it would swell beyond so many bytes."""
    member = archive.getinfo(name)
    if member.file_size > most or member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise ValueError(
            f"{name} has {member.file_size} bytes, packed by method {member.compress_type}; at most {most}"
        )
    if name.endswith(".bin") and member.compress_type != ZIP_STORED:
        raise ValueError(f"{name} is packed, which an export does not do")
    return archive.read(member)
