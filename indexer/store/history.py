"""Rows by which a follower recognises the history it has followed.

A backup that is restored and then written to reaches revision numbers that were there before, with other rows behind
them: the number alone would let an old index pass for complete.
"""

from typing import Any

from sqlalchemy import text

from indexer.store import Store

ROWS = 8
"""Rows of each kind that are remembered; one would do, were it never removed."""

ADDED = text("""
select e.image_id, extract(epoch from r.added_at)::float8 as at
from embedding e join reference_image r on r.id = e.image_id
where e.checkpoint_id = :checkpoint and e.revision = :revision order by e.image_id limit :rows
""")
REMOVED = text("""
select image_id from removal where checkpoint_id = :checkpoint and revision = :revision order by image_id limit :rows
""")
REMOVED_SINCE = text("""
select image_id from removal where checkpoint_id = :checkpoint and image_id = any(:ids) and revision > :revision
""")


def landmark(store: Store, checkpoint_id: str, revision: int) -> dict[str, Any]:
    """Some of what this revision, at or below the present one, added (id and time) and removed (id), as JSON."""
    place = {"checkpoint": checkpoint_id, "revision": revision, "rows": ROWS}
    with store.engine.connect() as connection:
        added = [[row.image_id, row.at] for row in connection.execute(ADDED, place)]
        removed = list(connection.scalars(REMOVED, place))
    return {"revision": revision, "added": added, "removed": removed}


def stands(store: Store, checkpoint_id: str, remembered: dict[str, Any]) -> bool:
    """Whether the database still has these rows, or has removed them since in the ordinary way."""
    now = landmark(store, checkpoint_id, remembered["revision"])
    missing = [image_id for image_id, at in remembered["added"] if [image_id, at] not in now["added"]]
    place = {"checkpoint": checkpoint_id, "revision": remembered["revision"], "ids": missing}
    with store.engine.connect() as connection:
        gone = set(connection.scalars(REMOVED_SINCE, place))
    return set(missing) <= gone and remembered["removed"] == now["removed"]
