"""Files of the public web, fetched over https within limits of size and time."""

import asyncio
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from socket import SOCK_STREAM, getaddrinfo
from ssl import SSLContext

from httpx2 import AsyncClient, HTTPError, InvalidURL, Request, TimeoutException, TooManyRedirects

MAX_BYTES = 64 * 1024 * 1024
"""Largest file that is fetched, unless the caller says less."""
REDIRECTS = 5
SILENCE_SECONDS = 20.0
FILE_SECONDS = 120.0
NAT64 = IPv6Network("64:ff9b::/96")
"""Addresses that a gateway translates to their last 32 bits (RFC 6052)."""


class Refused(ValueError):
    """What an address gives is not taken; the message is the reason, the same for every address with that fault."""


def public_client(verify: SSLContext | bool = True, *, private: bool = False) -> AsyncClient:
    """A client that asks nothing but public servers over https, also where it is redirected.

    Args:
        verify: Whose certificates are trusted, as httpx has it.
        private: Whether servers that are not public are asked as well.
    """

    async def check(request: Request) -> None:
        if not private:
            await asyncio.to_thread(refuse_private, request)  # names are looked up
        elif request.url.scheme != "https":
            raise Refused("not https")

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
