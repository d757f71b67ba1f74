"""Embedding what is stored with another checkpoint, beside the one that serves, until nothing is missing."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from sqlalchemy import text

from indexer.ingest.ingest import register
from indexer.ingest.prefetch import prefetch
from indexer.store import Store
from trainer.cores import usable_cores
from trainer.data.datasets import read_uri
from trainer.images import UnreadableImage, decode_image
from trainer.model.embedder import Embedder

PAGE = 256
MISSING = """select r.id, r.sha256, r.uri from reference_image r
where r.id > :after and not exists (
    select from embedding e where e.image_id = r.id and e.checkpoint_id = :checkpoint)
order by r.id limit :page"""


@dataclass(frozen=True, slots=True)
class Missing:
    """A reference without an embedding of the new checkpoint."""

    id: int
    sha256: str
    uri: str | None


def reembed(
    embedder: Embedder,
    store: Store,
    *,
    max_pixels: int = 50_000_000,
    partial: bool = False,
    batch_size: int = 32,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Give every reference an embedding of this checkpoint, then make it the active one.

    What others add meanwhile is embedded too, before the switch. Safe to end at any point and to run again.

    Args:
        embedder: The new checkpoint.
        store: The references.
        max_pixels: Larger images cannot be read.
        partial: Switch although some images cannot be read any more; they are no longer found by searches then.
        batch_size: Images per forward pass.
        on_image: Called once for each image that is done.

    Returns:
        {"checkpoint", "embedded", "unreadable": [{"id", "uri", "reason"}], "active"}.
    """
    register(embedder, store)
    unreadable: dict[int, dict[str, Any]] = {}
    embedded = 0
    complete = False
    # Each turn leaves nothing but what others add meanwhile.
    while not complete and (partial or not unreadable):
        with (
            ThreadPoolExecutor(min(32, usable_cores()), thread_name_prefix="decode") as pool,
            closing(prefetch(_decoded(store, embedder, pool, max_pixels, unreadable), 2 * batch_size)) as decoded,
        ):
            while batch := list(islice(decoded, batch_size)):
                vectors = embedder.embed_pixels(np.stack([pixels for _, pixels in batch]), batch_size)  # (n, d)
                embedded += store.references.embed([image_id for image_id, _ in batch], vectors, embedder.id)
                for _ in batch:
                    on_image()
        if partial or not unreadable:
            complete = store.checkpoints.activate(embedder.id, list(unreadable), embedder.folder)
    active = store.checkpoints.active()
    return {
        "checkpoint": embedder.id,
        "embedded": embedded,
        "unreadable": [unreadable[image_id] for image_id in sorted(unreadable)],
        "active": active is not None and active.id == embedder.id,
    }


def missing(store: Store, checkpoint_id: str, after: int = 0) -> Sequence[Missing]:
    """A page of references without an embedding of this checkpoint, ids above `after`, ascending."""
    values = {"after": after, "checkpoint": checkpoint_id, "page": PAGE}
    with store.engine.connect() as connection:
        rows = connection.execute(text(MISSING), values).all()
    return [Missing(row.id, row.sha256.hex(), row.uri) for row in rows]


def _decoded(
    store: Store, embedder: Embedder, pool: ThreadPoolExecutor, max_pixels: int, unreadable: dict[int, dict[str, Any]]
) -> Generator[tuple[int, np.ndarray], None, None]:
    def pixels(image: Missing) -> np.ndarray | None:
        try:
            picture, _ = decode_image(_read(store, image), max_pixels=max_pixels)
            prepared: np.ndarray = embedder.preprocess([picture])[0]  # (3, s, s)
            return prepared
        except (UnreadableImage, OSError) as error:
            unreadable[image.id] = {"id": image.id, "uri": image.uri, "reason": str(error)}
            return None

    after = 0
    while page := missing(store, embedder.id, after):
        after = page[-1].id
        todo = [image for image in page if image.id not in unreadable]
        for image, made in zip(todo, pool.map(pixels, todo), strict=True):
            if made is not None:
                yield image.id, made


def _read(store: Store, image: Missing) -> bytes:
    """The bytes that were kept, or the file's."""
    kept = store.references.file(image.id)
    if kept is not None:
        return kept
    if image.uri is None:
        raise UnreadableImage("its bytes were not kept")
    data = read_uri(image.uri)
    if hashlib.sha256(data).hexdigest() != image.sha256:
        raise UnreadableImage("the file has changed since it was added")
    return data
