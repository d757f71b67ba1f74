"""Data sets whose folders say what is real and what made each fake."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from trainer.data.entry import DatasetError, Entry, check_generator, file_entry
from trainer.data.shards import D3_GENERATORS, generator_name

SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test", "unseen")
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"]
) | {".heic", ".heif"}

_LITTER = ("thumbs.db", "desktop.ini")
_FOLDER_LABELS = {"0_real": 0, "1_fake": 1, "nature": 0, "ai": 1}
_MARKERS = {"0_real", "1_fake", "ai"}  # `nature` alone is what people call a folder of landscapes
_SEARCH_DEPTH = 4
# Of ForenSynths: LSUN's for ProGAN, then those of StyleGAN, StyleGAN 2 and CycleGAN. `train` is one of them.
_CLASSES = frozenset([
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    "bedroom", "church", "apple", "orange", "summer", "winter", "zebra",
])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """A folder all of whose images are of one kind.

    With `records` images of the same relative path, its ending aside, belong to one record across the parts.
    """

    folder: Path
    label: int
    generator: str | None = None
    split: str | None = None
    records: bool = False
    attributes: dict[str, str] = field(default_factory=dict)


def folder_entries(root: Path, parts: Sequence[Part]) -> Iterator[Entry]:
    """Every file of the parts that is not hidden, sorted."""
    for part in parts:
        for path in files(part.folder):
            key = path.relative_to(root).as_posix() if path != root else path.name
            record = path.relative_to(part.folder).as_posix().removesuffix(path.suffix)
            yield file_entry(
                path,
                key,
                part.label,
                part.generator,
                home=root.name,
                split=part.split,
                group=f"{root.name}/{record}" if part.records else None,
                attributes=dict(part.attributes),
            )


def files(folder: Path) -> Iterator[Path]:
    """The files below a folder, or the file itself, without hidden ones; links to folders are not followed."""
    if not folder.is_dir():
        yield folder
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower() not in _LITTER:
                yield Path(place, name)


def is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def one_kind(path: Path, label: str, generator: str | None) -> list[Part]:
    """A folder or file that is all real, or all of one generator.

    Raises:
        DatasetError: Label and generator do not fit each other, or the folder names labels itself.
    """
    if label not in ("real", "fake"):
        raise DatasetError(f"label is {label!r}; expected real or fake")
    if label == "real" and generator is not None:
        raise DatasetError(f"real images have no generator: drop --generator {generator}")
    if label == "fake" and generator is None:
        raise DatasetError("fake images need the name of what made them: give --generator NAME")
    if (path / "manifest.csv").is_file() or real_and_fake(path, "any"):
        raise DatasetError(f"{path} says itself what is real and fake: drop --label, or give one folder of it")
    if generator is not None:
        check_generator(generator, "--generator")
    return [Part(path, int(label == "fake"), generator)]


def real_and_fake(root: Path, generator: str | None) -> list[Part]:
    """`real/**` and `fake/<generator>/**`, here or below folders named like splits; empty where there are none.

    Raises:
        DatasetError: Images lie in `fake/` itself and no generator is given.
    """
    parts: list[Part] = []
    homes = [(None, root), *((f.name.lower(), f) for f in _folders(root) if f.name.lower() in SPLIT_FOLDERS)]
    for split, home in homes:
        for folder in _folders(home):
            if folder.name.lower() == "real":
                parts.append(Part(folder, 0, split=split))
            elif folder.name.lower() == "fake" and generator is not None:
                parts.append(Part(folder, 1, check_generator(generator, "--generator"), split))
            elif folder.name.lower() == "fake":
                loose = next((path for path in folder.iterdir() if path.is_file() and is_image_name(path)), None)
                if loose is not None:
                    raise DatasetError(
                        f"{loose} lies in fake/ itself; expected fake/<generator>/, or give --generator NAME"
                    )
                parts += [Part(f, 1, check_generator(f.name, str(f)), split) for f in _folders(folder)]
    return parts


def d3_test(root: Path, generator: str | None) -> list[Part]:
    """D3's test archive, `{augm,no_augm}/{real,gen_0,...}/**`, or one of the two; empty where it is none.

    All of it is of the split `test`, so that it cannot train anything by accident.

    The generators are a comma list, names of gen_0, gen_1, ...; by default D3's.
    """
    names = d3_names(generator)
    parts: list[Part] = []
    for home in [root, *(f for f in _folders(root) if f.name in ("augm", "no_augm"))]:
        fakes = {f: int(f.name[4:]) for f in _folders(home) if re.fullmatch(r"gen_\d+", f.name)}
        part = partial(Part, split="test", records=True, attributes={} if home == root else {"variant": home.name})
        if fakes and (home / "real").is_dir():
            parts.append(part(home / "real", 0))
        parts += [part(folder, 1, generator_name(names, number, str(home))) for folder, number in fakes.items()]
    return parts


def d3_names(generator: str | None) -> Sequence[str]:
    """The names of gen_0, gen_1, ... from a comma list, or D3's own."""
    if generator is None:
        return D3_GENERATORS
    return [check_generator(name.strip(), "--generator") for name in generator.split(",")]


def foren_synths_or_gen_image(root: Path, generator: str | None) -> list[Part]:
    """`<generator>/[<class>/]{0_real,1_fake}` or `<generator>/{train,val}/{ai,nature}`; empty where there are none.

    The generator is the first folder below `root` that is not named like a split, or `root` itself where there is
    none.

    Raises:
        DatasetError: By that rule a class of ForenSynths would be a generator, and no generator is given.
    """
    parts = []
    for home in sorted(_homes(root, _SEARCH_DEPTH)):
        below = [folder for folder in (*reversed(home.parents), home) if root in folder.parents]
        split = next((folder.name.lower() for folder in (*below, root) if _names_split(folder)), None)
        names = [folder.name for folder in below if not _names_split(folder)]
        name = generator or (names or [root.parent.name if _names_split(root) else root.name])[0]
        if generator is None and name in _CLASSES:
            raise DatasetError(
                f"{home}: {name!r} is a class of ForenSynths, not a generator; give --generator NAME, "
                "or the folder that holds the generator's"
            )
        attributes = {"class": "/".join(names[1:])} if names[1:] else {}
        for folder in _folders(home):
            if (label := _FOLDER_LABELS.get(folder.name)) is not None:
                maker = check_generator(name, str(folder)) if label else None
                parts.append(Part(folder, label, maker, split, attributes=attributes))
    return parts


def _names_split(folder: Path) -> bool:
    """Whether a folder is named like a split; `train` beside other classes of ForenSynths is a class."""
    return folder.name.lower() in SPLIT_FOLDERS and not any(
        (folder.parent / name / "0_real").is_dir() for name in _CLASSES - {folder.name}
    )


def _homes(folder: Path, depth: int) -> Iterator[Path]:
    """Folders that hold `0_real`, `1_fake` or `ai`; what lies below one is not searched."""
    below = _folders(folder)
    if any(child.name in _MARKERS for child in below):
        yield folder
    elif depth:
        for child in below:
            yield from _homes(child, depth - 1)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as items:
        return sorted(Path(item.path) for item in items if item.is_dir() and not item.name.startswith("."))
