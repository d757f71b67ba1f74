"""How many references there are: counted in the transaction that changes them, so that nobody reads them all to know.

Whoever writes counts must hold the lock on a revision, and writes them last: they are what adders for several
checkpoints at once have in common.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, text

from indexer.database.transactions import Rows
from indexer.store.reference_facts import kind

# The same order everywhere, so that adders for two checkpoints wait for each other instead of deadlocking.
CHANGE = """insert into reference_count (label, generator_id, source, images)
select label, generator_id, source, :sign * count(*) from reference_image where id = any(:ids)
group by label, generator_id, source order by label, generator_id, source
on conflict (label, coalesce(generator_id, 0), source)
do update set images = reference_count.images + excluded.images"""
CHANGE_ENROLMENTS = """update enrolment e set images = e.images + :sign * changed.images
from (select enrolment_id, count(*) as images from reference_image where id = any(:ids) group by enrolment_id) changed
where e.id = changed.enrolment_id"""
DROP_EMPTY = "delete from reference_count where images = 0"

ANEW = (
    "delete from reference_count",
    """insert into reference_count (label, generator_id, source, images)
    select label, generator_id, source, count(*) from reference_image group by label, generator_id, source""",
    """update enrolment e set images = (select count(*) from reference_image r where r.enrolment_id = e.id)""",
)
MISCOUNTS = text("""
select coalesce(r.label, c.label) as label, g.name as generator, coalesce(r.source, c.source) as source,
       coalesce(r.images, 0) as images, coalesce(c.images, 0) as counted
from (select label, generator_id, source, count(*) as images from reference_image group by 1, 2, 3) r
full join reference_count c
    on c.label = r.label and coalesce(c.generator_id, 0) = coalesce(r.generator_id, 0) and c.source = r.source
left join generator g on g.id = coalesce(r.generator_id, c.generator_id)
where r.images is distinct from c.images order by 1, 2, 3
""")
ENROLMENT_MISCOUNTS = text("""
select e.id, e.images as counted, count(r.id) as images
from enrolment e left join reference_image r on r.enrolment_id = e.id group by e.id having e.images <> count(r.id)
order by e.id
""")


def count_added(connection: Connection, ids: Sequence[int]) -> None:
    """Count rows that this transaction has made."""
    _change(connection, ids, 1)


def count_removed(connection: Connection, ids: Sequence[int]) -> None:
    """Take rows off that this transaction, which excludes all others, is about to delete."""
    _change(connection, ids, -1)
    connection.execute(text(DROP_EMPTY))


def recount(rows: Rows) -> None:
    """Count all references anew, while nobody adds or removes any."""

    def work(connection: Connection) -> None:
        connection.execute(text("lock table index_revision in exclusive mode"))
        for statement in ANEW:
            connection.execute(text(statement))

    rows.transaction(work)


def miscounts(rows: Rows) -> list[str]:
    """Where the counts differ from the rows, a line each; reads all references."""
    problems = [
        f"{kind(row['label'], row['generator'])} of source {row['source']!r}: "
        f"{row['counted']:,} references counted, {row['images']:,} there"
        for row in rows.read(MISCOUNTS)
    ]
    return problems + [
        f"enrolment {row['id']}: {row['counted']:,} references counted, {row['images']:,} there"
        for row in rows.read(ENROLMENT_MISCOUNTS)
    ]


def _change(connection: Connection, ids: Sequence[int], sign: int) -> None:
    if ids:
        for statement in (CHANGE, CHANGE_ENROLMENTS):
            connection.execute(text(statement), {"ids": list(ids), "sign": sign})
