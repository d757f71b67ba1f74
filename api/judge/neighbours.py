"""Neighbours as they are shown: what the index remembers of a reference, and what Postgres adds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from api.breaker import DATABASE_AWAY, Breaker
from api.judge.evidence import Evidence
from api.judge.judgement import clip
from api.schemas import LABELS, Label
from api.schemas.verdicts import Neighbour
from indexer.follower import Follower
from indexer.follower import Neighbour as Nearby
from indexer.store import Store
from indexer.store.columns import Reference


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """Looks references up by what a query found. While Postgres is away it shows what memory holds."""

    store: Store
    follower: Follower
    breaker: Breaker

    def rows(self, evidence: Iterable[Evidence], hashes: Sequence[str] = ()) -> dict[int, Reference] | None:
        """What Postgres says of the neighbours that `voters` shows, by id, and of the references with these bytes.

        None while it is away.
        """
        ids = {int(id) for one in evidence for near in (one.real, one.fake) for id in near.ids[0, : one.k]}
        return self._rows(ids - {-1}, hashes)

    def voters(self, evidence: Evidence, rows: Mapping[int, Reference]) -> list[Neighbour]:
        """Neighbours of the first embedding, both labels, nearest first, with what `rows` gave."""
        votes = evidence.votes
        found: list[tuple[Nearby, float]] = []
        for nearest, weights in ((evidence.real, votes.weights_real), (evidence.fake, votes.weights_fake)):
            shown = self.follower.neighbours(nearest.first(evidence.k))[0]
            found += zip(shown, map(clip, weights[0]), strict=False)  # padding has weights, but is not shown
        return [_shown(near, weight, rows) for near, weight in sorted(found, key=lambda item: -item[0].similarity)]

    def search(
        self,
        embedding: np.ndarray,
        *,
        label: Label | None = None,
        generator: str | None = None,
        source: str | None = None,
        limit: int = 10,
        offset: int = 0,
    ) -> tuple[list[Neighbour], int | None]:
        """The reference images nearest to one embedding, and the offset of the next page.

        Args:
            embedding: Raw, shape (d,).
            label: Only these.
            generator: Only of this generator, by name without regard to case.
            source: Only from this source.
            limit: Length of a page.
            offset: Neighbours to pass over.
        """
        found = self.follower.search(
            embedding[None],  # (1, d)
            offset + limit + 1,
            label=None if label is None else LABELS.index(label),
            generator=generator,
            source=source,
        )[0]
        page = found[offset : offset + limit]
        rows = self._rows({near.id for near in page}) or {}
        return [_shown(near, None, rows) for near in page], offset + limit if len(found) > offset + limit else None

    def _rows(self, ids: Collection[int], hashes: Sequence[str] = ()) -> dict[int, Reference] | None:
        if self.follower.degraded:
            return None
        if not hashes and not ids:
            return {}
        try:
            return self.breaker.ask(self.store.references.get_many, ids, hashes)
        except DATABASE_AWAY:
            return None


def _shown(near: Nearby, weight: float | None, rows: Mapping[int, Reference]) -> Neighbour:
    """What memory holds of a neighbour, with thumbnail, address and attributes from Postgres."""
    row = rows.get(near.id)
    return Neighbour(
        id=near.id,
        label=LABELS[near.label],
        generator=near.generator,
        source=near.source,
        similarity=near.similarity,
        weight=weight,
        thumbnail=f"/v1/references/{near.id}/thumbnail" if row else None,
        uri=(row.uri or None) if row else None,
        attributes=dict(row.attributes) if row else {},
    )
