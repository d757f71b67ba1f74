"""What index, heads and Postgres say of embeddings: neighbours of each label, their vote, and the combined score."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np

from api.breaker import DATABASE_AWAY, Breaker
from api.schemas import LABELS, Label
from api.schemas.verdicts import Neighbour
from indexer.follower import Follower
from indexer.follower import Neighbour as IndexNeighbour
from indexer.index.index import Neighbours
from indexer.index.milvus import EngineAway
from indexer.store import Store
from indexer.store.reference_facts import Reference, in_places
from trainer.heads.calibration import Calibration
from trainer.heads.heads import Heads
from trainer.heads.vote import Votes, vote

Arrays = TypeVar("Arrays", Neighbours, Votes)
PAGE = 2000
"""References that one look-up asks for at most, or those of one image: it has seconds to be answered."""
SAME = 0.9995
"""Similarity from which on two images may be the same bytes: half precision and engines cost under 0.0001."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Neighbours, raw scores and combined scores of the q embeddings of one image at one revision and calibration."""

    k: int
    """How many neighbours vote."""
    real: Neighbours
    """The nearest reals, k or more: ids (q, kr), -1 for missing, and similarities, NaN for missing."""
    fake: Neighbours
    """The nearest fakes, in the same form."""
    votes: Votes
    logits: dict[str, np.ndarray]
    """Raw logit or score by head, each (q,); NaN where the head cannot answer."""
    scores: np.ndarray
    """Calibrated combination, shape (q,), 0..1; NaN where nothing is calibrated."""
    search_ms: float
    heads_ms: float
    searched: bool = True
    """Whether the index answered; without it there are no neighbours, and the other heads judge alone."""

    @property
    def first_logits(self) -> dict[str, float]:
        """Raw logit or score by head for the first embedding; NaN where the head cannot answer."""
        return {head: float(values[0]) for head, values in self.logits.items()}

    @property
    def twins(self) -> list[int]:
        """References that cannot be told from the first image by their embeddings."""
        return [int(id) for near in (self.real, self.fake) for id in near.ids[0, near.similarities[0] >= SAME]]


def gather(
    stacks: Sequence[np.ndarray],
    k: int,
    follower: Follower,
    heads: Heads | None,
    calibration: Calibration,
    excluded: Sequence[Sequence[int]] | None = None,
) -> list[Evidence]:
    """Ask the index and the heads about the embeddings of several images together.

    Args:
        stacks: Raw embeddings of each image, shape (q, d), float32.
        k: Neighbours of each label, more of the one that has more references.
        follower: Where the references are.
        heads: Linear and SVM, where the checkpoint has them.
        calibration: Maps logits to the combined score.
        excluded: For each image the ids of references that may not vote on it: the image itself.

    Returns:
        The evidence on each image, with its share of the time.
    """
    lengths = [len(stack) for stack in stacks]
    exclude_each = None
    if excluded is not None:
        exclude_each = [np.array(ids) for ids, length in zip(excluded, lengths, strict=True) for _ in range(length)]
    embeddings = np.concatenate(stacks)  # (n, d)
    start = time.perf_counter()
    searched = True
    try:
        real, fake = follower.voters(embeddings, k, exclude_each=exclude_each)  # (n, kr) and (n, kf), both at least k
    except EngineAway:
        real = fake = Neighbours.none(len(embeddings), k)
        searched = False
    votes = vote(real.similarities, fake.similarities, fake.generators, k)
    search_end = time.perf_counter()
    logits = {"knn": votes.logit} | (heads.logits(embeddings) if heads else {})
    scores = calibration.combine_many(logits)
    search_ms, heads_ms = 1000 * (search_end - start), 1000 * (time.perf_counter() - search_end)
    parts = [slice(end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    return [
        Evidence(
            k=k,
            real=_rows(real, part),
            fake=_rows(fake, part),
            votes=_rows(votes, part),
            logits={head: values[part] for head, values in logits.items()},
            scores=scores[part],
            search_ms=search_ms * length / len(embeddings),
            heads_ms=heads_ms * length / len(embeddings),
            searched=searched,
        )
        for part, length in zip(parts, lengths, strict=True)
    ]


def _rows(arrays: Arrays, rows: slice) -> Arrays:
    """Those rows of every array of a dataclass of arrays."""
    return type(arrays)(*(getattr(arrays, column.name)[rows] for column in fields(arrays)))


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """Which references a search shows: `limit` of them after the `offset` nearest, None where all are asked.

    A generator is named without regard to case.
    """

    label: Label | None = None
    generator: str | None = None
    source: str | None = None
    limit: int = 10
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """Looks references up by what a query found. While Postgres is away it shows what memory holds."""

    store: Store
    follower: Follower
    breaker: Breaker
    thumbnail_places: Sequence[str]
    """Where the files of references may be read for thumbnails that are not kept."""

    def references(
        self, evidence: Sequence[Evidence], hashes: Sequence[str] = ()
    ) -> tuple[dict[int, Reference], list[bool]]:
        """What Postgres says of the neighbours that `voters` shows, by id, and of the references with these bytes.

        Images with few neighbours are looked up first, a page of them together. The first page that is not answered is
        the last one: who asks for more than others is not to have all of them wait again.

        Args:
            evidence: On each image.
            hashes: Of each image; none to look for no bytes.

        Returns:
            The references, and for each image whether Postgres answered.
        """
        asked = [
            {int(id) for near in (one.real, one.fake) for id in near.ids[0, : one.k] if id >= 0} for one in evidence
        ]
        found, answered = dict[int, Reference](), [False] * len(asked)
        for page in _pages([len(ids) for ids in asked]):
            ids = set[int]().union(*(asked[number] for number in page))
            references = self._look_up(ids, [hashes[number] for number in page] if hashes else ())
            if references is None:
                break
            found |= references
            for number in page:
                answered[number] = True
        return found, answered

    def voters(self, evidence: Evidence, references: Mapping[int, Reference]) -> list[Neighbour]:
        """Neighbours of the first embedding, both labels, nearest first, with what `references` gave."""
        votes, voters = evidence.votes, list[Neighbour]()
        for nearest, weights in ((evidence.real, votes.weights_real), (evidence.fake, votes.weights_fake)):
            neighbours = self.follower.neighbours(nearest.first(evidence.k))[0]
            # Padding has weights, but is not shown. Rounding may leave 0..1 by a hair.
            pairs = zip(neighbours, weights[0].clip(0, 1).tolist(), strict=False)
            voters += [self._described(near, references, weight) for near, weight in pairs]
        return sorted(voters, key=lambda voter: -voter.similarity)

    def search(
        self,
        embedding: np.ndarray,
        query: SearchQuery,
    ) -> tuple[list[Neighbour], int | None]:
        """The reference images nearest to one raw embedding, shape (d,), and the offset of the next page.

        Raises:
            EngineAway: They are in a search engine that does not answer.
        """
        end, label = query.offset + query.limit, None if query.label is None else LABELS.index(query.label)
        [nearest] = self.follower.search(
            embedding[None],  # (1, d)
            end + 1,
            label=label,
            generator=query.generator,
            source=query.source,
        )
        page = nearest[query.offset : end]
        references = self._look_up({near.id for near in page}) or {}
        return [self._described(near, references) for near in page], end if len(nearest) > end else None

    def around(self, id: int, query: SearchQuery) -> list[Neighbour] | None:
        """The references nearest to one of them, without itself; None where it has no embedding to compare.

        Raises:
            EngineAway: They are in a search engine that does not answer.
        """
        vector = self.store.references.vector(id, self.follower.checkpoint_id)
        if vector is None:
            return None
        nearest, _ = self.search(vector, replace(query, limit=query.limit + 1))
        return [near for near in nearest if near.id != id][: query.limit]

    def _described(
        self, near: IndexNeighbour, references: Mapping[int, Reference], weight: float | None = None
    ) -> Neighbour:
        """What memory holds of a neighbour, with thumbnail, address and attributes from Postgres."""
        reference = references.get(near.id)
        return Neighbour(
            id=near.id,
            label=LABELS[near.label],
            generator=near.generator,
            source=near.source,
            similarity=near.similarity,
            weight=weight,
            thumbnail=thumbnail_path(reference, self.thumbnail_places) if reference else None,
            uri=(reference.uri or None) if reference else None,
            attributes=dict(reference.attributes) if reference else {},
        )

    def _look_up(self, ids: Collection[int], hashes: Sequence[str] = ()) -> dict[int, Reference] | None:
        if self.follower.degraded:
            return None
        if not hashes and not ids:
            return {}
        try:
            return self.breaker.ask(self.store.references.get_many, ids, hashes)
        except DATABASE_AWAY:
            return None


def thumbnail_path(reference: Reference, places: Sequence[str]) -> str | None:
    """Where the service shows a reference, if its thumbnail is kept or may be made of a file in one of the places."""
    shown = reference.pictured or in_places(reference.uri, places)
    return f"/v1/references/{reference.id}/thumbnail" if shown else None


def _pages(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of these lengths, shortest first, in pages of at most `PAGE` together; a longer one is alone."""
    pages, room = list[list[int]](), -1
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[number] > room:
            pages.append([])
            room = PAGE
        pages[-1].append(number)
        room -= lengths[number]
    return pages
