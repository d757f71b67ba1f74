"""Who may call: API keys with scopes, or, while there is none, who sits at this machine and has the start's token."""

import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from api.breaker import DATABASE_AWAY, Breaker
from api.schemas import Scope
from api.schemas.problems import ApiError
from api.schemas.verdicts import Neighbour
from indexer.store.keys import ApiKey, ApiKeys
from indexer.store.reference_facts import PUBLIC

PREFIX = "lineup_"
"""What every API key begins with."""
SCOPES: tuple[Scope, ...] = ("detect", "enrol", "admin")
FRESH = 2.0
"""Seconds that an answer about a key is believed: a revocation counts after these at the latest."""
STALE = 300.0
"""Seconds that a key which was good goes on being honoured while the database is away."""
MOST_REMEMBERED = 4096
"""Keys kept in memory, of those that there are and of wrong ones each."""
WRONG_KEYS = 60
"""Wrong keys that one address may send per minute before it is told to stop; good ones go on being honoured."""
FORWARDING = (
    *("forwarded", "via", "cdn-loop", "client-ip", "x-client-ip", "x-cluster-client-ip", "x-real-ip", "x-proxyuser-ip"),
    *("true-client-ip", "cf-connecting-ip", "cf-ray", "fastly-client-ip", "fly-client-ip", "x-amzn-trace-id"),
    *("x-appengine-user-ip", "x-azure-clientip", "x-envoy-external-address", "x-original-url"),
)
"""Headers, beside `x-forwarded-*`, that show that a proxy stands between; then the peer's address proves nothing."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. Without keys it is whoever has the token at this machine, who may do everything."""

    key_id: int | None = None
    name: str = "loopback"
    scopes: frozenset[str] = frozenset({"admin"})

    def may(self, scope: Scope) -> bool:
        """Whether this caller holds a scope; admin includes the others."""
        return "admin" in self.scopes or scope in self.scopes

    def visible(self, uri: str | None) -> str | None:
        """Where a reference lies, if this caller may know: of the web everybody, paths of this machine admins."""
        public = uri is not None and uri.startswith((*PUBLIC, "http://"))
        return uri if public or self.may("admin") else None


def hide_paths(neighbours: Iterable[Neighbour], caller: Caller) -> None:
    """Leave of the neighbours' addresses what this caller may see."""
    for neighbour in neighbours:
        neighbour.uri = caller.visible(neighbour.uri)


def new_secret() -> str:
    """A key as its owner gets it, 256 random bits. Only its hash is kept, so it cannot be shown again."""
    return f"{PREFIX}{secrets.token_urlsafe(32)}"


def hash_secret(secret: str) -> bytes:
    """SHA-256; a slow hash would add nothing, for the secret is random and long."""
    return sha256(secret.encode()).digest()


def in_force(key: ApiKey, now: datetime) -> bool:
    """Whether a key is neither revoked nor expired."""
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now)


@dataclass(slots=True)
class RateLimit:
    """A bucket of tokens for each of the latest callers: a minute's worth may come at once, then they drip.

    Args:
        per_minute: Tokens of one caller; 0 is no limit.
        rule: What a caller without tokens is told, with a place for that number.
    """

    per_minute: int
    rule: str = "this key may make {} requests per minute"
    _buckets: OrderedDict[Hashable, tuple[float, float]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def spend(self, caller: Hashable, now: float) -> None:
        """Take a token, where there is one.

        Args:
            caller: Whose bucket.
            now: Seconds of a clock that never goes back.

        Raises:
            ApiError: too-many-requests, with the seconds until the next token.
        """
        if not self.per_minute:
            return
        with self._lock:
            tokens, last = self._buckets.get(caller, (float(self.per_minute), now))
            tokens = min(float(self.per_minute), tokens + (now - last) * self.per_minute / 60)
            self._buckets[caller] = (tokens - 1 if tokens >= 1 else tokens, now)
            self._buckets.move_to_end(caller)
            if len(self._buckets) > MOST_REMEMBERED:
                self._buckets.popitem(last=False)
        if tokens < 1:
            wait = math.ceil((1 - tokens) * 60 / self.per_minute)
            raise ApiError("too-many-requests", self.rule.format(self.per_minute), retry_after=wait)


@dataclass(slots=True)
class Keys:
    """Looks keys up, remembering each answer for two seconds, and for longer while the database is away.

    An address that sends many wrong keys is told so, and looked up all the same: behind a proxy it is everybody's.
    """

    keys: ApiKeys
    breaker: Breaker
    failures: RateLimit = field(
        default_factory=lambda: RateLimit(WRONG_KEYS, "this address may send {} wrong keys per minute")
    )
    _known: OrderedDict[bytes, tuple[float, ApiKey | None]] = field(default_factory=OrderedDict)
    _unknown: OrderedDict[bytes, tuple[float, ApiKey | None]] = field(default_factory=OrderedDict)
    _any: tuple[float, bool] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def remembered(self, secret: str = "") -> bool | None:
        """What `exist` answers without asking the database; None where it has to ask."""
        at, exist = self._any or (-math.inf, False)
        fresh = time.monotonic() - at < FRESH and not secret.startswith(PREFIX)
        return exist if exist or fresh else None

    def exist(self, secret: str = "") -> bool:
        """Whether any key was ever made. Revoked ones count: revoking the last key must not open the door.

        Args:
            secret: What the caller sends. Who sends a key may have the first one, made a moment ago: that there was
                none is not believed then, or its holder might do everything, whatever its scopes.

        Raises:
            ApiError: not-ready, when the database is away and was never asked, or the caller sends a key.
        """
        if (remembered := self.remembered(secret)) is not None:
            return remembered
        try:
            self._any = (time.monotonic(), bool(self.breaker.ask(self.keys.list)))
        except DATABASE_AWAY as error:
            if self._any is None or secret.startswith(PREFIX):
                raise ApiError("not-ready", "the database does not answer", retry_after=2) from error
        return self._any[1]

    def authenticate(self, secret: str, address: str | None = None) -> Caller:
        """The owner of a key.

        Args:
            secret: The key.
            address: Where it was sent from.

        Raises:
            ApiError: unauthorized for an unknown, revoked or expired key; too-many-requests after many of them from
                this address; not-ready when that cannot be found out.
        """
        key = self._find(hash_secret(secret))
        if key is None or not in_force(key, datetime.now(UTC)):
            self.failures.spend(site(address), time.monotonic())
            detail = "this API key is unknown, revoked or expired; the token of the start ends with the first key"
            raise ApiError("unauthorized", detail)
        return Caller(key.id, key.name, frozenset(key.scopes))

    def _find(self, digest: bytes) -> ApiKey | None:
        now = time.monotonic()
        with self._lock:
            at, key = self._known.get(digest) or self._unknown.get(digest) or (-math.inf, None)
        if now - at < FRESH:
            return key
        try:
            key = self.breaker.ask(self.keys.find, digest)
        except DATABASE_AWAY as error:
            if now - at < STALE:
                return key
            detail = "the database does not answer, so this key cannot be checked"
            raise ApiError("not-ready", detail, retry_after=2) from error
        # Apart, so that no number of wrong keys has those forgotten that are in use.
        seen, others = (self._unknown, self._known) if key is None else (self._known, self._unknown)
        with self._lock:
            others.pop(digest, None)
            seen[digest] = (now, key)
            seen.move_to_end(digest)
            if len(seen) > MOST_REMEMBERED:
                seen.popitem(last=False)
        return key


def check_loopback(client: str | None, headers: Mapping[str, str], http_version: str = "1.1") -> None:
    """Refuse what may come from elsewhere: any web page that a browser here shows can post to 127.0.0.1.

    Args:
        client: The peer's address.
        headers: By lower-case name.
        http_version: No browser says 1.0, and some proxies do.

    Raises:
        ApiError: forbidden, saying which rule was broken.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    if client is None or not is_loopback(client):
        rule = f"only this machine may call, not {client}"
    elif any(name in FORWARDING or name.startswith("x-forwarded-") for name in headers):
        rule = "no proxy may stand between (forwarding header)"
    elif http_version == "1.0":
        rule = "no proxy may stand between (HTTP/1.0)"
    elif not is_loopback(_hostname(f"//{host}")):
        rule = f"the Host header must name this machine, not {host!r}"
    elif origin is not None and origin.lower() != f"http://{host}".lower():
        rule = f"pages of another origin may not call: {origin!r}"
    elif headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        rule = "pages of another site may not call"
    else:
        return
    advice = "make an API key (`lineup keys create`) to call from elsewhere"
    raise ApiError("forbidden", f"without API keys {rule}; {advice}")


def bearer(headers: Mapping[str, str]) -> str:
    """The secret that the header Authorization carries; empty where there is none."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def check_token(sent: str, token: str) -> None:
    """Refuse who has not seen what `lineup serve` printed: a proxy on this machine looks like this machine.

    Raises:
        ApiError: unauthorized.
    """
    if not secrets.compare_digest(sent.encode(), token.encode()):
        detail = (
            "open the link that `lineup serve` printed, or send its token as `Authorization: Bearer ...`; "
            "LINEUP_TOKEN sets the token, LINEUP_OPEN=true does without"
        )
        raise ApiError("unauthorized", detail)


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def site(address: str | None) -> Hashable:
    """Whom an address belongs to: itself, but of IPv6 the network of 64 bits, all of which one customer has."""
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return address
    return ip_network((parsed, 64), strict=False) if isinstance(parsed, IPv6Address) else parsed


def is_loopback(host: str) -> bool:
    """Whether an address or name means this very machine."""
    if host.lower() == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
