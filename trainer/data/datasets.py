"""One reader for every data layout: a stream of entries with label, generator, group and bytes on demand.

| layout | looks like |
|---|---|
| manifest | a CSV file, or a folder with a `manifest.csv`: `path,label,generator,split[,source,group,...]` |
| folders | `real/**` and `fake/<generator>/**`, also below `train/`, `test/`, ... |
| ForenSynths | `<generator>/[<class>/]{0_real,1_fake}/**` |
| GenImage | `<generator>/{train,val}/{ai,nature}/**` |
| D3 test | `{augm,no_augm}/{real,gen_0,...}/**`, or one of the two |
| D3 shards | `*.tar`, WebDataset records of `real.jpg`, `gen_0.jpg`, ..., `caption.txt`, `url.txt` |
| hub parquet | `*.parquet` with `image_gen0`, `model_gen0`, ... (extra `datasets`) |
| the hub | `hf://datasets/OWNER/NAME[@REVISION][/FILES]`, of such parquet files, read in place |
| object storage | `s3://`, `gs://` or `az://BUCKET/...`: shards, parquet files or images of one kind, read in place |
| a web server | `https://HOST/FILE`, one of these |
| one kind | a folder or file with `label` and, for fakes, `generator` |
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from trainer.data.entry import DatasetError, Entry, check_source, default_split, plain, read_file
from trainer.data.folders import (
    IMAGE_SUFFIXES,
    Part,
    d3_names,
    d3_test,
    files,
    folder_entries,
    foren_synths_or_gen_image,
    is_image_name,
    one_kind,
    real_and_fake,
)
from trainer.data.hub_files import hub_parquets, hub_uri, on_hub
from trainer.data.manifest import manifest_entries, manifest_rows
from trainer.data.object_storage import (
    SCHEMES,
    StoredObject,
    in_object_storage,
    object_uri,
    read_object,
    read_range,
    stored_objects,
)
from trainer.data.parts import WHOLE, DatasetPart
from trainer.data.shards import parquet_entries, read_cell, read_member, tar_entries
from trainer.images import UnreadableImage

_EXPECTED = "manifest.csv; real/ and fake/<generator>/; 0_real/ and 1_fake/; ai/ and nature/; gen_0/; *.tar; *.parquet"
_ONE_KIND = "give --label real, or --label fake and --generator NAME"


def is_remote(path: PurePath) -> bool:
    """Whether a path is of the hub, of object storage or of a web server."""
    return on_hub(path) or in_object_storage(path)


def read_dataset(
    path: Path,
    *,
    split: str | None = None,
    label: str | None = None,
    generator: str | None = None,
    source: str | None = None,
    part: DatasetPart = WHOLE,
    hold: bool = False,
) -> Iterator[Entry]:
    """Every image of `path` in a fixed order, whatever its layout.

    The layout, a manifest's every row and the first image are checked before this returns; unreadable images are met
    only when they are read. Files that are no images are given too, so that they are named and counted.

    Args:
        path: A folder or file.
        split: Only these splits, a comma list. Where the data set names none, a hash of the group makes 70 % of the
            groups `train` and the rest `test`.
        label: `real` or `fake`: all of the folder is of this kind.
        generator: Of all fakes, where the layout does not name it; for D3's shards, test archive and parquet a comma
            list in the order of gen_0, gen_1, ...
        source: Where the images came from; by default what the manifest says, or the folder's name.
        part: Only this part, which may be empty.
        hold: The caller drops each entry once it is read. Those of shards in object storage then have their bytes,
            which are so transferred once.

    Raises:
        DatasetError: No such layout, no images, or names and labels that cannot be; one line that says what to do.
    """
    if not is_remote(path):
        path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow links and so rename the images
        if not path.exists():
            raise DatasetError(f"{path} does not exist")
    if in_object_storage(path):
        entries, has_splits = _stored_entries(path, label, generator, part, hold), False
    else:
        entries, has_splits = _open_layout(path, label, generator, part)
    if source is not None:
        check_source(source, "--source")
        entries = (replace(entry, source=source) for entry in entries)
    other_splits: set[str] = set()
    if split is not None:
        entries = _select(entries, {part.strip() for part in split.split(",")}, has_splits, other_splits)
    first_entries: list[Entry] = []
    for entry in entries:
        first_entries.append(entry)
        if PurePath(entry.key).suffix.lower() in {"", *IMAGE_SUFFIXES} or entry.uri.partition("#")[2]:
            return chain(first_entries, entries)
    if part != WHOLE:  # which may be empty, unless all are
        read_dataset(path, split=split, label=label, generator=generator, source=source)
        return iter(first_entries)
    if first_entries:
        raise DatasetError(f"{path} has no images, only other files such as {first_entries[0].key}")
    if other_splits:
        raise DatasetError(f"{path} has no images of split {split}; its splits are {', '.join(sorted(other_splits))}")
    raise DatasetError(f"{path} has no images" + (f" of split {split}" if split else ""))


def read_uri(uri: str) -> bytes:
    """The bytes that the `uri` of an entry names.

    Raises:
        UnreadableImage: They are no longer there, or the address is of another kind.
    """
    parts = urlsplit(uri)
    inside = unquote(parts.fragment, errors="surrogateescape")
    if parts.scheme == "hf":
        return _read_cell(PurePath("hf:", parts.netloc, *parts.path.split("/")), inside, uri)
    if f"{parts.scheme}:" in SCHEMES:
        path = PurePath(f"{parts.scheme}:", parts.netloc, *unquote(parts.path).split("/"))
        return _read_cell(path, inside, uri) if path.suffix.lower() == ".parquet" else read_object(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise UnreadableImage(f"cannot read {uri!r}; expected file:///path, file:///x.tar#member or a parquet cell")
    path = Path(unquote(parts.path, errors="surrogateescape"))
    if not inside:
        return read_file(path)
    if path.suffix.lower() != ".parquet":
        return read_member(path, inside)
    return _read_cell(path, inside, uri)


def _read_cell(path: PurePath, inside: str, uri: str) -> bytes:
    column, _, row = inside.partition("/")
    if not row.isdecimal():
        raise UnreadableImage(f"cannot read {uri!r}; expected a column and a row after #")
    return read_cell(path, column, int(row))


def _select(entries: Iterator[Entry], splits: set[str], has_splits: bool, others: set[str]) -> Iterator[Entry]:
    """The entries of some splits; the names of those passed over are added to `others`."""
    for entry in entries:
        split = entry.split if has_splits else default_split(entry.group)
        if split in splits:
            yield replace(entry, split=split)
        elif split is not None:
            others.add(split)


def _open_layout(
    path: Path, label: str | None, generator: str | None, part: DatasetPart
) -> tuple[Iterator[Entry], bool]:
    """The entries of a part of a path, and whether its layout names splits."""
    if on_hub(path):
        if label is not None:
            raise DatasetError(f"{hub_uri(path)} says itself what is real and fake: drop --label")
        names = d3_names(generator) if generator else None
        return part.read(hub_parquets(path), partial(parquet_entries, names=names)), False
    kind = path.suffix.lower() if path.is_file() else ""
    if label is not None:
        if kind in (".csv", ".tar", ".parquet"):
            raise DatasetError(f"{path} says itself what is real and fake: drop --label")
        return filter(part.holds, folder_entries(path, one_kind(path, label, generator))), False
    manifest = path if kind == ".csv" else path / "manifest.csv"
    if manifest.is_file():
        if generator is not None:
            raise DatasetError(f"{manifest} names its generators itself: drop --generator")
        splits = {row.split for row in manifest_rows(manifest)}  # every line is checked before the first is used
        return filter(part.holds, manifest_entries(manifest)), splits != {None}
    if path.is_file() and kind not in (".tar", ".parquet"):
        raise DatasetError(f"{path} is a single file: {_ONE_KIND}")
    kinds = d3_test(path, generator) or real_and_fake(path, generator) or foren_synths_or_gen_image(path, generator)
    if kinds:
        return filter(part.holds, folder_entries(path, kinds)), any(one.split for one in kinds)
    if archives := [path] if kind else sorted(p for p in path.iterdir() if p.suffix.lower() in (".tar", ".parquet")):
        return part.read(archives, partial(_archive, generator=generator)), False
    if not any(map(is_image_name, files(path))):
        raise DatasetError(f"{path} has no images")
    raise DatasetError(f"{path} has no known layout ({_EXPECTED}): {_ONE_KIND}")


def _stored_entries(
    path: Path, label: str | None, generator: str | None, part: DatasetPart, hold: bool
) -> Iterator[Entry]:
    """The entries of a part of what lies in object storage."""
    stored = [one for one in stored_objects(path) if not one.path.name.startswith(".")]
    archives = [one for one in stored if one.path.suffix.lower() in (".tar", ".parquet")]
    if label is None:
        if not archives:
            raise DatasetError(f"{object_uri(path)} has no .tar or .parquet: {_ONE_KIND}")
        return part.read(archives, partial(_archive, generator=generator, hold=hold))
    if archives:
        raise DatasetError(f"{object_uri(archives[0].path)} says itself what is real and fake: drop --label")
    [kind] = one_kind(path, label, generator)
    return filter(part.holds, (_object_entry(one, path, kind) for one in stored))


def _object_entry(stored: StoredObject, home: PurePath, kind: Part) -> Entry:
    """The entry of one image; `home` is what was asked for."""
    key = stored.path.relative_to(home).as_posix() if stored.path != home else stored.path.name
    source = plain(home.name if stored.path != home else home.parent.name)
    return Entry(
        key=plain(key),
        group=plain(f"{source}/{key}"),
        label=kind.label,
        generator=kind.generator,
        source=source,
        uri=object_uri(stored.path),
        split=None,
        size=stored.size,
        mtime=stored.mtime,
        attributes={},
        read=partial(read_range, stored.path, 0, stored.size),
    )


def _archive(archive: Path | StoredObject, generator: str | None, hold: bool = False) -> Iterator[Entry]:
    path = archive.path if isinstance(archive, StoredObject) else archive
    if path.suffix.lower() == ".tar":
        return tar_entries(archive, names=d3_names(generator), hold=hold)
    return parquet_entries(path, names=d3_names(generator) if generator else None)
