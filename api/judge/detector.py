"""Journey 3: an upload becomes an embedding, neighbours and scores, and those a verdict that shows its evidence."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from uuid import UUID, uuid4

import numpy as np

from api.breaker import DATABASE_AWAY, Breaker
from api.judge import judgement
from api.judge.calibrator import Calibrator, IndexCalibration
from api.judge.evidence import Evidence, Neighbourhood, gather
from api.judge.regions import VARIANTS
from api.judge.uploads import Prepared, Question, Upload, prepare
from api.schemas import LABELS
from api.schemas.problems import ApiError, FailedFile
from api.schemas.verdicts import IndexFacts, Known, ModelFacts, Provenance, Verdict
from api.service_settings import ServiceSettings
from indexer.follower import Follower
from indexer.store import Store
from indexer.store.checkpoints import Checkpoint
from indexer.store.detections import Detection as Record
from indexer.store.reference_facts import Reference
from trainer.cores import usable_cores
from trainer.heads.heads import Heads
from trainer.model.embedder import Embedder

CHUNK = 16
"""Files that `detect` embeds together."""
RECORD_VERSION = 1
"""Of the fields of a recorded verdict; it rises when one of them goes or changes its meaning."""
FLIPS = "the verdict flips under re-encoding or rescaling"


@dataclass(frozen=True, slots=True)
class Case:
    """One image to be judged.

    Attributes:
        prepared: What `Detector.prepare` made.
        embeddings: Of `prepared.views`, shape (1 + regions + variants, d), the plain view's first.
        question: As given to `prepare`.
        embed_ms: How long embedding took.
        api_key_id: Who asks.
    """

    prepared: Prepared
    embeddings: np.ndarray
    question: Question = field(default_factory=Question)
    embed_ms: float = 0.0
    api_key_id: int | None = None


@dataclass(slots=True)
class Detector:
    """A checkpoint, the index that it follows, and the calibration of both, see `loader`. Threads may share it.

    Attributes:
        settings: They name the checkpoint's folder and the database.
        store: The rows.
        breaker: For what verdicts ask of the store.
        status_breaker: For what grows with the store: its time-outs leave verdicts alone.
        embedder: The checkpoint's backbone.
        heads: The checkpoint's heads, if it has any.
        follower: The index of the checkpoint's embeddings.
        calibrator: Keeps the calibration of the index.
        model_facts: Which checkpoint judges.
        named: Whether the settings named the checkpoint; otherwise it is to be the active one.
        hindrance: Why the active checkpoint could not be loaded; for the operator, because it may name folders.
    """

    settings: ServiceSettings
    store: Store
    breaker: Breaker
    status_breaker: Breaker
    embedder: Embedder
    heads: Heads | None
    follower: Follower
    calibrator: Calibrator
    model_facts: ModelFacts
    named: bool
    hindrance: str | None = None

    @property
    def neighbourhood(self) -> Neighbourhood:
        """The references as they are shown."""
        return Neighbourhood(self.store, self.follower, self.breaker, self.settings.thumbnail_places)

    @property
    def active(self) -> Checkpoint:
        """The active checkpoint, as last seen."""
        checkpoint = self.follower.active
        assert checkpoint is not None  # one was registered, and the first becomes active
        return checkpoint

    @property
    def inactive(self) -> str | None:
        """Why another checkpoint than the active one is in use; None where it is the active one."""
        active, used = self.active, self.embedder
        if active.id == used.id:
            return None
        loading = "it cannot be loaded" if self.hindrance else "it is being loaded"
        why = "LINEUP_CHECKPOINT names the other" if self.named else loading
        return f"{used.name} ({used.id}) judges while {active.name} ({active.id}) is the active checkpoint: {why}"

    def start(self) -> None:
        """Follow changes and keep the calibration fresh in the background, until `close`."""
        self.follower.start()
        self.calibrator.start()

    def stop(self) -> None:
        """End what `start` began; detections go on with what is known by then."""
        self.calibrator.stop()
        self.follower.stop()  # writes the snapshot where that is out of date

    def close(self) -> None:
        """Stop the background work and let go of the database."""
        self.stop()
        self.breaker.close()
        self.status_breaker.close()
        self.store.engine.dispose()

    def prepare(self, upload: Upload, question: Question = Question()) -> Prepared:
        """Check, decode and preprocess one upload.

        Raises:
            ApiError: too-large, not-an-image or unreadable.
        """
        return prepare(upload, question, self.embedder.preprocess, self.settings)

    def detect(self, uploads: Iterable[Upload], question: Question = Question()) -> Iterator[Verdict | FailedFile]:
        """Judge and record files, a few at a time; one that cannot be judged is named with its problem."""

        def prepared_or_failed(upload: Upload) -> Prepared | FailedFile:
            try:
                return self.prepare(upload, question)
            except ApiError as error:
                return FailedFile(file=upload.file, error=error.problem())

        rest = iter(uploads)
        with ThreadPoolExecutor(usable_cores(), "decode") as pool:
            while chunk := list(islice(rest, CHUNK)):
                results = list(pool.map(prepared_or_failed, chunk))
                images = [result for result in results if isinstance(result, Prepared)]
                start = time.perf_counter()
                stacks = self.embedder.embed_stacks([image.views for image in images])
                share = 1000 * (time.perf_counter() - start) / max(1, len(images))
                cases = [Case(image, stack, question, share) for image, stack in zip(images, stacks, strict=True)]
                verdicts = iter(self.answer(cases))
                for result in results:
                    yield result if isinstance(result, FailedFile) else next(verdicts)

    def answer(self, cases: Sequence[Case]) -> list[Verdict]:
        """Judge images, and keep the verdicts where settings and database allow it.

        Each verdict says whether it was kept, and that the database is away. Of an image nothing is kept but the plain
        view's embedding, hash, sizes and the regions' boxes, and a thumbnail where a setting says so: not what its
        metadata say.
        """
        verdicts = self.judge(cases)
        to_record = [
            (verdict, case)
            for verdict, case in zip(verdicts, cases, strict=True)
            if self.settings.record and case.question.record and not verdict.degraded
        ]
        for verdict, _ in to_record:
            verdict.recorded = True
        if to_record:
            try:
                self.breaker.ask(self.store.detections.add, [_record(*pair) for pair in to_record])
            except DATABASE_AWAY:
                for verdict, _ in to_record:
                    verdict.degraded, verdict.recorded = True, False
        return verdicts

    def judge(self, cases: Sequence[Case]) -> list[Verdict]:
        """The verdicts on images, whose searches and look-ups are made together.

        A `k` other than the setting changes the neighbours shown and the vote among them; score and verdict stay
        those of the k that was calibrated.
        """
        if not cases:
            return []
        fitted, neighbourhood = self.calibrator.current, self.neighbourhood
        # The facts are read before the search, which may see a little more.
        index = IndexFacts(revision=self.follower.revision, size=len(self.follower.index))
        hashes = [case.prepared.image.sha256 for case in cases]
        evidence = self._gather(cases, fitted)
        references, answered = neighbourhood.references([display for _, display in evidence], hashes)
        by_hash = {reference.sha256: reference for reference in references.values()}
        known = [by_hash.get(sha256) if told else None for sha256, told in zip(hashes, answered, strict=True)]
        # Unless the bytes can be compared, what looks just alike may be this very file.
        itself = [
            ([reference.id] if reference else []) if told else basis.twins
            for (basis, _), reference, told in zip(evidence, known, answered, strict=True)
        ]
        described = [references if told else None for told in answered]
        again = [number for number, ids in enumerate(itself) if ids]
        if again:  # those that may not vote on themselves
            without = self._gather([cases[number] for number in again], fitted, [itself[number] for number in again])
            for number, pair in zip(again, without, strict=True):
                evidence[number] = pair
            told_again = [number for number in again if answered[number]]
            references, answered = neighbourhood.references([evidence[number][1] for number in told_again])
            for number, told in zip(told_again, answered, strict=True):
                described[number] = references if told else None
        columns = zip(cases, evidence, described, known, itself, strict=True)
        return [
            self._verdict(case, *pair, fitted, index, references, reference, ids)
            for case, pair, references, reference, ids in columns
        ]

    def _gather(
        self, cases: Sequence[Case], fitted: IndexCalibration, excluded: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[Evidence, Evidence]]:
        """The evidence on each case, and what is shown of it, without the references that `excluded` names for it.

        It is the same unless another k than the calibrated one was asked for, and then of the plain view alone.
        """
        parts = self.follower, self.heads, fitted.calibration
        pairs = []
        every = gather([case.embeddings for case in cases], self.settings.k, *parts, excluded)
        for number, (case, basis) in enumerate(zip(cases, every, strict=True)):
            k, display = case.question.k, basis
            if k not in (None, basis.k):
                [display] = gather([case.embeddings[:1]], k, *parts, excluded and [excluded[number]])
            pairs.append((basis, display))
        return pairs

    def _verdict(
        self,
        case: Case,
        evidence: Evidence,
        display: Evidence,
        fitted: IndexCalibration,
        index: IndexFacts,
        references: Mapping[int, Reference] | None,
        known: Reference | None,
        itself: Sequence[int],
    ) -> Verdict:
        """The verdict on one image; `known` has its bytes, and those that are or may be `itself` did not vote."""
        prepared, question, settings = case.prepared, case.question, self.settings
        if shortfall := prepared.image.shortfall:
            ruling, terms = judgement.Ruling("uncertain", shortfall), dict[str, float]()
        else:
            ruling = judgement.rule(evidence, fitted, self.calibrator.reason, settings, question.max_false_alarm)
            terms = fitted.calibration.terms(evidence.first_logits)
        names = self.follower.generator_names
        times = {"decode": prepared.decode_ms, "embed": case.embed_ms}
        times |= {"search": display.search_ms, "heads": display.heads_ms}
        verdict = Verdict(
            id=str(uuid4()),
            file=prepared.file,
            verdict=ruling.verdict,
            basis="score",
            score=ruling.score,
            probability=ruling.probability,
            false_alarm=ruling.false_alarm,
            reason=ruling.reason,
            thresholds=ruling.thresholds,
            combination=judgement.combination(terms),
            heads=judgement.heads_side_by_side(display, fitted, self.heads, settings, terms),
            generators=judgement.shares(display, names),
            unknown_generator=ruling.unknown_generator,
            novelty=ruling.novelty,
            neighbours=self.neighbourhood.voters(display, references or {}),
            provenance=prepared.provenance,
            image=prepared.image,
            model=self.model_facts,
            index=index,
            calibration=fitted.facts,
            degraded=references is None or not evidence.searched,
            timings_ms={stage: round(value, 3) for stage, value in times.items()},
        )
        if prepared.boxes:
            verdict.regions = judgement.regions(prepared.boxes, evidence, names)
        if prepared.variants is not None:
            scores = dict(zip(prepared.variants, evidence.scores[1 + len(prepared.boxes) :].tolist(), strict=True))
            verdict.stability = judgement.stability({name: scores.get(name) for name in VARIANTS}, verdict)
            if verdict.stability.flips and settings.flip_uncertain:
                verdict.verdict, verdict.reason, verdict.unknown_generator = "uncertain", FLIPS, False
        if known:
            label = LABELS[known.label]
            verdict.known = Known(id=known.id, label=label, generator=known.generator)
            verdict.verdict, verdict.basis, verdict.reason, verdict.unknown_generator = label, "known", None, False
        elif itself:
            doubt = "may be this very file, and does not vote: no hash is compared while degraded"
            reasons = (verdict.reason, f"reference {itself[0]} {doubt}")
            verdict.reason = "; ".join(reason for reason in reasons if reason)
        return verdict


def _record(verdict: Verdict, case: Case) -> Record:
    image, question = verdict.image, case.question
    result = verdict.model_copy(update={"provenance": Provenance()}).model_dump(mode="json")
    asked = {"k": question.k, "max_false_alarm": question.max_false_alarm}  # for a replay to ask the same
    return Record(
        id=UUID(verdict.id),
        sha256=image.sha256,
        file_bytes=case.prepared.file_bytes,
        width=image.width,
        height=image.height,
        vector=case.embeddings[0],  # (d,)
        result=result | {"version": RECORD_VERSION, "question": asked},
        checkpoint_id=verdict.model.checkpoint,
        heads_id=verdict.model.heads,
        revision=verdict.index.revision,
        api_key_id=case.api_key_id,
        thumbnail=case.prepared.thumbnail,
    )
