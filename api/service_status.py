"""The state of the service: what is loaded, followed and calibrated."""

from importlib.metadata import PackageNotFoundError, version

import numpy as np

from api.breaker import DATABASE_AWAY
from api.judge.detector import Detector
from api.schemas.resources import (
    CalibrationState,
    Drift,
    GeneratorCount,
    Histogram,
    IndexState,
    References,
    SourceCount,
    Status,
)
from trainer.heads.calibration import Calibration
from trainer.heads.logistic import sigmoid

BINS = 20
"""Of the histogram of calibration scores."""


def status(detector: Detector, drift: Drift | None) -> Status:
    """What is loaded, followed and calibrated; from memory while the database is away."""
    follower, fitted, settings = detector.follower, detector.calibrator.current, detector.settings
    index, revision, degraded = follower.index, follower.revision, follower.degraded
    real, fake = index.counts()
    generators: list[GeneratorCount] = []
    sources: list[SourceCount] = []
    if not degraded:
        try:
            ask, store = detector.status_breaker.ask, detector.store
            counts = ask(store.references.counts)
            real, fake = counts["real"], counts["fake"]
            revision = ask(store.checkpoints.revision, detector.embedder.id)
            generator_rows = ask(store.generators.list)
            generators = [GeneratorCount(name=row.name, references=row.references) for row in generator_rows]
            counts_by_source = ask(store.references.sources)
            sources = [SourceCount(name=name, references=count) for name, count in counts_by_source.items() if name]
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
        index=IndexState(kind=index.kind, device=index.device, size=len(index), revision=follower.revision),
        calibration=fitted.facts,
        reason=detector.calibrator.reason or fitted.shortage(settings.max_false_alarm, settings.max_miss),
        degraded=degraded or follower.engine_away,
        version=package_version(),
        drift=drift,
        k=settings.k,
    )


def calibration_state(detector: Detector) -> CalibrationState:
    """The calibration in use and what it promises."""
    fitted, settings = detector.calibrator.current, detector.settings
    return CalibrationState(
        calibration=fitted.facts,
        thresholds=fitted.thresholds(settings.max_false_alarm, settings.max_miss),
        max_false_alarm=settings.max_false_alarm,
        max_miss=settings.max_miss,
        prior=settings.prior,
        reason=detector.calibrator.reason or fitted.shortage(settings.max_false_alarm, settings.max_miss),
        maps={name: item.to_json() for name, item in fitted.calibration.maps.items()},
        histogram=histogram(fitted.calibration),
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
