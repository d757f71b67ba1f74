"""Rows of the store as the API shows them, and the state of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from api.access import Caller
from api.breaker import DATABASE_AWAY
from api.judge.detector import Detector
from api.judge.judgement import calibration_facts, shortage, thresholds_of
from api.schemas import LABELS
from api.schemas.resources import (
    CalibrationState,
    Enrolment,
    Generator,
    GeneratorCount,
    Histogram,
    IndexState,
    ReferenceImage,
    References,
    Removed,
    SourceCount,
    Status,
)
from indexer import store
from trainer.heads.calibration import Calibration
from trainer.heads.logistic import sigmoid

BINS = 20
"""Of the histogram of calibration scores."""


def reference_image(row: store.Reference, caller: Caller) -> ReferenceImage:
    """One reference image, as this caller may see it."""
    return ReferenceImage(
        id=row.id,
        sha256=row.sha256,
        label=LABELS[row.label],
        generator=row.generator,
        source=row.source,
        group=row.group,
        uri=caller.visible(row.uri or None),
        file_bytes=row.file_bytes,
        width=row.width,
        height=row.height,
        format=row.format,
        jpeg_quality=row.jpeg_quality,
        thumbnail=f"/v1/references/{row.id}/thumbnail",
        attributes=dict(row.attributes),
        enrolment=row.enrolment_id,
        added_at=row.added_at,
    )


def generator(row: store.Generator) -> Generator:
    """One generator with its number of references."""
    return Generator(
        name=row.name,
        family=row.family,
        vendor=row.vendor,
        version=row.version,
        released_on=row.released_on,
        notes=row.notes,
        references=row.references,
    )


def change_generator(detector: Detector, name: str, facts: Mapping[str, Any]) -> Generator:
    """Change what is known of a generator, in this process's neighbours too."""
    changed = detector.store.update_generator(name, facts)
    detector.follower.catch_up()
    return generator(changed)


def enrolment(row: store.Enrolment) -> Enrolment:
    """One enrolment with its report."""
    return Enrolment(
        id=row.id,
        at=row.at,
        generator=row.generator,
        source=row.source,
        references=row.references,
        report=row.report,
    )


def status(detector: Detector) -> Status:
    """What is loaded, followed and calibrated; from memory while the database is away."""
    follower, fitted, settings = detector.follower, detector.calibrator.current, detector.settings
    real, fake = follower.index.counts()
    revision, degraded = follower.revision, follower.degraded
    generators: list[GeneratorCount] = []
    sources: list[SourceCount] = []
    if not degraded:
        try:
            ask = detector.status_breaker.ask
            counts = ask(detector.store.counts)
            real, fake = counts["real"], counts["fake"]
            revision = ask(detector.store.revision, detector.embedder.id)
            generators = [
                GeneratorCount(name=row.name, references=row.references) for row in ask(detector.store.generators)
            ]
            sources = [
                SourceCount(name=name, references=count) for name, count in ask(detector.store.sources).items() if name
            ]
        except DATABASE_AWAY:
            degraded = True
    return Status(
        checkpoint=detector.embedder.id,
        active_checkpoint=detector.active.id,
        inactive=detector.inactive,
        model=detector.model_facts,
        revision=revision,
        references=References(real=real, fake=fake),
        generators=generators,
        sources=sources,
        index=IndexState(
            kind=follower.index.kind,
            device=follower.index.device,
            size=len(follower.index),
            revision=follower.revision,
        ),
        calibration=calibration_facts(fitted),
        reason=detector.calibrator.reason or shortage(fitted, settings.max_false_alarm, settings.max_miss),
        degraded=degraded,
        version=package_version(),
        k=settings.k,
    )


def calibration_state(detector: Detector) -> CalibrationState:
    """The calibration in use and what it promises."""
    fitted, settings = detector.calibrator.current, detector.settings
    return CalibrationState(
        calibration=calibration_facts(fitted),
        thresholds=thresholds_of(fitted, settings.max_false_alarm, settings.max_miss),
        max_false_alarm=settings.max_false_alarm,
        max_miss=settings.max_miss,
        prior=settings.prior,
        reason=detector.calibrator.reason or shortage(fitted, settings.max_false_alarm, settings.max_miss),
        maps={name: item.to_json() for name, item in fitted.calibration.maps.items()} if fitted else {},
        histogram=histogram(fitted.calibration) if fitted else None,
    )


def histogram(calibration: Calibration) -> Histogram | None:
    """How the calibration images score where every head answers."""
    name = calibration.largest()
    if name is None:
        return None
    real, fake = (
        np.histogram(sigmoid(scores[name]), BINS, (0, 1))[0].tolist() for scores in (calibration.real, calibration.fake)
    )
    return Histogram(real=real, fake=fake)


def package_version() -> str:
    """The version that is installed; `source` for a checkout that is not."""
    try:
        return version("lineup")
    except PackageNotFoundError:
        return "source"


def remove(detector: Detector, removal: Callable[[], store.Removed]) -> Removed:
    """Carry out a removal and bring this process's index up to date."""
    removed = removal()
    revision = detector.follower.catch_up()
    return Removed(references=removed.references, revision=removed.revisions.get(detector.embedder.id, revision))
