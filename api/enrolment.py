"""Reference images that come and go over HTTP; they come on the way of all: `indexer.ingest.ingest`."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from api.inflight import deadline_in_use
from api.judge.detector import Detector
from api.judge.uploads import Question, Upload, prepare
from api.schemas import LABELS, Label
from api.schemas.problems import ApiError, FieldError
from api.schemas.resources import Added, ReferenceChange, Removed
from indexer.ingest.ingest import FORGOTTEN, ingest
from indexer.measure.discovery import enrol_judged
from indexer.measure.enrolment_effect import consequences
from indexer.store.detections import Detection
from indexer.store.generators import check_generator_name
from indexer.store.reference_facts import Reference
from indexer.store.relabelling import Kind, was
from indexer.store.removing import Removed as RemovedRows
from trainer.data.entry import Entry
from trainer.process_pool import DeadlinePassed


@dataclass(frozen=True, slots=True)
class Batch:
    """What the images of one request are.

    Raises:
        ApiError: bad-field, for fakes without a generator, real images with one, or a name that none may have.
    """

    label: Label
    generator: str | None
    source: str

    def __post_init__(self) -> None:
        check_kind(self.label, self.generator)

    def entry(self, upload: Upload) -> Entry:
        """An upload as `ingest` takes it: there is nowhere to read it again, and each file is a group of its own."""
        return Entry(
            key=upload.file,
            group="",  # the hash of its bytes, which `ingest` makes
            label=LABELS.index(self.label),
            generator=self.generator,
            source=self.source,
            uri="",
            split=None,
            size=None,
            mtime=None,
            attributes={},
            read=partial(bytes, upload.data),
        )


def check_kind(label: Label, generator: str | None) -> None:
    """See that real images have no generator, and fakes one.

    Raises:
        ApiError: bad-field, also for a name that no generator may have.
    """
    try:
        if label == "real" and generator:
            raise ValueError("a real image has no generator: leave it out, or send label=fake")
        if label == "fake" and not generator:
            raise ValueError("fake images need the name of what made them: send generator, or label=real")
        if generator:
            check_generator_name(generator)
    except ValueError as error:
        field = FieldError(field="generator", message=str(error))
        raise ApiError("bad-field", str(error), errors=[field]) from error


def enrol(detector: Detector, uploads: Sequence[Upload], batch: Batch) -> Added:
    """Store uploads as references, bring this process's index up to date, and measure what that changed.

    Raises:
        ApiError: conflict, when all are known with another label or generator; the first file's own problem, when
            none can be read; not-ready, when the request has no time left. Images that may not come back are only
            listed as rejected.
        CheckpointSwitched: The detector's checkpoint is no longer the active one, though no setting names it.
    """
    settings = detector.settings
    excesses = [(upload, upload.excess(settings)) for upload in uploads]
    try:
        report = ingest(
            (batch.entry(upload) for upload, excess in excesses if not excess),
            detector.embedder,
            detector.store,
            max_pixels=settings.max_pixels,
            image_seconds=settings.image_seconds,
            deadline=deadline_in_use(),
            generator=batch.generator,
            source=batch.source,
            keep_bytes=settings.keep_uploads,
            while_active=not detector.named,
        )
    except DeadlinePassed as error:
        raise ApiError("not-ready", f"{error}; send fewer images at once", retry_after=5) from error
    large = [{"file": upload.file, "reason": excess} for upload, excess in excesses if excess]
    added = Added.model_validate(report | {"rejected": [*report["rejected"], *large]})
    if not (added.added or added.known or added.embedded):
        if added.conflicts and not added.rejected:
            detail = "every image is known with another label or generator; remove those references first"
            raise ApiError("conflict", detail, conflicts=added.conflicts)
        if not added.conflicts and all(item.reason != FORGOTTEN for item in added.rejected):
            prepare(uploads[0], Question(), detector.embedder.preprocess, settings)  # raises what is wrong with it
    return measured(detector, added)


def measured(detector: Detector, added: Added) -> Added:
    """Bring this process's index up to date, and tell and keep what an enrolment changed, where there was one."""
    detector.follower.catch_up()
    if (enrolment := added.enrolment) is not None:
        added = added.model_copy(update=consequences(detector.settings, detector.follower, enrolment))
        detector.store.enrolments.finish(enrolment, added.model_dump(mode="json"))
    return added


def correct(
    detector: Detector, verdict: Detection, batch: Batch, upload: Upload | None = None
) -> tuple[Added, Reference, Reference | None]:
    """Make a reference of a judged image, or relabel the one that it is.

    Args:
        detector: Where the verdict is kept.
        verdict: On the image.
        batch: What the image is.
        upload: The image itself; without it the reference stands on the embedding of the verdict.

    Returns:
        What was added, the reference, and what it was before if it was relabelled.

    Raises:
        ApiError: bad-field, when the upload is another image; conflict, when the image may not come back, has become a
            reference of another kind meanwhile, or the verdict's embedding is of another checkpoint; and as `enrol`.
        CheckpointSwitched: See `enrol`.
    """
    references, sha256 = detector.store.references, verdict.sha256
    if upload is not None and hashlib.sha256(upload.data).hexdigest() != sha256:
        detail = f"{upload.file} is not the image of detection {verdict.id}: send that one, or none"
        raise ApiError("bad-field", detail, errors=[FieldError(field="image", message=detail)])
    if references.blocked_hashes([sha256]):
        raise ApiError("conflict", f"the image of detection {verdict.id} {FORGOTTEN}")
    known = references.find(sha256)
    if known is not None:
        relabel(detector, known.id, ReferenceChange(label=batch.label, generator=batch.generator))
    if upload is not None:
        added = enrol(detector, [upload], batch)  # which brings a known one what it lacks
    elif known is not None:
        added = Added(added=0, known=1, embedded=0, revision=detector.follower.revision)
    elif verdict.checkpoint_id != detector.embedder.id:
        detail = f"detection {verdict.id} was embedded by checkpoint {verdict.checkpoint_id}: send the image as well"
        raise ApiError("conflict", detail)
    else:
        report = enrol_judged(
            detector.store,
            detector.embedder.id,
            [verdict.image()],
            Kind(LABELS.index(batch.label), batch.generator),
            batch.source,
            while_active=not detector.named,
        )
        added = measured(detector, Added.model_validate(asdict(report)))
    if added.conflicts:
        detail = f"the image of detection {verdict.id} has just become a reference of another kind; try again"
        raise ApiError("conflict", detail, conflicts=added.conflicts)
    reference = references.find(sha256)
    if reference is None:
        raise ApiError("conflict", "the reference was removed meanwhile; try again")
    return added, reference, None if known is None or known.id == reference.id else known


def remove(detector: Detector, removal: Callable[[], RemovedRows]) -> Removed:
    """Carry out a removal and bring this process's index up to date."""
    rows = removal()
    revision = detector.follower.catch_up()
    return Removed(references=rows.references, revision=rows.revisions.get(detector.embedder.id, revision))


def relabel(detector: Detector, id: int, change: ReferenceChange) -> Reference | None:
    """Let a reference be of another kind and bring this process's index up to date; None where there is none.

    Raises:
        ApiError: bad-field, for a real image with a generator, or a fake without one that was not such a fake before.
    """
    references, kind = detector.store.references, Kind(LABELS.index(change.label), change.generator)
    reference = references.get(id)
    if reference is None or not was(reference.attributes, kind):
        check_kind(change.label, change.generator)
    relabelled = references.relabel(kind, ids=[id])
    detector.follower.catch_up()
    return references.get(relabelled.ids.get(id, id))
