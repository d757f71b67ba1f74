"""Thumbnails of references that came without: fetched from their public addresses, and checked to be the ones meant."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from socket import SOCK_STREAM, getaddrinfo
from ssl import SSLContext
from typing import Any

from httpx2 import AsyncClient, HTTPError, InvalidURL, Request, TimeoutException, TooManyRedirects
from PIL import Image
from sqlalchemy import RowMapping, text

from indexer.ingest.ingest import fingerprint, hamming_distance
from indexer.store import Store
from indexer.store.reference_facts import NEAR_BITS
from trainer.data.datasets import read_uri
from trainer.images import UnreadableImage, decode_image, decoding_memory, thumbnail
from trainer.process_pool import LimitExceeded, decoding_pool

MAX_BYTES = 64 * 1024 * 1024
"""Largest file that is fetched."""
CONNECTIONS = 8
"""Files that are fetched at a time."""
REDIRECTS = 5
SILENCE_SECONDS = 20.0
FILE_SECONDS = 120.0
PAGE_REFERENCES = 64
NAT64 = IPv6Network("64:ff9b::/96")
"""Addresses that a gateway translates to their last 32 bits (RFC 6052)."""
MISSING = text("""select id, encode(sha256, 'hex') as sha256, uri, width, height, fingerprint, attributes
from reference_image where thumbnail is null and id > :after order by id limit :page""")
MISSING_COUNT = text("select count(*) as images from reference_image where thumbnail is null")


class Refused(ValueError):
    """What an address gives is not taken; the message is the reason, the same for every address with that fault."""


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


def public_client(verify: SSLContext | bool = True) -> AsyncClient:
    """A client that asks nothing but public servers over https, also where it is redirected."""

    async def check(request: Request) -> None:
        await asyncio.to_thread(refuse_private, request)  # names are looked up

    return AsyncClient(
        verify=verify,
        follow_redirects=True,
        max_redirects=REDIRECTS,
        timeout=SILENCE_SECONDS,
        headers={"accept-encoding": "identity"},
        event_hooks={"request": [check]},
    )


def refuse_private(request: Request) -> None:
    """Refuse a request before it is sent unless it goes to public addresses over https.

    A name that leads elsewhere a moment later gains a handshake and no request: that server would need a certificate
    for the name.

    Raises:
        Refused: It is not https, or the name has an address that is not public, or none.
    """
    if request.url.scheme != "https":
        raise Refused("not https")
    try:
        addresses = {str(found[4][0]) for found in getaddrinfo(request.url.host, None, type=SOCK_STREAM)}
    except (OSError, ValueError) as error:  # no such name, or none that can be: an empty label, or one of 64 characters
        raise Refused("unreachable") from error
    if not all(_is_public(ip_address(address)) for address in addresses):
        raise Refused("not a public server")


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is of the public internet, and so is the one that it stands for in IPv4."""
    if isinstance(address, IPv6Address):
        translated = IPv4Address(int(address) & 0xFFFF_FFFF) if address in NAT64 else address.sixtofour
        return address.is_global and (translated is None or translated.is_global)
    return address.is_global


async def download(client: AsyncClient, uri: str, max_bytes: int = MAX_BYTES) -> bytes:
    """What lies at an address; redirects and headers are part of its `FILE_SECONDS`.

    Raises:
        Refused: It cannot be had, takes too long or is too large.
    """
    data = bytearray()
    try:
        async with asyncio.timeout(FILE_SECONDS), client.stream("GET", uri) as response:
            if response.status_code != 200:
                raise Refused(f"HTTP {response.status_code}")
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > max_bytes:
                    raise Refused(f"more than {max_bytes:,} bytes")
    except TooManyRedirects as error:
        raise Refused(f"more than {REDIRECTS} redirects") from error
    except (TimeoutException, TimeoutError) as error:
        raise Refused("too slow") from error
    except (HTTPError, InvalidURL) as error:
        raise Refused("unreachable") from error
    return bytes(data)


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
