"""Embedding what is stored with another checkpoint, beside the one that serves, until nothing is missing."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from httpx2 import InvalidURL, Request
from sqlalchemy import RowMapping, text

from indexer.ingest.decoded import decode_windows
from indexer.ingest.ingest import register
from indexer.ingest.prefetch import map_batches, prefetch
from indexer.ingest.public_files import Refused, refuse_private
from indexer.store import Store
from trainer.cores import usable_cores
from trainer.data.datasets import read_uri
from trainer.images import UnreadableImage, decoding_memory
from trainer.model.embedder import Embedder
from trainer.process_pool import LimitExceeded, decoding_pool

PAGE_REFERENCES = 256
MISSING = text("""select r.id, r.sha256, r.uri from reference_image r
where r.id > :after and not exists (
    select from embedding e where e.image_id = r.id and e.checkpoint_id = :checkpoint)
order by r.id limit :page""")


def reembed(
    embedder: Embedder,
    store: Store,
    *,
    max_pixels: int = 50_000_000,
    image_seconds: float = 20.0,
    partial: bool = False,
    private_addresses: bool = False,
    batch_size: int = 32,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Give every reference an embedding of this checkpoint, then make it the active one.

    What others add meanwhile is embedded too, before the switch. Safe to end at any point and to run again.

    Args:
        embedder: The new checkpoint.
        store: The references.
        max_pixels: Larger images cannot be read.
        image_seconds: Images that take longer to decode cannot be read.
        partial: Switch although some images cannot be read any more; they are no longer found by searches then.
        private_addresses: Also read https:// from servers that are not public: whoever made an imported file chose it.
        batch_size: Images per forward pass.
        on_image: Called once for each image that is done.

    Returns:
        {"checkpoint", "embedded", "unreadable": [{"id", "uri", "reason"}], "active"}.
    """

    def embed(batch: Sequence[tuple[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
        vectors = embedder.embed_windows([windows for _, windows in batch], batch_size)  # (n, d)
        return [image_id for image_id, _ in batch], vectors

    register(embedder, store)
    unreadable: dict[int, dict[str, Any]] = {}
    embedded = 0
    complete = False
    # Each turn leaves nothing but what others add meanwhile.
    while not complete and (partial or not unreadable):
        with ThreadPoolExecutor(min(32, usable_cores()), thread_name_prefix="decode") as pool:
            decoded = _decoded(store, embedder, pool, max_pixels, image_seconds, private_addresses, unreadable)
            with closing(map_batches(embed, prefetch(decoded, 2 * batch_size), batch_size)) as batches:
                for ids, vectors in batches:
                    embedded += store.references.embed(ids, vectors, embedder.id)
                    for _ in ids:
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


def _decoded(
    store: Store,
    embedder: Embedder,
    pool: ThreadPoolExecutor,
    max_pixels: int,
    image_seconds: float,
    private_addresses: bool,
    unreadable: dict[int, dict[str, Any]],
) -> Generator[tuple[int, np.ndarray], None, None]:
    """Ids and windows of the references without an embedding of this checkpoint, in order of id."""

    def decode(row: RowMapping) -> np.ndarray | None:
        try:
            return decoding_pool().call(
                decode_windows,
                *(_read(store, row, private_addresses), max_pixels, embedder.preprocess),
                seconds=image_seconds,
                memory=decoding_memory(max_pixels),
            )
        except (UnreadableImage, LimitExceeded, OSError) as error:
            unreadable[row["id"]] = {"id": row["id"], "uri": row["uri"], "reason": str(error)}
            return None

    place = {"after": 0, "checkpoint": embedder.id, "page": PAGE_REFERENCES}
    while page := store.read(MISSING, place):
        place["after"] = page[-1]["id"]
        rows = [row for row in page if row["id"] not in unreadable]
        for row, windows in zip(rows, pool.map(decode, rows), strict=True):
            if windows is not None:
                yield row["id"], windows


def _read(store: Store, row: RowMapping, private_addresses: bool) -> bytes:
    """The bytes that were kept, or the file's."""
    file = store.references.file(row["id"])
    if file is not None:
        return file
    if row["uri"] is None:
        raise UnreadableImage("its bytes were not kept")
    _check_address(row["uri"], private_addresses)
    data = read_uri(row["uri"])
    if hashlib.sha256(data).digest() != row["sha256"]:
        raise UnreadableImage("the file has changed since it was added")
    return data


def _check_address(uri: str, private_addresses: bool) -> None:
    """Refuse what a stranger's reference may name and this machine is not to ask.

    Raises:
        UnreadableImage: It is no address, of a whole file on the web, or of a server that is not public.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UnreadableImage(f"its address cannot be read: {error}") from error
    if parts.scheme != "https":
        return
    if not parts.fragment:  # of an archive only what lies there is read
        raise UnreadableImage("its picture is not on this machine: add its data set with this checkpoint first")
    if not private_addresses:
        try:
            refuse_private(Request("GET", f"https://{parts.netloc}"))
        except (Refused, InvalidURL) as error:
            rule = "LINEUP_PRIVATE_ADDRESSES=true lets servers be read that are not public"
            raise UnreadableImage(f"{parts.netloc}: {error}; {rule}") from error
