"""What the API says of what it keeps: references, generators, enrolments, records, and its own state."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import ConfigDict, Field

from api.schemas import GeneratorName, Label, Model, Text
from api.schemas.problems import Conflict
from api.schemas.verdicts import EXAMPLE_VERDICT, CalibrationFacts, ModelFacts, Neighbour, Thresholds, Verdict


class Rejected(Model):
    file: str
    reason: str


class Added(Model):
    """What an enrolment did; as `lineup index add --json`."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="allow")

    added: int
    known: int
    embedded: int
    """Images that were known, but not to this checkpoint."""
    conflicts: list[Conflict] = Field(default_factory=list)
    rejected: list[Rejected] = Field(default_factory=list)
    revision: int
    enrolment: int | None = None
    effect: dict[str, Any] | None = None
    """Recall of the new images and false alarms without the enrolment and with it; null where nothing was added."""
    warnings: list[str] = Field(default_factory=list)
    """Facts of the files, such as their format, that tell real from fake by themselves."""


class ReferenceImage(Model):
    """A reference image as stored."""

    id: int
    sha256: str
    label: Label
    generator: str | None = None
    source: str | None = None
    group: str | None = None
    uri: str | None = None
    """As of a `Neighbour`."""
    file_bytes: int | None = None
    width: int
    height: int
    format: str
    jpeg_quality: int | None = None
    thumbnail: str | None = None
    """Path of a small JPEG, null where the picture is not here."""
    attributes: dict[str, Any] = Field(default_factory=dict)
    """What the data set says of it; once it was relabelled, `former_label` and `former_generator`."""
    enrolment: int | None = None
    added_at: datetime


class ReferenceChange(Model):
    """What a reference is."""

    label: Label
    generator: GeneratorName | None = None
    """What made it, for fakes only; created if new. Null for a fake only where that was not known before either."""


class Corrected(Added):
    """What became of a judged image: a new reference, or the one that it was, relabelled."""

    reference: ReferenceImage
    relabelled: bool
    """It was a reference of another kind."""
    former: ReferenceChange | None
    """What it was then, which `PATCH` makes it again."""
    readable: bool
    """Its bytes are kept or lie at its uri; of others no other checkpoint can make an embedding."""


class ReferenceNeighbours(Model):
    neighbours: list[Neighbour]
    """The nearest first, without the reference itself."""


class ReferencePage(Model):
    references: list[ReferenceImage]
    next: int | None = None
    """Give it as `after` for the following page; null at the end."""


class MapKind(Model):
    """Points of one colour."""

    label: Label
    generator: str | None


class ReferenceMap(Model):
    """References on a plane, a point each: `id`, `kind`, `x` and `y` are lists of one length.

    The axes are the two first principal components of the embeddings' directions.
    """

    checkpoint: str
    revision: int
    """Of the index that was drawn; a newer one follows after a rest of twenty times what drawing took."""
    references: int
    """How many there are in all; of more than 50,000 so many are drawn."""
    explained: Annotated[list[float], Field(min_length=2, max_length=2)]
    """Share of the variance along each axis, 0..1; what is far apart here is so in fact, what is near may not be."""
    kinds: list[MapKind]
    id: list[int]
    kind: list[int]
    """Number of the point's kind, from 0."""
    x: list[int]
    """0..9999, in the same unit as `y`."""
    y: list[int]


class Removed(Model):
    references: int
    revision: int


class GeneratorFacts(Model):
    """What is known of a generator beside its images."""

    family: Text | None = None
    vendor: Text | None = None
    version: Text | None = None
    released_on: date | None = None
    notes: Annotated[str, Field(max_length=4000, pattern=r"^[^\x00]*$")] | None = None


class NewGenerator(GeneratorFacts):
    name: GeneratorName


class GeneratorChange(GeneratorFacts):
    """Only what is given is changed."""

    name: GeneratorName = ""


class Generator(NewGenerator):
    references: int = 0


class Generators(Model):
    generators: list[Generator]


class Enrolment(Model):
    id: int
    at: datetime
    generator: str | None = None
    source: str | None = None
    references: int | None = None
    """Images of it that are still there."""
    report: dict[str, Any] | None = None
    """Null while it runs, or where it was cut off."""


class Enrolments(Model):
    enrolments: list[Enrolment]
    next: int | None = None


class CandidateKind(Model):
    """Of how many images of a candidate the nearest reference is of this kind."""

    label: Label
    generator: str | None
    images: int


class CandidateImage(Model):
    """An image of a candidate, by its latest verdict."""

    detection: str
    file: str
    verdict: str
    at: datetime
    thumbnail: str | None
    """Path of a small JPEG, null unless LINEUP_KEEP_THUMBNAILS let it be kept."""
    nearest: Neighbour | None
    """The reference that is most similar today."""


class Candidate(Model):
    """Judged images that are alike and that no reference explains: a new generator's, perhaps."""

    name: str
    """Of the image that was seen first; it stays while the group grows."""
    images: int
    first: datetime
    last: datetime
    novelty: float | None
    """p-value, 0..1, of the image in the middle: how rare it is that a calibration image is as far from everything
    known; null below 50 calibration images."""
    similarity: float | None
    """To the nearest reference, -1..1, of the image in the middle."""
    verdicts: dict[str, int]
    """Images by verdict."""
    nearest: list[CandidateKind]
    """The most frequent first."""
    examples: list[CandidateImage]


class Candidates(Model):
    candidates: list[Candidate]
    """The most novel first."""
    images: int
    """How many images were grouped."""
    ungrouped: int
    """How many of these are in no group."""
    left_out: int
    """Older images that were not looked at."""


class CandidateEnrolment(Model):
    """What a candidate's images are."""

    generator: GeneratorName
    """What made them; created if new."""
    source: Text = "verdicts"
    """Where they came from."""


class Feedback(Model):
    """A dispute or a confirmation of a verdict."""

    label: Label
    """What the image is, according to who says so."""
    note: Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")] = ""


class Asked(Model):
    """How a verdict was asked for; null where the settings decided."""

    k: int | None = None
    max_false_alarm: float | None = None


class Detection(Model):
    """A recorded verdict. Of the image only hash, size, embedding and the regions' boxes are kept."""

    id: str
    at: datetime
    version: int
    """Of the fields of `result`; 0 for records that do not tell it."""
    result: dict[str, Any]
    """The verdict as it was given, thus with the fields that a `Verdict` had then."""
    question: Asked
    feedback: dict[str, Any] | None = None


class DetectionSummary(Model):
    id: str
    at: datetime
    file: str | None = None
    verdict: str | None = None
    score: float | None = None
    thresholds: dict[str, float | None] | None = None
    sha256: str
    feedback: dict[str, Any] | None = None


class DetectionPage(Model):
    detections: list[DetectionSummary]
    next: str | None = None
    """Give it as `after` for the following page; null at the end."""


class Change(Model):
    field: str
    before: Any
    after: Any


class Replay(Model):
    """A recorded embedding judged at today's revision."""

    before: dict[str, Any]
    """The verdict as it was given, thus with the fields that a `Verdict` had then."""
    after: Verdict
    changed: list[Change]


class Job(Model):
    """Images that are judged in the background. Those that none of the four counts has are still to be judged."""

    id: UUID
    state: Annotated[Literal["queued", "running", "done", "cancelled", "failed"], Field(examples=["running"])]
    """`done` once all are judged, `failed` where that gave no verdict at all."""
    at: datetime
    ended_at: datetime | None = None
    images: Annotated[int, Field(examples=[1000])]
    fake: Annotated[int, Field(examples=[12])]
    real: Annotated[int, Field(examples=[301])]
    uncertain: Annotated[int, Field(examples=[87])]
    failed: Annotated[int, Field(examples=[2])]
    """Files that could not be judged."""
    webhook: str | None = None
    """What is told of the end: this document, posted and signed in the header `X-Lineup-Signature`."""
    webhook_state: Literal["pending", "delivered", "failed"] | None = None
    webhook_error: str | None = None


class Jobs(Model):
    jobs: list[Job]
    next: UUID | None = None
    """Give it as `after` for the following page; null at the end."""


class JobResults(Model):
    results: Annotated[list[dict[str, Any]], Field(examples=[[EXAMPLE_VERDICT]])]
    """As `POST /v1/detect` gives them, in the order of the images: a `Verdict` or a `FailedFile` of each."""
    next: int | None = None
    """Give it as `after` for what follows, which may be judged only later; null once all is told."""


class IndexState(Model):
    kind: str
    device: str
    size: int
    revision: int


class References(Model):
    real: int
    fake: int


class GeneratorCount(Model):
    name: str
    references: int


class SourceCount(Model):
    name: str
    references: int


class DriftTest(Model):
    """A comparison of what was judged over some days with verdicts of before, or with calibration images."""

    against: Literal["before", "calibration"]
    value: Literal["score", "novelty"]
    days: int
    images: int
    compared: int
    """Images on the other side."""
    p_value: float | None
    """0..1, null where either side has fewer than 50 images."""


class DriftPValues(Model):
    """0..1, each the least of its tests' times their number (Bonferroni), null where there were too few images."""

    before: float | None
    """Of the 28 days before."""
    calibration: float | None
    """Of the calibration images, real and generated in any proportion."""


class Drift(Model):
    """Whether what is judged has changed: of the last complete day (UTC)."""

    day: date
    images: int
    rate: float
    """A p-value below this is drift; at most this share of days is told so although nothing has changed."""
    p_values: DriftPValues
    tests: list[DriftTest]


class Status(Model):
    """What is loaded, followed and calibrated."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="allow")

    checkpoint: str
    active_checkpoint: str | None = None
    """The store's active checkpoint, as last seen."""
    inactive: str | None = None
    """Why `checkpoint` is another one than that."""
    model: ModelFacts | None = None
    revision: int
    """The newest revision in Postgres; while it is away, the last one followed."""
    references: References
    generators: list[GeneratorCount]
    sources: list[SourceCount] = Field(default_factory=list)
    index: IndexState
    calibration: CalibrationFacts | None = None
    reason: str | None = None
    """Why nothing is calibrated, or how many calibration images more a promised rate would need."""
    degraded: bool = False
    """The database is away, or the search engine of LINEUP_INDEX."""
    version: str | None = None
    drift: Drift | None = None
    """Null until it was looked for, which is at the start and then each hour."""
    k: int | None = None
    """Neighbours that vote unless a request asks for another number."""


class Histogram(Model):
    """How the calibration images score, each by maps fitted without its group: counts in equal bins of 0..1."""

    real: list[int]
    fake: list[int]


class CalibrationState(Model):
    """The calibration in use and what it promises."""

    calibration: CalibrationFacts | None = None
    thresholds: Thresholds
    max_false_alarm: float
    max_miss: float
    prior: float
    reason: str | None = None
    maps: dict[str, Any] = Field(default_factory=dict)
    """The logistic maps from raw head scores to calibrated logits, by the heads that answer."""
    histogram: Histogram | None = None
    """Of the scores that all heads together give; null where nothing is calibrated."""


class Health(Model):
    status: Literal["live", "ready"]
