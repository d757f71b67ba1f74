"""Every data layout gives the same kind of entries; a data set that cannot be is refused in one line."""

import io
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import make_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer.data.datasets import read_dataset, read_uri
from trainer.data.entry import FIT_FORBIDDEN_SPLITS, MOST_SOURCE_BYTES, DatasetError, Entry, default_split, role
from trainer.data.shards import D3_GENERATORS
from trainer.images import ImageTooLarge, UnreadableImage, decode_image


def picture(colour: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(out, "PNG")
    return out.getvalue()


def place(root: Path, *paths: str) -> Path:
    """Different small images at these paths."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture(number))
    return root


def facts(entries: Iterable[Entry], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(entry, name) for name in names) for entry in entries]


def record(key: str, seed: int = 0) -> dict[str, bytes]:
    images = {f"{key}.gen_{i}.png": picture(seed + i) for i in range(4)}
    return {
        f"{key}.caption.txt": b"a cat",
        **images,
        f"{key}.real.png": picture(seed + 9),
        f"{key}.url.txt": b"http://example.org/cat.jpg",
    }


# Folders


def test_real_and_fake_folders(tmp_path: Path) -> None:
    root = place(
        tmp_path / "set", "real/b.png", "real/deep/a.PNG", "fake/gen-a/a.png", "fake/Gen B/x/a.jpg", "real/.hidden.png"
    )
    entries = list(read_dataset(root))
    assert facts(entries, "key", "label", "generator", "source", "split") == [
        ("fake/Gen B/x/a.jpg", 1, "Gen B", "set", None),
        ("fake/gen-a/a.png", 1, "gen-a", "set", None),
        ("real/b.png", 0, None, "set", None),
        ("real/deep/a.PNG", 0, None, "set", None),
    ]
    assert len({entry.group for entry in entries}) == 4
    first, file = entries[2], root / "real/b.png"
    assert (first.uri, first.size, first.mtime) == (file.as_uri(), file.stat().st_size, file.stat().st_mtime)
    assert first.read() == file.read_bytes() == read_uri(first.uri)
    assert pickle.loads(pickle.dumps(first)) == first


def test_the_shared_fixture_reads(image_folder: Path) -> None:
    entries = list(read_dataset(image_folder))
    assert [sum(e.generator == name for e in entries) for name in (None, "gen-a", "gen-b")] == [60, 30, 30]


def test_folders_below_split_names_and_one_generator_for_all(tmp_path: Path) -> None:
    place(tmp_path, "train/REAL/a.png", "train/FAKE/b.png", "test/REAL/c.png", "test/FAKE/d.png")
    entries = list(read_dataset(tmp_path, split="test", generator="SD-1.4"))
    assert facts(entries, "key", "generator", "split") == [
        ("test/FAKE/d.png", "SD-1.4", "test"),
        ("test/REAL/c.png", None, "test"),
    ]
    with pytest.raises(DatasetError, match=r"lies in fake/ itself.*--generator"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("path", "generator", "split", "attributes"),
    [
        ("progan/airplane/1_fake/a.png", "progan", None, {"class": "airplane"}),
        ("biggan/1_fake/a.png", "biggan", None, {}),
        ("val/progan/cat/1_fake/a.png", "progan", "val", {"class": "cat"}),
        ("train/progan/cat/1_fake/a.png", "progan", "train", {"class": "cat"}),
        ("1_fake/a.png", "set", None, {}),
        ("Midjourney/train/ai/a.png", "Midjourney", "train", {}),
        ("ADM/imagenet_ai_0508_adm/val/ai/a.png", "ADM", "val", {"class": "imagenet_ai_0508_adm"}),
        ("val/ai/a.png", "set", "val", {}),
    ],
)
def test_foren_synths_and_gen_image(
    tmp_path: Path, path: str, generator: str, split: str | None, attributes: dict[str, str]
) -> None:
    real = path.replace("1_fake", "0_real").replace("/ai/", "/nature/")
    root = place(tmp_path / "set", path, real)
    expected = [(path, 1, generator, split, attributes), (real, 0, None, split, attributes)]
    assert sorted(facts(read_dataset(root), "key", "label", "generator", "split", "attributes")) == sorted(expected)
    named = [entry.generator for entry in read_dataset(root, generator="mine")]
    assert sorted(map(str, named)) == ["None", "mine"]


@pytest.mark.parametrize("root", ["progan", "progan/cat", "progan/train"])
def test_a_class_of_foren_synths_is_no_generator(tmp_path: Path, root: str) -> None:
    """The folder above names the generator; below it, it must be given."""
    place(tmp_path, *(f"progan/{name}/{kind}/a.png" for name in ("cat", "train") for kind in ("0_real", "1_fake")))
    above = [(entry.generator, entry.split, entry.attributes["class"]) for entry in read_dataset(tmp_path)]
    assert sorted(above, key=str) == [(made, None, name) for made in ("progan", None) for name in ("cat", "train")]
    with pytest.raises(DatasetError, match=r"'(cat|train)' is a class of ForenSynths.*--generator NAME"):
        read_dataset(tmp_path / root)
    named = read_dataset(tmp_path / root, generator="progan")
    assert {(entry.generator, entry.split) for entry in named} == {("progan", None), (None, None)}


def test_a_split_folder_of_a_gen_image_generator_is_named_after_it(tmp_path: Path) -> None:
    place(tmp_path, "wukong/train/ai/a.png", "wukong/train/nature/b.png")
    entries = read_dataset(tmp_path / "wukong/train", split="train")
    assert facts(entries, "generator", "split") == [("wukong", "train"), (None, "train")]


def test_d3_test_archive_keeps_records_together(tmp_path: Path) -> None:
    root = place(
        tmp_path / "d3", *(f"{v}/{k}/007.png" for v in ("augm", "no_augm") for k in ("real", "gen_0", "gen_3"))
    )
    entries = list(read_dataset(root))
    assert {entry.group for entry in entries} == {"d3/007"}
    assert {entry.split for entry in entries} == {"test"}
    assert {(e.generator, e.attributes["variant"]) for e in entries} == {
        (name, variant) for name in (None, "DF-IF", "SD-XL") for variant in ("augm", "no_augm")
    }
    plain = list(read_dataset(root / "no_augm", generator="a,b,c,d"))
    assert facts(plain, "key", "generator") == [("real/007.png", None), ("gen_0/007.png", "a"), ("gen_3/007.png", "d")]
    with pytest.raises(DatasetError, match="gen_3 has no name among a, b"):
        read_dataset(root, generator="a,b")


def test_one_folder_of_one_kind(tmp_path: Path) -> None:
    root = place(tmp_path / "scrape", "a.png", "nature/b.png")
    assert facts(read_dataset(root, label="real", source="web"), "key", "label", "source") == [
        ("a.png", 0, "web"),
        ("nature/b.png", 0, "web"),
    ]
    assert facts(read_dataset(root, label="fake", generator="Flux 1"), "label", "generator") == [(1, "Flux 1")] * 2
    assert facts(read_dataset(root / "a.png", label="real"), "key", "source") == [("a.png", "a.png")]
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"label": "fake"}, "give --generator"),
        ({"label": "real", "generator": "x"}, "drop --generator"),
        ({"label": "forged"}, "expected real or fake"),
        ({"label": "fake", "generator": "real"}, "cannot name a generator"),
        ({"label": "fake", "generator": "a/b"}, "cannot name a generator"),
        ({}, "no known layout"),
    ]
    for options, message in refusals:
        with pytest.raises(DatasetError, match=message):
            read_dataset(root, **options)


def test_a_source_has_a_name_that_an_index_can_hold(tmp_path: Path) -> None:
    place(tmp_path, "real/a.png")
    (entry,) = read_dataset(tmp_path, source="s" * MOST_SOURCE_BYTES)
    assert entry.source == "s" * MOST_SOURCE_BYTES
    with pytest.raises(DatasetError, match=r"--source: .* has 2,601 bytes; a source has at most 2,600"):
        read_dataset(tmp_path, source="s" * (MOST_SOURCE_BYTES + 1))


def test_label_is_refused_where_the_data_say_it(tmp_path: Path) -> None:
    place(tmp_path / "a", "real/a.png", "fake/g/a.png")
    place(tmp_path / "b", "a.png")
    (tmp_path / "b/manifest.csv").write_text("path,label\na.png,real\n")
    make_tar(tmp_path / "c.tar", record("1"))
    for name in ("a", "b", "c.tar", "b/manifest.csv"):
        with pytest.raises(DatasetError, match="drop --label"):
            read_dataset(tmp_path / name, label="real")


# Manifest


def manifest(root: Path, text: str) -> Path:
    (root / "manifest.csv").write_text(text, encoding="utf-8")
    return root


def test_manifest_wins_over_the_shape_and_keeps_its_other_columns(tmp_path: Path) -> None:
    root = place(tmp_path / "set", "real/a.png", "fake/g/b.png", "real/unlisted.png")
    manifest(
        root,
        "\ufeffpath,label,generator,split,source,group,licence,note\n"
        "real/a.png,real,,train,flickr,g1,CC0,\n"
        'fake/../fake/g/b.png, Fake ,SD-1.4,unseen,,,,"one, two"\n',
    )
    columns = ("key", "label", "generator", "split", "source", "group", "attributes")
    expected = [
        ("real/a.png", 0, None, "train", "flickr", "g1", {"licence": "CC0"}),
        ("fake/g/b.png", 1, "SD-1.4", "unseen", "set", "set/fake/g/b.png", {"note": "one, two"}),
    ]
    assert facts(read_dataset(root), *columns) == expected
    assert facts(read_dataset(root / "manifest.csv"), *columns) == expected
    assert facts(read_dataset(root, split="unseen, test", source="mine"), "key", "source") == [("fake/g/b.png", "mine")]
    with pytest.raises(DatasetError, match="no images of split test; its splits are train, unseen"):
        read_dataset(root, split="test")
    with pytest.raises(DatasetError, match="drop --generator"):
        read_dataset(root, generator="x")


def test_a_manifest_says_where_its_images_were_published(tmp_path: Path) -> None:
    place(tmp_path, "a.png", "b.png", "c.png", "d.png")
    manifest(
        tmp_path,
        "path,label,uri,source_repo,source_commit,source_path,window\n"
        'a.png,real,,who/what,c0ffee,"in/50 % off, Let\'s #1.png","8,0,256,224"\n'
        "b.png,real,https://example.org/b.png,who/what,c0ffee,b.png,\n"
        "c.png,real,ftp://example.org/c.png,,,,\n"
        "d.png,real,,who/what,,d.png,\n",
    )
    github = "https://raw.githubusercontent.com/who/what/c0ffee/in/50%20%25%20off%2C%20Let%27s%20%231.png"
    repository = {"source_repo": "who/what", "source_path": "b.png"}
    assert facts(read_dataset(tmp_path), "public_uri", "attributes") == [
        (github, {"window": "8,0,256,224"}),
        ("https://example.org/b.png", repository | {"source_commit": "c0ffee"}),
        (None, {"uri": "ftp://example.org/c.png"}),
        (None, repository | {"source_path": "d.png"}),
    ]
    assert all(read_uri(entry.uri) == entry.read() for entry in read_dataset(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,generator\na.png,x\n", r"lacks the column label; expected path,label.*found path, generator"),
        ("", "lacks the column path and label.*found nothing"),
        ("path,label\na.png,real\na.png,maybe\n", "line 3: label is 'maybe'; expected real or fake"),
        ("path,label\na.png\n", "line 2: label is ''"),
        ("path,label\n,real\n", "line 2: path is ''"),
        ("path,label\n/etc/passwd,real\n", "line 2: path is '/etc/passwd'; expected a path inside"),
        ("path,label\nx/../../a.png,real\n", "expected a path inside the manifest's folder"),
        ("path,label,generator\na.png,fake,\n", "line 2: '' cannot name a generator"),
        ("path,label,generator\na.png,fake,All\n", "'All' cannot name a generator"),
        ("path,label,generator\na.png,real,SD\n", "a real image has generator 'SD'"),
        (f"path,label,source\na.png,real,{'ü' * 1301}\n", "line 2: 'üüüüüüüüüüüüüüüüüüüü'... has 2,602 bytes"),
        ("path,label\na.png,real,more\n", "more cells"),
        ("path,label\n\udcff,real\n", "no readable UTF-8"),
        ("path,label\n", "has no images"),
    ],
)
def test_a_bad_manifest_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    place(tmp_path, "a.png")
    (tmp_path / "manifest.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetError, match=message) as caught:
        read_dataset(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    manifest(place(tmp_path, "a.png"), "path,label\ngone.png,real\na.png,real\n")
    gone, there = read_dataset(tmp_path)
    assert (gone.key, gone.size, gone.mtime) == ("gone.png", None, None)
    with pytest.raises(UnreadableImage, match="no such file"):
        gone.read()
    assert there.read() == picture()


# Shards


def test_d3_shard(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "d3/000.tar", {**record("k1"), **record("k.2", 20), "notes.md": b"x"})
    entries = list(read_dataset(shard))
    assert facts(entries[:5], "key", "group", "label", "generator", "source") == [
        *((f"k1.gen_{i}", "k1", 1, D3_GENERATORS[i], "d3") for i in range(4)),
        ("k1.real", "k1", 0, None, "d3"),
    ]
    assert [entry.read() for entry in entries[:5]] == [picture(i) for i in (0, 1, 2, 3, 9)]
    assert entries[0].attributes == {"caption": "a cat"}
    assert entries[4].attributes == {"caption": "a cat", "url": "http://example.org/cat.jpg"}
    assert entries[0].uri == shard.as_uri() + "#k1.gen_0.png"
    assert all(read_uri(entry.uri) == entry.read() for entry in entries)
    assert pickle.loads(pickle.dumps(entries[3])).read() == picture(3)
    assert facts(read_dataset(tmp_path / "d3"), "key") == facts(entries, "key")
    renamed = read_dataset(shard, generator="a,b,c,d", source="mine")
    assert {(entry.generator, entry.source) for entry in renamed} == {(name, "mine") for name in (None, *"abcd")}


def test_dots_in_a_webdataset_key_end_it_but_folders_do_not(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "x.tar", {"v1.0/a.gen_0.jpg": picture(1), "v1.0/a.real.jpg": picture(2)})
    assert facts(read_dataset(shard), "group", "key") == [("v1.0/a", "v1.0/a.gen_0"), ("v1.0/a", "v1.0/a.real")]


@pytest.mark.parametrize("cut", [4 * 1024, 6 * 1024 + 100, 8 * 1024 + 600])
def test_a_shard_cut_short_gives_what_lies_before_the_cut(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    shard = make_tar(tmp_path / "d3.tar", {**record("a"), **record("b", 20)})
    whole = [entry.key for entry in read_dataset(shard)]
    with shard.open("r+b") as file:
        file.truncate(cut)  # each of the 14 members takes two blocks of 512 bytes
    keys, unreadable = [], 0
    for entry in read_dataset(shard):
        keys.append(entry.key)
        try:
            decode_image(entry.read())
        except UnreadableImage:
            unreadable += 1
    assert keys == whole[: len(keys)]
    assert 3 <= len(keys) < 10
    assert unreadable <= 1
    assert "cut short" in caplog.text


def test_a_damaged_header_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = make_tar(tmp_path / "d3.tar", {**record("a"), **record("b", 20)})
    data = bytearray(shard.read_bytes())
    data[5 * 1024 + 150] ^= 0xFF  # the checksum of the sixth member
    shard.write_bytes(data)
    assert [entry.key for entry in read_dataset(shard)] == [f"a.gen_{i}" for i in range(4)]
    assert "before byte 5120" in caplog.text
    caplog.clear()
    list(read_dataset(make_tar(tmp_path / "whole.tar", record("a"))))
    assert caplog.text == ""


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DatasetError, match="no uncompressed tar"):
        read_dataset(tmp_path / "a.tar")
    shard = make_tar(tmp_path / "b.tar", {"k.gen_4.png": picture()})
    with pytest.raises(DatasetError, match=r"gen_4 has no name among DF-IF.*--generator A,B,C"):
        read_dataset(shard)
    with pytest.raises(DatasetError, match="has no images"):
        read_dataset(make_tar(tmp_path / "c.tar", {"k.txt": b"x"}))


# Hub parquet


def make_parquet(path: Path, rows: int = 5) -> Path:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = {
        "id": pa.array([f"id-{i}" for i in range(rows)]),
        "original_prompt": pa.array([f"prompt {i}" for i in range(rows)]),
        "url": pa.array(["http://example.org"] * rows),
    }
    for g in range(4):
        table[f"model_gen{g}"] = pa.array([f"owner/Model {g}" for _ in range(rows)])
        table[f"num_inference_steps_gen{g}"] = pa.array([10 * g] * rows)
        cells = [None if (i, g) == (1, 2) else {"bytes": picture(10 * i + g), "path": "x.png"} for i in range(rows)]
        table[f"image_gen{g}"] = pa.array(cells, image)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=2)
    return path


def test_hub_parquet(tmp_path: Path) -> None:
    path = make_parquet(tmp_path / "elsa/0000.parquet")
    entries = list(read_dataset(path.parent))
    assert len(entries) == 20
    last = entries[-1]
    assert facts([last], "key", "group", "label", "generator", "source") == [
        ("id-4.gen_3", "id-4", 1, "Model 3", "elsa")
    ]
    assert last.attributes == {
        "id": "id-4",
        "original_prompt": "prompt 4",
        "url": "http://example.org",
        "model": "owner/Model 3",
        "num_inference_steps": "30",
    }
    assert last.uri == path.as_uri() + "#image_gen3/4"
    assert last.read() == read_uri(last.uri) == picture(43)
    with pytest.raises(UnreadableImage, match="no image in image_gen2 of row 1"):
        entries[6].read()
    assert {entry.generator for entry in read_dataset(path, generator=",".join(D3_GENERATORS))} == set(D3_GENERATORS)


def test_parquet_of_other_columns_or_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="has columns text; expected image_gen0"):
        read_dataset(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match="is no parquet file"):
        read_dataset(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"needs pyarrow; install the extra: pip install 'lineup\[datasets\]'"):
        read_dataset(tmp_path / "a.parquet")


# What all layouts share


def test_splits_are_made_by_hash_where_a_layout_names_none(tmp_path: Path) -> None:
    place(tmp_path, *(f"real/{i}.png" for i in range(200)))
    train, test = (list(read_dataset(tmp_path, split=split)) for split in ("train", "test"))
    assert 120 <= len(train) <= 160
    assert {e.split for e in train} == {"train"}
    assert {e.split for e in test} == {"test"}
    assert sorted(e.key for e in train + test) == sorted(e.key for e in read_dataset(tmp_path))
    with pytest.raises(DatasetError, match="no images of split unseen"):
        read_dataset(tmp_path, split="unseen")
    assert FIT_FORBIDDEN_SPLITS == ("test", "unseen")


def test_such_splits_do_not_depend_on_the_role() -> None:
    names = [f"group {i}" for i in range(5000)]
    held_out = [default_split(name) for name in names if role(name) != "training"]
    assert held_out.count("train") / len(held_out) == pytest.approx(0.7, abs=0.05)


def test_roles_are_fixed_by_the_hash_of_the_group() -> None:
    names = [f"group {i}" for i in range(5000)]
    shares = [
        int.from_bytes(blake2b(f"lineup{name}".encode(), digest_size=8).digest(), "big") / 2**64 for name in names
    ]
    roles = [role(name) for name in names]
    assert roles == ["validation" if s < 0.1 else "calibration" if s < 0.2 else "training" for s in shares]
    assert [round(roles.count(name) / 5000, 1) for name in ("validation", "calibration", "training")] == [0.1, 0.1, 0.8]


def test_role_of_known_groups() -> None:
    """These never change: a model would otherwise be judged on what it learned from."""
    assert {name: role(name) for name in ("set/real/0.png", "k1", "id-4", "prompt-7")} == {
        "set/real/0.png": "calibration",
        "k1": "validation",
        "id-4": "training",
        "prompt-7": "training",
    }


@pytest.mark.parametrize("content", [(), ("notes.txt",), (".hidden.png",), ("real/notes.txt", "fake/g/readme.md")])
def test_a_folder_without_images_is_one_clear_line(tmp_path: Path, content: tuple[str, ...]) -> None:
    for name in content:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(DatasetError, match=r"has no images|has no known layout") as caught:
        read_dataset(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match="does not exist"):
        read_dataset(tmp_path / "nowhere")


def test_files_that_are_no_images_are_named_not_dropped(tmp_path: Path) -> None:
    root = place(tmp_path, "real/b.png")
    (root / "real/a.txt").write_text("x")
    os.mkfifo(root / "real/pipe.png")
    (root / "real/link.png").symlink_to("gone.png")
    reasons = {}
    for entry in read_dataset(root):
        try:
            reasons[entry.key] = decode_image(entry.read())[1].format
        except UnreadableImage as error:
            reasons[entry.key] = str(error)
    assert reasons["real/b.png"] == "PNG"
    assert reasons["real/a.txt"].startswith("not an image")
    assert reasons["real/pipe.png"] == "not a regular file"
    assert reasons["real/link.png"] == "no such file"


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    root = place(tmp_path, "real/a.png")
    os.truncate(root / "real/a.png", 2**30 + 1)
    with pytest.raises(ImageTooLarge, match="1,073,741,825 bytes"):
        next(read_dataset(root)).read()


@given(name=st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=40))
def test_uris_name_any_file(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("names")
    try:
        (folder / f"{name}.png").write_bytes(picture())
    except OSError:  # longer than the file system allows
        return
    entry = next(read_dataset(folder, label="real")) if not name.startswith(".") else None
    assert entry is None or (entry.key == f"{name}.png" and read_uri(entry.uri) == picture())


def test_a_name_that_is_no_utf8_can_be_stored_and_read(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9#%.png"
    Path(os.fsdecode(path)).write_bytes(picture())
    entry = next(read_dataset(tmp_path, label="real"))
    assert entry.key == "caf\ufffd#%.png"
    assert (entry.uri.isascii(), read_uri(entry.uri)) == (True, picture())
    assert role(entry.group) in ("training", "calibration", "validation")


@pytest.mark.parametrize(
    "uri",
    [
        "http://example.org/a.png",
        "file://host/a.png",
        "a.png",
        "file:///no/such.png",
        "file:///no/such.tar#a",
        "file:///x.parquet#a",
    ],
)
def test_read_uri_refuses_what_it_cannot_read(uri: str) -> None:
    with pytest.raises(UnreadableImage):
        read_uri(uri)


def test_read_uri_names_the_member_that_is_gone(tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "a.tar", record("k"))
    with pytest.raises(UnreadableImage, match=r"no member 'other.png'"):
        read_uri(shard.as_uri() + "#other.png")
    parquet = make_parquet(tmp_path / "a.parquet")
    for cell, reason in [("image_gen0/99", "has no row 99"), ("image_gen9/0", "no readable cell")]:
        with pytest.raises(UnreadableImage, match=reason):
            read_uri(f"{parquet.as_uri()}#{cell}")


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = place(tmp_path, *(f"real/{i}/{j}.png" for i in "ba" for j in "ba"))
    walk: Callable[..., Any] = os.walk
    before = [entry.key for entry in read_dataset(root)]
    monkeypatch.setattr(os, "walk", lambda top: ((p, d[::-1] and d, f[::-1]) for p, d, f in walk(top)))
    assert [entry.key for entry in read_dataset(root)] == before == sorted(before)
