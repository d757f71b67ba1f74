"""Random input: mutated image files, requests, and sequences of changes to the store against a model of it.

A small form runs with the other tests; `make soak PART=fuzz` tries `LINEUP_SOAK_FILES` (40,000) files,
`LINEUP_SOAK_REQUESTS` (200) requests for each call and caller, and `LINEUP_SOAK_SEQUENCES` (200) sequences of 30 steps.
"""

import io
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import schemathesis
from conftest import new_database, small_image
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numbered import CHECKPOINT, DIM, new, opened, sha256, vector
from PIL import ExifTags, Image, PngImagePlugin
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from sqlalchemy import URL
from starlette.types import ASGIApp, Receive, Scope, Send

from api.access import hash_secret, new_secret
from api.http.app import create_app
from api.judge.loader import load_detector
from api.judge.uploads import Upload, decode
from api.schemas.problems import ApiError
from api.service_settings import ServiceSettings
from indexer.follower import Follower
from indexer.ingest.exchange import export_references, import_references
from indexer.settings import Settings
from indexer.store.counts import miscounts
from indexer.store.generators import GeneratorExists
from indexer.store.relabelling import Kind
from trainer.images import FORMATS

log = logging.getLogger(__name__)

HEIC = Path(__file__).parents[1] / "heic"
FILES = int(os.environ.get("LINEUP_SOAK_FILES", "40000"))
REQUESTS = int(os.environ.get("LINEUP_SOAK_REQUESTS", "200"))
SEQUENCES = int(os.environ.get("LINEUP_SOAK_SEQUENCES", "200"))
OTHER, OTHER_DIM = "d" * 32, 3
DIMS = {CHECKPOINT: DIM, OTHER: OTHER_DIM}
GENERATORS = ("gen-a", "gen-b", "gen-c")
CHOICE = st.randoms(use_true_random=False)
Record = Callable[[str, object], None]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    allow_header_conformance,
]
"""Those that hold for multipart, where a file may be sent for any field."""


def sound_files() -> dict[str, bytes]:
    """A small file with metadata of each accepted format, and of the variants that take another way through it."""
    image, exif = small_image(1, True), Image.Exif()
    exif[ExifTags.Base.Software], exif[ExifTags.Base.Orientation] = "a generator", 6
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a prompt")
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
    options: dict[str, tuple[str, Image.Image, dict[str, object]]] = {
        "JPEG": ("JPEG", image, {"exif": exif, "xmp": b"<x/>", "comment": b"a comment"}),
        "JPEG, progressive, CMYK": ("JPEG", image.convert("CMYK"), {"progressive": True}),
        "PNG": ("PNG", image, {"exif": exif, "pnginfo": text}),
        "PNG, palette": ("PNG", image.quantize(16), {"transparency": 3}),
        "PNG, 16 bits": ("PNG", image.convert("I;16"), {}),
        "GIF": ("GIF", image, {"comment": b"a comment", "save_all": True, "append_images": [image.rotate(90)]}),
        "WEBP": ("WEBP", image, {"exif": exif, "xmp": b"<x/>"}),
        "WEBP, lossless, alpha": ("WEBP", image.convert("RGBA"), {"lossless": True}),
        "TIFF": ("TIFF", image, {"exif": exif, "compression": "tiff_deflate"}),
        "TIFF, raw": ("TIFF", image.convert("L"), {}),
        "BMP": ("BMP", image, {}),
        "AVIF": ("AVIF", image, {"exif": exif}),
    }
    files = {}
    for name, (format, picture, arguments) in options.items():
        buffer = io.BytesIO()
        picture.save(buffer, format, **arguments)
        files[name] = buffer.getvalue()
    return files | {f"HEIF, {path.stem}": path.read_bytes() for path in HEIC.glob("*.heic")}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The file with one to eight damages: other bytes, extreme integers, parts cut, doubled or moved."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(max(1, len(changed)))
        end = min(len(changed), at + rng.randint(1, 64))
        match rng.randrange(6):
            case 0:
                changed[at:end] = rng.randbytes(end - at)
            case 1:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << rng.randrange(8)]) if at < len(changed) else b""
            case 2:
                value = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
                changed[at : at + 4] = value.to_bytes(4, rng.choice(("big", "little")))
            case 3:
                del changed[at:end]
            case 4:
                changed[at:at] = changed[at:end] * rng.randint(1, 50)
            case 5:
                del changed[rng.randint(0, len(changed)) :]
    return bytes(changed)


@pytest.mark.timeout(4 * 3600)
@pytest.mark.filterwarnings("ignore")  # as in the processes that decode uploads
@pytest.mark.parametrize("count", [360, pytest.param(FILES, marks=pytest.mark.soak)])
def test_mutated_files_are_read_or_refused(count: int, record_property: Record) -> None:
    files, rng = list(sound_files().items()), random.Random(20261121)
    assert {name.split(",")[0] for name, _ in files} == set(FORMATS)
    faults, accepted = [], 0
    for number in range(count):
        name, sound = files[number % len(files)]
        data, before = mutated(sound, rng), time.thread_time()
        try:
            try:
                decode(Upload(name, data), max_pixels=4_000_000)
                accepted += 1
            except ApiError as error:
                faults += [f"{name}, file {number}: {error}"] if "\n" in str(error) else []
            assert time.thread_time() - before < 2
        except Exception as error:
            faults.append(f"{name}, file {number}: {type(error).__name__}: {error}")
    record_property("tried", f"{count:,} mutated files of {len(files)} kinds, {accepted:,} of them readable")
    record_property("failed", len(faults))
    assert faults == []
    assert 0 < accepted < count


def from_here(app: ASGIApp) -> ASGIApp:
    """The same application, already started, called from this machine; the generator's own client has no address."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                await send({"type": f"{(await receive())['type']}.complete"})
            return
        if scope["type"] == "http":
            headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope = dict(scope) | {"client": ("127.0.0.1", 1), "headers": [*headers, (b"host", b"localhost")]}
        await app(scope, receive, send)

    return call


@pytest.fixture(scope="module", params=["without a key", "with a key", "with none where there is one"])
def caller(populated: ServiceSettings, request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, str]]]:
    """What calls an application, and with which headers."""
    limited = populated.model_copy(update={"max_upload_bytes": 100_000})
    detector, secret = load_detector(limited), new_secret()
    detector.calibrator.refresh()
    if request.param != "without a key":
        detector.store.keys.create(request.param, hash_secret(secret), ["admin"])
    headers = {"authorization": f"Bearer {secret}"} if request.param == "with a key" else {}
    app = create_app(limited, detector)
    with TestClient(app):
        yield schemathesis.openapi.from_asgi("/openapi.json", from_here(app)), headers


def operations() -> list[tuple[str, str]]:
    """Path and method of every call."""
    paths = create_app(ServiceSettings()).openapi()["paths"]
    return [(path, method.upper()) for path, methods in paths.items() for method in methods]


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("count", [4, pytest.param(REQUESTS, marks=pytest.mark.soak)])
def test_generated_requests_get_answers_that_are_promised(
    caller: tuple[Any, dict[str, str]], count: int, request: pytest.FixtureRequest, record_property: Record
) -> None:
    (schema, headers), answers, faults = caller, Counter[int](), []
    for path, method in operations():

        @settings(
            max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
        )
        @given(case=schema[path][method].as_strategy())
        def check(case: Any) -> None:
            answers[case.call_and_validate(checks=CHECKS, headers=headers).status_code] += 1

        try:
            check()
        except Exception as error:
            faults.append(f"{method} {path}: {error}")
    name = request.node.callspec.params["caller"]
    record_property("tried", f"{answers.total():,} generated requests {name}, answers {dict(sorted(answers.items()))}")
    record_property("failed", len(faults))
    assert faults == []
    assert (answers[401] > answers[200]) == (name == "with none where there is one")


@dataclass
class Row:
    """What the model knows of a reference."""

    generator: str | None
    source: str
    enrolment: int | None
    checkpoints: set[str]
    former: tuple[str | None] | None = None
    """The generator before it was relabelled, where it was."""

    def relabel(self, generator: str | None) -> None:
        if generator != self.generator:
            self.former = None if self.former == (generator,) else (self.generator,)
            self.generator = generator


class StoreModel(RuleBasedStateMachine):
    """References by number, changed here and in the store alike; followers of two checkpoints see every change."""

    states, removed, relabelled = 0, 0, 0

    def __init__(self, server: URL, folder: Path) -> None:
        super().__init__()
        self.server, self.folder, self.stack = server, folder, ExitStack()
        self.rows: dict[int, Row] = {}
        self.blocked: set[int] = set()
        self.generators: set[str] = set()
        self.enrolments: list[int] = []
        self.active = CHECKPOINT
        self.exported: tuple[dict[int, Row], set[str]] | None = None

    def teardown(self) -> None:
        """A failure that does not come again, as of a server that answers too late, is nowhere else told as it was."""
        if isinstance(error := sys.exception(), Exception):
            log.error("the sequence failed", exc_info=error)
        self.stack.close()

    def follower(self, checkpoint: str) -> Follower:
        follower = Follower(self.settings, self.store, checkpoint, DIMS[checkpoint])
        follower.load()
        return follower

    @property
    def ids(self) -> dict[int, int]:
        """Ids of the store's rows by number."""
        numbers = {sha256(number): number for number in range(12)}
        return {numbers[row.sha256]: row.id for row in self.store.references.list(limit=1000)}

    def expect(self, number: int, row: Row) -> None:
        """What adding this reference does."""
        if number in self.blocked:
            return
        stored = self.rows.setdefault(number, replace(row, checkpoints=set()))
        if stored.generator == row.generator:
            stored.checkpoints |= row.checkpoints

    def forget(self, gone: Iterable[int], forget: bool) -> None:
        for number in set(gone):
            del self.rows[number]
            type(self).removed += 1
            self.blocked |= {number} if forget else set()

    @initialize()
    def begin(self) -> None:
        """Without rows most other rules do nothing."""
        url = self.stack.enter_context(new_database(self.server))
        self.settings = Settings(home=self.folder / url.rpartition("/")[2].partition("?")[0], database_url=url)
        self.store = opened(self.settings)
        self.stack.callback(self.store.engine.dispose)
        self.store.checkpoints.register(OTHER, "other", OTHER_DIM, {})
        self.followers = {checkpoint: self.follower(checkpoint) for checkpoint in DIMS}
        for number, generator in enumerate((None, *GENERATORS)):
            self.add(list(range(2 * number, 2 * number + 2)), generator, "one", CHECKPOINT)
        self.everything_agrees()
        self.relabel(random.Random(0), GENERATORS[0])

    @rule(
        numbers=st.lists(st.integers(0, 11), min_size=1, max_size=6),
        generator=st.sampled_from((None, *GENERATORS)),
        source=st.sampled_from(("one", "two")),
        checkpoint=st.sampled_from(list(DIMS)),
    )
    def add(self, numbers: list[int], generator: str | None, source: str, checkpoint: str) -> None:
        enrolment = self.store.enrolments.open(generator, source)
        batch = [new(n, generator, source, vector=vector(n)[: DIMS[checkpoint]]) for n in numbers]
        self.store.references.add(batch, checkpoint, enrolment)
        self.enrolments.append(enrolment)
        self.generators |= set() if generator is None else {generator}
        for number in numbers:
            self.expect(number, Row(generator, source, enrolment, {checkpoint}))

    @precondition(lambda self: self.rows)
    @rule(choice=CHOICE, forget=st.booleans())
    def remove(self, choice: random.Random, forget: bool) -> None:
        ids, numbers = self.ids, choice.choices(list(self.rows), k=3)
        self.store.references.remove(ids=[ids[number] for number in numbers], forget=forget)
        self.forget(numbers, forget)

    @precondition(lambda self: self.rows)
    @rule(choice=CHOICE, generator=st.sampled_from((None, *GENERATORS)))
    def relabel(self, choice: random.Random, generator: str | None) -> None:
        ids, numbers = self.ids, set(choice.choices(list(self.rows), k=3))
        changed = {ids[number] for number in numbers if self.rows[number].generator != generator}
        kind = Kind(int(generator is not None), generator)
        relabelled = self.store.references.relabel(kind, ids=[ids[number] for number in numbers])
        assert relabelled.ids.keys() == changed
        assert not set(relabelled.ids.values()) & set(ids.values())
        self.generators |= {generator} if generator is not None and changed else set()
        type(self).relabelled += len(changed)
        for number in numbers:
            self.rows[number].relabel(generator)

    @precondition(lambda self: self.rows)
    @rule(source=st.sampled_from(("one", "two")))
    def relabel_back(self, source: str) -> None:
        self.store.references.relabel(None, source=source)
        for row in self.rows.values():
            if row.source == source and row.former is not None:
                (generator,) = row.former
                row.relabel(generator)
                self.generators |= set() if generator is None else {generator}

    @precondition(lambda self: self.rows)
    @rule(source=st.sampled_from(("one", "two")))
    def remove_source(self, source: str) -> None:
        self.store.references.remove(source=source)
        self.forget([n for n, row in self.rows.items() if row.source == source], False)

    @precondition(lambda self: self.rows)
    @rule(choice=CHOICE)
    def undo(self, choice: random.Random) -> None:
        enrolment = choice.choice(self.enrolments)
        self.store.references.remove(enrolment=enrolment)
        self.forget([n for n, row in self.rows.items() if row.enrolment == enrolment], False)

    @precondition(lambda self: self.generators)
    @rule(name=st.sampled_from(GENERATORS), wanted=st.sampled_from(GENERATORS))
    def rename(self, name: str, wanted: str) -> None:
        if name not in self.generators:
            return
        if wanted in self.generators - {name}:
            with pytest.raises(GeneratorExists):
                self.store.generators.update(name, {"name": wanted})
            return
        self.store.generators.update(name, {"name": wanted})
        self.generators = self.generators - {name} | {wanted}
        for row in self.rows.values():
            row.generator = wanted if row.generator == name else row.generator

    @precondition(lambda self: self.generators)
    @rule(name=st.sampled_from(GENERATORS))
    def delete_generator(self, name: str) -> None:
        if name in self.generators:
            self.store.generators.delete(name)
            self.generators -= {name}
            self.forget([n for n, row in self.rows.items() if row.generator == name], False)

    @rule(checkpoint=st.sampled_from(list(DIMS)))
    def embed_and_switch(self, checkpoint: str) -> None:
        ids = self.ids
        lacking = [n for n, row in self.rows.items() if checkpoint not in row.checkpoints]
        if lacking:
            assert self.store.checkpoints.activate(checkpoint) is False
            vectors = np.stack([vector(n)[: DIMS[checkpoint]] for n in lacking])  # (n, d)
            assert self.store.references.embed([ids[n] for n in lacking], vectors, checkpoint) == len(lacking)
        for number in lacking:
            self.rows[number].checkpoints.add(checkpoint)
        assert self.store.checkpoints.activate(checkpoint) is True
        self.active = checkpoint

    @rule(checkpoint=st.sampled_from(list(DIMS)), anew=st.booleans())
    def rebuild_or_start_again(self, checkpoint: str, anew: bool) -> None:
        self.followers[checkpoint].save()
        self.followers[checkpoint] = self.follower(checkpoint)
        if anew:
            self.followers[checkpoint].load(anew=True)

    @precondition(lambda self: self.rows)
    @rule()
    def export(self) -> None:
        export_references(self.store, self.settings.home / "set")
        self.exported = deepcopy(self.rows), set(self.generators)

    @precondition(lambda self: self.exported is not None)
    @rule()
    def import_again(self) -> None:
        assert self.exported is not None
        rows, generators = self.exported
        report = import_references(self.store, self.settings.home / "set")
        self.generators |= generators | {row.generator for row in rows.values() if row.generator is not None}
        self.enrolments += [] if report["enrolment"] is None else [report["enrolment"]]
        for number, row in rows.items():
            self.expect(number, replace(row, enrolment=report["enrolment"]))

    @invariant()
    def everything_agrees(self) -> None:
        type(self).states += 1
        stored = {row.sha256: row for row in self.store.references.list(limit=1000)}
        assert {(row.sha256, row.label, row.generator, row.source, row.enrolment_id) for row in stored.values()} == {
            (sha256(n), int(row.generator is not None), row.generator, row.source, row.enrolment)
            for n, row in self.rows.items()
        }
        counts = {name: sum(row.generator == name for row in self.rows.values()) for name in self.generators}
        assert {generator.name: generator.references for generator in self.store.generators.list()} == counts
        fakes = sum(row.generator is not None for row in self.rows.values())
        assert self.store.references.counts() == {"real": len(self.rows) - fakes, "fake": fakes}
        assert self.store.references.sources() == Counter(row.source for row in self.rows.values())
        enrolled = Counter(row.enrolment for row in self.rows.values())
        assert {one.id: one.references for one in self.store.enrolments.list(limit=1000)} == {
            number: enrolled[number] for number in self.enrolments
        }
        assert miscounts(self.store) == []
        active = self.store.checkpoints.active()
        assert active is not None
        assert active.id == self.active
        for checkpoint, follower in self.followers.items():
            follower.catch_up()
            held = follower.copy.contents()
            expected = {stored[sha256(n)].id: n for n, row in self.rows.items() if checkpoint in row.checkpoints}
            assert held.ids.tolist() == sorted(expected)
            anew = self.follower(checkpoint).copy.contents()
            assert anew.ids.tolist() == held.ids.tolist()
            assert np.array_equal(anew.labels, held.labels)
            columns = (held.ids.tolist(), held.vectors, held.labels, held.generators.tolist(), held.sources)
            facts = zip(*columns, strict=True)
            for image_id, unit, label, generator, source in facts:
                number = expected[image_id]
                row, raw = self.rows[number], vector(number)[: DIMS[checkpoint]]
                assert np.abs(unit - raw / np.linalg.norm(raw)).max() < 1e-3
                assert label == int(row.generator is not None)
                assert follower.generator_names.get(generator) == row.generator
                assert source == row.source


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(
    ("sequences", "steps"), [(3, 12), pytest.param(SEQUENCES, 30, marks=pytest.mark.soak)]
)  # fmt: skip
def test_the_store_and_its_followers_do_as_a_model_does(
    sequences: int, steps: int, postgres_server: URL, tmp_path: Path, record_property: Record
) -> None:
    StoreModel.states = StoreModel.removed = StoreModel.relabelled = 0
    record_property("failed", 1)
    run_state_machine_as_test(
        lambda: StoreModel(postgres_server, tmp_path),  # type: ignore[arg-type]
        settings=settings(
            max_examples=sequences,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],  # each step is a transaction: shrinking would take hours
            suppress_health_check=list(HealthCheck),
        ),
    )
    record_property("tried", f"{sequences:,} sequences of changes to the store, {StoreModel.states:,} states")
    record_property("failed", 0)
    assert min(StoreModel.removed, StoreModel.relabelled) >= sequences
