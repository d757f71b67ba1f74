"""Keeps the calibration in step with the index: it is refitted in the background after references change."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from indexer.follower import Follower
from indexer.measure.calibrate import calibrate, kept
from trainer.heads.calibration import MINIMUM, Calibration
from trainer.heads.calibration_set import CalibrationSet
from trainer.heads.heads import Heads

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A calibration and the index revision it was fitted at."""

    calibration: Calibration
    revision: int


class Calibrator:
    """Holds the newest calibration; `current` may be read from any thread.

    Args:
        follower: The index that is calibrated.
        heads: The checkpoint's heads, if it has any.
        images: The checkpoint's calibration images, if it has any.
        k: Neighbours that vote.
    """

    QUIET = 1.0
    """Seconds without a change before refitting, so that a long enrolment is not refitted at each step."""
    LATEST = 15.0
    """Seconds after which a calibration is refitted even while changes go on."""

    def __init__(
        self,
        follower: Follower,
        heads: Heads | None,
        images: CalibrationSet | None,
        k: int,
    ) -> None:
        self._follower, self._heads, self._images, self._k = follower, heads, images, k
        self._end = threading.Event()
        self._fitting = threading.Lock()
        self._thread: threading.Thread | None = None
        self.current: Fitted | None = None

    @property
    def reason(self) -> str | None:
        """Why there is no calibration; None where there is one."""
        if self.current is not None and self.current.calibration.maps:
            return None
        if self._heads is None or self._images is None or len(self._images) == 0:
            lacking = "the checkpoint lacks heads or calibration images"
            return f"nothing is calibrated: {lacking}: run `lineup train heads --data IMAGES`"
        fakes = int(self._images.labels.sum())
        reals = len(self._images) - fakes
        if min(fakes, reals) < MINIMUM:
            return (
                f"nothing is calibrated: the checkpoint has {reals} real and {fakes} fake calibration images, "
                f"{MINIMUM} of each are needed"
            )
        if self.current is None:
            return "nothing is calibrated yet: the calibration is being fitted"
        return "nothing is calibrated: no head answers (add real and fake references)"

    def refresh(self) -> None:
        """Load the calibration of the followed revision, or fit and save it."""
        if self._heads is None or self._images is None or len(self._images) == 0:
            return
        with self._fitting:
            revision = self._follower.revision
            if self.current is not None and self.current.revision == revision:
                return
            if (saved := kept(self._follower, self._heads, revision, self._k)) is not None:
                self.current = Fitted(saved, revision)
                return
            start = time.perf_counter()
            self.current = Fitted(calibrate(self._follower, self._heads, self._images, self._k), revision)
            log.info("calibrated", extra={"revision": revision, "seconds": round(time.perf_counter() - start, 2)})

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
        seen, changed, stale_since = self._follower.revision, 0.0, time.monotonic()
        while not self._end.wait(0.2):
            now, revision = time.monotonic(), self._follower.revision
            if self.current is not None and self.current.revision == revision:
                seen, stale_since = revision, now
                continue
            if revision != seen:
                seen, changed = revision, now
            if now - changed >= self.QUIET or now - stale_since >= self.LATEST:
                try:
                    self.refresh()
                    stale_since = now
                except Exception:  # the database may be away; the last calibration stays in use
                    log.warning("calibration failed; trying again", exc_info=True)
                    self._end.wait(2)
