"""Thumbnails of references that came without, read again from where they lie and checked to be the ones meant.

A command fetches all from their public addresses; a service makes single ones, from places that its operator names.
"""

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from ssl import SSLContext
from typing import Any
from urllib.parse import urlsplit

from httpx2 import AsyncClient, Request
from PIL import Image
from sqlalchemy import RowMapping, text

from indexer.ingest.decoded import fingerprint, hamming_distance
from indexer.ingest.public_files import MAX_BYTES, Refused, download, public_client, refuse_private
from indexer.store import Store
from indexer.store.reference_facts import NEAR_BITS, Reference, in_places
from trainer.cores import usable_memory
from trainer.data.datasets import read_uri
from trainer.images import UnreadableImage, decode_image, decoding_memory, thumbnail
from trainer.process_pool import LimitExceeded, ProcessPool, decoding_pool

CONNECTIONS = 8
"""Files that are fetched at a time."""
READERS, READING_SHARE = 2, 0.2
"""Processes that read files for single thumbnails; those that decode uploads are not to wait for somebody's disk. Both
work at a time where they are allowed no more than this share of the memory."""
PARQUET_MEMORY = 2**31
"""Bytes that reading a cell may take beside decoding it: pyarrow reserves some, and reads a row group."""
PAGE_REFERENCES = 64
MISSING = text("""select id, encode(sha256, 'hex') as sha256, uri, width, height, fingerprint, attributes
from reference_image where num_nulls(thumbnail, thumbnail_sha256) = 2 and id > :after order by id limit :page""")
MISSING_COUNT = text("select count(*) as images from reference_image where num_nulls(thumbnail, thumbnail_sha256) = 2")


def missing_thumbnails(store: Store) -> int:
    """How many references have no thumbnail."""
    return int(store.read(MISSING_COUNT)[0]["images"])


def fetch_thumbnails(
    store: Store,
    *,
    verify: SSLContext | bool = True,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = 50_000_000,
    image_seconds: float = 20.0,
    on_image: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fetch the pictures of references without a thumbnail; safe to end at any point and to run again.

    A file that is the reference itself must have its hash; of one that the reference is a window of, the window must
    have its size, and a difference hash within `NEAR_BITS` bits of it.

    Args:
        store: The references.
        verify: See `public_client`.
        max_bytes: Larger files are refused.
        max_pixels: Larger images are refused.
        image_seconds: Images that take longer to decode are refused.
        on_image: Called once for each reference.

    Returns:
        {"missing", "fetched", "failed": [{"id", "uri", "reason"}], "reasons": {reason: count}}.
    """
    fetched = 0
    failed: list[dict[str, Any]] = []
    place = {"after": 0, "page": PAGE_REFERENCES}

    in_process = partial(decoding_pool().call, seconds=image_seconds, memory=decoding_memory(max_pixels))

    async def fetch(row: RowMapping, client: AsyncClient, turn: asyncio.Semaphore) -> bytes | str:
        try:
            if row["uri"] is None:
                raise Refused("no public address")
            async with turn:
                if row["uri"].startswith("hf://"):
                    data = await asyncio.to_thread(_from_hub, row["uri"], max_bytes)
                else:
                    data = await download(client, row["uri"], max_bytes)
                return await asyncio.to_thread(in_process, _checked_thumbnail, dict(row), data, max_pixels)
        except (Refused, LimitExceeded) as error:
            return str(error)

    async def fetch_all() -> None:
        nonlocal fetched
        turn = asyncio.Semaphore(CONNECTIONS)
        async with public_client(verify) as client:
            while page := store.read(MISSING, place):
                place["after"] = page[-1]["id"]
                tasks = [asyncio.create_task(fetch(row, client, turn)) for row in page]
                for row, task in zip(page, tasks, strict=True):
                    outcome = await task
                    if isinstance(outcome, bytes):
                        store.references.add_thumbnail(row["id"], outcome)
                        fetched += 1
                    else:
                        failed.append({"id": row["id"], "uri": row["uri"], "reason": outcome})
                    on_image()

    asyncio.run(fetch_all())
    reasons = dict(Counter(one["reason"] for one in failed).most_common())
    return {"missing": fetched + len(failed), "fetched": fetched, "failed": failed, "reasons": reasons}


def make_thumbnail(
    store: Store,
    reference: Reference,
    places: Sequence[str],
    *,
    private_addresses: bool = False,
    max_pixels: int = 50_000_000,
    seconds: float = 20.0,
    deadline: float = math.inf,
) -> bytes:
    """Make and keep the thumbnail of a reference, of its kept upload or of what its uri names.

    Args:
        store: The references.
        reference: One whose thumbnail is not there.
        places: Where a uri may be read, see `in_places`.
        private_addresses: Also read https:// from servers that are not public.
        max_pixels: Larger images are refused.
        seconds: Reading and decoding may take so long; then the process that does it is ended.
        deadline: When nobody waits any more, by `time.monotonic`.

    Raises:
        Refused: It may not be read, cannot be, or is not the picture meant.
        LimitExceeded: It takes too much time or memory.
        DeadlinePassed: Nobody waits any more.
        BlobsAway: Object storage cannot be used.
    """
    file = store.references.file(reference.id)
    if file is None and not in_places(reference.uri, places):
        raise Refused("its file is in no place of LINEUP_THUMBNAILS_FROM")
    data = _reading_pool().call(
        _thumbnail_of_file,
        *(asdict(reference), file, private_addresses, max_pixels),
        seconds=seconds,
        memory=decoding_memory(max_pixels) + PARQUET_MEMORY,
        deadline=deadline,
    )
    store.references.add_thumbnail(reference.id, data)
    return data


@cache
def _reading_pool() -> ProcessPool:
    return ProcessPool(READERS, READING_SHARE * usable_memory())


def _thumbnail_of_file(row: Mapping[str, Any], file: bytes | None, private_addresses: bool, max_pixels: int) -> bytes:
    try:
        data = _read(row["uri"], private_addresses) if file is None else file
    except MemoryError:
        raise
    except Exception as error:  # of one of many libraries
        raise Refused(str(error) or type(error).__name__) from error
    if len(data) > MAX_BYTES:
        raise Refused(f"more than {MAX_BYTES:,} bytes")
    return _checked_thumbnail(row, data, max_pixels)


def _read(uri: str, private_addresses: bool) -> bytes:
    """The bytes that a uri names."""
    parts = urlsplit(uri)
    if parts.scheme == "https" and not parts.fragment:
        return asyncio.run(_download(uri, private_addresses))
    if parts.scheme == "https" and not private_addresses:
        refuse_private(Request("GET", f"https://{parts.netloc}"))
    return read_uri(uri)


async def _download(uri: str, private_addresses: bool) -> bytes:
    async with public_client(private=private_addresses) as client:
        return await download(client, uri)


def _from_hub(uri: str, max_bytes: int) -> bytes:
    """A cell of a data set on the hub, at the commit that its address names.

    Raises:
        Refused: It cannot be had, or is too large.
    """
    try:
        data = read_uri(uri)
    except ImportError as error:
        raise Refused("needs the hub's client: pip install 'lineup[train,datasets]'") from error
    except ValueError as error:
        raise Refused("unreachable") from error
    if len(data) > max_bytes:
        raise Refused(f"more than {max_bytes:,} bytes")
    return data


def _checked_thumbnail(row: Mapping[str, Any], data: bytes, max_pixels: int) -> bytes:
    """The thumbnail of a reference from the bytes of its public file; windows are cut from pixels as stored."""
    window = row["attributes"].get("window")
    if window is None and hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise Refused("another file: its hash differs")
    try:
        image, _ = decode_image(data, max_pixels=max_pixels, upright=window is None)
    except UnreadableImage as error:
        raise Refused("no readable image") from error
    if window is not None:
        image = _cut(image, window)
        if image.size != (row["width"], row["height"]):
            raise Refused("another picture: its size differs")
        if not row["fingerprint"]:  # 0 is that of every flat picture
            raise Refused("no difference hash to check it by")
        if hamming_distance(fingerprint(image), row["fingerprint"]) > NEAR_BITS:
            raise Refused("another picture: its difference hash differs")
    return thumbnail(image)


def _cut(image: Image.Image, window: str) -> Image.Image:
    try:
        x, y, width, height = map(int, window.split(","))
    except (AttributeError, ValueError) as error:
        raise Refused("its window is not x,y,width,height") from error
    if min(x, y, width - 1, height - 1) < 0 or x + width > image.width or y + height > image.height:
        raise Refused("another picture: its window lies outside")
    return image.crop((x, y, x + width, y + height))
