"""The indexer's commands: what they print, what they answer as JSON, and how they fail."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from archives import make_tar
from buckets import serve_buckets
from conftest import fill_disk
from hashing import HashingEmbedder
from sqlalchemy import Connection, Engine, event, make_url
from typer.testing import CliRunner, Result

from indexer.__main__ import app
from indexer.database.connection import connect
from indexer.ingest.ingest import ingest
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.checkpoints import Checkpoints
from indexer.terminal import tell_removed
from trainer import progress
from trainer.data.datasets import read_dataset
from trainer.heads.calibration_set import CALIBRATION_FILE

Run = Callable[..., Result]


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command with the hashing embedder, in this test's home and database."""
    monkeypatch.setenv("LINEUP_HOME", str(settings.home))
    monkeypatch.setenv("LINEUP_DATABASE_URL", str(settings.database_url))
    monkeypatch.setenv("LINEUP_CHECKPOINT", str(settings.home / "hashing"))
    monkeypatch.setattr("trainer.model.embedder.Embedder", HashingEmbedder)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the tests' own process keeps its handlers

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    engine = connect(settings)
    yield Store(engine)
    engine.dispose()


@pytest.fixture
def images(image_folder: Path, tmp_path: Path) -> Path:
    """8 real, 4 of each generator, and one file that is none."""
    root = tmp_path / "images"
    for name, count in (("real", 8), ("fake/gen-a", 4), ("fake/gen-b", 4)):
        (root / name).mkdir(parents=True)
        for path in sorted((image_folder / name).iterdir())[:count]:
            shutil.copy2(path, root / name / path.name)
    (root / "real/zero.jpg").write_bytes(b"")
    return root


def test_long_work_says_how_far_it_is_where_no_bar_is_seen(
    run: Run, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PERIOD", 0.001)
    added = run("add", images, "--json")
    assert json.loads(added.stdout)["added"] == 16
    assert re.search(r"^images: \d+$", added.stderr, re.M)


def document(result: Result) -> Any:
    """The one JSON document on stdout."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_add_status_check_remove(run: Run, images: Path, settings: Settings) -> None:
    added = document(run("add", images, "--json"))
    assert {key: added[key] for key in ("added", "known", "embedded", "conflicts", "revision")} == {
        "added": 16,
        "known": 0,
        "embedded": 0,
        "conflicts": [],
        "revision": 1,
    }
    assert added["rejected"] == [{"file": "real/zero.jpg", "reason": "the file is empty"}]
    assert added["sources"] == {"images": 16}  # the folder's name
    assert json.loads(Path(added["report"]).read_text())["rejected"] == added["rejected"]

    status = document(run("status", "--json"))
    assert status["checkpoint"] == HashingEmbedder().id
    assert status["revision"] == 1
    assert status["references"] == {"real": 8, "fake": 8}
    assert [(row["name"], row["references"]) for row in status["generators"]] == [("gen-a", 4), ("gen-b", 4)]
    assert (status["active"], status["not_embedded"]) == (True, 0)
    assert status["index"] == {"kind": "flat-fp16", "device": "cpu", "size": 16, "revision": 1, "recall": 1.0}
    assert status["calibration"] is None
    (enrolment,) = status["enrolments"]
    assert (enrolment["id"], enrolment["added"], enrolment["references"]) == (added["enrolment"], 16, 16)

    assert document(run("check", "--json"))["agree"] is True
    removed = document(run("remove", "--generator", "GEN-A", "--json"))
    hashing = HashingEmbedder().id
    assert removed == {
        "removed": 4,
        "revisions": {hashing: 2},
        "forgotten": False,
        "indexes": [{"checkpoint": hashing, "removed": 4, "size": 12, "snapshot": 2}],
    }
    assert document(run("status", "--json"))["enrolments"][0]["references"] == 12
    (one,) = document(run("check", "--json"))["checkpoints"]
    assert (one["rows"], one["index"], one["snapshot"], one["problems"]) == (12, 12, 2, [])
    assert document(run("remove", "--enrolment", added["enrolment"], "--json"))["removed"] == 12
    assert document(run("status", "--json"))["references"] == {"real": 0, "fake": 0}


def test_parts_share_an_enrolment_that_the_last_of_them_ends(
    run: Run, images: Path, settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = document(run("add", images, "--part", "2/3", "--json"))
    assert (first["parts_left"], first["added"] > 0, first["known"]) == (2, True, 0)
    assert not list(settings.home.glob("index/**/*"))  # nothing was loaded or fitted yet
    with monkeypatch.context() as patched:
        patched.setattr("indexer.ingest.ingest._Ingestion.finish", raise_interrupt)
        run("add", images, "--part", "1/3")
    assert document(run("add", images, "--part", "1/3", "--json"))["parts_left"] == 1
    assert document(run("status", "--json"))["enrolments"][0]["added"] is None
    people = run("add", images, "--part", "1/3").stdout  # again, before the last
    assert "1 parts are still to come" in people
    last = document(run("add", images, "--part", "3/3", "--json"))
    assert (last["images"], last["added"], last["generators"]) == (17, 16, {"real": 8, "gen-a": 4, "gen-b": 4})
    assert [one["file"] for one in last["rejected"]] == ["real/zero.jpg"]
    assert last["effect"]["recall"]
    assert list(settings.home.glob("index/**/*"))
    assert document(run("check", "--json"))["agree"] is True
    (enrolment,) = store.enrolments.list()
    assert enrolment.report is not None
    assert (enrolment.id, enrolment.references, enrolment.report["added"]) == (last["enrolment"], 16, 16)

    again = [document(run("add", images, "--part", f"{number}/3", "--json")) for number in (1, 2, 3)]
    assert (again[2]["known"], again[2]["enrolment"]) == (16, None)
    assert [one.id for one in store.enrolments.list()] == [enrolment.id]
    assert document(run("remove", "--enrolment", enrolment.id, "--json"))["removed"] == 16


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_status_says_to_whom_the_rate_of_false_alarms_is_promised(run: Run, images: Path, store: Store) -> None:
    """How many sources there are is not known of a calibration of before this was kept."""
    run("add", images, "--json")
    kept: dict[str, Any] = {"n_real": 60, "n_fake": 90}
    for revision, params, promise in (
        (1, kept, "to new sources not known yet: it was fitted by an earlier version"),
        (2, kept | {"new_sources": 0}, "known sources alone (under 9 sources say nothing of a new one)"),
        (3, kept | {"new_sources": 12}, "nine of ten new sources (judging by 12 sources)"),
    ):
        store.calibrations.save(HashingEmbedder().id, "heads", revision, params)
        assert document(run("status", "--json"))["calibration"]["new_sources"] == params.get("new_sources")
        lines = " ".join(run("status").stdout.split())
        assert promise in lines
        assert re.search(r"drift \d{4}-\d\d-\d\d, 0 images: too few verdicts kept to say", lines)


def test_people_get_lines(run: Run, images: Path) -> None:
    first = run("add", images)
    assert first.stdout.splitlines()[:2] == [
        "added 16 of 17 images (4 gen-a, 4 gen-b, 8 real)",
        "known 0, embedded 0, conflicts 0, rejected 1",
    ]
    assert "rejected real/zero.jpg: the file is empty" in first.stderr
    assert "known 16" in run("add", images).stdout
    assert "8 real, 8 fake; revision 1" in run("status").stdout
    assert run("check").stdout.endswith("revision 1, 16 rows, 16 in the index, snapshot of revision 1: they agree\n")
    gone = run("remove", "--id", 1, "--forget").stdout.splitlines()
    assert gone == [
        "removed 1 references with their thumbnails, which may not come back",
        f"index of {HashingEmbedder().id}: 1 vectors removed, 15 left, snapshot of revision 2 written",
    ]
    rebuilt = f"index of {HashingEmbedder().id}: 15 vectors, snapshot of revision 2 written"
    assert rebuilt in run("rebuild").stdout.splitlines()


def test_a_search_engine_keeps_no_snapshot(capsys: pytest.CaptureFixture[str]) -> None:
    index = {"checkpoint": "one", "removed": 2, "size": 7, "snapshot": None}
    tell_removed({"removed": 2, "forgotten": False, "indexes": [index]})
    assert capsys.readouterr().out.splitlines()[1:] == ["index of one: 2 vectors removed, 7 left"]


def test_references_are_relabelled_and_back(run: Run, images: Path, store: Store) -> None:
    run("add", images)
    chosen = next(iter(store.references.list(generator="gen-a"))).id
    lines = run("relabel", "--id", chosen, "--to", "REAL").stdout.splitlines()
    assert lines == [
        "relabelled 1 references",
        f"  {chosen} is 17 now",
        f"index of {HashingEmbedder().id}: 1 vectors relabelled among 16, snapshot of revision 2 written",
    ]
    merged = document(run("relabel", "--generator", "gen-a", "--to", "gen-b", "--json"))
    assert (merged["relabelled"], len(merged["ids"])) == (3, 3)
    assert merged["indexes"] == [{"checkpoint": HashingEmbedder().id, "relabelled": 3, "size": 16, "snapshot": 3}]
    assert store.references.counts() == {"real": 9, "fake": 7}
    assert document(run("check", "--json"))["agree"] is True
    assert document(run("relabel", "--source", "images", "--undo", "--json"))["relabelled"] == 4
    assert {one.name: one.references for one in store.generators.list()} == {"gen-a": 4, "gen-b": 4}
    assert document(run("relabel", "--source", "images", "--undo", "--json"))["indexes"] == []
    assert document(run("check", "--json"))["agree"] is True


def test_a_dry_run_says_what_would_be(run: Run, images: Path, settings: Settings, store: Store) -> None:
    assert run("add", images, "--dry-run").stdout.startswith("would add 16 of 17 images")
    assert store.references.counts() == {"real": 0, "fake": 0}
    assert not settings.home.exists()  # not even a report of the file that is no image
    run("add", images)
    other = document(run("add", images, "--dry-run", "--json", "--checkpoint", images.parent / "newer"))
    assert (other["added"], other["known"], other["embedded"]) == (0, 0, 16)


def test_forgotten_images_stay_away(run: Run, images: Path) -> None:
    run("add", images)
    document(run("remove", "--source", "images", "--forget", "--json"))
    for options in (["--json"], ["--json", "--dry-run"]):
        again = run("add", images, *options)
        assert again.exit_code == 1  # nothing was usable
        report = json.loads(again.stdout)
        assert (len(report["rejected"]), report["enrolment"]) == (17, None)


def test_facts_of_a_generator(run: Run, images: Path, store: Store) -> None:
    shutil.rmtree(images / "real")
    folder = images / "fake/gen-a"
    facts = ["--vendor", "ACME", "--version", "2", "--released-on", "2025-01-31", "--family", "diffusion"]
    report = document(run("add", folder, "--label", "fake", "--generator", "Gen A", *facts, "--json"))
    assert report["added"] == 4
    generator = store.generators.get("gen a")
    assert generator is not None
    assert (generator.vendor, generator.version, generator.family) == ("ACME", "2", "diffusion")
    (row,) = document(run("status", "--json"))["generators"]
    assert (row["vendor"], row["released_on"]) == ("ACME", "2025-01-31")
    assert all(part in run("status").stdout for part in ("ACME", "2025-01-31", "diffusion"))
    assert str(generator.released_on) == "2025-01-31"
    enrolment = store.enrolments.get(report["enrolment"])
    assert enrolment is not None
    assert enrolment.generator == "Gen A"


def test_check_notices(run: Run, images: Path, settings: Settings, store: Store) -> None:
    run("add", images)
    (snapshot,) = settings.home.glob("index/*/*/snapshot")
    damaged = bytearray(snapshot.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    snapshot.write_bytes(damaged)
    broken = run("check")
    assert broken.exit_code == 1
    assert "run lineup index rebuild" in broken.stdout
    assert run("rebuild").exit_code == 0
    assert run("check").exit_code == 0
    with store.engine.begin() as connection:  # behind the rules' back: without a revision
        connection.exec_driver_sql("update reference_image set source = 'else' where id = 2")
        other = "(select vector from embedding where image_id = 3)"
        connection.exec_driver_sql(f"update embedding set vector = {other} where image_id = 4")
    wrong = run("check", "--json")
    assert wrong.exit_code == 1
    (one,) = json.loads(wrong.stdout)["checkpoints"]
    assert one["problems"] == ["2 vectors of the index differ from their rows"]
    snapshot.unlink()  # nothing is lost
    uncounted = run("check")
    assert uncounted.exit_code == 1
    assert "of source 'else': 0 references counted, 1 there: run lineup index rebuild" in uncounted.stdout
    assert run("rebuild").exit_code == 0
    assert run("check").exit_code == 0


def test_check_compares_object_storage(run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--blobs needs LINEUP_BLOBS" in run("check", "--blobs").stderr
    folder = tmp_path / "objects"
    monkeypatch.setenv("LINEUP_BLOBS", folder.as_uri())
    away = run("add", images)
    assert (away.exit_code, len(away.stderr.splitlines())) == (1, 1)
    assert "LINEUP_BLOBS file:///" in away.stderr
    folder.mkdir()
    run("add", images)
    blobs = document(run("check", "--blobs", "--json"))["blobs"]
    assert {name: blobs[name] for name in ("objects", "missing", "orphans")} == {
        "objects": 16,
        "missing": [],
        "orphans": 0,
    }
    with monkeypatch.context() as patch:
        patch.setattr("indexer.store.blobs.DONE", "select 1/0 from blob_outbox where id = any(:ids)")
        removed = run("remove", "--generator", "gen-a")
    assert (removed.exit_code, len(removed.stderr.splitlines())) == (0, 1)
    assert removed.stderr.startswith("warning: division by zero; a service, or `lineup index check --blobs --repair`")
    first, *rest = sorted(folder.glob("??/*"))
    assert len(rest) == 11
    (folder / "ff").mkdir(exist_ok=True)
    first.rename(folder / "ff" / ("f" * 64))  # which no row names
    wrong = run("check", "--blobs", "--orphan-hours", "0")
    assert wrong.exit_code == 1
    assert f"1 missing, {first.name} for one: restore them; 1 that no row names: --repair deletes them" in wrong.stdout
    repaired = run("check", "--blobs", "--orphan-hours", "0", "--repair")
    assert repaired.exit_code == 1
    assert "5 deleted: 1 missing" in repaired.stdout  # four of them noted
    assert len(list(folder.glob("??/*"))) == 11
    assert "--repair goes with --blobs" in run("check", "--repair").stderr


def test_rebuild_with_another_checkpoint(run: Run, images: Path, settings: Settings, store: Store) -> None:
    run("add", images)
    run("add", images / "fake/gen-b", "--label", "fake", "--generator", "gen-b")
    old, new = HashingEmbedder(), HashingEmbedder("newer")
    (images / "real/000.jpg").unlink()
    (images / "real/002.jpg").write_bytes((images / "real/001.png").read_bytes())
    half = run("rebuild", "--checkpoint", settings.home / "newer", "--json")
    assert half.exit_code == 1
    report = json.loads(half.stdout)
    assert (report["embedded"], report["active"]) == (14, False)
    assert json.loads(Path(report["report"]).read_text())["unreadable"] == report["unreadable"]
    reasons = sorted(item["reason"] for item in report["unreadable"])
    assert reasons == ["no such file", "the file has changed since it was added"]
    active = store.checkpoints.active()
    assert active is not None
    assert active.id == old.id
    whole = document(run("rebuild", "--checkpoint", settings.home / "newer", "--partial", "--json"))
    assert (whole["embedded"], whole["active"], len(whole["unreadable"])) == (0, True, 2)
    again = document(run("rebuild", "--checkpoint", settings.home / "newer", "--json"))
    assert (again["active"], len(again["unreadable"])) == (True, 2)  # it was before, and stays
    active = store.checkpoints.active()
    assert active is not None
    assert active.id == new.id
    assert len(store.changes.embedded_ids(new.id)) == 14
    status = run("status").stdout
    assert f"newer {new.id}, the active one" in status
    assert "2 references, which its searches do not find" in status
    assert document(run("check", "--json"))["agree"] is True
    assert "is not the active checkpoint" in run("add", images).stderr


def test_shards_of_a_bucket_are_added_in_place_and_embedded_again(
    run: Run, images: Path, settings: Settings, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fakes = (sorted((images / folder).glob("*.png")) for folder in ("real", "fake/gen-a"))
    for number, (one, other) in enumerate(zip(real, fakes, strict=False)):
        members = {f"{number}.real.png": one.read_bytes(), f"{number}.gen_0.png": other.read_bytes()}
        make_tar(tmp_path / f"bucket/shards/{number}.tar", members)
    with serve_buckets(tmp_path) as buckets:
        for name, value in (("ENDPOINT_URL", buckets.url), ("ALLOW_HTTP", "true"), ("SKIP_SIGNATURE", "true")):
            monkeypatch.setenv(f"AWS_{name}", value)
        added = document(run("add", "s3://bucket/shards", "--generator", "gen-x", "--part", "1/1", "--json"))
        assert (added["added"], added["generators"]) == (2 * number + 2, {"real": number + 1, "gen-x": number + 1})
        assert document(run("add", "s3://bucket/shards", "--generator", "gen-x", "--json"))["known"] == added["added"]
        buckets.sent = 0
        rebuilt = document(run("rebuild", "--checkpoint", settings.home / "newer", "--json"))
        assert (rebuilt["embedded"], rebuilt["active"], rebuilt["unreadable"]) == (added["added"], True, [])
        assert buckets.sent == sum(path.stat().st_size for path in [*real[: number + 1], *fakes[: number + 1]])
    missing = run("add", "s3://bucket/none.tar")
    assert missing.exit_code == 1
    assert re.fullmatch(r"error: s3://bucket/none\.tar cannot be read \(.*\n", missing.stderr)


def test_what_comes_in_during_the_switch_is_embedded_too(
    run: Run, images: Path, settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("add", images / "real", "--label", "real")
    switch = Checkpoints.activate
    rest = [["add", images / "fake" / name, "--label", "fake", "--generator", name] for name in ("gen-a", "gen-b")]

    def late(checkpoints: Checkpoints, checkpoint_id: str, without: Sequence[int], folder: Path) -> bool:
        if rest:
            run(*rest.pop())
        return switch(checkpoints, checkpoint_id, without, folder)

    monkeypatch.setattr(Checkpoints, "activate", late)
    report = document(run("rebuild", "--checkpoint", settings.home / "newer", "--json"))
    assert (report["embedded"], report["active"]) == (16, True)
    rest.append(["add", images / "real/000.jpg", "--label", "fake"])  # a conflict: nothing new
    again = document(run("rebuild", "--checkpoint", settings.home / "newer", "--json"))
    assert (again["embedded"], again["active"]) == (0, True)


def test_uploads_that_were_kept_are_embedded_again(run: Run, images: Path, settings: Settings, store: Store) -> None:
    embedder = HashingEmbedder()
    ingest(read_dataset(images / "real/000.jpg", label="real"), embedder, store, keep_bytes=True)
    ingest(read_dataset(images / "real/001.png", label="real"), embedder, store)
    shutil.rmtree(images)
    report = json.loads(run("rebuild", "--checkpoint", settings.home / "newer", "--json").stdout)
    assert (report["embedded"], [item["id"] for item in report["unreadable"]]) == (1, [2])


def test_a_broken_calibration_loses_no_enrolment(run: Run, images: Path, settings: Settings, store: Store) -> None:
    folder = settings.home / "hashing"
    folder.mkdir(parents=True)
    (folder / CALIBRATION_FILE).write_bytes(b"half a fi")
    report = document(run("add", images, "--json"))
    assert report["effect"]["false_alarms"] is None
    enrolment = store.enrolments.get(report["enrolment"])
    assert enrolment is not None
    assert enrolment.report is not None
    assert enrolment.report["effect"] == report["effect"]


def test_export_and_import(run: Run, images: Path, tmp_path: Path, settings: Settings) -> None:
    run("add", images)
    assert run("export", tmp_path / "set").stdout == f"wrote 16 references to {tmp_path / 'set'}\n"
    run("remove", "--source", "images")
    report = document(run("import", tmp_path / "set", "--json"))
    assert (report["added"], report["embeddings"]) == (16, 16)
    assert document(run("check", "--json"))["agree"] is True
    again = run("import", tmp_path / "set")
    assert "all 16 references are there already" in again.stdout
    [absent] = again.stderr.splitlines()[-1:]
    assert absent.startswith("warning: checkpoint hashing (")
    assert absent.endswith(f"until its folder is at {settings.home / 'hashing'} or LINEUP_CHECKPOINT names it")
    damaged = run("import", images / "real/000.jpg")
    assert (damaged.exit_code, len(damaged.stderr.splitlines())) == (1, 1)


def test_references_without_pictures_serve_every_command(
    run: Run, images: Path, settings: Settings, tmp_path: Path
) -> None:
    kinds = {"real/": "real,", "fake/gen-a/": "fake,gen-a", "fake/gen-b/": "fake,gen-b"}
    lines = [
        f"{folder}{path.name},{kind},who/what,c0ffee,{folder}{path.name}"
        for folder, kind in kinds.items()
        for path in sorted((images / folder).iterdir())
    ]
    header = "path,label,generator,source_repo,source_commit,source_path"
    (images / "manifest.csv").write_text("\n".join([header, *lines]) + "\n")
    run("add", images)
    assert run("export", tmp_path / "set", "--without-pictures").exit_code == 0
    run("remove", "--source", "images")
    told = run("import", tmp_path / "set").stdout.splitlines()
    assert told[0].startswith("added 16 of 16 references")
    assert told[2] == "16 references have no picture: `lineup index thumbnails` fetches public ones"
    assert document(run("check", "--json"))["agree"] is True
    rebuilt = run("rebuild", "--checkpoint", settings.home / "newer", "--json")
    unreadable = json.loads(rebuilt.stdout)["unreadable"]
    assert (rebuilt.exit_code, len(unreadable)) == (1, 16)
    assert {one["uri"].partition("/c0ffee/")[0] for one in unreadable} == {"https://raw.githubusercontent.com/who/what"}
    assert "add its data set with this checkpoint" in unreadable[0]["reason"]
    # as the reason says: whoever has the images adds them with the new checkpoint
    assert document(run("add", images, "--checkpoint", settings.home / "newer", "--json"))["embedded"] == 16
    assert document(run("rebuild", "--checkpoint", settings.home / "newer", "--json"))["active"] is True
    assert document(run("check", "--json"))["agree"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["add", "missing"], 1, "does not exist"),
        (["add", "."], 1, "no images"),
        (["add", "images", "--vendor", "ACME"], 2, "--generator"),
        (["remove"], 2, "--enrolment"),
        (["remove", "--id", "1", "--source", "x"], 2, "--enrolment"),
        (["remove", "--generator", "nobody"], 1, "no generator 'nobody'"),
        (["relabel", "--id", "1"], 2, "--undo"),
        (["relabel", "--id", "1", "--source", "x", "--undo"], 2, "--enrolment"),
        (["relabel", "--id", "1", "--to", "all"], 1, "'all'"),
        (["status", "--checkpoint", "nowhere"], 1, "nowhere"),
        (["migrate", "nonsense"], 1, "nonsense"),
        (["export", "/proc/nowhere/set"], 1, "/proc/nowhere"),
        (["import", "nothing"], 1, "does not exist"),
    ],
)
def test_failures_are_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, part: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    result = run(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert part in line


def test_missing_checkpoints_and_databases_are_one_line(
    images: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEUP_HOME", str(settings.home))
    away = "postgresql://127.0.0.1:1/none"
    for arguments, url, part in (
        (["add", str(images)], settings.database_url, "lineup train fit"),
        (["add", str(images)], away, "LINEUP_DATABASE_URL"),
        (["status"], away, "LINEUP_DATABASE_URL"),
        (["migrate"], away, "LINEUP_DATABASE_URL"),
    ):
        monkeypatch.setenv("LINEUP_DATABASE_URL", str(url))
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert part in line
    monkeypatch.setenv("LINEUP_K", "none")
    result = CliRunner().invoke(app, ["status"])
    assert result.stderr.startswith("error: LINEUP_K is 'none'")


@pytest.mark.parametrize("moment", ["analyze incoming", "for update", "insert into embedding"])
def test_a_database_that_goes_away_is_one_line_and_the_next_run_goes_on(
    run: Run, images: Path, settings: Settings, moment: str
) -> None:
    def cut(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if moment in statement:
            event.remove(Engine, "before_cursor_execute", cut)
            with psycopg.connect(str(settings.database_url), autocommit=True) as other:
                backends = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
                other.execute(f"{backends} and pid <> pg_backend_pid()")

    event.listen(Engine, "before_cursor_execute", cut)
    broken = run("add", images)
    assert broken.exit_code == 1
    (line,) = broken.stderr.splitlines()
    assert line.startswith("error: the database stopped answering (")
    assert line.endswith("run the command again")
    assert document(run("add", images, "--json"))["added"] == 16
    assert document(run("check", "--json"))["agree"] is True


def test_a_home_that_cannot_be_written_to_costs_snapshot_and_report_alone(
    run: Run, images: Path, settings: Settings
) -> None:
    settings.home.mkdir()
    for name in ("index", "reports"):
        (settings.home / name).write_text("a file where the folder should be")
    added = run("add", images)
    assert added.exit_code == 0
    assert added.stdout.startswith("added 16 of 17 images")
    assert "warning: the report is not kept" in added.stderr
    removed = run("remove", "--generator", "gen-a", "--json")
    assert (removed.exit_code, document(removed)["removed"]) == (0, 4)
    assert run("rebuild").exit_code == 1


def test_a_full_database_is_told_as_such(run: Run, images: Path, store: Store) -> None:
    fill_disk(store)
    refused = run("add", images)
    assert refused.exit_code == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: the database has no room left (")


def test_a_transaction_left_open_is_one_line(
    run: Run, images: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("add", images)
    monkeypatch.setattr("indexer.database.connection.LOCK_SECONDS", 0.2)
    with psycopg.connect(str(settings.database_url)) as other:
        other.execute("select * from index_revision for update")
        for arguments in (["remove", "--id", 1], ["migrate", "base"]):
            blocked = run(*arguments)
            assert blocked.exit_code == 1
            (line,) = blocked.stderr.splitlines()
            assert line.startswith("error: another transaction holds a lock (")
    assert run("remove", "--id", 1).exit_code == 0


def test_what_the_database_forbids_is_one_line(run: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run("migrate", "base")
    read_only = make_url(str(settings.database_url)).update_query_dict(
        {"options": "-c default_transaction_read_only=on"}
    )
    monkeypatch.setenv("LINEUP_DATABASE_URL", read_only.render_as_string(hide_password=False))
    refused = run("migrate")
    assert refused.exit_code == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: the database refuses (")
    assert "LINEUP_DATABASE_URL" in line


def test_other_errors_of_the_database_blame_no_rights(run: Run) -> None:
    wrong = run("remove", "--id", 10**20)
    assert wrong.exit_code == 1
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("error: the database cannot do that: ")
    assert "out of range" in line
    assert "rights" not in line


def test_migrate_and_stop(run: Run, settings: Settings) -> None:
    assert run("migrate", "base").stdout == "schema at nothing\n"
    behind = run("status")
    assert behind.exit_code == 1
    assert "lineup index migrate" in behind.stderr
    newest = max(path.name[:4] for path in (Path(__file__).parents[2] / "migrations" / "versions").glob("0*.py"))
    assert document(run("migrate", "--json")) == {"schema": newest}
    assert run("status").stdout.strip().endswith("nothing was added yet")
    assert run("stop").stdout.startswith("no embedded database runs")
    assert document(run("stop", "--json")) == {"stopped": False}
    assert run("check").stdout == "nothing was added yet\n"
