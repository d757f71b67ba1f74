"""Many images in one command: from wherever they lie into a file that the next run goes on from."""

import csv
import fcntl
import hashlib
import json
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import small_image
from typer.testing import CliRunner, Result

from api.__main__ import app
from api.image_places import Places
from api.judge.uploads import Question
from api.schemas.problems import FailedFile
from api.schemas.verdicts import EXAMPLE_VERDICT, Verdict
from api.service_settings import ServiceSettings
from api.verdict_file import COLUMNS, VerdictFile, row
from trainer.data.entry import DatasetError

Call = Callable[..., Result]
CHECKPOINT = EXAMPLE_VERDICT["model"]["checkpoint"]


@pytest.fixture
def call(populated: ServiceSettings) -> Call:
    """Runs the command line on the populated store."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        values = {name: getattr(populated, name) for name in ("home", "database_url", "checkpoint", "device", "k")}
        env = {f"LINEUP_{name.upper()}": str(value) for name, value in values.items()} | {"COLUMNS": "200"}
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env, input=stdin)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "=images"
    folder.mkdir()
    for number in range(5):
        small_image(71_000 + number, number % 2 == 0, 64).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"broken")
    return folder


def verdict(file: str, sha256: str = "00", **changed: object) -> Verdict:
    image = EXAMPLE_VERDICT["image"] | {"sha256": sha256}
    return Verdict.model_validate(EXAMPLE_VERDICT | {"file": file, "image": image} | changed)


def test_a_folder_becomes_lines_and_a_table_and_a_second_run_changes_nothing(call: Call, folder: Path) -> None:
    table = folder.parent / "verdicts.csv"
    done = call("detect", folder, "--output", table)
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    assert "6 images: " in done.stderr
    assert "1 rejected" in done.stderr
    lines = [json.loads(line) for line in table.with_suffix(".jsonl").read_text().splitlines()]
    assert [Path(line["file"]).name for line in lines] == [*(f"{number}.png" for number in range(5)), "broken.png"]
    verdicts = [Verdict.model_validate(line) for line in lines[:5]]
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(one["file"], one["verdict"]) for one in rows[:5]] == [(one.file, one.verdict) for one in verdicts]
    assert [float(one["score"]) for one in rows[:5]] == [one.score for one in verdicts]
    assert rows[5]["error"] == lines[5]["error"]["detail"]
    before = {path.name: path.read_bytes() for path in folder.parent.glob("verdicts.*")}
    again = call("detect", folder, "--output", table)
    assert "0 cannot tell, 1 rejected, 5 judged before; " in again.stderr
    (folder / "broken.png").unlink()
    assert "5 images, all judged before; another --output" in call("detect", folder, "--output", table).stderr
    assert {path.name: path.read_bytes() for path in folder.parent.glob("verdicts.*")} == before


def test_an_interrupted_run_goes_on_where_it_ended(call: Call, folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "verdicts.jsonl"
    call("detect", folder, "--output", lines)
    whole = lines.read_bytes()
    first, second = whole.splitlines(keepends=True)[:2]
    lines.write_bytes(first + second[:-40])  # as a kill would leave it
    small_image(72_000, True, 64).save(folder / "0.png")  # changed since
    done = call("detect", folder, "--output", lines)
    assert done.exit_code == 0, done.stderr
    files = [Path(json.loads(line)["file"]).name for line in lines.read_text().splitlines()]
    assert files == ["0.png", *(f"{number}.png" for number in range(5)), "broken.png"]
    call("detect", folder / "1.png", "--output", lines.with_suffix(".csv"))
    with lines.with_suffix(".csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6  # of 0.png the last
    assert rows[0]["sha256"] == json.loads(lines.read_text().splitlines()[1])["image"]["sha256"]


def test_a_list_names_files_folders_and_data_sets(call: Call, folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,label,generator,split\n=images/3.png,real,,test\n")
    deep = tmp_path / "deep"
    shutil.copytree(folder, deep / "inner", ignore=shutil.ignore_patterns("[1-9b]*"))
    stdin = f"{folder / '1.png'}\n\n{deep}\n{manifest}\nhttp://127.0.0.1:1/a.png\n{tmp_path / 'missing.png'}\n"
    done = call("detect", "-", "--json", stdin=stdin)
    assert done.exit_code == 0, done.stderr
    names = [Path(json.loads(line)["file"]).name for line in done.stdout.splitlines()]
    assert names == ["1.png", "0.png", "3.png", "a.png", "missing.png"]
    assert "http://127.0.0.1:1/a.png: not https" in done.stderr
    assert "missing.png: no such file" in done.stderr


def test_several_images_are_a_line_each_and_one_is_told_at_length(call: Call, folder: Path) -> None:
    done = call("detect", folder)
    assert len(done.stdout.splitlines()) == 5
    for number, line in enumerate(done.stdout.splitlines()):
        decision, score, rest = line.split(maxsplit=2)
        assert decision in ("fake", "real", "uncertain")
        assert 0 <= float(score) <= 1
        assert rest.startswith(str(folder / f"{number}.png"))
    assert "neighbour" in call("detect", folder / "0.png").stdout
    assert "neighbour" not in call("detect", folder / "0.png", "--no-details").stdout


def test_addresses_are_fetched_within_limits(
    public_files: tuple[str, dict[str, bytes | str], list[str]], trust: ssl.SSLContext, folder: Path
) -> None:
    base, served, _ = public_files
    served |= {"/a.png": (folder / "0.png").read_bytes(), "/large.png": b"x" * 2001, "/loop": f"{base}/loop"}
    names = tuple(f"{base}/{name}" for name in ("a.png", "large.png", "loop", "none.png"))
    failures: list[FailedFile] = []
    places = Places((*names, "https://127.0.0.1/a.png"), most_bytes=2000, verify=trust)
    served["/a.png"] = served["/a.png"][:2000]
    [upload] = places.uploads(failures)
    assert (upload.file, upload.data) == (names[0], served["/a.png"])
    reasons = [failure.error.detail.partition(": ")[2] for failure in failures]
    assert reasons == ["more than 2,000 bytes", "more than 5 redirects", "HTTP 404", "not a public server"]


def test_a_large_file_is_not_read(folder: Path) -> None:
    failures: list[FailedFile] = []
    assert list(Places((str(folder / "0.png"),), most_bytes=10).uploads(failures)) == []
    assert failures[0].error.status == 413


def test_a_table_is_typed_and_no_cell_is_a_formula(tmp_path: Path) -> None:
    for suffix in (".csv", ".parquet"):
        path = tmp_path / f"table{suffix}"
        path.with_suffix(".jsonl").unlink(missing_ok=True)
        with VerdictFile(path, CHECKPOINT) as written:
            written.add(verdict("=cmd()|a.jpg"))
            written.add(verdict("b.jpg", verdict="real", score=None, known={"id": 7, "label": "real"}))
    rows = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert [list(one) for one in rows] == [list(COLUMNS)] * 2
    first, second = rows
    assert (first["file"], first["score"], first["generator"]) == ("=cmd()|a.jpg", 0.97, "SD-XL")
    assert (second["known"], second["score"], second["generator"]) == (7, None, None)
    for one in rows:
        assert all(value is None or type(value) is COLUMNS[name] for name, value in one.items())
    text = (tmp_path / "table.csv").read_text("utf-8-sig").splitlines()
    assert text[1].startswith("'=cmd()|a.jpg,fake,0.97,")


def test_what_no_file_can_be_called_is_a_line_that_cannot_be_read(call: Call, folder: Path) -> None:
    lines = ["a\0b.png", "x" * 5000, "\udce9.png", str(folder / "missing.csv"), str(folder / "0.png")]
    stdin = "\n".join(lines).encode("utf-8", "surrogateescape")
    done = call("detect", "-", "--json", stdin=stdin)
    assert done.exit_code == 0, done.stderr
    assert "5 images: " in done.stderr
    assert "4 rejected" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_does_not_replace_what_is_judged(call: Call, folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "set.csv"
    manifest.write_text("path,label,generator,split\n=images/3.png,real,,test\n")
    before = manifest.read_text()
    done = call("detect", manifest, "--output", manifest)
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert manifest.read_text() == before


def test_only_the_last_line_of_a_file_counts(tmp_path: Path) -> None:
    digests = {data: hashlib.sha256(data).hexdigest() for data in (b"A", b"B")}
    path = tmp_path / "a.jsonl"
    for data in (b"A", b"B"):
        with VerdictFile(path, CHECKPOINT) as written:
            assert not written.has("a.jpg", data)
            written.add(verdict("a.jpg", digests[data]))
    with VerdictFile(path, CHECKPOINT) as written:
        assert written.has("a.jpg", b"B")
        assert not written.has("a.jpg", b"A")
    strict = Question(max_false_alarm=0.01, explain=frozenset({"regions"}))
    with VerdictFile(path, CHECKPOINT, strict) as written:
        assert not written.has("a.jpg", b"B")
        written.add(verdict("a.jpg", digests[b"B"]))
    with VerdictFile(path, CHECKPOINT, strict) as written:
        assert written.has("a.jpg", b"B")
    with VerdictFile(path, CHECKPOINT) as written:
        assert not written.has("a.jpg", b"B")


def test_what_another_checkpoint_said_does_not_count(tmp_path: Path) -> None:
    data, digest = b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with VerdictFile(tmp_path / "a.jsonl", CHECKPOINT) as written:
        written.add(verdict("a.jpg", digest))
    with VerdictFile(tmp_path / "a.jsonl", CHECKPOINT) as written:
        assert written.has("a.jpg", data)
        assert not written.has("b.jpg", data)
        assert not written.has("a.jpg", b"other")
    with VerdictFile(tmp_path / "a.jsonl", "another") as written:
        assert not written.has("a.jpg", data)


def test_bad_outputs_are_refused_before_anything_is_judged(tmp_path: Path, call: Call, folder: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"verdict": 1}\n')
    for name, reason in (
        ("a.txt", "expected a name that ends with .jsonl, .csv, .parquet"),
        ("missing/a.csv", "is no folder"),
        ("notes.csv", "line 1 of"),
    ):
        done = call("detect", folder, "--output", tmp_path / name)
        assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
        assert reason in done.stderr
    assert (tmp_path / "notes.jsonl").read_text() == '{"verdict": 1}\n'
    assert call("detect", folder, "--output", tmp_path / "a.csv", "--json").exit_code == 2
    with (tmp_path / "b.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DatasetError, match="another command writes"), VerdictFile(tmp_path / "b.csv", CHECKPOINT):
            raise AssertionError


def test_a_row_has_every_column() -> None:
    assert list(row(verdict("a.jpg").model_dump(mode="json"))) == list(COLUMNS)
    error = {"file": "a.jpg", "error": {"detail": "a.jpg: broken"}}
    assert row(error) == dict.fromkeys(COLUMNS) | {"file": "a.jpg", "error": "a.jpg: broken"}
