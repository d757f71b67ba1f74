"""The audit rings where files tell the label, is silent where they do not, and lists pictures on both sides."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numbered import CHECKPOINT, add_all, new, opened

from indexer.measure import NothingToMeasure
from indexer.measure import audit as module
from indexer.measure.audit import audit, fact_aurocs, fact_warnings, near_duplicates_across
from indexer.settings import Settings
from indexer.store import Store
from indexer.store.reference_facts import NewReference
from indexer.terminal import tell_audit
from trainer.images import FileFacts


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = opened(settings)
    yield store
    store.engine.dispose()


def reference(number: int, generator: str | None, **others: Any) -> NewReference:
    """A file whose facts say nothing of its label."""
    rng = np.random.default_rng(number)
    is_jpeg = rng.random() < 0.5
    facts: dict[str, Any] = {
        "format": "JPEG" if is_jpeg else "PNG",
        "jpeg_quality": int(rng.integers(60, 100)) if is_jpeg else None,
        "width": int(rng.integers(200, 900)),
        "height": int(rng.integers(200, 900)),
        "file_bytes": int(rng.integers(10_000, 90_000)),
        "fingerprint": int(rng.integers(1, 2**62)),
    }
    return new(number, generator, **(facts | others))


def test_a_balanced_set_is_silent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_all(store, [reference(number, None) for number in range(150)])
    add_all(store, [reference(number, f"gen-{number % 2}") for number in range(200, 350)])
    monkeypatch.setattr("trainer.evaluation.file_facts.file_fact_scores", lambda facts, *_: np.full(len(facts), 0.5))
    found = audit(store)
    assert found["warnings"] == fact_warnings(store) == []
    assert (found["images"], found["auroc"]) == (300, 0.5)
    assert all(0.5 <= area < 0.65 for area in found["facts"].values())
    assert [(one["name"], one["images"], one["reals"]) for one in found["generators"]] == [
        ("gen-0", 75, 150),
        ("gen-1", 75, 150),
    ]
    assert found["near_duplicates"] == {"count": 0, "listed": []}


def test_a_generator_of_one_format_rings(store: Store) -> None:
    def mixed(number: int) -> dict[str, Any]:
        return {"format": "JPEG" if number % 4 else "PNG", "jpeg_quality": 60 + number % 40 if number % 4 else None}

    add_all(store, [reference(number, None, **mixed(number)) for number in range(160)])
    add_all(store, [reference(number, "fair", **mixed(number)) for number in range(200, 360)])
    add_all(store, [reference(number, "png", format="PNG", jpeg_quality=None) for number in range(400, 440)])
    assert fact_warnings(store) == ["jpeg quality alone tells png from the real images (AUROC 0.88)"]
    for number, generator, rung in ((500, "fair", []), (501, "png", [True])):
        enrolment = store.enrolments.open(generator, "tests")
        store.references.add([reference(number, generator, **mixed(number))], CHECKPOINT, enrolment)
        assert [" png " in warning for warning in fact_warnings(store, enrolment)] == rung


def test_facts_that_tell_only_together_ring(store: Store) -> None:
    """Wide reals and tall fakes below a size, the other way round above: no single fact ranks them."""

    def shape(number: int, fake: bool) -> dict[str, int]:
        big = number % 2
        wide = bool(big) != fake
        long, short = (900, 600) if big else (300, 200)
        return {"width": long if wide else short, "height": short if wide else long}

    add_all(store, [reference(number, None, **shape(number, False)) for number in range(100)])
    add_all(store, [reference(number, "gen", **shape(number, True)) for number in range(200, 300)])
    found = audit(store)
    assert found["auroc"] > 0.95
    assert max(found["facts"].values()) < 0.7
    assert [warning.split(" (")[0] for warning in found["warnings"]] == [
        "file facts alone tell the fakes from the real images",
        "file facts alone tell gen from the real images",
    ]
    assert fact_warnings(store) == []


def test_a_few_images_ring_nothing(store: Store) -> None:
    add_all(store, [reference(number, None, format="JPEG") for number in range(100)])
    add_all(store, [reference(number, "gen", format="PNG") for number in range(200, 200 + module.ENOUGH - 1)])
    assert fact_warnings(store) == []
    add_all(store, [reference(300, "gen", format="PNG")])
    assert len(fact_warnings(store)) == 2


def test_near_duplicates_across_labels_are_listed(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = 0x1234_5678_9ABC_DEF0, 0x0F0F_3C3C_5A5A_6969, -0x7777_1111_2222_4444
    reals = add_all(
        store, [reference(n, None, uri=f"file:///{n}", fingerprint=one) for n, one in enumerate((first, second))]
    )
    fakes = add_all(
        store,
        [
            reference(5, "gen", fingerprint=first ^ 0b11),
            reference(6, "gen", fingerprint=second),
            reference(7, "gen", fingerprint=third),
        ],
    )
    found = near_duplicates_across(store)
    assert found == {
        "count": 2,
        "listed": [
            {
                "real": {"id": reals[1], "uri": "file:///1", "generator": None},
                "fake": {"id": fakes[1], "uri": None, "generator": "gen"},
                "bits": 0,
            },
            {
                "real": {"id": reals[0], "uri": "file:///0", "generator": None},
                "fake": {"id": fakes[0], "uri": None, "generator": "gen"},
                "bits": 2,
            },
        ],
    }
    monkeypatch.setattr(module, "LISTED_PAIRS", 1)
    shorter = near_duplicates_across(store)
    assert (shorter["count"], len(shorter["listed"])) == (2, 1)
    tell_audit({"facts": [], "auroc": None, "generators": [], "warnings": [], "near_duplicates": found})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("2 near duplicates across labels, some by chance perhaps: ")
    assert lines[-2] == f"  real {reals[1]} file:///1 and gen {fakes[1]}: 0 bits apart"


def test_a_large_set_is_sampled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_REAL", 30)
    monkeypatch.setattr(module, "SAMPLE_FAKE", 10)
    monkeypatch.setattr(
        "trainer.evaluation.file_facts.file_fact_scores", lambda facts, labels, groups: np.full(len(facts), np.nan)
    )
    add_all(store, [reference(number, None) for number in range(50)])
    add_all(store, [reference(number, f"gen-{number % 3}") for number in range(100, 145)])
    found = audit(store)
    assert found["images"] == 60
    assert found["auroc"] is None
    assert [one["images"] for one in found["generators"]] == [10, 10, 10]


def test_the_sample_is_the_first_of_each_kind_by_hash(store: Store) -> None:
    kinds = [None, "gen-a", "gen-b"]
    add_all(store, [new(number, kinds[number % 3]) for number in range(60)])
    add_all(store, [new(number, label=1) for number in range(60, 70)])  # of no known generator
    by_kind: dict[tuple[int, str | None], list[str]] = {}
    for row in store.references.list(limit=100):
        by_kind.setdefault((row.label, row.generator), []).append(row.sha256)
    first = [digest for kind, own in by_kind.items() for digest in sorted(own)[: 7 if kind == (0, None) else 4]]
    facts, labels, generators, groups = module._sample(store, 7, 4)
    assert [fact.sha256 for fact in facts] == sorted(first)
    assert (labels.sum(), len(labels), len(groups)) == (12, 19, 19)
    assert sorted(set(generators.tolist())) == ["", "gen-a", "gen-b"]


def test_one_label_cannot_be_audited(store: Store) -> None:
    for batch in ([], [reference(1, None)]):
        if batch:
            add_all(store, batch)
        assert fact_warnings(store) == []
        with pytest.raises(NothingToMeasure, match="add both first"):
            audit(store)


def test_fact_aurocs_by_hand() -> None:
    def file(size: int, width: int, quality: int | None, kind: str) -> FileFacts:
        return FileFacts("", size, width, 100, kind, quality)

    facts = [
        file(10, 100, 50, "JPEG"),
        file(20, 100, 60, "JPEG"),
        file(15, 100, None, "PNG"),
        file(30, 200, 70, "JPEG"),
    ]
    assert fact_aurocs(facts, np.array([0, 0, 1, 1])) == {
        "file size": 0.75,
        "pixels": 0.75,
        "aspect": 0.75,
        "bytes per pixel": 0.5,
        "jpeg quality": 0.5,
        "format JPEG": 0.75,
        "format PNG": 0.75,
    }
