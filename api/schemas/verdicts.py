"""What the API says of images: verdicts and searches.

Scores rise with "fake". Similarities are cosines, -1..1. Lists are best first.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from api.schemas import Label, Model, Similarity, Unit, absent
from api.schemas.problems import FailedFile

Decision = Literal["fake", "real", "uncertain"]
Explanation = Literal["regions", "stability"]
EXAMPLE_VERDICT: dict[str, Any] = json.loads(Path(__file__).with_name("example_verdict.json").read_text())


class Thresholds(Model):
    """Cuts on `score`; null where the calibration images are too few to promise the rate asked for."""

    fake: float | None = None
    """From here on an image is called fake."""
    real: float | None = None
    """Below this it is called real."""


class Known(Model):
    """The reference image whose bytes the query repeats."""

    id: int
    """Of the reference."""
    label: Label
    """What the reference is."""
    generator: str | None = None
    """What made it; null for a real image."""


class Votes(Model):
    """How many of each label are among the nearest."""

    real: int
    """Real ones among the neighbours that vote."""
    fake: int
    """Fakes among them."""


class Nearest(Model):
    """Similarity of the nearest reference image of each label; null where there is none."""

    real: Similarity | None = None
    """Cosine with the nearest real reference."""
    fake: Similarity | None = None
    """Cosine with the nearest fake."""


class KnnHead(Model):
    """The vote of the k nearest reference images."""

    score: Unit
    """Weight of the fakes among the neighbours."""
    probability: Unit | None = None
    """Calibrated; null where nothing is calibrated, or for a k other than the calibrated one."""
    contribution: float | None = None
    """As of the other heads; that of the calibrated k, whatever k was asked for."""
    label: Label
    """What the vote says: fake above a half."""
    k: int
    """Neighbours that were asked for."""
    votes: Votes
    """How many of each label are among the k nearest."""
    nearest: Nearest


class Nn1Head(Model):
    """The single nearest reference image."""

    label: Label
    """Of that reference."""
    id: int
    """Of that reference."""
    similarity: Similarity
    """Cosine with it."""


class LinearHead(Model):
    """Logistic regression on the embedding."""

    score: Unit
    """Its own probability of fake."""
    probability: Unit | None = None
    """Calibrated, moved to the prior; null where nothing is calibrated."""
    contribution: float | None = None
    """What the head adds to `combination.logit`, above 0 for fake; null where it has no part in the score."""
    label: Label
    """What it says: fake from a half."""


class SvmHead(Model):
    """One-class SVM on real images; the score is minus its decision function, above 0 fake."""

    score: float
    """Distance from the real images it knows, in units of its own."""
    probability: Unit | None = None
    """As of the linear head."""
    contribution: float | None = None
    """As of the linear head."""
    label: Label
    """What it says: fake above 0."""


class HeadAnswers(Model):
    """The heads side by side; null for a head that cannot answer."""

    knn: KnnHead | None = None
    nn1: Nn1Head | None = None
    linear: LinearHead | None = None
    svm: SvmHead | None = None


class Combination(Model):
    """The sum behind the score: the heads' contributions and a bias, which the calibration images set."""

    bias: float
    """What the sum begins with, before any head."""
    logit: float
    """Bias and contributions together; the score is its logistic function, 1 / (1 + exp(-logit))."""


class GeneratorShare(Model):
    """Part of the fakes' weight that one generator holds."""

    name: str
    """Of the generator."""
    share: Unit
    """Its part of the weight of all fakes that vote."""


class Neighbour(Model):
    """A reference image near the query."""

    id: int
    """Of the reference: `/v1/references/{id}`."""
    label: Label
    """What the reference is."""
    generator: str | None = None
    """What made it; null for a real image."""
    source: str | None = None
    """The data set or feed it came from."""
    similarity: Similarity
    """Cosine between the embeddings."""
    weight: Unit | None = None
    """Its part of the vote; 0 for one that is shown but does not vote, null in a search."""
    thumbnail: str | None = None
    """Path of a small JPEG, null while the database is away or where the picture is not here."""
    uri: str | None = None
    """Where it lies; null for what came over HTTP, and a path of the server for callers without the scope admin.
    With the attribute `window` (x,y,width,height) it is that part of what lies there."""
    attributes: dict[str, Any] = Field(default={})
    """What else the data set says of it."""


class Region(Model):
    """One local crop and its own vote."""

    box: tuple[int, int, int, int]
    """x, y, width, height in pixels of the upright image."""
    score: Unit
    """Weight of the fakes among its own neighbours."""
    generator: str | None = None
    """The closest one, where it looks fake."""


class Stability(Model):
    """The score of re-encoded and rescaled copies of the image."""

    scores: dict[str, float | None]
    """Null for a copy that holds too little to be judged, or where nothing is calibrated."""
    spread: float | None = None
    """Highest minus lowest score, the unchanged image included; null where no copy has one."""
    flips: bool
    """Whether any copy that has a score gets another verdict."""


class ContentCredentials(Model):
    """A C2PA manifest found in the file."""

    state: Literal["trusted", "intact", "invalid", "remote", "unreadable"]
    """`intact`: the signature fits the bytes, but its signer is on no trust list.
    `remote`: the file only links to a manifest; the link is not followed."""
    issues: list[str] = Field(default=[])
    """C2PA status codes of what failed or could not be trusted."""
    generator: str | None = None
    """The software that claims to have made the manifest."""
    signer: str | None = None
    """Who signed, as the certificate says."""
    signed_at: str | None = None
    """When, as the signature says."""
    title: str | None = None
    """As the manifest has it."""
    actions: list[str] = Field(default=[])
    """What was done to the image, as the manifest has it."""
    source_types: list[str] = Field(default=[])
    """IPTC digital source types of the actions, last path segment."""
    says_generated: bool = False
    """Whether a source type says that a trained algorithm made the image."""


class Provenance(Model):
    """What the file says of itself. Easily removed or forged, so it never touches the score."""

    c2pa: Annotated[ContentCredentials | None, Field(exclude_if=absent)] = None
    metadata: Annotated[dict[str, str] | None, Field(exclude_if=absent)] = None
    """Software, source type and prompt fields of EXIF, XMP, IPTC and PNG text, shortened."""
    says_generated: Annotated[bool | None, Field(exclude_if=absent)] = None
    """Whether a field or manifest names a generator or an AI source type; absent where nothing was found."""


class ImageFacts(Model):
    """The image as decoded; width and height after EXIF orientation."""

    sha256: str
    """Of the file's bytes, in hexadecimal."""
    width: int
    """Pixels of the upright image."""
    height: int
    """Pixels of the upright image."""
    format: str
    """JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or HEIF, by its content."""
    crop: tuple[int, int, int, int]
    """x, y, width, height of what the model saw, in pixels of the upright image; encloses all windows."""
    windows: Annotated[list[tuple[int, int, int, int]] | None, Field(exclude_if=absent)] = None
    """Each window that the model saw, as `crop`, the centre's first; absent where there was one."""
    shortfall: str | None = None
    """Why what the model saw is too little to judge; null where it suffices."""


class ModelFacts(Model):
    """What judged."""

    checkpoint: str
    """Id of the weights."""
    heads: str | None = None
    """Id of its heads; null where it has none."""
    name: str
    """Of the checkpoint."""
    engine: str
    """What embedded the image, such as `openvino-bf16`."""


class IndexFacts(Model):
    """The references that voted."""

    revision: int
    """State of the references that voted; it rises with each change."""
    size: int
    """References in it."""


class CalibrationFacts(Model):
    """The calibration in use and how many images of each label it rests on."""

    revision: int
    """Of the references it was fitted with."""
    real: int
    """Real images it rests on."""
    fake: int
    """Fakes it rests on."""
    new_sources: int = 0
    """Sources of real images on which the rate of false alarms is promised for nine of ten new sources as well; 0 where
    they are too few (under 9), and the rate is promised for images of known sources alone."""


class Verdict(Model):
    """One image judged, with the evidence."""

    model_config = ConfigDict(
        use_attribute_docstrings=True, extra="forbid", json_schema_extra={"examples": [EXAMPLE_VERDICT]}
    )

    id: str
    """Names the record, where one is kept."""
    file: str
    """As the caller named it."""
    verdict: Decision
    """What Lineup says."""
    basis: Literal["score", "known"]
    """`known` where the very bytes are a reference, and its label decides."""
    score: Unit | None = None
    """Calibrated combination of the heads, prior 0.5; null where nothing is calibrated or there is too little to
    judge (see `reason`); then nothing that follows from a score is given."""
    probability: Unit | None = None
    """The score moved to the operator's prior (`LINEUP_PRIOR`), as the heads' probabilities are."""
    false_alarm: Unit | None = None
    """Share of real calibration images that score at least this."""
    reason: str | None = None
    """Why the verdict is uncertain or a part is missing."""
    thresholds: Thresholds
    known: Known | None = None
    combination: Combination | None = None
    """How the heads make the score; null where there is none."""
    heads: HeadAnswers
    generators: list[GeneratorShare] = Field(default=[])
    unknown_generator: bool = False
    """A fake that is unlike the fakes of every enrolled generator."""
    novelty: Unit | None = None
    """Conformal p-value of the nearest similarity: small means unlike everything known. Null below 50 images."""
    neighbours: list[Neighbour] = Field(default=[])
    regions: Annotated[list[Region] | None, Field(exclude_if=absent)] = None
    """If asked for: those with enough to judge; absent where there is none."""
    stability: Annotated[Stability | None, Field(exclude_if=absent)] = None
    """If asked for; absent where there is too little to judge."""
    provenance: Provenance = Provenance()
    image: ImageFacts
    model: ModelFacts
    index: IndexFacts
    calibration: CalibrationFacts | None = None
    degraded: bool = False
    """The database is away: judged from memory, neither recorded nor compared with known hashes. Or the search engine
    of LINEUP_INDEX is: judged without neighbours, and not recorded."""
    recorded: bool = False
    """`/v1/detections/{id}` gives it again."""
    timings_ms: dict[str, float] = Field(default={})
    """Milliseconds of decode, embed, search and heads."""


class Detections(Model):
    results: list[Verdict | FailedFile]


class Hits(Model):
    """Neighbours of one searched image."""

    file: str
    neighbours: list[Neighbour]
    next: int | None = None
    """The offset of the following page; null at the end."""


class Searches(Model):
    results: list[Hits | FailedFile]
