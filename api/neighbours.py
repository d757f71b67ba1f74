"""Neighbours as they are shown: what the index remembers of a reference, and what Postgres adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from api.evidence import Evidence
from api.judgement import clip
from api.patience import DATABASE_AWAY, Patience
from api.schemas import LABELS, Label, Neighbour
from indexer.follower import Follower
from indexer.follower import Neighbour as Nearby
from indexer.store import Reference, Store

Found = tuple[Nearby, float | None]
"""A neighbour and its weight."""


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """Looks references up by what a query found. While Postgres is away it shows what memory holds, and says so."""

    store: Store
    follower: Follower
    patience: Patience

    def known(self, sha256: str) -> tuple[Reference | None, bool]:
        """The reference with these bytes, and whether the database was away."""
        if self.follower.degraded:
            return None, True
        try:
            return self.patience.ask(self.store.find, sha256), False
        except DATABASE_AWAY:
            return None, True

    def voters(self, evidence: Evidence, degraded: bool) -> tuple[list[Neighbour], bool]:
        """Neighbours of the first embedding, both labels, nearest first, and whether the database was away."""
        votes = evidence.votes
        found: list[Found] = []
        for nearest, weights in ((evidence.real, votes.weights_real), (evidence.fake, votes.weights_fake)):
            shown = self.follower.neighbours(nearest)[0]
            found += zip(shown, map(clip, weights[0]), strict=False)  # padding has weights, but is not shown
        return self._describe(sorted(found, key=lambda item: -item[0].similarity), degraded)

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
        page: list[Found] = [(neighbour, None) for neighbour in found[offset : offset + limit]]
        neighbours, _ = self._describe(page, self.follower.degraded)
        return neighbours, offset + limit if len(found) > offset + limit else None

    def _describe(self, found: Sequence[Found], degraded: bool) -> tuple[list[Neighbour], bool]:
        """What memory holds of neighbours and their weights, with thumbnail, address and attributes from Postgres."""
        rows: dict[int, Reference] = {}
        if found and not degraded:
            try:
                rows = self.patience.ask(self.store.get_many, [neighbour.id for neighbour, _ in found])
            except DATABASE_AWAY:
                degraded = True
        shown = []
        for neighbour, weight in found:
            row = rows.get(neighbour.id)
            shown.append(
                Neighbour(
                    id=neighbour.id,
                    label=LABELS[neighbour.label],
                    generator=neighbour.generator,
                    source=neighbour.source,
                    similarity=neighbour.similarity,
                    weight=weight,
                    thumbnail=f"/v1/references/{neighbour.id}/thumbnail" if row else None,
                    uri=(row.uri or None) if row else None,
                    attributes=dict(row.attributes) if row else {},
                )
            )
        return shown, degraded
