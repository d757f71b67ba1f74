"""Verdicts of many images in a file: whole ones as lines of JSON, and a table with a row for each image."""

import csv
import fcntl
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Self

from api.judge.uploads import Question
from api.schemas.problems import FailedFile
from api.schemas.verdicts import Verdict
from trainer.data.entry import DatasetError
from trainer.files import naming, whole_file

LINES, TABLES = ".jsonl", (".csv", ".parquet")
PAGE_ROWS = 10_000
"""Rows of a table that are in memory together."""
FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that a spreadsheet takes for a formula; names of files are chosen by strangers."""
COLUMNS: dict[str, type] = {
    "file": str,
    "verdict": str,
    "score": float,
    "false_alarm": float,
    "basis": str,
    "reason": str,
    "generator": str,
    "generator_share": float,
    "unknown_generator": bool,
    "novelty": float,
    "known": int,
    "nearest": int,
    "nearest_label": str,
    "nearest_generator": str,
    "nearest_similarity": float,
    "says_generated": bool,
    "credentials": str,
    "width": int,
    "height": int,
    "format": str,
    "sha256": str,
    "id": str,
    "checkpoint": str,
    "revision": int,
    "error": str,
}
"""The columns of a table and the type of their values, any of which may be missing."""


class VerdictFile:
    """A file of verdicts that one command writes and that the next, after an interruption, goes on from.

    `NAME.jsonl` has a line per image as it is judged. A table, `NAME.csv` or `NAME.parquet`, is made of the lines
    beside it at the end, and has the last line of each file.

    Args:
        path: `.jsonl`, `.csv` or `.parquet`.
        checkpoint: Id of the checkpoint that judges: what another one said of an image does not count.
        question: How it is asked: nor does an answer to another question. What is not the default is in each line.

    Raises:
        DatasetError: The suffix is another one, a library for it is missing, its folder is, the lines are no verdicts
            of ours, or another command writes them.
    """

    def __init__(self, path: Path, checkpoint: str, question: Question = Question()) -> None:
        if path.suffix.lower() not in (LINES, *TABLES):
            raise DatasetError(f"--output is {path}; expected a name that ends with {', '.join((LINES, *TABLES))}")
        if path.suffix.lower() == ".parquet":
            parquet()
        if not path.parent.is_dir():
            raise DatasetError(f"--output is {path}, and {path.parent} is no folder; make it first")
        self.path, self.lines_path, self.checkpoint = path, path.with_suffix(LINES), checkpoint
        asked = {"k": question.k, "max_false_alarm": question.max_false_alarm, "explain": sorted(question.explain)}
        self.question = {name: value for name, value in asked.items() if value}
        self._lines: BinaryIO
        self._judged: dict[str, str | None] = {}
        self._failed: set[str] = set()

    def __enter__(self) -> Self:
        try:
            self._lines = self.lines_path.open("a+b")
        except OSError as error:
            raise DatasetError(f"--output is {self.path}, and {self.lines_path}: {error.strerror}") from error
        try:
            self._read()
        except BaseException:
            self._lines.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.path != self.lines_path:
                with whole_file(self.path) as file:
                    (write_csv if self.path.suffix.lower() == ".csv" else write_parquet)(self._rows(), file)
        finally:
            self._lines.close()

    @property
    def paths(self) -> list[Path]:
        """What is written: the lines, and the table that was asked for."""
        return list(dict.fromkeys((self.lines_path, self.path)))

    def has(self, file: str, data: bytes) -> bool:
        """Whether the last line of this name is of these bytes, this checkpoint and this question."""
        return file in self._judged and hashlib.sha256(data).hexdigest() == self._judged[file]

    def add(self, result: Verdict | FailedFile) -> None:
        """Write a line; not again for a file that fails as it did."""
        document = result.model_dump(mode="json")
        if self.question and isinstance(result, Verdict):
            document["question"] = self.question
        line = json.dumps(document, ensure_ascii=False)
        if isinstance(result, FailedFile):
            if line in self._failed:
                return
            self._failed.add(line)
        with naming(self.lines_path):
            self._lines.write(line.encode() + b"\n")
            self._lines.flush()

    def _read(self) -> None:
        """Take the lines that are there; one that a kill cut off is taken away."""
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DatasetError(
                f"another command writes {self.lines_path}; wait for it, or name another file"
            ) from error
        self._lines.seek(0)
        end = 0
        for number, line in enumerate(self._lines, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                one = json.loads(line)
                if "error" in one:
                    self._failed.add(line[:-1].decode())
                else:
                    ours = one["model"]["checkpoint"] == self.checkpoint and one.get("question", {}) == self.question
                    self._judged[one["file"]] = one["image"]["sha256"] if ours else None
            except (ValueError, KeyError, TypeError) as error:
                detail = f"line {number} of {self.lines_path} is no verdict; name another file with --output"
                raise DatasetError(detail) from error
        self._lines.truncate(end)
        self._lines.seek(end)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """A row of each file, from the last line about it, in the order of the lines."""
        self._lines.seek(0)
        last = {json.loads(line)["file"]: number for number, line in enumerate(self._lines)}
        self._lines.seek(0)
        for number, line in enumerate(self._lines):
            one = json.loads(line)
            if last[one["file"]] == number:
                yield row(one)


def row(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a table says of an image, from a verdict or a failure as JSON, with the keys of `COLUMNS`."""
    if "error" in result:
        return dict.fromkeys(COLUMNS) | {"file": result["file"], "error": result["error"]["detail"]}
    first: dict[str, Any] = result["generators"][0] if result["generators"] and result["verdict"] != "real" else {}
    nearest: dict[str, Any] = max(result["neighbours"], key=lambda near: near["similarity"], default={})
    provenance, image = result["provenance"], result["image"]
    return dict.fromkeys(COLUMNS) | {
        **{name: result[name] for name in ("file", "verdict", "score", "false_alarm", "basis", "reason")},
        "generator": first.get("name"),
        "generator_share": first.get("share"),
        "unknown_generator": result["unknown_generator"],
        "novelty": result["novelty"],
        "known": result["known"] and result["known"]["id"],
        "nearest": nearest.get("id"),
        **{f"nearest_{name}": nearest.get(name) for name in ("label", "generator", "similarity")},
        "says_generated": bool(provenance.get("says_generated")),
        "credentials": (provenance.get("c2pa") or {}).get("state"),
        **{name: image[name] for name in ("width", "height", "format", "sha256")},
        "id": result["id"] if result["recorded"] else None,
        "checkpoint": result["model"]["checkpoint"],
        "revision": result["index"]["revision"],
    }


def write_csv(rows: Iterator[dict[str, Any]], file: BinaryIO) -> None:
    """Write a table that spreadsheets open, in UTF-8; a text that they would take for a formula has a ' before it."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    table = csv.DictWriter(text, COLUMNS)
    table.writeheader()
    for one in rows:
        table.writerow({name: _cell(value) for name, value in one.items()})
    text.flush()
    text.detach()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value


def write_parquet(rows: Iterator[dict[str, Any]], file: BinaryIO) -> None:
    """Write a table with typed columns."""
    pa, pq = parquet()
    types = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
    schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    with pq.ParquetWriter(file, schema) as writer:
        while page := list(islice(rows, PAGE_ROWS)):
            writer.write_table(pa.Table.from_pylist(page, schema))


def parquet() -> tuple[Any, Any]:
    """The library of parquet files.

    Raises:
        DatasetError: It is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DatasetError("a .parquet needs pyarrow; install the extra: pip install 'lineup[datasets]'") from error
    return pa, pq
