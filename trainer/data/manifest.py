"""The data set as a table: a CSV with `path,label,generator,split[,source,group,...]`.

Where the images were published is a column `uri`, or `source_repo,source_commit,source_path` of a file on GitHub.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import quote

from trainer.data.entry import DatasetError, Entry, check_generator, check_source, file_entry, plain

LABEL_CELLS = {"real": 0, "0": 0, "fake": 1, "1": 1}
REQUIRED_COLUMNS = ("path", "label")
MANIFEST_COLUMNS = (*REQUIRED_COLUMNS, "generator", "split", "source", "group")
GITHUB_COLUMNS = ("source_repo", "source_commit", "source_path")
"""Of a file on GitHub: owner and repository, commit, and the path in it."""
GITHUB = "https://raw.githubusercontent.com/"


@dataclass(frozen=True, slots=True)
class Row:
    """One checked line; empty cells are None."""

    path: str
    label: int
    generator: str | None
    split: str | None
    source: str | None
    group: str | None
    public_uri: str | None
    attributes: dict[str, str]


def manifest_rows(manifest: Path) -> Iterator[Row]:
    """The lines of a manifest, each checked; columns that mean nothing to Lineup are attributes.

    Raises:
        DatasetError: The table lacks a column, or a line a label, path or generator that can be used.
    """
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            names = table.fieldnames or ()
            if missing := [name for name in REQUIRED_COLUMNS if name not in names]:
                raise DatasetError(
                    f"{manifest} lacks the column {' and '.join(missing)}; expected "
                    f"{','.join(MANIFEST_COLUMNS)} in its first line, found {', '.join(names) or 'nothing'}"
                )
            for cells in table:
                yield _row(cells, f"{manifest} line {table.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{manifest} is no readable UTF-8 CSV file ({error})") from error


def _row(cells: dict[str, str | None], where: str) -> Row:
    if None in cells:
        raise DatasetError(f"{where} has more cells than the first line has names; quote cells that hold a comma")
    values = {name: plain(value.strip()) for name, value in cells.items() if name and value and value.strip()}
    label = LABEL_CELLS.get(values.get("label", "").lower())
    if label is None:
        raise DatasetError(f"{where}: label is {values.get('label', '')!r}; expected real or fake")
    path = values.get("path", "")
    if not path or PurePath(path).is_absolute() or PurePath(os.path.normpath(path)).parts[:1] == ("..",):
        raise DatasetError(f"{where}: path is {path!r}; expected a path inside the manifest's folder, relative to it")
    generator = values.get("generator")
    if label == 0 and generator is not None:
        raise DatasetError(f"{where}: a real image has generator {generator!r}; leave the cell empty")
    if label == 1:
        check_generator(generator or "", where)
    public_uri, columns = _public_uri(values)
    return Row(
        path=path,
        label=label,
        generator=generator,
        split=values.get("split"),
        source=check_source(values["source"], where) if "source" in values else None,
        group=values.get("group"),
        public_uri=public_uri,
        attributes={name: value for name, value in values.items() if name not in (*MANIFEST_COLUMNS, *columns)},
    )


def _public_uri(values: dict[str, str]) -> tuple[str | None, Sequence[str]]:
    """Where an image was published, and the columns that say so; an address that is not https is an attribute."""
    if (uri := values.get("uri", "")).startswith("https://"):
        return uri, ["uri"]
    if all(name in values for name in GITHUB_COLUMNS):
        place = "/".join(quote(values[name]) for name in GITHUB_COLUMNS)
        return f"{GITHUB}{place}", GITHUB_COLUMNS
    return None, []


def manifest_entries(manifest: Path) -> Iterator[Entry]:
    """The images a manifest lists, in its order; one that is missing says so when it is read."""
    folder = manifest.parent
    for row in manifest_rows(manifest):
        key = os.path.normpath(row.path)
        yield file_entry(
            folder / key,
            key,
            row.label,
            row.generator,
            home=folder.name,
            source=row.source,
            split=row.split,
            group=row.group,
            attributes=row.attributes,
            public_uri=row.public_uri,
        )
