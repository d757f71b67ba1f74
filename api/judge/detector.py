"""Journey 3: an upload becomes an embedding, neighbours and scores, and those a verdict that shows its evidence."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, repeat
from uuid import UUID, uuid4

import numpy as np

from api.breaker import DATABASE_AWAY, Breaker
from api.judge import judgement
from api.judge.calibrator import Calibrator, Fitted
from api.judge.evidence import Evidence, gather
from api.judge.neighbours import Neighbourhood
from api.judge.uploads import Prepared, Question, Upload, prepare
from api.schemas import LABELS
from api.schemas.problems import ApiError, FailedFile
from api.schemas.verdicts import IndexFacts, Known, ModelFacts, Provenance, Region, Verdict
from api.service_settings import ServiceSettings
from indexer.database.connection import connect
from indexer.follower import Follower
from indexer.ingest.ingest import register
from indexer.store import Store
from indexer.store.checkpoints import Checkpoint, with_active_folder
from indexer.store.columns import Reference
from indexer.store.detections import Detection as Record
from trainer.cores import usable_cores
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import HEADS_FILE, Heads
from trainer.model.checkpoint import CONFIG_FILE, CheckpointError
from trainer.model.embedder import Embedder

STATEMENT_SECONDS = 60
"""After which the database ends a statement of the service."""
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
        embeddings: Of `prepared.pixels`, shape (1 + regions + variants, d), the plain view's first.
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
    """A checkpoint, the index that it follows, and the calibration of both. Threads may share it once it is loaded.

    Args:
        settings: Which checkpoint and which database; once it is loaded, they name the checkpoint's folder.
    """

    settings: ServiceSettings
    named: bool = field(init=False)
    """Whether the settings name the checkpoint; otherwise it is to be the active one."""
    hindrance: str | None = field(init=False, default=None)
    """Why the active checkpoint could not be loaded; for the operator, because it may name folders."""
    embedder: Embedder = field(init=False)
    heads: Heads | None = field(init=False, default=None)
    store: Store = field(init=False)
    follower: Follower = field(init=False)
    breaker: Breaker = field(init=False, default_factory=Breaker)
    """For what verdicts need."""
    status_breaker: Breaker = field(init=False, default_factory=partial(Breaker, seconds=5.0, threads=2))
    """For what grows with the store: its time-outs leave verdicts alone."""
    neighbourhood: Neighbourhood = field(init=False)
    calibrator: Calibrator = field(init=False)
    model_facts: ModelFacts = field(init=False)
    """Which checkpoint judges."""

    def load(self) -> Detector:
        """Reach the database, load the checkpoint, follow its index. A calibration comes by `calibrate` or `start`.

        Where the active checkpoint is not on this machine, the home's stands in, and `inactive` says so.

        Raises:
            CheckpointError: The checkpoint is missing, broken, or known to the database with another dimension.
            DatabaseUnreachable: No database answers.
            DatabaseBehind: Its schema is another one.
        """
        self.named = self.settings.checkpoint is not None
        self.store = Store(connect(self.settings, statement_seconds=STATEMENT_SECONDS))
        try:
            settings = self.settings
            try:
                settings = with_active_folder(settings, self.store.checkpoints)
            except CheckpointError as error:
                if not (settings.checkpoint_folder / CONFIG_FILE).exists():
                    raise
                self.hindrance = str(error)
            return self._open(settings)
        except BaseException:
            self.store.engine.dispose()
            raise

    def successor(self) -> Detector:
        """A detector with the checkpoint that is the active one by now, beside this one on the same store.

        It is loaded and calibrated, and not started.

        Raises:
            CheckpointError: The active checkpoint is not on this machine, or broken.
            sqlalchemy.exc.DBAPIError: The database cannot be reached.
        """
        other = Detector(self.settings.model_copy(update={"checkpoint": None}))
        other.named, other.store, other.breaker, other.status_breaker = (
            False,
            self.store,
            self.breaker,
            self.status_breaker,
        )
        other._open(with_active_folder(other.settings, self.store.checkpoints)).calibrate()
        return other

    def _open(self, settings: ServiceSettings) -> Detector:
        """Load the checkpoint in the folder of these settings."""
        self.settings, folder = settings, settings.checkpoint_folder
        self.embedder = Embedder.load(folder, device=settings.device, engine=settings.engine)
        self.heads = Heads.load(folder) if (folder / HEADS_FILE).exists() else None
        images = None
        with suppress(CheckpointError):  # then nothing is calibrated, and every verdict says so
            images = CalibrationSet.load(folder)
        checkpoint = self.embedder
        heads_id = self.heads.id if self.heads else None  # a hash: not to be computed for each verdict
        self.model_facts = ModelFacts(
            checkpoint=checkpoint.id, heads=heads_id, name=checkpoint.name, engine=checkpoint.engine
        )
        try:
            register(checkpoint, self.store)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        self.follower = Follower(self.settings, self.store, checkpoint.id, checkpoint.dim)
        self.follower.load()
        self.neighbourhood = Neighbourhood(self.store, self.follower, self.breaker)
        self.calibrator = Calibrator(self.follower, self.heads, images, self.settings.k)
        return self

    def calibrate(self) -> None:
        """Load or fit the calibration of the index as it is now; seconds where it is new."""
        self.calibrator.refresh()

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

    def judge(self, cases: Sequence[Case]) -> list[Verdict]:
        """The verdicts on images, whose searches and look-ups are made together.

        A `k` other than the setting changes the neighbours shown and the vote among them; score and verdict stay
        those of the k that was calibrated.
        """
        if not cases:
            return []
        fitted = self.calibrator.current
        index = self.index_facts  # before the search, which may see a little more
        hashes = [case.prepared.image.sha256 for case in cases]
        evidence = self._gather(cases, fitted)
        rows = self.neighbourhood.rows([shown for _, shown in evidence], hashes)
        by_hash = {row.sha256: row for row in (rows or {}).values()}
        known = [by_hash.get(sha256) for sha256 in hashes]
        # Unless the bytes can be compared, what looks just alike may be this very file.
        itself = [
            own.twins if rows is None else [reference.id] if reference else []
            for (own, _), reference in zip(evidence, known, strict=True)
        ]
        found = [rows] * len(cases)
        again = [number for number, ids in enumerate(itself) if ids]
        if again:  # those that may not vote on themselves
            without = self._gather([cases[number] for number in again], fitted, [itself[number] for number in again])
            rows_again = None if rows is None else self.neighbourhood.rows([shown for _, shown in without])
            for number, pair in zip(again, without, strict=True):
                evidence[number], found[number] = pair, rows_again
        return [
            self._judge(case, own, shown, told, reference, ids, fitted, index)
            for case, (own, shown), told, reference, ids in zip(cases, evidence, found, known, itself, strict=True)
        ]

    def _judge(
        self,
        case: Case,
        evidence: Evidence,
        shown: Evidence,
        rows: Mapping[int, Reference] | None,
        reference: Reference | None,
        itself: Sequence[int],
        fitted: Fitted | None,
        index: IndexFacts,
    ) -> Verdict:
        """The verdict on one image; `reference` has its bytes, and those that are or may be `itself` did not vote."""
        prepared, question, settings = case.prepared, case.question, self.settings
        ruling = judgement.rule(evidence, fitted, self.calibrator.reason, settings, question.max_false_alarm)
        terms = evidence.terms(fitted.calibration if fitted else None)
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
            heads=judgement.heads_side_by_side(shown, fitted, self.heads, settings, terms),
            generators=judgement.shares(shown, self.follower.generator_names),
            unknown_generator=ruling.unknown_generator,
            novelty=ruling.novelty,
            neighbours=self.neighbourhood.voters(shown, rows or {}),
            provenance=prepared.provenance,
            image=prepared.image,
            model=self.model_facts,
            index=index,
            calibration=judgement.calibration_facts(fitted),
            degraded=rows is None,
        )
        self._explain(verdict, prepared, evidence)
        if reference:
            label = LABELS[reference.label]
            verdict.known = Known(id=reference.id, label=label, generator=reference.generator)
            verdict.verdict, verdict.basis, verdict.reason, verdict.unknown_generator = label, "known", None, False
        elif itself:
            doubt = (
                f"reference {itself[0]} may be this very file, and does not vote: no hash is compared while degraded"
            )
            verdict.reason = f"{verdict.reason}; {doubt}" if verdict.reason else doubt
        times = {"decode": prepared.decode_ms, "embed": case.embed_ms}
        times |= {"search": shown.search_ms, "heads": shown.heads_ms}
        verdict.timings_ms = {stage: round(value, 3) for stage, value in times.items()}
        return verdict

    def detect(self, uploads: Iterable[Upload], question: Question = Question()) -> Iterator[Verdict | FailedFile]:
        """Judge and record files, a few at a time; one that cannot be judged is named with its problem."""
        rest = iter(uploads)
        with ThreadPoolExecutor(usable_cores(), "decode") as pool:
            while chunk := list(islice(rest, CHUNK)):
                prepared = list(pool.map(self._prepare_or_fail, chunk, repeat(question)))
                good = [item for item in prepared if isinstance(item, Prepared)]
                start = time.perf_counter()
                embeddings = self.embedder.embed_stacks([item.pixels for item in good])
                share = 1000 * (time.perf_counter() - start) / max(1, len(good))
                cases = [Case(item, own, question, share) for item, own in zip(good, embeddings, strict=True)]
                verdicts = iter(self.answer(cases))
                for item in prepared:
                    yield item if isinstance(item, FailedFile) else next(verdicts)

    def _prepare_or_fail(self, upload: Upload, question: Question) -> Prepared | FailedFile:
        try:
            return self.prepare(upload, question)
        except ApiError as error:
            return FailedFile(file=upload.file, error=error.problem())

    def answer(self, cases: Sequence[Case]) -> list[Verdict]:
        """Judge images, and keep the verdicts where settings and database allow it.

        Each verdict says whether it was kept, and that the database is away. Of an image nothing is kept but the plain
        view's embedding, hash, sizes and the regions' boxes: not what its metadata say.
        """
        verdicts = self.judge(cases)
        kept = [
            (verdict, case)
            for verdict, case in zip(verdicts, cases, strict=True)
            if self.settings.record and case.question.record and not verdict.degraded
        ]
        for verdict, _ in kept:
            verdict.recorded = True
        if kept:
            try:
                self.breaker.ask(self.store.detections.add, [_record(verdict, case) for verdict, case in kept])
            except DATABASE_AWAY:
                for verdict, _ in kept:
                    verdict.degraded, verdict.recorded = True, False
        return verdicts

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

    @property
    def index_facts(self) -> IndexFacts:
        """What is searched."""
        return IndexFacts(revision=self.follower.revision, size=len(self.follower.index))

    def _gather(
        self, cases: Sequence[Case], fitted: Fitted | None, exclude: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[Evidence, Evidence]]:
        """The evidence on each case, and what is shown of it, without the references that `exclude` names for it.

        It is the same unless another k than the calibrated one was asked for, and then of the plain view alone.
        """

        def of(embeddings: Sequence[np.ndarray], k: int, without: Sequence[Sequence[int]] | None) -> list[Evidence]:
            lengths = [len(own) for own in embeddings]
            each = None
            if without is not None:
                each = [np.array(ids) for ids, length in zip(without, lengths, strict=True) for _ in range(length)]
            every = np.concatenate(embeddings)  # (n, d)
            return gather(every, k, self.follower, self.heads, calibration, each).split(lengths)

        calibration = fitted.calibration if fitted else None
        found = of([case.embeddings for case in cases], self.settings.k, exclude)
        pairs = []
        for number, (case, own) in enumerate(zip(cases, found, strict=True)):
            k, shown = case.question.k, own
            if k not in (None, own.k):
                [shown] = of([case.embeddings[:1]], k, exclude and [exclude[number]])
            pairs.append((own, shown))
        return pairs

    def _explain(self, verdict: Verdict, prepared: Prepared, evidence: Evidence) -> None:
        """Add regions and stability, whose embeddings follow the plain view's in the evidence."""
        ends = 1 + len(prepared.boxes)
        names = self.follower.generator_names
        if prepared.boxes:
            verdict.regions = [
                Region(
                    box=box,
                    score=judgement.region_score(evidence, row),
                    generator=judgement.best_generator(evidence, row, names),
                )
                for row, box in enumerate(prepared.boxes, start=1)
            ]
        if prepared.variants:
            verdict.stability = judgement.stability(prepared.variants, evidence.scores[ends:], verdict)
            if verdict.stability.flips and self.settings.flip_uncertain:
                verdict.verdict, verdict.reason, verdict.unknown_generator = "uncertain", FLIPS, False


def _record(verdict: Verdict, case: Case) -> Record:
    image, question = verdict.image, case.question
    return Record(
        id=UUID(verdict.id),
        sha256=image.sha256,
        file_bytes=case.prepared.file_bytes,
        width=image.width,
        height=image.height,
        vector=case.embeddings[0],  # (d,)
        result=verdict.model_copy(update={"provenance": Provenance()}).model_dump(mode="json")
        | {
            "version": RECORD_VERSION,
            "question": {"k": question.k, "max_false_alarm": question.max_false_alarm},  # for a replay to ask the same
        },
        checkpoint_id=verdict.model.checkpoint,
        heads_id=verdict.model.heads,
        revision=verdict.index.revision,
        api_key_id=case.api_key_id,
    )
