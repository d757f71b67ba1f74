"""The store's rules: the same bytes once, revisions in commit order, nothing removed that a follower keeps."""

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import psycopg
import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import IntegrityError

from indexer.database.connection import connect
from indexer.measure.audit import fact_warnings
from indexer.measure.near_duplicates import related_references, similar_fingerprints
from indexer.settings import Settings
from indexer.store import Store, relabelling
from indexer.store.changes import ADDITIONS, REMOVALS, Additions, Removals
from indexer.store.checkpoints import CALIBRATIONS, CheckpointSwitched, UnknownCheckpoint
from indexer.store.counts import miscounts, recount
from indexer.store.detections import Detection
from indexer.store.generators import BadGeneratorName, GeneratorExists, UnknownGenerator
from indexer.store.keys import KeyExists
from indexer.store.reference_facts import NewReference, Reference
from indexer.store.references import ReferenceGone, SortKey
from indexer.store.relabelling import Kind
from indexer.store.removing import STAMP, Removed
from indexer.store.writing import BadVector
from trainer.model.embedder import Embedder

DIM = 4
CHECKPOINT = "c" * 32


def new(number: int, generator: str | None = None, *, source: str = "tests", dim: int = DIM) -> NewReference:
    """Reference number `number`, whose vector says so; with a generator it is fake."""
    return NewReference(
        sha256=hashlib.sha256(str(number).encode()).hexdigest(),
        label=int(generator is not None),
        generator=generator,
        source=source,
        group=f"group {number}",
        uri=f"file:///{number}.png",
        file_bytes=100 + number,
        mtime=1700000000.25 + number,
        width=64,
        height=48,
        format="PNG",
        jpeg_quality=None,
        thumbnail=b"jpeg" * 3,
        attributes={"prompt": "a cat"},
        vector=np.full(dim, number + 1, np.float32),
        fingerprint=-number,
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    engine = connect(settings)
    store = Store(engine)
    store.checkpoints.register(CHECKPOINT, "tiny", DIM, {"image_size": 32})
    yield store
    engine.dispose()


class Replica:
    """A follower by the book: what an index must hold after it has seen a revision."""

    def __init__(self, store: Store, checkpoint: str = CHECKPOINT) -> None:
        self.store, self.checkpoint, self.seen = store, checkpoint, 0
        self.rows: dict[int, float] = {}

    def catch_up(self, page: int = 20_000) -> None:
        target = self.store.checkpoints.revision(self.checkpoint)
        for change in self.store.changes.between(self.checkpoint, self.seen, target, page=page):
            match change:
                case Additions():
                    self.rows |= dict(zip(change.ids.tolist(), change.vectors[:, 0].tolist(), strict=True))
                case Removals():
                    for image_id in change.ids.tolist():
                        self.rows.pop(image_id, None)
        self.seen = target


def test_checkpoints_stand_side_by_side(store: Store) -> None:
    first, again = (store.checkpoints.register("d" * 32, "other", 8, {"a": 1}) for _ in range(2))
    assert first == again
    assert (first.id, first.name, first.config, first.active) == ("d" * 32, "other", {"a": 1}, False)
    assert [(c.name, c.dim, c.active) for c in store.checkpoints.list()] == [("tiny", 4, True), ("other", 8, False)]
    assert store.checkpoints.activate("d" * 32)
    active = store.checkpoints.active()
    assert active is not None
    assert active.name == "other"
    with pytest.raises(UnknownCheckpoint):
        store.checkpoints.activate("missing")
    with pytest.raises(UnknownCheckpoint):
        store.checkpoints.revision("missing")
    with pytest.raises(ValueError, match="4 dimensions, this one has 5"):
        store.checkpoints.register(CHECKPOINT, "tiny", 5, {})


def test_a_checkpoint_becomes_active_when_nothing_lacks_its_embedding(store: Store) -> None:
    other = "d" * 32
    store.checkpoints.register(other, "other", DIM, {})
    first, second = store.references.add([new(1), new(2)], CHECKPOINT).ids
    assert not store.checkpoints.activate(other, without=[first or 0])
    assert store.checkpoints.activate(other, without=[first or 0, second or 0])
    assert store.checkpoints.activate(CHECKPOINT)
    assert [one.id for one in store.checkpoints.list() if one.active] == [CHECKPOINT]


def test_nothing_is_added_for_a_checkpoint_that_is_no_longer_active(store: Store) -> None:
    other = "d" * 32
    store.checkpoints.register(other, "other", DIM, {})
    assert store.references.add([new(1)], CHECKPOINT, while_active=True).added == 1
    store.references.embed([1], new(1).vector[None], other)
    assert store.checkpoints.activate(other)
    with pytest.raises(CheckpointSwitched, match="run the command again"):
        store.references.add([new(2)], CHECKPOINT, while_active=True)
    assert sum(store.references.counts().values()) == 1
    assert store.references.add([new(2)], CHECKPOINT).added == 1


def test_a_checkpoint_remembers_where_it_lies(store: Store, tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = Embedder.load(tiny_checkpoint, device="cpu")
    register = partial(store.checkpoints.register, one.id, one.name, one.dim, one.config.to_json())
    assert register().find(tmp_path) is None
    assert register(tiny_checkpoint).find(tmp_path) == tiny_checkpoint
    assert register(tmp_path).find(tmp_path) == tiny_checkpoint  # the first one stays until it is made active
    assert store.checkpoints.activate(one.id, folder=tmp_path)
    assert store.checkpoints.require(one.id).find(tmp_path) is None
    assert store.checkpoints.require(one.id).find(tiny_checkpoint) == tiny_checkpoint


def test_add_keeps_everything(store: Store) -> None:
    enrolment = store.enrolments.open("SD-XL", "tests")
    item = replace(new(1, "SD-XL"), data=b"the file")
    added = store.references.add([item], CHECKPOINT, enrolment)
    assert (added.added, added.known, added.embedded, added.conflicts, added.revision) == (1, 0, 0, [], 1)
    (image_id,) = added.ids
    assert image_id is not None
    row = store.references.get(image_id)
    assert row is not None
    assert row == store.references.find(item.sha256)
    shared = (
        "sha256 label generator source group uri file_bytes mtime width height format jpeg_quality attributes "
        "fingerprint"
    )
    assert {name: getattr(row, name) for name in shared.split()} == {
        name: getattr(item, name) for name in shared.split()
    }
    assert row.enrolment_id == enrolment
    assert store.references.thumbnail(image_id) == b"jpegjpegjpeg"
    assert store.references.file(image_id) == b"the file"
    assert store.references.get_many([image_id, 999]) == {image_id: row}
    assert store.references.counts() == {"real": 0, "fake": 1}
    assert store.references.sources() == {"tests": 1}
    (page,) = store.changes.between(CHECKPOINT, 0, 1)
    assert isinstance(page, Additions)
    assert (page.ids.tolist(), page.labels.tolist(), page.sources) == ([image_id], [1], ["tests"])
    assert store.generators.names() == {int(page.generators[0]): "SD-XL"}
    np.testing.assert_array_equal(page.vectors, [item.vector])


def test_the_same_bytes_twice_change_nothing(store: Store) -> None:
    batch = [new(1), new(2), new(3, "SD-XL")]
    first = store.references.add(batch, CHECKPOINT)
    second = store.references.add([*batch[::-1], batch[0]], CHECKPOINT)
    assert (second.added, second.known, second.embedded, second.revision) == (0, 4, 0, 1)
    assert second.ids == [*first.ids[::-1], first.ids[0]]
    twice = store.references.add([new(9), new(9)], CHECKPOINT)
    assert (twice.added, twice.known, twice.revision) == (1, 1, 2)
    assert twice.ids[0] == twice.ids[1]


def test_same_bytes_with_another_label_or_generator_are_a_conflict(store: Store) -> None:
    store.references.add([new(1), new(2, "SD-XL")], CHECKPOINT)
    added = store.references.add([new(1, "SD-XL"), new(2, "DALL-E 3"), new(2, "sd-xl"), new(2)], CHECKPOINT)
    assert (added.added, added.known, added.embedded, added.revision) == (0, 1, 0, 1)
    assert [(c.position, c.has, c.wants) for c in added.conflicts] == [
        (0, "real", "fake (SD-XL)"),
        (1, "fake (SD-XL)", "fake (DALL-E 3)"),
        (3, "fake (SD-XL)", "real"),
    ]
    inside = store.references.add([new(5), new(5, "SD-XL")], CHECKPOINT)
    assert (inside.added, len(inside.conflicts)) == (1, 1)


def test_vectors_of_two_checkpoints_never_mix(store: Store) -> None:
    other = "d" * 32
    store.checkpoints.register(other, "wide", 8, {})
    first = store.references.add([new(1), new(2)], CHECKPOINT)
    second = store.references.add([new(2, dim=8), new(3, dim=8)], other)
    assert (second.added, second.known, second.embedded, second.revision) == (1, 0, 1, 1)
    assert store.changes.embedded_ids(CHECKPOINT).tolist() == first.ids
    assert store.changes.embedded_ids(other).tolist() == second.ids
    assert store.changes.embedded(other) == len(second.ids)
    (page,) = store.changes.between(other, 0, 1)
    assert isinstance(page, Additions)
    assert page.vectors.shape == (2, 8)
    known = store.references.known_hashes([new(1).sha256, new(2).sha256], other)
    assert {sha256: row.embedded for sha256, row in known.items()} == {new(1).sha256: False, new(2).sha256: True}


def test_known_images_are_embedded_by_another_checkpoint(store: Store) -> None:
    other = "d" * 32
    store.checkpoints.register(other, "wide", 8, {})
    first, second = (number or 0 for number in store.references.add([new(1), new(2, "SD-XL")], CHECKPOINT).ids)
    vectors = np.arange(1, 17, dtype=np.float32).reshape(2, 8)
    assert store.references.embed([second, 999], vectors, other) == 1  # the other one was removed meanwhile
    assert store.references.embed([first, second], vectors[::-1], other) == 1
    assert store.references.embed([first, second], vectors, other) == 0
    assert (store.checkpoints.revision(other), store.checkpoints.revision(CHECKPOINT)) == (2, 1)
    one, last = store.changes.between(other, 0, 1), store.changes.between(other, 1, 2)
    assert [(page.ids.tolist(), page.vectors.tolist()) for page in (*one, *last) if isinstance(page, Additions)] == [
        ([second], [vectors[0].tolist()]),
        ([first], [vectors[1].tolist()]),
    ]
    with pytest.raises(BadVector):
        store.references.embed([first], np.ones((1, DIM)), other)
    with pytest.raises(UnknownCheckpoint):
        store.references.embed([first], vectors[:1], "missing")


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(DIM),
        np.array([1, 2, np.nan, 4]),
        np.array([1, np.inf, 3, 4]),
        np.full(DIM, 1e30),
        np.full(DIM, 1e-30),
        np.ones(DIM + 1),
        np.ones((1, 4)),
    ],
)
def test_bad_vectors_are_refused(store: Store, vector: np.ndarray) -> None:
    with pytest.raises(BadVector):
        store.references.add([new(1), replace(new(2), vector=vector)], CHECKPOINT)
    assert store.references.counts() == {"real": 0, "fake": 0}


def test_add_refuses_what_cannot_be(store: Store) -> None:
    with pytest.raises(ValueError, match="1001 images in one transaction; 1000"):
        store.references.add([new(1)] * 1001, CHECKPOINT)
    with pytest.raises(UnknownCheckpoint):
        store.references.add([new(1)], "missing")
    with pytest.raises(BadGeneratorName):
        store.references.add([new(1, "a/b")], CHECKPOINT)
    assert store.generators.list() == []


def test_text_that_postgres_cannot_hold_is_escaped(store: Store) -> None:
    odd = replace(new(1), group="a\0b", source="caf\udce9", attributes={"k\0": "\udce9"})
    (image_id,) = store.references.add([odd], CHECKPOINT).ids
    row = store.references.get(image_id or 0)
    assert row is not None
    assert (row.group, row.source, row.attributes) == ("ab", "caf\\udce9", {"k": "\\udce9"})


def test_known_files_are_found_by_uri_size_and_time(store: Store) -> None:
    item = new(1, "SD-XL")
    store.references.add([item], CHECKPOINT)
    known = store.references.known_files([item.uri or "", "file:///else"], CHECKPOINT)
    assert list(known) == [(item.uri, item.file_bytes, item.mtime)]
    (row,) = known.values()
    assert (row.sha256, row.label, row.generator, row.embedded) == (item.sha256, 1, "SD-XL", True)


def test_list_pages_and_filters(store: Store) -> None:
    store.references.add([new(i) for i in range(5)], CHECKPOINT)
    store.references.add([new(i, "SD-XL", source="d3") for i in range(5, 8)], CHECKPOINT)
    first = store.references.list(limit=6)
    rest = store.references.list(limit=6, after=first[-1].id)
    ids = [row.id for row in [*first, *rest]]
    assert len(ids) == 8
    assert ids == sorted(ids)
    assert [row.label for row in store.references.list(label=1)] == [1, 1, 1]
    assert len(store.references.list(generator="sd-xl")) == 3
    assert len(store.references.list(source="tests", label=0)) == 5
    assert store.references.list(generator="none such") == []


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize("by", ["label", "generator", "source"])
def test_references_are_grouped_page_by_page(store: Store, by: SortKey, newest: bool) -> None:
    rows = [(None, "b"), ("SD-XL", "a"), ("gan", "b"), (None, "a"), ("Flux", "b"), ("gan", "a"), ("SD-XL", "b")]
    store.references.add([new(n, generator, source=source) for n, (generator, source) in enumerate(rows)], CHECKPOINT)
    store.references.add([replace(new(9), label=1, source="c")], CHECKPOINT)  # of no known generator
    every = store.references.list(newest=newest)
    keys: dict[str, Callable[[Reference], Any]] = {
        "label": lambda row: row.label,
        "generator": lambda row: (row.label, (row.generator or "").lower()),
        "source": lambda row: row.source,
    }
    expected = sorted(every, key=keys[by])  # stable
    pages: list[Reference] = []
    while page := store.references.sorted(by, newest=newest, limit=3, after=pages[-1] if pages else None):
        pages += page
    assert [row.id for row in pages] == [row.id for row in expected]
    narrowed = store.references.sorted(by, newest=newest, label=1, source="b")
    assert [row.id for row in narrowed] == [row.id for row in expected if row.label == 1 and row.source == "b"]
    store.references.remove(source="c")
    last = next(row for row in every if row.source == "c")
    if by == "source":
        with pytest.raises(ReferenceGone, match=f"no reference {last.id} "):
            store.references.sorted(by, newest=newest, after=last)
    else:  # its group is still there
        store.references.sorted(by, newest=newest, after=last)


def test_removal_reaches_the_followers_of_every_checkpoint(store: Store) -> None:
    other = "d" * 32
    store.checkpoints.register(other, "wide", 8, {})
    store.references.add([new(i) for i in range(4)], CHECKPOINT)
    store.references.add([new(i, dim=8) for i in range(2)], other)
    mine, theirs = Replica(store), Replica(store, other)
    mine.catch_up()
    theirs.catch_up()
    gone = [row.id for row in store.references.list() if row.sha256 in {new(1).sha256, new(3).sha256}]
    removed = store.references.remove(ids=[*gone, 12345])
    assert removed.references == 2
    assert removed.revisions == {CHECKPOINT: 2, other: 2}
    assert removed.vectors == {CHECKPOINT: 2, other: 1}
    mine.catch_up()
    theirs.catch_up()
    assert sorted(mine.rows) == store.changes.embedded_ids(CHECKPOINT).tolist()
    assert sorted(theirs.rows) == store.changes.embedded_ids(other).tolist()
    assert len(mine.rows) == 2
    assert len(theirs.rows) == 1
    assert store.references.get_many(gone) == {}


@pytest.mark.parametrize("criterion", ["generator", "source", "enrolment"])
def test_remove_by(store: Store, criterion: str) -> None:
    enrolment = store.enrolments.open("SD-XL", "d3")
    store.references.add([new(i) for i in range(3)], CHECKPOINT)
    store.references.add([new(i, "SD-XL", source="d3") for i in range(3, 8)], CHECKPOINT, enrolment)
    value: dict[str, object] = {"generator": "sd-xl", "source": "d3", "enrolment": enrolment}
    assert store.references.remove(**{criterion: value[criterion]}).references == 5  # type: ignore[arg-type]
    assert store.references.counts() == {"real": 3, "fake": 0}
    again = store.references.add([new(3, "SD-XL")], CHECKPOINT)
    assert again.added == 1  # with a new id: ids are never given twice
    assert again.ids[0] is not None
    assert again.ids[0] > 8


def test_remove_wants_exactly_one_criterion(store: Store) -> None:
    with pytest.raises(ValueError, match="one of"):
        store.references.remove()
    with pytest.raises(ValueError, match="one of"):
        store.references.remove(source="a", ids=[1])
    with pytest.raises(UnknownGenerator):
        store.references.remove(generator="nobody")
    assert store.references.remove(source="nothing").references == 0


def test_forgotten_images_do_not_come_back(store: Store) -> None:
    store.references.add([new(1), new(2)], CHECKPOINT)
    store.references.remove(ids=[store.references.list()[0].id], forget=True)
    added = store.references.add([new(1), new(2), new(3)], CHECKPOINT)
    assert (added.added, added.known, added.blocked) == (1, 1, [new(1).sha256])
    assert added.ids[0] is None
    assert store.references.blocked_hashes([new(1).sha256, new(2).sha256]) == {new(1).sha256}


def test_changes_come_in_pages_that_lose_nothing(store: Store) -> None:
    for start in range(0, 60, 7):
        store.references.add([new(i, "SD-XL" if i % 2 else None) for i in range(start, min(start + 7, 60))], CHECKPOINT)
    replica = Replica(store)
    replica.catch_up(page=5)  # pages end inside and at the end of a revision
    assert sorted(replica.rows) == store.changes.embedded_ids(CHECKPOINT).tolist()
    assert sorted(replica.rows.values()) == list(range(1, 61))
    assert list(store.changes.between(CHECKPOINT, replica.seen, replica.seen)) == []


def test_generators(store: Store) -> None:
    made = store.generators.create("SD-XL", vendor="Stability AI", released_on=date(2023, 7, 26))
    assert (made.name, made.released_on, made.references) == ("SD-XL", date(2023, 7, 26), 0)
    store.references.add([new(1, "sd-xl"), new(2, "Midjourney 6"), new(3, "Midjourney 6")], CHECKPOINT)
    assert [(g.name, g.references) for g in store.generators.list()] == [("Midjourney 6", 2), ("SD-XL", 1)]
    with pytest.raises(GeneratorExists):
        store.generators.create("sd-XL")
    with pytest.raises(GeneratorExists):
        store.generators.update("Midjourney 6", {"name": "sd-xl"})
    with pytest.raises(UnknownGenerator):
        store.generators.update("nobody", {"family": "x"})
    with pytest.raises(ValueError, match="no colour"):
        store.generators.update("SD-XL", {"colour": "red"})
    facts = {"name": "SDXL", "version": "1.0", "family": "diffusion", "notes": "seen"}
    changed = store.generators.update("sd-xl", facts | {"released_on": None})
    assert {name: getattr(changed, name) for name in facts} == facts
    assert (changed.released_on, changed.vendor, changed.references) == (None, "Stability AI", 1)
    assert store.generators.delete("sdxl").references == 1
    assert store.references.blocked_hashes([new(1).sha256]) == set()  # unless it is asked for
    assert store.generators.get("SDXL") is None


@pytest.mark.parametrize("name", ["real", "ALL", "Unknown", "none", "", " a", ".a", "a/b", "a" * 101, "a\n", "ä"])
def test_bad_generator_names(store: Store, name: str) -> None:
    with pytest.raises(BadGeneratorName):
        store.generators.create(name)


def test_enrolments(store: Store) -> None:
    ids = [store.enrolments.open("SD-XL", "d3"), store.enrolments.open(None, None)]
    store.enrolments.finish(ids[0], {"added": 3})
    first = store.enrolments.get(ids[0])
    assert first is not None
    assert (first.generator, first.source, first.report) == ("SD-XL", "d3", {"added": 3})
    assert [e.id for e in store.enrolments.list(limit=1)] == [ids[1]]
    assert [e.id for e in store.enrolments.list(before=ids[1])] == [ids[0]]


def test_the_parts_of_an_enrolment_end_once(store: Store) -> None:
    enrolments = store.enrolments
    one = enrolments.join("job", 1, 2, None, None)
    assert enrolments.join("job", 2, 2, None, None) == one
    assert enrolments.finish_part(one, 1, {"added": 1}) == (1, [{"added": 1}])
    begun = enrolments.get(one)
    assert begun is not None
    assert begun.report is None  # what its parts did so far is nobody's business
    assert enrolments.join("job", 1, 2, None, None) == one  # a second worker repeats the part
    assert enrolments.finish_part(one, 1, {"added": 1})[0] == 1
    assert enrolments.finish_part(one, 2, {"added": 2})[0] == 0
    # The last one measures what changed, while another repeats its part.
    other = enrolments.join("job", 2, 2, None, None)
    assert other != one
    assert [row.id for row in enrolments.list()] == []  # neither has brought a reference
    assert enrolments.finish_part(one, 2, {"added": 2}) == (1, [])
    enrolments.finish(one, {"added": 3})
    assert enrolments.finish_part(one, 2, {"added": 2}) == (1, [])
    ended = enrolments.get(one)
    assert ended is not None
    assert ended.report == {"added": 3}
    assert [row.id for row in enrolments.list()] == [one]
    store.references.add([new(1)], CHECKPOINT, other)
    assert [row.id for row in enrolments.list()] == [other, one]
    enrolments.discard(other)
    assert enrolments.finish_part(other, 2, {"added": 2}) == (1, [])


def test_the_calibration_before_an_unfinished_enrolment_is_spared(store: Store) -> None:
    for revision in (1, 2):
        store.calibrations.save(CHECKPOINT, "h", revision, {"at": revision})
    enrolment = store.enrolments.open(None, None)
    later = range(3, 3 + 2 * CALIBRATIONS)
    for revision in later:
        store.calibrations.save(CHECKPOINT, "h", revision, {"at": revision})
    [begun] = store.read(text("select at from enrolment"))
    before = store.calibrations.load(CHECKPOINT, "h", before=begun["at"])
    assert before is not None
    assert before.params == {"at": 2}
    assert store.calibrations.load(CHECKPOINT, "h", 1) is None
    store.enrolments.finish(enrolment, {})
    store.calibrations.save(CHECKPOINT, "h", later.stop, {})
    assert store.calibrations.load(CHECKPOINT, "h", before=begun["at"]) is None


def test_calibrations(store: Store) -> None:
    assert store.calibrations.load(CHECKPOINT, "h") is None
    store.calibrations.save(CHECKPOINT, "h", 3, {"a": 1})
    store.calibrations.save(CHECKPOINT, "h", 5, {"a": 2})
    store.calibrations.save(CHECKPOINT, "h", 5, {"a": 3})
    latest, third = store.calibrations.load(CHECKPOINT, "h"), store.calibrations.load(CHECKPOINT, "h", 3)
    assert latest is not None
    assert third is not None
    assert (latest.revision, latest.params, third.params) == (5, {"a": 3}, {"a": 1})
    for revision in range(6, 6 + CALIBRATIONS):
        store.calibrations.save(CHECKPOINT, "h", revision, {})
    store.calibrations.save(CHECKPOINT, "other", 1, {})
    kept = [revision for revision in range(40) if store.calibrations.load(CHECKPOINT, "h", revision)]
    assert kept == list(range(6, 6 + CALIBRATIONS))
    assert store.calibrations.load(CHECKPOINT, "other", 1)


def test_detections(store: Store) -> None:
    sha256 = hashlib.sha256(b"query").hexdigest()
    vector = np.arange(4, dtype=np.float32)
    given = [
        Detection(uuid.uuid4(), sha256, 10, 4, 3, vector, {"verdict": "fake", "n": n}, CHECKPOINT, "h", 7)
        for n in range(3)
    ]
    for detection in given:
        store.detections.add([detection])
    got = store.detections.get(given[0].id)
    assert got is not None
    np.testing.assert_array_equal(got.vector, vector)
    assert (got.sha256, got.result, got.revision, got.feedback) == (sha256, {"verdict": "fake", "n": 0}, 7, None)
    newest = store.detections.list(limit=2)
    assert [listed.id for listed in newest] == [given[2].id, given[1].id]
    assert (newest[0].sha256, newest[0].verdict, newest[0].file, newest[0].score) == (sha256, "fake", None, None)
    assert [listed.id for listed in store.detections.list(before=newest[-1].id)] == [given[0].id]
    assert store.detections.set_feedback(given[0].id, {"verdict": "real"})
    assert not store.detections.set_feedback(uuid.uuid4(), {})
    assert [d.feedback for d in store.detections.list()] == [None, None, {"verdict": "real"}]
    assert newest[1].at is not None
    assert store.detections.delete(newest[1].at) == 1
    assert [d.id for d in store.detections.list()] == [given[2].id, given[1].id]


def test_detections_recorded_together(store: Store) -> None:
    key = store.keys.create("caller", b"h" * 32, ["detect"])
    vector = np.zeros(4, np.float32)
    given = [
        Detection(uuid.uuid4(), f"{n:064x}", n, 4, 3, vector + n, {"n": n}, CHECKPOINT, "h", 7, key.id if n else None)
        for n in range(3)
    ]
    store.detections.add(given)
    got = [store.detections.get(detection.id) for detection in given]
    assert [row and (row.sha256, row.result, row.api_key_id, row.vector[0]) for row in got] == [
        (f"{n:064x}", {"n": n}, key.id if n else None, n) for n in range(3)
    ]
    last, seen = None, []
    while page := store.detections.list(before=last, limit=1):
        last = page[0].id
        seen.append(last)
    assert seen == [detection.id for detection in reversed(given)]
    with pytest.raises(IntegrityError):
        store.detections.add([replace(given[0], id=uuid.uuid4()), given[1]])
    assert len(store.detections.list()) == 3


def test_keys(store: Store) -> None:
    later = datetime(2100, 1, 1, tzinfo=UTC)
    key = store.keys.create("ci", b"hash", ["detect"], expires_at=later)
    assert (key.name, key.scopes, key.expires_at, key.revoked_at) == ("ci", ["detect"], later, None)
    with pytest.raises(KeyExists):
        store.keys.create("ci", b"else", [])
    with pytest.raises(IntegrityError):  # the same secret under another name
        store.keys.create("other", b"hash", [])
    assert store.keys.find(b"hash") == key
    assert store.keys.find(b"none") is None
    assert store.keys.revoke("ci")
    assert not store.keys.revoke("ci")
    assert store.keys.list()[0].revoked_at is not None


def together(*works: Callable[[], object]) -> None:
    """Run at once in threads; the first failure is raised."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]


def test_a_deadlock_is_tried_again(store: Store) -> None:
    store.references.add([new(1), new(2)], CHECKPOINT)
    ids = [row.id for row in store.references.list()]
    both_hold_one = threading.Barrier(2)
    attempts = []

    def cross(order: Sequence[int]) -> None:
        def work(connection: Connection) -> None:
            attempts.append(order)
            lock = text("select id from reference_image where id = :id for update")
            connection.execute(lock, {"id": order[0]})
            if len(attempts) <= 2:
                both_hold_one.wait(30)
            connection.execute(lock, {"id": order[1]})

        store.transaction(work)

    together(lambda: cross(ids), lambda: cross(ids[::-1]))
    assert len(attempts) == 3


def test_a_known_row_that_vanishes_before_the_lock_is_added_again(store: Store, settings: Settings) -> None:
    store.references.add([new(1), new(2)], CHECKPOINT)
    engine = connect(settings)
    other = Store(engine)
    removed: list[Removed] = []

    def before(connection: object, cursor: object, statement: str, *_: object) -> None:
        if "for update" in statement and not removed:
            removed.append(
                other.references.remove(ids=[row.id for row in other.references.list() if row.sha256 == new(1).sha256])
            )

    event.listen(store.engine, "before_cursor_execute", before)
    added = store.references.add([new(1), new(2), new(3)], CHECKPOINT)
    event.remove(store.engine, "before_cursor_execute", before)
    engine.dispose()
    assert removed[0].references == 1
    assert (added.added, added.known) == (2, 1)
    replica = Replica(store)
    replica.catch_up()
    assert sorted(replica.rows) == store.changes.embedded_ids(CHECKPOINT).tolist() == sorted(added.ids)  # type: ignore[type-var]


def test_revisions_become_visible_in_order_while_many_write_and_remove(store: Store) -> None:
    """Writers commit out of the order of their ids; a follower that polls all the while misses nothing."""
    stop = threading.Event()
    replica = Replica(store)

    def write(worker: int) -> None:
        for turn in range(12):
            # Overlapping batches in opposite orders, with a common image.
            numbers = [worker * 100 + turn * 3 + i for i in range(3)] + [5000 + turn]
            store.references.add(
                [new(n, "SD-XL" if n % 2 else None) for n in numbers[:: 1 if worker % 2 else -1]], CHECKPOINT
            )

    def remove() -> None:
        for _ in range(15):
            present = store.changes.embedded_ids(CHECKPOINT)
            if len(present):
                store.references.remove(ids=present[::5].tolist())

    def follow() -> None:
        while not stop.is_set():
            replica.catch_up(page=4)

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        together(*(lambda worker=worker: write(worker) for worker in range(3)), remove)
    finally:
        stop.set()
        follower.join(30)
    replica.catch_up()
    assert sorted(replica.rows) == store.changes.embedded_ids(CHECKPOINT).tolist()
    assert len(replica.rows) == sum(store.references.counts().values())
    assert miscounts(store) == []


def test_a_late_commit_of_an_early_id_is_not_missed(store: Store, settings: Settings) -> None:
    """Two writers: the one with the smaller ids commits last, after the follower has passed."""
    engine = connect(settings)
    slow = Store(engine)
    taken, go_on = threading.Event(), threading.Event()

    def late() -> None:
        def work(connection: Connection) -> None:
            # The sequence moves although nothing is committed yet, as in any writer that is still at work.
            connection.execute(text("select nextval(pg_get_serial_sequence('reference_image', 'id'))"))
            taken.set()
            assert go_on.wait(30)

        slow.transaction(work)
        slow.references.add([new(1)], CHECKPOINT)

    thread = threading.Thread(target=late)
    thread.start()
    assert taken.wait(30)
    store.references.add([new(2)], CHECKPOINT)
    replica = Replica(store)
    replica.catch_up()
    go_on.set()
    thread.join(30)
    replica.catch_up()
    assert sorted(replica.rows) == store.changes.embedded_ids(CHECKPOINT).tolist()
    assert len(replica.rows) == 2
    engine.dispose()


def test_writers_are_told_apart_by_the_lock(store: Store) -> None:
    """A second writer cannot stamp a revision before the first has committed."""
    held, go_on = threading.Event(), threading.Event()
    done = threading.Event()

    def first() -> None:
        def work(connection: Connection) -> None:
            connection.execute(text("select revision from index_revision for update"))
            held.set()
            assert go_on.wait(30)

        store.transaction(work)

    def second() -> None:
        assert held.wait(30)
        store.references.add([new(1)], CHECKPOINT)
        done.set()

    def release() -> None:
        assert held.wait(30)
        assert not done.wait(0.3)
        go_on.set()

    together(first, second, release)
    assert done.is_set()


def test_adding_is_announced(store: Store, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as listener:
        listener.execute("listen lineup")
        store.references.add([new(1)], CHECKPOINT)
        store.references.remove(ids=[store.references.list()[0].id])
        store.generators.create("SD-XL")
        store.generators.update("SD-XL", {"name": "SDXL"})
        heard = [notify.payload for notify in listener.notifies(timeout=10, stop_after=3)]
    assert heard == [f"{CHECKPOINT} 1", f"{CHECKPOINT} 2", "generators"]


def test_counts_are_changed_in_one_order(store: Store) -> None:
    """Adders for two checkpoints, which no revision makes wait for each other, cannot deadlock on counts."""
    store.references.add([new(n, source=source) for n, source in enumerate("abc")], CHECKPOINT)
    row_locks = text("select source from reference_count for update skip locked")
    with store.engine.connect() as holder, store.engine.connect() as other:
        holder.execute(text("select from reference_count where source = 'b' for update"))
        batch = [new(n, source=source) for n, source in enumerate("cba", 3)]
        adder = threading.Thread(target=store.references.add, args=(batch, CHECKPOINT))
        adder.start()
        free = ["a", "c"]
        while "a" in free and adder.is_alive():  # until it has come to the row that is held
            other.rollback()
            free = list(other.scalars(row_locks))
        assert free == ["c"]
        other.rollback()
        holder.rollback()
        adder.join(30)
    assert store.references.sources() == {"a": 2, "b": 2, "c": 2}
    assert miscounts(store) == []


def test_counts_that_are_wrong_are_named_and_mended(store: Store) -> None:
    enrolment = store.enrolments.open(None, None)
    store.references.add([new(1), new(2, "SD-XL"), new(3, "SD-XL", source="d3")], CHECKPOINT, enrolment)
    with store.engine.begin() as connection:  # behind the rules' back
        connection.execute(text("delete from reference_count where label = 0"))
        connection.execute(text("update reference_count set images = 7 where source = 'd3'"))
        connection.execute(text("insert into reference_count (label, source, images) values (1, 'none', 2)"))
        connection.execute(text("update enrolment set images = 4"))
    assert miscounts(store) == [
        "real of source 'tests': 0 references counted, 1 there",
        "fake (SD-XL) of source 'd3': 7 references counted, 1 there",
        "fake of source 'none': 2 references counted, 0 there",
        f"enrolment {enrolment}: 4 references counted, 3 there",
    ]
    recount(store)
    assert miscounts(store) == []
    assert store.references.counts() == {"real": 1, "fake": 2}


def test_relabelled_references_keep_all_but_label_and_generator(store: Store) -> None:
    store.checkpoints.register("d" * 32, "other", 8, {})
    enrolment = store.enrolments.open("SD-XL", "tests")
    first, second, third = new(1), new(2, "SD-XL"), new(3, "SD-XL")
    ids = store.references.add([replace(first, data=b"the file"), second, third], CHECKPOINT, enrolment).ids
    real, fake, other = (int(image_id or 0) for image_id in ids)
    store.references.embed([real, fake], np.ones((2, 8), np.float32), "d" * 32)
    replicas = [Replica(store), Replica(store, "d" * 32)]
    for replica in replicas:
        replica.catch_up()
    before = store.references.get(real)
    assert before is not None

    relabelled = store.references.relabel(Kind(1, "Flux"), ids=[real, fake, 999])
    assert relabelled.ids.keys() == {real, fake}
    assert (relabelled.vectors, relabelled.revisions) == ({CHECKPOINT: 2, "d" * 32: 2}, {CHECKPOINT: 2, "d" * 32: 2})
    after = store.references.get(relabelled.ids[real])
    assert after is not None
    was = {"former_label": "real"}
    assert after == replace(
        before, id=after.id, label=1, generator="Flux", attributes=before.attributes | was, pictured=True
    )
    assert store.references.get(real) is None
    assert store.references.file(after.id) == b"the file"
    assert store.references.thumbnail(after.id) == b"jpeg" * 3
    for replica, left in zip(replicas, ([other], []), strict=True):
        replica.catch_up()
        anew = Replica(store, replica.checkpoint)
        anew.catch_up()
        assert replica.rows == anew.rows
        assert replica.rows.keys() == {*relabelled.ids.values(), *left}
    assert {one.name: one.references for one in store.generators.list()} == {"Flux": 2, "SD-XL": 1}
    (counted,) = store.enrolments.list()
    assert counted.references == 3
    assert miscounts(store) == []

    assert store.references.relabel(Kind(1, "FLUX"), generator="Flux").ids == {}  # the same name, nothing to change
    assert store.references.relabel(Kind(0, None), ids=[real]).ids == {}
    with pytest.raises(BadGeneratorName):
        store.references.relabel(Kind(1, "all"), source="nowhere")
    with pytest.raises(UnknownGenerator):
        store.references.relabel(Kind(0, None), generator="nobody")
    assert store.checkpoints.revision(CHECKPOINT) == 2

    undone = store.references.relabel(None, enrolment=enrolment)
    again = store.references.get(undone.ids[after.id])
    assert again == replace(before, id=undone.ids[after.id])
    assert {one.name: one.references for one in store.generators.list()} == {"Flux": 0, "SD-XL": 2}
    assert store.references.relabel(None, enrolment=enrolment).ids == {}


def test_many_references_are_relabelled_in_several_transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relabelling, "TRANSACTION_IMAGES", 3)
    store.references.add([new(i, "a" if i % 2 else "b") for i in range(8)], CHECKPOINT)
    relabelled = store.references.relabel(Kind(0, None), source="tests")
    assert (len(relabelled.ids), relabelled.vectors, relabelled.revisions) == (8, {CHECKPOINT: 8}, {CHECKPOINT: 4})
    assert store.references.counts() == {"real": 8, "fake": 0}
    replica, anew = Replica(store), Replica(store)
    replica.catch_up(page=3)
    anew.catch_up()
    assert len(replica.rows) == 8
    assert len(store.references.relabel(None, source="tests").ids) == 8
    replica.catch_up()
    assert replica.rows.keys() == {row.id for row in store.references.list()}
    assert {one.name: one.references for one in store.generators.list()} == {"a": 4, "b": 4}


LARGE = ("reference_image", "reference_file", "embedding", "removal", "detection", "calibration", "blocked_hash")


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of a plan that read a table which grows."""
    if plan.get("Relation Name") in LARGE and plan["Node Type"] != "ModifyTable":
        yield plan
    for part in plan.get("Plans", []):
        yield from scans(part)


def test_hot_queries_can_use_their_indexes(store: Store) -> None:
    """With scans of whole tables forbidden, each table that grows is entered at the rows that are wanted."""
    enrolment = store.enrolments.open(None, None)
    store.references.add([new(i, "SD-XL" if i % 2 else None) for i in range(50)], CHECKPOINT, enrolment)
    seen: list[tuple[str, object]] = []

    def note(connection: object, cursor: object, statement: str, parameters: object, *_: object) -> None:
        if statement.lstrip().startswith(
            ("select", "SELECT", "delete", "DELETE", "insert into removal", "insert into blob", "with relabelled")
        ):
            seen.append((statement, parameters))

    event.listen(store.engine, "before_cursor_execute", note)
    store.references.known_files(["file:///1.png"], CHECKPOINT)
    store.references.known_hashes([new(1).sha256], CHECKPOINT)
    store.references.blocked_hashes([new(1).sha256])
    store.references.find(new(1).sha256)
    store.references.get_many([1, 2, 3])
    store.references.list(generator="sd-xl", after=3)
    store.references.list(source="tests", after=3)
    store.references.thumbnail(1)
    store.references.file(1)
    store.blobs.named([b"1" * 32])
    store.blobs.names("00")
    store.references.counts()
    store.references.sources()
    store.generators.get("sd-xl")
    store.checkpoints.revision(CHECKPOINT)
    store.enrolments.list(before=5)
    store.detections.list(before=uuid.uuid4())
    store.calibrations.load(CHECKPOINT, "h", 1)
    related_references(store, [new(1).sha256], ["group 1"])
    similar_fingerprints(store, np.array([-1]))
    fact_warnings(store, enrolment)
    for chosen in ({"ids": [1]}, {"generator": "sd-xl"}, {"source": "none"}, {"enrolment": enrolment}):
        store.references.relabel(Kind(1, "Flux"), **chosen)
        store.references.remove(**chosen)
    event.remove(store.engine, "before_cursor_execute", note)
    place = {"checkpoint": CHECKPOINT, "seen": 0, "target": 1, "revision": 0, "image": 0, "page": 20}
    statements = [*seen, (ADDITIONS, place), (REMOVALS, place), (STAMP.replace(":ids", "%(ids)s"), {"ids": [1, 2]})]
    with store.engine.connect() as connection:
        driver = cast("psycopg.Connection[tuple[Any]]", connection.connection.driver_connection)
        driver.execute("set enable_seqscan = off")
        found = []
        for statement, parameters in statements:
            explained = driver.execute(f"explain (format json) {statement}", cast("dict[str, object]", parameters))
            ((answer,),) = explained.fetchall()
            found += [(statement, scan) for scan in scans(answer[0]["Plan"])]
    assert len(found) > 30
    for statement, scan in found:
        assert scan["Node Type"] != "Seq Scan", statement
        assert {"Index Cond", "Recheck Cond"} & scan.keys(), (statement, scan)
