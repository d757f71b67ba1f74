"""Numbers for operators, in the Prometheus format."""

from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from api.schemas.problems import ApiError
from api.schemas.verdicts import Verdict

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TWENTIETHS = tuple(i / 20 for i in range(1, 21))
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One registry per application, so that two of them in a process do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter("lineup_requests", "Requests answered.", ["method", "route", "status"])
        self.request_seconds = histogram(
            "lineup_request_seconds", "Time from first byte to last.", ["route"], buckets=SECONDS
        )
        self.stage_seconds = histogram(
            "lineup_stage_seconds", "Time of one image in each stage.", ["stage"], buckets=SECONDS
        )
        self.queue = gauge("lineup_queue_images", "Views that wait to be embedded or judged.")
        self.batch = histogram(
            "lineup_batch_images", "Views in one forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.verdicts = counter("lineup_verdicts", "Verdicts given.", ["verdict", "basis"])
        self.rejected = counter("lineup_rejected", "Files that could not be judged.", ["kind"])
        self.score = histogram("lineup_score", "Combined score of judged images.", buckets=TWENTIETHS)
        self.similarity = histogram(
            "lineup_nearest_similarity",
            "Similarity of judged images to their nearest reference; a falling share of high values is drift.",
            buckets=TWENTIETHS,
        )
        self.index_size = gauge("lineup_index_images", "References in the index.", ["label"])
        self.revision = gauge("lineup_index_revision", "Revision up to which the index is complete.")
        self.lag = gauge("lineup_index_lag_seconds", "Time since the index was known to be complete.")
        self.engine_away = gauge("lineup_engine_away", "1 while the search engine of LINEUP_INDEX does not answer.")
        self.calibration = gauge("lineup_calibration_revision", "Revision of the calibration in use.")
        self.inactive = gauge("lineup_checkpoint_inactive", "1 while another checkpoint than the active one judges.")
        self.jobs = gauge("lineup_jobs", "Jobs that have not ended, of all services on this database.")
        self.job_images = gauge("lineup_job_images", "Images of jobs that are not judged yet, of all services.")
        self.job_age = gauge("lineup_job_oldest_seconds", "Since when the oldest job that has not ended waits.")
        self.webhooks = counter("lineup_webhooks", "Webhooks told of the end of a job, or given up.", ["state"])
        self.drift = gauge(
            "lineup_drift_p_value",
            "How likely the last complete day is where nothing has changed against the days before or the calibration.",
            ["against"],
        )
        self.degraded = gauge("lineup_degraded", "1 while the index cannot follow the database.")

    def judged(self, results: Iterable[Verdict | ApiError], final: bool) -> None:
        """Count what a request gave.

        Args:
            results: Of its files.
            final: The verdicts count; otherwise only the time they took and the files that failed, for the caller asks
                again.
        """
        for result in results:
            if isinstance(result, ApiError):
                self.rejected.labels(result.kind).inc()
                continue
            for stage, milliseconds in result.timings_ms.items():
                self.stage_seconds.labels(stage).observe(milliseconds / 1000)
            if not final:
                continue
            self.verdicts.labels(result.verdict, result.basis).inc()
            if result.score is not None:
                self.score.observe(result.score)
            if result.heads.nn1:
                self.similarity.observe(result.heads.nn1.similarity)

    def page(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)
