"""Archives of records: D3's WebDataset shards (tar) and its parquet files on the hub. Nothing is unpacked."""

from __future__ import annotations

import logging
import re
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache, partial
from itertools import accumulate, groupby
from pathlib import Path, PurePath
from threading import Lock
from typing import IO, TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from trainer.data.entry import DatasetError, Entry, check_generator, plain
from trainer.data.hub_files import hub_failures, hub_uri, on_hub, open_on_hub
from trainer.data.object_storage import (
    StoredObject,
    in_object_storage,
    object_uri,
    open_object,
    read_range,
    storage_failures,
    stored_objects,
)
from trainer.images import UnreadableImage

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

# The order of gen_0 to gen_3 in D3 (arXiv 2407.20337, section 3).
D3_GENERATORS = ("DF-IF", "SD-1.4", "SD-2.1", "SD-XL")
MAX_TEXT_BYTES = 65_536
HELD_BYTES = 64 << 20
"""Of a member that is kept in memory until its turn comes, at most."""

_log = logging.getLogger(__name__)
_FIELD = re.compile(r"gen_(\d+)")
_COLUMN = re.compile(r"image_gen(\d+)")
_reading = Lock()
"""Held while a footer or a column is read: several threads would read the same one."""


class Member(NamedTuple):
    """A file inside a tar: its name and where its bytes lie. `record` and `field` are WebDataset's reading of it."""

    name: str
    offset: int
    size: int
    read: Callable[[], bytes]

    @property
    def record(self) -> str:
        folder, _, base = self.name.rpartition("/")
        return f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]

    @property
    def field(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2]


def generator_name(names: Sequence[str], number: int, where: str) -> str:
    """The name of gen_`number`.

    Raises:
        DatasetError: There are not that many names.
    """
    if number >= len(names):
        raise DatasetError(
            f"{where}: gen_{number} has no name among {', '.join(names)}; give one per generator as --generator A,B,C"
        )
    return names[number]


def tar_entries(
    archive: Path | StoredObject, *, names: Sequence[str] = D3_GENERATORS, hold: bool = False
) -> Iterator[Entry]:
    """The real and generated images of a shard, record by record; captions and addresses become attributes.

    A shard that was cut short gives the images before the cut, and says so in the log.

    Args:
        archive: The shard.
        names: Of the generators.
        hold: Images of object storage have their bytes, which came with the headers, instead of reading them anew.

    Raises:
        DatasetError: It is no tar, or a generator has no name.
        OSError: The storage does not give it.
    """
    path = _path(archive)
    mtime = archive.mtime if isinstance(archive, StoredObject) else archive.stat().st_mtime
    for record, members in groupby(tar_members(archive, hold=hold), key=lambda member: member.record):
        images: list[tuple[Member, int | None]] = []
        texts: dict[str, str] = {}
        for member in members:
            kind, _, suffix = member.field.partition(".")
            match = _FIELD.fullmatch(kind)
            if suffix == "txt" and member.size <= MAX_TEXT_BYTES:
                texts[kind] = plain(member.read().decode("utf-8", "replace").strip())
            elif kind == "real" or match:
                images.append((member, int(match[1]) if match else None))
        for member, number in images:
            yield Entry(
                key=plain(f"{record}.{member.field.partition('.')[0]}"),
                group=plain(record),
                label=0 if number is None else 1,
                generator=None if number is None else generator_name(names, number, path.name),
                source=plain(path.parent.name),
                uri=_member_uri(archive, member),
                split=None,
                size=member.size,
                mtime=mtime,
                attributes={name: text for name, text in texts.items() if number is None or name != "url"},
                read=member.read,
            )


def _path(archive: Path | StoredObject) -> PurePath:
    return archive.path if isinstance(archive, StoredObject) else archive


def _member_uri(archive: Path | StoredObject, member: Member) -> str:
    if isinstance(archive, StoredObject):
        return object_uri(archive.path, member.name, member.offset, member.size)
    return f"{archive.as_uri()}#{quote(member.name, errors='surrogateescape')}"


def tar_members(archive: Path | StoredObject, *, hold: bool = False) -> Iterator[Member]:
    """The regular files of a tar, header by header; with `hold` those of object storage have their bytes."""
    path = _path(archive)
    try:
        with _open_binary(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            with suppress(tarfile.ReadError):
                for info in tar:
                    if info.isfile():
                        place = info.offset_data, info.size
                        yield Member(info.name, *place, _member_reader(archive, file, *place, hold))
            file.seek(tar.offset)  # tarfile takes a broken header for the end
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                _log.warning("%s is cut short or damaged; only what lies before byte %d is used", path, tar.offset)
    except tarfile.ReadError as error:
        raise DatasetError(f"{path} is no uncompressed tar ({error})") from error


def _member_reader(
    archive: Path | StoredObject, file: IO[bytes], offset: int, size: int, hold: bool
) -> Callable[[], bytes]:
    """What gives the bytes of a member; `file` is the open archive."""
    if not isinstance(archive, StoredObject):
        return partial(read_slice, archive, offset, size)
    if size <= (HELD_BYTES if hold else MAX_TEXT_BYTES):
        file.seek(offset)
        return partial(bytes, file.read(size))
    return partial(read_range, archive.path, offset, size)


def _open_binary(archive: Path | StoredObject) -> IO[bytes]:
    return open_object(archive) if isinstance(archive, StoredObject) else archive.open("rb")


def read_slice(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a file.

    Raises:
        UnreadableImage: The file ends inside them, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise UnreadableImage(f"{path.name} cannot be read ({error.strerror or error})") from error
    if len(data) < size:
        raise UnreadableImage(f"{path.name} ends inside this image")
    return data


def read_member(path: Path, name: str) -> bytes:
    """The bytes of a tar's member.

    Raises:
        UnreadableImage: There is none of that name.
    """
    try:
        member = _members(path, path.stat().st_mtime_ns).get(name)
    except (OSError, DatasetError) as error:
        raise UnreadableImage(f"{path} cannot be read ({error})") from error
    if member is None:
        raise UnreadableImage(f"{path} has no member {name!r}")
    return read_slice(path, member.offset, member.size)


@lru_cache(maxsize=8)
def _members(path: Path, version: int) -> dict[str, Member]:
    del version  # a changed file is another key of the cache
    return {member.name: member for member in tar_members(path)}


def parquet_entries(path: PurePath, *, names: Sequence[str] | None = None) -> Iterator[Entry]:
    """The generated images of a parquet file with D3's columns; the real image is only an address there.

    Other columns with text or numbers become attributes, those of one generator (`..._gen0`) only of its image.

    Args:
        path: Absolute, of the hub or of object storage.
        names: Of the generators; by default `model_gen<i>` says, or D3's usual order.

    Raises:
        DatasetError: pyarrow is missing, or the columns are others.
    """
    file = _open_parquet(path)
    columns = {int(match[1]): name for name in file.schema_arrow.names if (match := _COLUMN.fullmatch(name))}
    if not columns:
        names_there = ", ".join(file.schema_arrow.names[:10])
        raise DatasetError(
            f"{path} has columns {names_there}; expected image_gen0, image_gen1, ... and model_gen0, ..."
        )
    texts = [field.name for field in file.schema_arrow if _is_scalar(str(field.type))]
    uri, mtime, row = (*_identity(path), 0)
    source = path.parts[3].partition("@")[0] if on_hub(path) else path.parent.name
    for batch in _batches(path, file, texts):
        for values in batch.to_pylist():
            cells = {name: str(value) for name, value in values.items() if value is not None}
            group = cells.get("id") or f"{path.stem}/{row}"
            for number, column in sorted(columns.items()):
                model = names is None and cells.get(f"model_gen{number}")
                fallback = names or D3_GENERATORS
                name = _hub_name(model, path.name) if model else generator_name(fallback, number, path.name)
                yield Entry(
                    key=plain(f"{group}.gen_{number}"),
                    group=plain(group),
                    label=1,
                    generator=name,
                    source=plain(source),
                    uri=f"{uri}#{column}/{row}",
                    split=None,
                    size=None,
                    mtime=mtime,
                    attributes=_attributes(cells, number),
                    read=partial(read_cell, path, column, row),
                )
            row += 1


def _identity(path: PurePath) -> tuple[str, float | None]:
    """The uri of a parquet file, and when it was written where that does not follow from the uri."""
    if on_hub(path):
        return hub_uri(path), None
    if in_object_storage(path):
        return object_uri(path), stored_objects(path)[0].mtime
    return Path(path).as_uri(), Path(path).stat().st_mtime


def _is_scalar(arrow_type: str) -> bool:
    return arrow_type.startswith(("string", "large_string", "int", "uint", "float", "double", "bool"))


def _attributes(cells: dict[str, str], number: int) -> dict[str, str]:
    """What a row says of its image `number`: the columns of all images and its own, without their suffix."""
    suffix = f"_gen{number}"
    return {
        name.removesuffix(suffix): plain(value)
        for name, value in cells.items()
        if name.endswith(suffix) or not re.search(r"_gen\d+$", name)
    }


def _hub_name(model: str, where: str) -> str:
    """`stabilityai/stable-diffusion-2-1` without its owner."""
    return check_generator(re.sub(r"[^A-Za-z0-9 ._+-]", "-", model.strip("/ ").rpartition("/")[2]), where)


def _open_parquet(path: PurePath) -> ParquetFile:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DatasetError(f"{path.name} needs pyarrow; install the extra: pip install 'lineup[datasets]'") from error
    try:
        with _reaching(path):
            if in_object_storage(path):
                return pq.ParquetFile(open_object(stored_objects(path)[0]))
            return pq.ParquetFile(open_on_hub(path) if on_hub(path) else path)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} is no parquet file ({' '.join(str(error).split())[:200]})") from error


def _reaching(path: PurePath) -> AbstractContextManager[None]:
    if in_object_storage(path):
        return storage_failures(path)
    return hub_failures(path) if on_hub(path) else nullcontext()


def _batches(path: PurePath, file: ParquetFile, columns: Sequence[str]) -> Iterator[RecordBatch]:
    with _reaching(path):
        yield from file.iter_batches(batch_size=1024, columns=columns)


def read_cell(path: PurePath, column: str, row: int) -> bytes:
    """The image bytes in one cell: a binary value, or the hub's pair of `bytes` and `path`.

    Raises:
        UnreadableImage: There is no such cell, or no image in it.
    """
    try:
        # A path of the hub names its commit; an object of a bucket is not written again as a rule.
        version = 0 if on_hub(path) or in_object_storage(path) else Path(path).stat().st_mtime_ns
        with _reading:
            ends = _row_group_ends(path, version)
            group = bisect_right(ends, row)
            if group == len(ends):
                raise UnreadableImage(f"{path.name} has no row {row}")
            cells = _column(path, version, column, group)
    except (OSError, KeyError, DatasetError) as error:
        raise UnreadableImage(f"{path.name} has no readable cell {column}/{row} ({error})") from error
    data: bytes | None = cells[row - ends[group]]  # counted from the end of the row group
    if not data:
        raise UnreadableImage(f"{path.name} has no image in {column} of row {row}")
    return data


@lru_cache(maxsize=8)
def _row_group_ends(path: PurePath, version: int) -> list[int]:
    """For each row group the number of the row that follows it."""
    del version
    file = _open_parquet(path)
    return list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))


@lru_cache(maxsize=4)
def _column(path: PurePath, version: int, column: str, group: int) -> list[bytes | None]:
    """One column of one row group, as a reader of all images goes through them: a generator's next to another's."""
    del version
    with _reaching(path):
        cells = _open_parquet(path).read_row_group(group, columns=[column])[column].to_pylist()
    return [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
