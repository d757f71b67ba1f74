"""Tells an address of the end of a job, signed, so that who listens there can believe it."""

import asyncio
import hashlib
import hmac

from httpx2 import AsyncClient, HTTPError, InvalidURL, TimeoutException
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from indexer.ingest.public_files import Refused

SIGNATURE = "x-lineup-signature"
ATTEMPTS = 5
ANSWER_SECONDS = 10.0
"""For each step of an attempt, and half of what all of them may take."""
PAUSE = wait_exponential(multiplier=1, max=8)
"""Seconds between two attempts: 1, 2, 4, 8."""
WEBHOOK_SECONDS = 120.0
"""In which all attempts are over."""


def signature(body: bytes, secret: str) -> str:
    """What the header `X-Lineup-Signature` says of a body: HMAC-SHA256 (RFC 2104) in hexadecimal."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


async def deliver(client: AsyncClient, address: str, body: bytes, secret: str) -> None:
    """Post a JSON document until it is answered with a status of success; redirects are not followed.

    Raises:
        Refused: The last attempt failed, too.
    """
    headers = {"content-type": "application/json", SIGNATURE: signature(body, secret)}
    attempts = AsyncRetrying(
        retry=retry_if_exception_type(Refused), stop=stop_after_attempt(ATTEMPTS), wait=PAUSE, reraise=True
    )
    await attempts(_post, client, address, body, headers)


async def _post(client: AsyncClient, address: str, body: bytes, headers: dict[str, str]) -> None:
    request = client.build_request("POST", address, content=body, headers=headers, timeout=ANSWER_SECONDS)
    try:
        async with asyncio.timeout(2 * ANSWER_SECONDS):
            response = await client.send(request, stream=True, follow_redirects=False)
            await response.aclose()  # what else it says is not read
    except (TimeoutException, TimeoutError) as error:
        raise Refused("too slow") from error
    except (HTTPError, InvalidURL) as error:
        raise Refused("unreachable") from error
    if not response.is_success:
        raise Refused(f"HTTP {response.status_code}")
