"""Generators that nobody has enrolled: groups of judged images that no reference explains, and their enrolment.

Images are not kept, only their embeddings: what is enrolled from them has a vector of this checkpoint, no bytes that
another checkpoint could embed, and a picture only where thumbnails of judged images are kept.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from typing import Any

import numpy as np
from sqlalchemy import text

from indexer.database.transactions import TRANSACTION_IMAGES
from indexer.follower import Follower, Neighbour
from indexer.ingest.ingest import FORGOTTEN, Report
from indexer.store import Store
from indexer.store.detections import JudgedImage
from indexer.store.generators import check_generator_name
from indexer.store.reference_facts import LABEL_NAMES, NewReference, kind
from indexer.store.relabelling import Kind
from trainer.heads.calibration import Calibration

NOVELTY = 0.05
"""p-value below which an image is grouped although its verdict is sure of itself."""
MOST_IMAGES = 4000
"""Images that are grouped at most: all pairs are compared, in some seconds."""
SMALLEST = 5
"""Images that a candidate has at least, unless told otherwise."""
CORE_NEIGHBOURS = 3
"""The neighbour whose distance says how dense an image's surroundings are (`min_samples` of HDBSCAN)."""
EXAMPLES = 12
"""Images of a candidate that a report shows."""
KNOWN_IMAGES = 300
"""References that are grouped beside the unexplained images, so that a lone group stands out from something."""
NAME = re.compile(r"[0-9a-f]{12}")
SOURCE = "verdicts"
"""Source of references that were enrolled from verdicts, unless told otherwise."""

KNOWN = text("""
select e.vector from reference_image r join embedding e on e.image_id = r.id and e.checkpoint_id = :checkpoint
order by r.sha256 limit :most
""")  # by hash: as good as random, and the same each time

Cluster = Callable[[np.ndarray, int], np.ndarray]


class UnknownCandidate(ValueError):
    """No group of unexplained images has this name."""


class CandidateEnrolled(ValueError):
    """The candidate was enrolled before, as another generator."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Images that are alike and that no reference explains, in the order in which they were first seen.

    Attributes:
        images: At least as many as asked for.
        nearest: The nearest reference of each image; empty where there are none.
        novelty: p-value, 0..1, of the image in the middle: how rare it is that a calibration image is as far from all
            references; None below 50 calibration images.
    """

    images: Sequence[JudgedImage]
    nearest: Sequence[Neighbour]
    novelty: float | None

    @property
    def name(self) -> str:
        """Of the image that was seen first, so that it stays while the group grows: 12 digits of its hash."""
        return self.images[0].sha256[:12]

    def summary(self) -> dict[str, Any]:
        """What is shown of it."""
        kinds = Counter((near.label, near.generator) for near in self.nearest)
        similarities = [near.similarity for near in self.nearest]
        return {
            "name": self.name,
            "images": len(self.images),
            "first": self.images[0].first_at,
            "last": max(image.last_at for image in self.images),
            "novelty": self.novelty,
            "similarity": float(np.median(similarities)) if similarities else None,
            "verdicts": dict(Counter(image.verdict for image in self.images).most_common()),
            "nearest": [
                {"label": LABEL_NAMES[label], "generator": generator, "images": count}
                for (label, generator), count in kinds.most_common()
            ],
            "examples": [
                {"detection": str(image.id), "file": image.file, "verdict": image.verdict, "at": image.last_at}
                | {"pictured": image.pictured}
                | {"nearest": near and near._asdict() | {"label": LABEL_NAMES[near.label]}}
                for image, near in islice(zip_longest(self.images, self.nearest), EXAMPLES)
            ],
        }


@dataclass(frozen=True, slots=True)
class Discovery:
    """Candidates, the most novel first, of so many images; `left_out` counts older images that were not looked at."""

    candidates: Sequence[Candidate]
    images: int
    left_out: int

    def summary(self) -> dict[str, Any]:
        """{"candidates": [summaries], "images", "ungrouped", "left_out"}."""
        ungrouped = self.images - sum(len(candidate.images) for candidate in self.candidates)
        candidates = [candidate.summary() for candidate in self.candidates]
        return {"candidates": candidates, "images": self.images, "ungrouped": ungrouped, "left_out": self.left_out}


def cluster(vectors: np.ndarray, smallest: int) -> np.ndarray:
    """Number of the cluster of each raw embedding, shape (n,), -1 for none, by HDBSCAN (Campello et al. 2013).

    The clusters are the leaves of its tree, small and alike: a group of one generator does not swallow images that
    merely lie near it.

    Args:
        vectors: Raw embeddings, shape (n, d), float32; they are compared by direction.
        smallest: Images of a cluster, at least.
    """
    from sklearn.cluster import HDBSCAN

    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # (n, d)
    # On embeddings trees are slower than comparing all pairs: 27 s against 3 s for 4,000 on a busy core.
    clusters = HDBSCAN(
        min_cluster_size=smallest,
        min_samples=CORE_NEIGHBOURS,
        cluster_selection_method="leaf",
        algorithm="brute",
        copy=True,
    )
    return np.asarray(clusters.fit(directions).labels_)


def discover(
    follower: Follower,
    calibration: Calibration | None,
    *,
    smallest: int = SMALLEST,
    owner: int | None = None,
    everybody: bool = True,
    group: Cluster = cluster,
) -> Discovery:
    """Group the latest unexplained images of kept verdicts; the same verdicts and references give the same groups.

    Args:
        follower: A loaded index, whose references are the nearest ones.
        calibration: Gives p-values of novelty; None without.
        smallest: Images of a candidate, 2 or more.
        owner: See `Detections.unexplained`.
        everybody: See there.
        group: What clusters, for another process to do so.
    """
    images, total = follower.store.detections.unexplained(
        follower.checkpoint_id, novelty=NOVELTY, images=MOST_IMAGES, owner=owner, everybody=everybody
    )
    images = sorted(images, key=lambda image: (image.first_at, image.sha256))
    candidates: list[Candidate] = []
    if len(images) >= max(smallest, CORE_NEIGHBOURS):
        values = {"checkpoint": follower.checkpoint_id, "most": KNOWN_IMAGES}
        known = [np.frombuffer(row["vector"], "<f4") for row in follower.store.read(KNOWN, values)]
        vectors = np.stack([image.vector for image in images] + known)  # (n + m, d)
        numbers = group(vectors, smallest)[: len(images)]  # (n,)
        for number in range(numbers.max() + 1):
            rows = np.flatnonzero(numbers == number)
            if len(rows) < smallest:
                continue
            nearest = [row[0] for row in follower.search(vectors[rows], 1) if row]
            p_values = [calibration.novelty(near.similarity) for near in nearest] if calibration else []
            defined = [p_value for p_value in p_values if p_value is not None]
            novelty = float(np.median(defined)) if defined else None
            candidates.append(Candidate([images[row] for row in rows], nearest, novelty))
    candidates.sort(key=lambda one: (1.0 if one.novelty is None else one.novelty, -len(one.images), one.name))
    return Discovery(candidates, len(images), total - len(images))


def enrol_candidate(
    follower: Follower,
    discovery: Callable[[], Discovery],
    name: str,
    generator: str,
    *,
    source: str = SOURCE,
    while_active: bool = False,
) -> dict[str, Any]:
    """Make the images of a candidate references of a generator, which is created if new; one enrolment undoes it.

    A candidate that was enrolled as this generator already adds nothing.

    Args:
        follower: The index; it follows by itself, later.
        discovery: Gives the candidates of now.
        name: Of the candidate.
        generator: What made its images.
        source: Of the references.
        while_active: See `References.add`.

    Returns:
        What `lineup index add --json` prints, as far as it can be said, with `candidate`.

    Raises:
        UnknownCandidate: No candidate has this name, or has it any more.
        CandidateEnrolled: Its images are references of another kind.
        BadGeneratorName: The name may not be used.
    """
    store = follower.store
    check_generator_name(generator)
    first = store.references.find_prefix(name) if NAME.fullmatch(name) else None
    if first is not None:
        enrolled = None if first.enrolment_id is None else store.enrolments.get(first.enrolment_id)
        if (first.generator or "").lower() != generator.lower():
            undo = "" if enrolled is None else f"; undo that first: lineup index remove --enrolment {enrolled.id}"
            was = f"reference {first.id}, {kind(first.label, first.generator)}"
            raise CandidateEnrolled(f"candidate {name} was enrolled: its first image is {was}{undo}")
        known = 1 if enrolled is None else enrolled.references
        revision = store.checkpoints.revision(follower.checkpoint_id)
        return asdict(Report(revision=revision, images=known, known=known)) | {"candidate": name}
    candidate = next((one for one in discovery().candidates if one.name == name), None)
    if candidate is None:
        raise UnknownCandidate(f"no candidate is called {name!r}: `lineup index discover` lists those of now")
    report = enrol_judged(
        store, follower.checkpoint_id, candidate.images, Kind(1, generator), source, while_active=while_active
    )
    return asdict(report) | {"candidate": name}


def enrol_judged(
    store: Store, checkpoint_id: str, images: Sequence[JudgedImage], wanted: Kind, source: str, *, while_active: bool
) -> Report:
    """Make judged images references of one kind by the embeddings of their verdicts, as one finished enrolment.

    Where nothing is added there is no enrolment.

    Args:
        store: Where the verdicts are kept.
        checkpoint_id: What made the embeddings.
        images: None of them a reference.
        wanted: What they are.
        source: Of the references.
        while_active: See `References.add`.
    """
    start = time.monotonic()
    enrolment = store.enrolments.open(wanted.generator, source)
    report = Report(images=len(images), enrolment=enrolment)
    try:
        for place in range(0, len(images), TRANSACTION_IMAGES):
            batch = images[place : place + TRANSACTION_IMAGES]
            thumbnails = store.detections.thumbnails([image.id for image in batch if image.pictured])
            references = [_reference(image, wanted, source, thumbnails.get(image.id)) for image in batch]
            added = store.references.add(references, checkpoint_id, enrolment, while_active=while_active)
            report.added += added.added
            report.known += added.known
            report.revision = added.revision
            for conflict in added.conflicts:
                report.conflict(batch[conflict.position].file, conflict.sha256, conflict.has, conflict.wants)
            for image, image_id in zip(batch, added.ids, strict=True):
                if image_id is None:
                    report.reject(image.file, FORGOTTEN)
    finally:
        if not report.added:
            report.enrolment = None
            store.enrolments.discard(enrolment)
    report.generators = {wanted.generator or LABEL_NAMES[wanted.label]: report.added}
    report.sources = {source: report.added}
    report.seconds = round(time.monotonic() - start, 3)
    if report.added:
        store.enrolments.finish(enrolment, asdict(report))
    return report


def _reference(image: JudgedImage, wanted: Kind, source: str, thumbnail: bytes | None) -> NewReference:
    """A reference; each is a group of its own, as uploads are."""
    return NewReference(
        sha256=image.sha256,
        label=wanted.label,
        generator=wanted.generator,
        source=source,
        group=image.sha256,
        uri=None,
        file_bytes=image.file_bytes,
        mtime=None,
        width=image.width,
        height=image.height,
        format=image.format,
        jpeg_quality=None,
        thumbnail=thumbnail,
        attributes={"detection": str(image.id)},
        vector=image.vector,
    )
