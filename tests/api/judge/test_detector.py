"""Verdicts on small images with a random backbone: their parts agree with each other and with the store."""

import copy
import io
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest
from conftest import small_image
from PIL import Image, PngImagePlugin
from sqlalchemy.exc import OperationalError

from api import verdict_log
from api.access import Caller
from api.inflight import Budget, Reservation, reservation_in_use
from api.judge import evidence
from api.judge.detector import FLIPS, RECORD_VERSION, Case, Detector
from api.judge.evidence import SearchQuery
from api.judge.judgement import decide
from api.judge.loader import load_detector
from api.judge.regions import VARIANTS
from api.judge.uploads import Question, Upload, file_name
from api.schemas.problems import ApiError, FailedFile
from api.schemas.verdicts import Provenance, Verdict
from api.service_settings import ServiceSettings
from indexer import follower
from indexer.follower import Neighbour
from indexer.index.index import Neighbours
from indexer.index.milvus import EngineAway
from indexer.index.vector_index import VectorIndex
from indexer.store.detections import Detection
from indexer.store.reference_facts import Reference
from trainer.heads.calibration_set import refit_command
from trainer.heads.heads import unit_length

FIELDS = {
    *("id", "file", "verdict", "basis", "score", "false_alarm", "reason", "thresholds", "known", "heads"),
    "combination",
    *("generators", "unknown_generator", "novelty", "neighbours", "provenance", "image", "model", "index"),
    *("calibration", "degraded", "recorded", "timings_ms"),
}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def query(seed: int = 1, fake: bool = True, size: int = 64) -> Upload:
    return Upload(f"query-{seed}.png", png(small_image(70_000 + seed, fake, size)))


def judged(detector: Detector, upload: Upload, question: Question = Question()) -> Verdict:
    (result,) = detector.detect([upload], question)
    assert isinstance(result, Verdict), result
    return result


def embedded(detector: Detector, images: Sequence[Image.Image]) -> np.ndarray:
    """Unit embeddings of the plain views, shape (n, d)."""
    return unit_length(detector.embedder.embed_pixels(detector.embedder.preprocess(images)))


def with_settings(detector: Detector, **changes: object) -> Detector:
    """The same checkpoint, index and store under other settings."""
    other = copy.copy(detector)
    other.settings = detector.settings.model_copy(update=changes)
    return other


@pytest.fixture(scope="module")
def detector(populated: ServiceSettings) -> Iterator[Detector]:
    detector = load_detector(populated)
    detector.calibrator.refresh()
    yield detector
    detector.close()


def test_a_verdict_has_the_fields_of_the_contract(detector: Detector) -> None:
    shown = judged(detector, query()).model_dump(mode="json")
    assert set(shown) == FIELDS | {"probability"}
    assert set(shown["heads"]) == {"knn", "nn1", "linear", "svm"}
    assert set(shown["timings_ms"]) == {"decode", "embed", "search", "heads"}
    assert shown["image"] == {
        "sha256": shown["image"]["sha256"],
        "width": 64,
        "height": 64,
        "format": "PNG",
        "crop": list(detector.embedder.preprocess.box(64, 64)),
        "shortfall": None,
    }
    assert shown["index"] == {"revision": detector.follower.revision, "size": 120}
    # 60 of each, and the 30 references of the generator that is not among them
    assert shown["calibration"] == {"revision": detector.follower.revision, "real": 60, "fake": 90, "new_sources": 0}
    assert Verdict.model_validate(shown).model_dump(mode="json") == shown


def test_the_heads_and_the_neighbours_tell_the_same_story(detector: Detector) -> None:
    for seed, fake in ((1, True), (2, False), (3, True)):
        verdict = judged(detector, query(seed, fake))
        heads, near = verdict.heads, verdict.neighbours
        assert heads.knn is not None
        assert heads.nn1 is not None
        assert [n.similarity for n in near] == sorted((n.similarity for n in near), reverse=True)
        assert [sum(n.label == label for n in near) for label in ("real", "fake")] == [5, 5]
        assert sum(n.weight or 0 for n in near) == pytest.approx(1)
        assert sum(n.weight or 0 for n in near if n.label == "fake") == pytest.approx(heads.knn.score)
        assert heads.knn.votes.real == sum(n.label == "real" for n in near[:5])
        assert heads.knn.votes.fake == sum(n.label == "fake" for n in near[:5])
        assert (heads.nn1.id, heads.nn1.label, heads.nn1.similarity) == (near[0].id, near[0].label, near[0].similarity)
        assert heads.knn.nearest.fake == max(n.similarity for n in near if n.label == "fake")
        assert sum(share.share for share in verdict.generators) == pytest.approx(1)
        assert {share.name for share in verdict.generators} <= {"gen-a", "gen-b"}
        for head in (heads.knn, heads.linear):
            assert head is not None
            assert head.label == ("fake" if head.score >= 0.5 else "real")
        assert heads.svm is not None
        assert heads.svm.label == ("fake" if heads.svm.score > 0 else "real")


def test_contributions_and_bias_add_up_to_the_score(detector: Detector) -> None:
    for question in (Question(), Question(k=2)):
        verdict = judged(detector, query(), question)
        heads, combined = verdict.heads, verdict.combination
        assert combined is not None
        added = [head.contribution for head in (heads.knn, heads.linear, heads.svm) if head and head.contribution]
        assert len(added) == 3
        assert combined.bias + sum(added) == pytest.approx(combined.logit)
        assert 1 / (1 + np.exp(-combined.logit)) == pytest.approx(verdict.score)


def test_the_verdict_follows_from_score_and_thresholds(detector: Detector) -> None:
    seen = set()
    for seed in range(12):
        verdict = judged(detector, query(seed, seed % 2 == 0), Question(max_false_alarm=0.05 + 0.4 * (seed % 3)))
        assert verdict.score is not None
        assert verdict.thresholds.fake is not None
        assert verdict.thresholds.real is not None
        expected = "fake" if verdict.score >= verdict.thresholds.fake else None
        expected = expected or ("real" if verdict.score < verdict.thresholds.real else "uncertain")
        assert verdict.verdict == expected
        assert (verdict.reason is None) == (expected != "uncertain")
        seen.add(expected)
    assert len(seen) > 1


def test_neighbours_are_the_nearest_of_each_label(detector: Detector, image_folder: Path) -> None:
    upload = query(5)
    verdict = judged(detector, upload)
    with Image.open(io.BytesIO(upload.data)) as image:
        embedding = embedded(detector, [image])[0]  # (d,)
    for label, folder in (("real", "real"), ("fake", "fake")):
        files = sorted(path for path in (image_folder / folder).rglob("*") if path.is_file())
        known = embedded(detector, [Image.open(path).convert("RGB") for path in files])  # (n, d)
        best = np.sort(known @ embedding)[::-1][:5]
        shown = [n.similarity for n in verdict.neighbours if n.label == label]
        np.testing.assert_allclose(shown, best, atol=2e-3)


def test_a_reference_is_known_and_does_not_vote_for_itself(detector: Detector, image_folder: Path) -> None:
    path = image_folder / "fake" / "gen-b" / "003.png"
    verdict = judged(detector, Upload("renamed.png", path.read_bytes()))
    assert verdict.known is not None
    assert (verdict.basis, verdict.verdict, verdict.known.label, verdict.known.generator) == (
        "known",
        "fake",
        "fake",
        "gen-b",
    )
    assert verdict.known.id not in [n.id for n in verdict.neighbours]
    assert verdict.neighbours[0].similarity < 0.99999
    assert verdict.score is not None
    row = detector.store.references.get(verdict.known.id)
    assert row is not None
    assert row.uri == path.as_uri()


def test_the_false_alarm_rate_may_be_asked_for(detector: Detector) -> None:
    sure = with_settings(detector, max_miss=0.001)  # no miss can be promised either: the verdict is open
    usual, loose = (judged(detector, query(), Question(max_false_alarm=rate)) for rate in (None, 0.5))
    strict = judged(sure, query(), Question(max_false_alarm=0.001))
    assert usual.thresholds.fake is not None
    assert loose.thresholds.fake is not None
    assert loose.thresholds.fake < usual.thresholds.fake
    assert (strict.thresholds.fake, strict.thresholds.real, strict.verdict) == (None, None, "uncertain")
    assert usual.score == loose.score == strict.score
    assert strict.reason == (
        "a false alarm rate of 0.001 needs 939 more real calibration images; "
        "a miss rate of 0.001 needs 909 more fake calibration images"
    )


def test_k_changes_what_is_shown_and_not_the_verdict(detector: Detector) -> None:
    usual, few = judged(detector, query()), judged(detector, query(), Question(k=2))
    assert (usual.verdict, usual.score, usual.thresholds) == (few.verdict, few.score, few.thresholds)
    assert len(few.neighbours) == 4
    assert usual.heads.knn is not None
    assert few.heads.knn is not None
    assert (few.heads.knn.k, few.heads.knn.probability) == (2, None)
    assert usual.heads.knn.probability is not None
    many = judged(detector, query(), Question(k=1000))
    assert len(many.neighbours) == 120


def test_only_what_is_shown_is_looked_up(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[int]] = []
    named: list[tuple[int, ...]] = []
    get_many, neighbours = detector.store.references.get_many, detector.follower.neighbours

    def seen(ids: set[int], hashes: Sequence[str] = ()) -> dict[int, Reference]:
        asked.append(ids)
        return get_many(ids, hashes)

    def told(found: Neighbours) -> list[list[Neighbour]]:
        named.append(found.ids.shape)
        return neighbours(found)

    monkeypatch.setattr(detector.store.references, "get_many", seen)
    monkeypatch.setattr(detector.follower, "neighbours", told)
    monkeypatch.setattr(follower, "depths", lambda k, reals, fakes: (k, 4 * k))  # of a lopsided reference set
    verdict = judged(detector, query(), Question(explain=frozenset({"regions"})))
    assert [len(ids) for ids in asked] == [10]
    assert named == [(1, 5), (1, 5)]
    assert {n.id for n in verdict.neighbours} == asked[0]
    assert None not in {n.thumbnail for n in verdict.neighbours}


def test_a_slow_look_up_degrades_only_who_asked_for_much(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, opened = list[int](), threading.Event()
    get_many = detector.store.references.get_many

    def slow(ids: set[int], hashes: Sequence[str] = ()) -> dict[int, Reference]:
        asked.append(len(ids))
        if len(ids) > 50:
            opened.wait(60)
        return get_many(ids, hashes)

    monkeypatch.setattr(evidence, "PAGE", 50)
    monkeypatch.setattr(detector.breaker, "seconds", 0.3)
    monkeypatch.setattr(detector.store.references, "get_many", slow)
    questions = [Question(k=k, record=False) for k in (1000, None, None, 1000)]
    prepared = [detector.prepare(query(60 + number), question) for number, question in enumerate(questions)]
    embeddings = detector.embedder.embed_stacks([item.views for item in prepared])
    cases = [Case(*one) for one in zip(prepared, embeddings, questions, strict=True)]
    together = detector.answer(cases)
    after = judged(detector, query(66))
    opened.set()
    assert [verdict.degraded for verdict in together] == [True, False, False, True]
    assert [len(verdict.neighbours) for verdict in together] == [120, 10, 10, 120]
    assert (after.degraded, after.recorded) == (False, True)
    assert asked[0] <= 20  # those that ask for little together, and first
    assert asked[1] == 120  # and nobody waits for as much a second time
    assert len(asked) == 3


def test_the_prior_moves_probabilities_only(detector: Detector) -> None:
    wary = load_detector(detector.settings.model_copy(update={"prior": 0.9, "record": False}))
    wary.calibrator.refresh()
    try:
        usual, shifted = judged(detector, query()), judged(wary, query())
    finally:
        wary.close()
    assert (usual.verdict, usual.score, usual.thresholds) == (shifted.verdict, shifted.score, shifted.thresholds)
    assert usual.probability == pytest.approx(usual.score)
    assert shifted.probability is not None
    assert usual.score is not None
    odds = 9 * usual.score / (1 - usual.score)
    assert shifted.probability == pytest.approx(odds / (1 + odds))
    assert usual.heads.linear is not None
    assert shifted.heads.linear is not None
    assert shifted.heads.linear.score == usual.heads.linear.score
    assert (shifted.heads.linear.probability or 0) > (usual.heads.linear.probability or 1)


def test_an_answer_does_not_depend_on_its_batch(detector: Detector) -> None:
    prepared = [detector.prepare(query(seed)) for seed in range(7)]
    together = detector.embedder.embed_windows([item.views[0] for item in prepared])
    for item, vector in zip(prepared, together, strict=True):
        alone = detector.embedder.embed_windows(item.views)[0]
        assert float(unit_length(alone[None])[0] @ unit_length(vector[None])[0]) > 0.9999
        first, second = detector.judge([Case(item, v[None]) for v in (alone, vector)])
        assert first.score == pytest.approx(second.score, abs=1e-3)
        assert [n.id for n in first.neighbours[:3]] == [n.id for n in second.neighbours[:3]]


def test_cases_judged_together_are_judged_as_each_alone(detector: Detector) -> None:
    known, familiar = (Upload("known.png", png(small_image(seed, False))) for seed in (1, 3))
    asked = [
        (query(1), Question()),
        (query(2, size=80), Question(explain=frozenset({"regions", "stability"}))),
        (known, Question(k=3)),
        (query(3), Question(k=9, max_false_alarm=0.4)),
        (familiar, Question(k=4)),
    ]
    prepared = [detector.prepare(*one) for one in asked]
    embeddings = detector.embedder.embed_stacks([item.views for item in prepared])
    cases = [Case(*one) for one in zip(prepared, embeddings, [question for _, question in asked], strict=True)]
    together, alone = detector.judge(cases), [detector.judge([case])[0] for case in cases]
    assert [verdict.basis for verdict in together] == ["score", "score", "known", "score", "known"]
    assert [len(verdict.neighbours) for verdict in together] == [10, 10, 6, 18, 8]
    for verdict in (together[2], together[4]):
        assert verdict.known is not None
        assert verdict.known.id not in [near.id for near in verdict.neighbours]
    for one, other in zip(together, alone, strict=True):
        assert [n.id for n in one.neighbours] == [n.id for n in other.neighbours]
        assert verdict_log.changes(one.model_dump(mode="json"), other) == []
        assert (one.regions is None) == (other.regions is None)
        for region, again in zip(one.regions or [], other.regions or [], strict=True):
            assert (region.box, region.generator) == (again.box, again.generator)
            assert region.score == pytest.approx(again.score)
        assert (one.stability is None) == (other.stability is None)
        if one.stability and other.stability:
            assert one.stability.scores == pytest.approx(other.stability.scores)
    assert [verdict.regions is None for verdict in together] == [True, False, True, True, True]
    assert detector.judge([]) == []


def test_each_case_is_recorded_as_it_asks(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Detection] = []
    monkeypatch.setattr(detector.store.detections, "add", kept.extend)
    prepared = [detector.prepare(query(seed)) for seed in range(4, 8)]
    embeddings = detector.embedder.embed_stacks([item.views for item in prepared])
    asked = [Question(), Question(record=False), Question(k=2), Question()]
    cases = [
        Case(item, own, question, api_key_id=number)
        for number, (item, own, question) in enumerate(zip(prepared, embeddings, asked, strict=True))
    ]
    verdicts = detector.answer(cases)
    assert [verdict.recorded for verdict in verdicts] == [True, False, True, True]
    assert [(str(row.id), row.sha256, row.api_key_id) for row in kept] == [
        (verdict.id, case.prepared.image.sha256, case.api_key_id)
        for verdict, case in zip(verdicts, cases, strict=True)
        if case.question.record
    ]
    for row, case in zip(kept, [cases[0], *cases[2:]], strict=True):
        np.testing.assert_array_equal(row.vector, case.embeddings[0])


def test_too_little_to_judge_is_uncertain_whatever_the_heads_say(detector: Detector) -> None:
    rash = with_settings(detector, max_false_alarm=0.9, max_miss=0.9, unknown=0.99, flip_uncertain=True)
    flat = "too flat to judge: brightness varies by 0.0 of 255, where 3 are needed"
    small = "too small to judge: 15x64 pixels, where 16 a side are needed"
    for size, reason in (((64, 64), flat), ((15, 64), small)):
        upload = Upload("black.png", png(Image.new("RGB", size)))
        verdict = judged(rash, upload, Question(explain=frozenset({"regions", "stability"})))
        assert (verdict.verdict, verdict.basis, verdict.reason) == ("uncertain", "score", reason)
        assert verdict.image.shortfall == reason
        derived = (verdict.score, verdict.probability, verdict.false_alarm, verdict.novelty, verdict.combination)
        assert derived == (None,) * 5
        assert not verdict.unknown_generator
        assert not {"regions", "stability"} & set(verdict.model_dump())
        heads = verdict.heads  # the evidence is shown all the same
        assert heads.knn is not None
        assert heads.linear is not None
        assert (heads.knn.contribution, heads.linear.contribution) == (None, None)
        assert len(verdict.neighbours) == 10
        row = detector.store.detections.get(UUID(verdict.id))
        assert row is not None
        assert verdict_log.replay(rash, row, Caller()).changed == []


def test_regions_and_stability_come_when_asked_for(detector: Detector) -> None:
    assert not {"regions", "stability"} & set(judged(detector, query()).model_dump())
    verdict = judged(detector, query(size=80), Question(explain=frozenset({"regions", "stability"})))
    assert verdict.regions is not None
    assert [region.box for region in verdict.regions][:3] == [(0, 0, 32, 32), (24, 0, 32, 32), (48, 0, 32, 32)]
    assert len(verdict.regions) == 9
    assert len({region.score for region in verdict.regions}) > 1
    assert verdict.stability is not None
    assert list(verdict.stability.scores) == list(VARIANTS)
    scores = [verdict.score, *verdict.stability.scores.values()]
    assert verdict.stability.spread == pytest.approx(max(s or 0 for s in scores) - min(s or 0 for s in scores))
    plain = judged(detector, query(size=80))
    assert plain.score == pytest.approx(verdict.score)
    assert plain.verdict == verdict.verdict


def test_stability_judges_copies_as_uploads_and_leaves_out_what_has_too_little(detector: Detector) -> None:
    careful = with_settings(detector, flip_uncertain=True)
    question = Question(max_false_alarm=0.9, explain=frozenset({"stability"}))
    decided = []
    for seed in range(4):
        image = small_image(70_000 + seed, True, 24)  # 12 pixels at half the size, where 16 are needed
        verdict = judged(careful, Upload("small.png", png(image)), question)
        assert verdict.stability is not None
        copies = {
            name: judged(detector, Upload(f"{name}.png", png(change(image))), Question(max_false_alarm=0.9))
            for name, change in VARIANTS.items()
        }
        scores = {name: copy.score for name, copy in copies.items()}
        assert scores["scale-0.5"] is None
        assert verdict.stability.scores == pytest.approx(scores, abs=1e-4)
        known = [score for score in (verdict.score, *scores.values()) if score is not None]
        assert verdict.stability.spread == pytest.approx(max(known) - min(known), abs=1e-4)
        of_copies = {copy.verdict for copy in copies.values() if copy.score is not None}
        assert verdict.stability.flips == (of_copies != {decide(verdict.score, verdict.thresholds)})
        assert (verdict.reason == FLIPS) == verdict.stability.flips
        decided.append(verdict.verdict != "uncertain")
    assert any(decided)


def test_a_flip_makes_uncertain_where_the_operator_says_so(detector: Detector) -> None:
    usual, strict = (with_settings(detector, flip_uncertain=flip, unknown=1.1) for flip in (False, True))
    explain = Question(max_false_alarm=0.15, explain=frozenset({"stability"}))
    flipped, unknown = 0, 0
    for seed in range(8):
        first, careful = judged(usual, query(seed), explain), judged(strict, query(seed), explain)
        assert first.stability is not None
        flips = first.stability.flips
        assert first.unknown_generator == (first.verdict == "fake")
        assert careful.verdict == ("uncertain" if flips else first.verdict)
        assert careful.unknown_generator == (careful.verdict == "fake")
        flipped += flips
        unknown += flips and first.unknown_generator
    assert flipped
    assert unknown


def test_a_detection_is_recorded_without_its_image(detector: Detector) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a private prompt")
    buffer = io.BytesIO()
    small_image(70_040, True, 64).save(buffer, format="PNG", pnginfo=text)
    upload = Upload("a.png", buffer.getvalue())
    verdict = judged(detector, upload)
    assert verdict.provenance.metadata == {"png:parameters": "a private prompt"}
    row = detector.store.detections.get(UUID(verdict.id))
    assert row is not None
    assert row.result.pop("version") == RECORD_VERSION
    assert row.result.pop("question") == {"k": None, "max_false_alarm": None}
    assert Verdict.model_validate(row.result) == verdict.model_copy(update={"provenance": Provenance()})
    assert "private" not in str(row)
    assert (row.sha256, row.file_bytes, row.width, row.height) == (verdict.image.sha256, len(upload.data), 64, 64)
    assert row.vector.shape == (48,)
    assert verdict.recorded
    quiet = judged(with_settings(detector, record=False), query(41))
    assert not quiet.recorded
    assert detector.store.detections.get(UUID(quiet.id)) is None


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400),
        (b"not an image at all", 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        (png(small_image(1, False))[:300], 400),
        (b"%PDF-1.7" + png(small_image(1, False)), 415),
    ],
)
def test_what_is_no_image_is_named_with_its_problem(detector: Detector, data: bytes, status: int) -> None:
    good = query()
    first, second = detector.detect([Upload("bad.png", data), good])
    assert isinstance(first, FailedFile)
    assert (first.file, first.error.status) == ("bad.png", status)
    assert "bad.png" in first.error.detail
    assert isinstance(second, Verdict)


def test_limits_on_bytes_and_pixels(detector: Detector) -> None:
    upload = query()
    for name, limit in (("max_upload_bytes", len(upload.data) - 1), ("max_pixels", 64 * 64 - 1)):
        with pytest.raises(ApiError, match=f"LINEUP_{name.upper()}") as caught:
            with_settings(detector, **{name: limit}).prepare(upload)
        assert caught.value.status == 413


def test_limits_on_time_end_the_work_itself(detector: Detector) -> None:
    with pytest.raises(ApiError, match=r"more than 1e-05 seconds to read") as caught:
        with_settings(detector, image_seconds=1e-5).prepare(query())
    assert caught.value.kind == "unreadable"
    token = reservation_in_use.set(Reservation(Budget(1), deadline=time.monotonic()))
    try:
        with pytest.raises(ApiError, match="time for it") as caught:
            detector.prepare(query())
    finally:
        reservation_in_use.reset(token)
    assert caught.value.kind == "not-ready"
    assert detector.prepare(query()).image.width == 64


def test_while_the_database_is_away_memory_answers(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = judged(detector, query(50))

    def away(*args: object) -> None:
        raise OperationalError("select", {}, Exception("connection refused"))

    monkeypatch.setattr(detector.breaker, "pause", 0.0)
    monkeypatch.setattr(detector.store.references, "get_many", away)
    monkeypatch.setattr(detector.store.detections, "add", away)
    verdict = judged(detector, query(50))
    assert (verdict.degraded, verdict.recorded) == (True, False)
    assert (usual.degraded, usual.recorded) == (False, True)
    assert (verdict.verdict, verdict.score) == (usual.verdict, usual.score)
    kept = ("id", "label", "generator", "source", "similarity", "weight")
    assert [[getattr(n, f) for f in kept] for n in verdict.neighbours] == [
        [getattr(n, f) for f in kept] for n in usual.neighbours
    ]
    assert {n.thumbnail for n in verdict.neighbours} == {None}
    assert None not in {n.thumbnail for n in usual.neighbours}
    monkeypatch.undo()
    assert detector.store.detections.get(UUID(verdict.id)) is None
    assert not judged(detector, query(50)).degraded


def test_while_the_search_engine_is_away_the_other_heads_judge(
    detector: Detector, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image_folder / "fake" / "gen-b" / "003.png"
    reference = Upload(path.name, path.read_bytes())
    usual = judged(detector, query(50))

    def away(*args: object, **options: object) -> None:
        raise EngineAway("the search engine is away")

    for name in ("search", "search_both"):
        monkeypatch.setattr(VectorIndex, name, away)
    verdict, known = judged(detector, query(50)), judged(detector, reference)
    assert (verdict.degraded, verdict.recorded) == (True, False)
    assert (verdict.heads.knn, verdict.heads.nn1, verdict.neighbours) == (None, None, [])
    assert verdict.heads.linear == usual.heads.linear.model_copy(  # type: ignore[union-attr]
        update={"contribution": verdict.heads.linear and verdict.heads.linear.contribution}
    )
    assert verdict.score is not None
    assert (known.basis, known.verdict, known.degraded) == ("known", "fake", True)


def test_while_the_database_is_away_what_may_be_the_image_itself_does_not_vote(
    detector: Detector, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image_folder / "fake" / "gen-b" / "003.png"
    known = judged(detector, Upload("a.png", path.read_bytes()))
    assert known.known is not None
    monkeypatch.setattr(detector.follower, "degraded", True)
    verdict = judged(detector, Upload("a.png", path.read_bytes()))
    assert (verdict.degraded, verdict.known, verdict.basis) == (True, None, "score")
    assert verdict.score == known.score
    assert [n.id for n in verdict.neighbours] == [n.id for n in known.neighbours]
    assert f"reference {known.known.id} may be this very file" in str(verdict.reason)
    assert "may be" not in str(judged(detector, query(51)).reason)


def test_an_empty_store_still_answers_from_the_heads(settings: ServiceSettings, tiny_checkpoint: Path) -> None:
    detector = load_detector(settings.model_copy(update={"checkpoint": tiny_checkpoint, "device": "cpu"}))
    try:
        before = judged(detector, query())
        assert (before.verdict, before.score) == ("uncertain", None)
        assert before.reason == "nothing is calibrated yet: the calibration is being fitted"
        detector.calibrator.refresh()
        verdict = judged(detector, query())
    finally:
        detector.close()
    assert (verdict.heads.knn, verdict.heads.nn1, verdict.neighbours, verdict.generators) == (None, None, [], [])
    assert verdict.heads.linear is not None
    assert verdict.score is not None
    assert verdict.novelty is None


def test_the_same_revision_of_another_history_is_calibrated_anew(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = detector.calibrator.current
    monkeypatch.setattr(detector.calibrator, "current", before)  # afterwards again
    elsewhere = detector.follower.position._replace(nonce=uuid4())
    monkeypatch.setattr(detector.follower.copy, "position", elsewhere)
    detector.calibrator.refresh()
    after = detector.calibrator.current
    assert (after.position, after.revision) == (elsewhere, before.revision)


def test_without_calibration_images_the_verdict_says_why(
    settings: ServiceSettings, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_checkpoint / name).read_bytes())
    detector = load_detector(settings.model_copy(update={"checkpoint": bare, "device": "cpu"}))
    try:
        detector.calibrator.refresh()
        verdict = judged(detector, query())
    finally:
        detector.close()
    assert (verdict.verdict, verdict.score, verdict.calibration) == ("uncertain", None, None)
    assert verdict.reason is not None
    assert verdict.reason.startswith("nothing is calibrated: the checkpoint lacks heads or calibration images")
    assert verdict.reason.endswith(f" with --checkpoint and the folder of checkpoint tiny ({verdict.model.checkpoint})")
    assert str(bare) not in verdict.reason
    assert f"run `{refit_command(bare)}`" in caplog.text
    assert verdict.heads.linear is None


def test_search_filters_and_pages(detector: Detector) -> None:
    embedding = detector.embedder.embed_windows(detector.prepare(query(9)).views)[0]
    search = detector.neighbourhood.search
    everything, following = search(embedding, SearchQuery(limit=100, offset=0))
    assert (len(everything), following) == (100, 100)
    rest, following = search(embedding, SearchQuery(limit=100, offset=100))
    assert (len(rest), following) == (20, None)
    ids = [n.id for n in everything + rest]
    assert len(set(ids)) == 120
    paged, following = search(embedding, SearchQuery(limit=7, offset=7))
    assert ([n.id for n in paged], following) == (ids[7:14], 14)
    only, _ = search(embedding, SearchQuery(generator="GEN-B", limit=100))
    assert {n.generator for n in only} == {"gen-b"}
    assert [n.id for n in only] == [n.id for n in everything + rest if n.generator == "gen-b"]
    assert {n.label for n in search(embedding, SearchQuery(label="real", limit=100))[0]} == {"real"}
    assert len(search(embedding, SearchQuery(source="tests", limit=100))[0]) == 100
    assert search(embedding, SearchQuery(source="elsewhere")) == ([], None)
    assert search(embedding, SearchQuery(generator="nobody")) == ([], None)
    assert {n.weight for n in everything} == {None}


def test_names_of_files_are_made_fit_to_show() -> None:
    assert file_name("holiday ünïcode.png") == "holiday ünïcode.png"
    assert file_name("a\nb\x00\u202ec.png") == "a?b??c.png"
    assert len(file_name("x" * 1000)) == 255
    assert file_name(None) == file_name("") == "unnamed"
