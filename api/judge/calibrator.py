"""Keeps the calibration in step with the index: it is refitted in the background after references change."""

import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from api.breaker import DATABASE_AWAY
from api.schemas.verdicts import CalibrationFacts, Thresholds
from indexer.follower import Follower
from indexer.index.milvus import EngineAway
from indexer.measure.calibrate import shared_calibration
from indexer.store.changes import Position
from trainer.heads.calibration import MINIMUM, Calibration
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads

log = logging.getLogger(__name__)
UNCALIBRATED = Calibration({}, {}, {}, {}, {}, {}, nearest=np.empty(0, np.float32), n_real=0, n_fake=0)


@dataclass(frozen=True, slots=True)
class IndexCalibration:
    """A calibration and where the index was that it was fitted at, None for the empty one that stands until then."""

    calibration: Calibration = UNCALIBRATED
    position: Position | None = None

    @property
    def revision(self) -> int | None:
        """The index revision it was fitted at."""
        return None if self.position is None else self.position.revision

    @property
    def facts(self) -> CalibrationFacts | None:
        """What the caller is told of it; None before there is one."""
        if self.revision is None:
            return None
        fitted = self.calibration
        return CalibrationFacts(
            revision=self.revision, real=fitted.n_real, fake=fitted.n_fake, new_sources=fitted.new_sources()
        )

    def thresholds(self, max_false_alarm: float, max_miss: float, heads: Collection[str] | None = None) -> Thresholds:
        """The cuts that promise these error rates, of the heads that answered (all when None)."""
        fake, real = self.calibration.thresholds(max_false_alarm, max_miss, heads)
        return Thresholds(fake=fake, real=real)

    def shortage(self, max_false_alarm: float, max_miss: float, heads: Collection[str] | None = None) -> str | None:
        """What keeps a rate from being promised, as one line; None where nothing does, or nothing is calibrated."""
        if not self.calibration.maps:
            return None
        real, fake = self.calibration.more_images(max_false_alarm, max_miss, heads)
        rates = (("false alarm", max_false_alarm, real, "real"), ("miss", max_miss, fake, "fake"))
        needs = [
            f"a {name} rate of {rate:g} needs {count} more {label} calibration images"
            for name, rate, count, label in rates
            if count
        ]
        return "; ".join(needs) or None


class Calibrator:
    """Holds the newest calibration; `current` may be read from any thread.

    Args:
        follower: The index that is calibrated.
        heads: The checkpoint's heads, if it has any.
        images: The checkpoint's calibration images, if it has any.
        k: Neighbours that vote.
        name: Of the checkpoint, for who is to mend it.
    """

    QUIET = 1.0
    """Seconds without a change before refitting, so that a long enrolment is not refitted at each step."""
    LATEST = 15.0
    """Seconds after which a calibration is refitted even while changes go on."""

    def __init__(
        self, follower: Follower, heads: Heads | None, images: CalibrationSet | None, k: int, name: str
    ) -> None:
        self._follower, self._heads, self._images, self._k, self._name = follower, heads, images, k, name
        self._end = threading.Event()
        self._fitting = threading.Lock()
        self._thread: threading.Thread | None = None
        self.current = IndexCalibration()

    @property
    def reason(self) -> str | None:
        """Why there is no calibration; None where there is one. Callers read it: it names no folder of this machine."""
        if self.current.calibration.maps:
            return None
        if self._heads is None or self._images is None or len(self._images) == 0:
            lacking = "the checkpoint lacks heads or calibration images"
            folder = f"--checkpoint and the folder of checkpoint {self._name} ({self._follower.checkpoint_id})"
            return f"nothing is calibrated: {lacking}: run `lineup train heads --data IMAGES` with {folder}"
        fakes = int(self._images.labels.sum())
        reals = len(self._images) - fakes
        if min(fakes, reals) < MINIMUM:
            return (
                f"nothing is calibrated: the checkpoint has {reals} real and {fakes} fake calibration images, "
                f"{MINIMUM} of each are needed"
            )
        if self.current.revision is None:
            return "nothing is calibrated yet: the calibration is being fitted"
        return "nothing is calibrated: no head answers (add real and fake references)"

    def refresh(self) -> None:
        """Load the calibration of the followed revision, or fit and save it."""
        if self._heads is None or self._images is None or len(self._images) == 0:
            return
        with self._fitting:
            position = self._follower.position
            if self.current.position == position:
                return
            calibration = shared_calibration(self._follower, self._heads, self._images, self._k)
            self.current = IndexCalibration(calibration, position)

    def start(self) -> None:
        """Refit in the background from now on."""
        self._thread = threading.Thread(target=self._run, name="calibrator", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the background thread."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        last_position, changed_at, stale_since = self._follower.position, 0.0, time.monotonic()
        while not self._end.wait(0.2):
            now, position = time.monotonic(), self._follower.position
            if self.current.position == position:
                last_position, stale_since = position, now
                continue
            if position != last_position:
                last_position, changed_at = position, now
            if now - changed_at >= self.QUIET or now - stale_since >= self.LATEST:
                try:
                    self.refresh()
                    stale_since = now
                except (*DATABASE_AWAY, EngineAway):  # the follower says so; the last calibration stays in use
                    self._end.wait(2)
                except Exception:
                    log.warning("calibration failed; trying again", exc_info=True)
                    self._end.wait(2)
