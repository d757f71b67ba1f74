"""Loads a detector: the database, a checkpoint, the index that it follows. A calibration comes afterwards."""

import logging
from functools import partial
from threading import Thread

from sqlalchemy import text

from api.breaker import Breaker
from api.judge.calibrator import Calibrator
from api.judge.detector import Detector
from api.judge.uploads import prepare
from api.schemas.verdicts import ModelFacts
from api.service_settings import ServiceSettings
from indexer.database.connection import connect
from indexer.database.embedded import EmbeddedServer
from indexer.follower import Follower
from indexer.ingest.ingest import register
from indexer.store import Store
from indexer.store.checkpoints import with_active_folder
from trainer.heads.calibration_set import CalibrationSet, refit_command
from trainer.heads.heads import HEADS_FILE, Heads
from trainer.model.checkpoint import CONFIG_FILE, CheckpointError, read_sections
from trainer.model.embedder import Embedder
from trainer.process_pool import decoding_pool

log = logging.getLogger(__name__)
STATEMENT_SECONDS = 60
"""After which the database ends a statement of the service."""
PROBE = text("select 1 from reference_image where id = 0")
"""No row has this id: it costs nothing, and waits where all look-ups wait, be it for a lock."""


def load_detector(settings: ServiceSettings) -> Detector:
    """Reach the database, load the checkpoint, follow its index.

    Where the active checkpoint is not on this machine, the home's stands in, and `Detector.inactive` says so. That
    there is none is found out before an embedded database is made.

    Raises:
        CheckpointError: The checkpoint is missing, broken, or known to the database with another dimension.
        DatabaseUnreachable: No database answers.
        DatabaseBehind: Its schema is another one.
        BlobsAway: Object storage cannot be used.
    """
    Thread(target=decoding_pool().warm, args=(prepare.__module__,), daemon=True).start()  # a second, beside the others
    no_database = settings.database_url is None and not EmbeddedServer(settings.home).data.exists()
    if no_database or settings.checkpoint is not None:  # no other can be the active one, or none is asked for
        read_sections(settings.checkpoint_folder)
    store = Store(connect(settings, statement_seconds=STATEMENT_SECONDS), settings.blobs)
    named, hindrance = settings.checkpoint is not None, None
    try:
        store.blobs.claim()
        try:
            settings = with_active_folder(settings, store.checkpoints)
        except CheckpointError as error:
            if not (settings.checkpoint_folder / CONFIG_FILE).exists():
                raise
            hindrance = str(error)
        breaker = Breaker(partial(store.references.read, PROBE))
        detector = _open(settings, store, breaker, Breaker(seconds=5.0, threads=2), named)
    except BaseException:
        store.engine.dispose()
        raise
    detector.hindrance = hindrance
    return detector


def load_successor(old: Detector) -> Detector:
    """A detector with the checkpoint that is the active one by now, beside the old one on the same store.

    It is loaded and calibrated, and not started.

    Raises:
        CheckpointError: The active checkpoint is not on this machine, or broken.
        sqlalchemy.exc.DBAPIError: The database cannot be reached.
    """
    settings = with_active_folder(old.settings.model_copy(update={"checkpoint": None}), old.store.checkpoints)
    detector = _open(settings, old.store, old.breaker, old.status_breaker, named=False)
    detector.calibrator.refresh()
    return detector


def _open(settings: ServiceSettings, store: Store, breaker: Breaker, status_breaker: Breaker, named: bool) -> Detector:
    """A detector with the checkpoint in the folder of these settings."""
    folder = settings.checkpoint_folder
    embedder = Embedder.load(folder, device=settings.device, engine=settings.engine)
    heads = Heads.load(folder) if (folder / HEADS_FILE).exists() else None
    images = None
    try:
        images = CalibrationSet.load(folder)
    except CheckpointError as error:  # then nothing is calibrated, and every verdict says so
        log.warning("%s", error)
    if heads is None or not images:
        log.warning("nothing is calibrated: run `%s`", refit_command(folder))
    try:
        register(embedder, store)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    follower = Follower(settings, store, embedder.id, embedder.dim)
    follower.load()
    return Detector(
        settings=settings,
        store=store,
        breaker=breaker,
        status_breaker=status_breaker,
        embedder=embedder,
        heads=heads,
        follower=follower,
        calibrator=Calibrator(follower, heads, images, settings.k, embedder.name),
        # The id of the heads is a hash, which is not to be computed for each verdict.
        model_facts=ModelFacts(
            checkpoint=embedder.id, heads=heads.id if heads else None, name=embedder.name, engine=embedder.engine
        ),
        named=named,
    )
