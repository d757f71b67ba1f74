"""Relabelling references. Each gets a new id, which followers add before they drop the old one."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from psycopg.types.json import Jsonb
from sqlalchemy import ColumnElement, Connection, func, or_, select, text

from indexer.database.tables import GeneratorRow, ReferenceRow
from indexer.database.transactions import TRANSACTION_IMAGES, Rows, notify
from indexer.store.counts import count_added, count_removed
from indexer.store.generators import check_generator_name, generator_ids
from indexer.store.reference_facts import LABEL_NAMES
from indexer.store.removing import RECORD, STAMP

FORMER_LABEL, FORMER_GENERATOR = "former_label", "former_generator"
"""Attributes of a relabelled reference: what it was, so that this can be undone."""
# Thumbnails, files and vectors stay where they are: only keys change, all in one statement, at whose end they agree.
# `any` lets the planner enter every table by its key.
RELABEL = """with relabelled as (
    update reference_image r
    set id = default, label = i.label, generator_id = i.generator_id, attributes = i.attributes
    from unnest(cast(:ids as bigint[]), cast(:labels as smallint[]), cast(:generators as bigint[]),
                cast(:attributes as jsonb[])) i (id, label, generator_id, attributes)
    where r.id = i.id and r.id = any(:ids) returning i.id as former_id, r.id),
moved_files as (
    update reference_file f set image_id = r.id from relabelled r
    where f.image_id = r.former_id and f.image_id = any(:ids)),
moved_embeddings as (
    update embedding e set image_id = r.id, revision = i.revision from relabelled r, index_revision i
    where e.image_id = r.former_id and e.image_id = any(:ids) and i.checkpoint_id = e.checkpoint_id)
select former_id, id from relabelled"""


class Kind(NamedTuple):
    """What made an image: label 0 is real, 1 fake; only a fake has a generator, where that is known."""

    label: int
    generator: str | None


@dataclass(frozen=True, slots=True)
class Relabelled:
    """What one `relabel` did.

    Attributes:
        ids: New ids by the former ones, of the references that changed.
        vectors: Embeddings that went with them, by checkpoint.
        revisions: What each index has now, by checkpoint.
    """

    ids: dict[int, int] = field(default_factory=dict)
    vectors: Counter[str] = field(default_factory=Counter)
    revisions: dict[str, int] = field(default_factory=dict)

    def __add__(self, later: "Relabelled") -> "Relabelled":
        return Relabelled(self.ids | later.ids, self.vectors + later.vectors, self.revisions | later.revisions)


def was(attributes: Mapping[str, str], kind: Kind) -> bool:
    """Tell whether a relabelled reference was of this kind before, by its attributes."""
    return attributes.get(FORMER_LABEL) in LABEL_NAMES and _former(attributes) == kind


def relabel_all(rows: Rows, criterion: ColumnElement[bool], kind: Kind | None) -> Relabelled:
    """Let the references that meet a criterion be of this kind (None: of that before), 1,000 per transaction."""
    if kind is not None and kind.generator is not None:
        check_generator_name(kind.generator)
    relabelled = Relabelled()
    while (batch := rows.transaction(lambda connection: _relabel(connection, criterion, kind))).ids:
        relabelled += batch
    return relabelled


def _relabel(connection: Connection, criterion: ColumnElement[bool], kind: Kind | None) -> Relabelled:
    # As when references are removed: an embedding that appeared now would stay in an index under the old id.
    connection.execute(text("lock table index_revision in exclusive mode"))
    query = (
        select(ReferenceRow.id, ReferenceRow.label, GeneratorRow.name.label("generator"), ReferenceRow.attributes)
        .outerjoin(GeneratorRow, GeneratorRow.id == ReferenceRow.generator_id)
        .where(criterion, _pending(kind))
        .order_by(ReferenceRow.id)
        .limit(TRANSACTION_IMAGES)
    )
    rows = connection.execute(query).all()
    if not rows:
        return Relabelled()
    former = [Kind(row.label, row.generator) for row in rows]
    kinds = [kind or _former(row.attributes) for row in rows]
    generators = generator_ids(connection, {one.generator for one in kinds if one.generator is not None})
    ids = [row.id for row in rows]
    revisions = {row.checkpoint_id: row.revision for row in connection.execute(text(STAMP), {"ids": ids})}
    vectors = Counter(connection.scalars(text(RECORD), {"ids": ids}))
    count_removed(connection, ids)
    values = {
        "ids": ids,
        "labels": [one.label for one in kinds],
        "generators": [None if one.generator is None else generators[one.generator.lower()] for one in kinds],
        "attributes": [
            Jsonb(_attributes(row.attributes, before, one))
            for row, before, one in zip(rows, former, kinds, strict=True)
        ],
    }
    new_ids = {row.former_id: row.id for row in connection.execute(text(RELABEL), values)}
    count_added(connection, list(new_ids.values()))
    for checkpoint_id, revision in revisions.items():
        notify(connection, f"{checkpoint_id} {revision}")
    return Relabelled(new_ids, vectors, revisions)


def _pending(kind: Kind | None) -> ColumnElement[bool]:
    """Which references are not of this kind yet, or (None) can go back to what they were."""
    if kind is None:
        return cast("ColumnElement[bool]", ReferenceRow.attributes[FORMER_LABEL].astext.in_(LABEL_NAMES))
    generator = None if kind.generator is None else kind.generator.lower()
    return or_(ReferenceRow.label != kind.label, func.lower(GeneratorRow.name).is_distinct_from(generator))


def _former(attributes: Mapping[str, str]) -> Kind:
    return Kind(LABEL_NAMES.index(attributes[FORMER_LABEL]), attributes.get(FORMER_GENERATOR))


def _attributes(attributes: Mapping[str, str], before: Kind, after: Kind) -> dict[str, str]:
    """The attributes of a reference of kind `after`, which say what it was before, unless it is that again."""
    lasting = {name: value for name, value in attributes.items() if name not in (FORMER_LABEL, FORMER_GENERATOR)}
    if was(attributes, after):
        return lasting
    generator = {} if before.generator is None else {FORMER_GENERATOR: before.generator}
    return lasting | {FORMER_LABEL: LABEL_NAMES[before.label]} | generator
