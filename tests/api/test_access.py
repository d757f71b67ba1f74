"""Loopback rules, keys and their cache, and the rate limit, without a server."""

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from api import access
from api.access import Caller, Keys, RateLimit, check_loopback, hash_secret, new_secret
from api.breaker import Breaker
from api.schemas.problems import ApiError
from indexer.store.keys import ApiKey, ApiKeys

OWN = {"host": "127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        ("127.0.0.1", OWN),
        ("127.8.9.1", {"host": "localhost:8000"}),
        ("::1", {"host": "[::1]:8000"}),
        ("::ffff:127.0.0.1", {"host": "localhost"}),
        ("127.0.0.1", OWN | {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}),
        ("127.0.0.1", OWN | {"sec-fetch-site": "none"}),
    ],
)
def test_this_machine_may_call(client: str, headers: dict[str, str]) -> None:
    check_loopback(client, headers)


@pytest.mark.parametrize(
    ("client", "headers", "rule"),
    [
        ("192.168.1.7", OWN, "only this machine"),
        (None, OWN, "only this machine"),
        ("not-an-address", OWN, "only this machine"),
        ("127.0.0.1", {"host": "evil.example"}, "Host"),
        ("127.0.0.1", {"host": "127.0.0.1.evil.example"}, "Host"),
        ("127.0.0.1", {"host": "[broken"}, "Host"),
        ("127.0.0.1", {}, "Host"),
        ("127.0.0.1", OWN | {"origin": "https://evil.example"}, "another origin"),
        ("127.0.0.1", OWN | {"origin": "null"}, "another origin"),
        ("127.0.0.1", OWN | {"origin": "http://127.0.0.1:9000"}, "another origin"),
        ("127.0.0.1", OWN | {"origin": "http://localhost:8000"}, "another origin"),
        ("127.0.0.1", OWN | {"sec-fetch-site": "cross-site"}, "another site"),
        ("127.0.0.1", OWN | {"sec-fetch-site": "same-site"}, "another site"),
        ("127.0.0.1", OWN | {"x-forwarded-for": "127.0.0.1"}, "proxy"),
        ("127.0.0.1", OWN | {"x-forwarded-host": "a"}, "proxy"),
        ("127.0.0.1", OWN | {"forwarded": "for=127.0.0.1"}, "proxy"),
        ("127.0.0.1", OWN | {"via": "1.1 proxy"}, "proxy"),
        ("127.0.0.1", OWN | {"cf-connecting-ip": "10.0.0.1"}, "proxy"),
        ("127.0.0.1", OWN | {"x-client-ip": "10.0.0.1"}, "proxy"),
        ("127.0.0.1", OWN | {"true-client-ip": "10.0.0.1"}, "proxy"),
    ],
)
def test_nobody_else_may(client: str | None, headers: dict[str, str], rule: str) -> None:
    with pytest.raises(ApiError, match=rule) as caught:
        check_loopback(client, headers)
    assert (caught.value.kind, caught.value.status) == ("forbidden", 403)


def test_who_speaks_http_1_0_is_a_proxy() -> None:
    check_loopback("127.0.0.1", OWN, "1.1")
    with pytest.raises(ApiError, match="no proxy"):
        check_loopback("127.0.0.1", OWN, "1.0")


def test_scopes() -> None:
    assert [Caller(1, "a", frozenset({"detect"})).may(scope) for scope in access.SCOPES] == [True, False, False]
    assert [Caller(1, "a", frozenset({"admin"})).may(scope) for scope in access.SCOPES] == [True, True, True]


class Rows(ApiKeys):
    """Keys in memory; `away` makes every look-up fail as a dead database does."""

    def __init__(self, *keys: tuple[str, ApiKey]) -> None:
        self.rows = {hash_secret(secret): key for secret, key in keys}
        self.away = False
        self.look_ups = 0

    engine: Engine

    def find(self, hash: bytes) -> ApiKey | None:
        self._ask()
        return self.rows.get(hash)

    def list(self) -> Sequence[ApiKey]:
        self._ask()
        return tuple(self.rows.values())

    def _ask(self) -> None:
        self.look_ups += 1
        if self.away:
            raise OperationalError("select", {}, Exception("connection refused"))


def key(*, expires: datetime | None = None, revoked: datetime | None = None) -> ApiKey:
    return ApiKey(7, "me", ["detect"], datetime.now(UTC), expires, revoked)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The module's monotonic clock; set its one element."""
    now = [1000.0]
    monkeypatch.setattr("api.access.time.monotonic", lambda: now[0])
    return now


def test_a_key_is_honoured_remembered_and_revoked_within_two_seconds(clock: list[float]) -> None:
    secret = new_secret()
    rows = Rows((secret, key()))
    keys = Keys(rows, Breaker(pause=0))
    assert keys.authenticate(secret) == Caller(7, "me", frozenset({"detect"}))
    rows.rows[hash_secret(secret)] = key(revoked=datetime.now(UTC))
    clock[0] += 1.9
    keys.authenticate(secret)
    assert rows.look_ups == 1
    clock[0] += 0.2
    with pytest.raises(ApiError, match="revoked"):
        keys.authenticate(secret)


def test_unknown_and_expired_keys_are_refused(clock: list[float]) -> None:
    secret = new_secret()
    keys = Keys(Rows((secret, key(expires=datetime.now(UTC) - timedelta(seconds=1)))), Breaker())
    for wrong in (secret, secret + "x", ""):
        with pytest.raises(ApiError) as caught:
            keys.authenticate(wrong)
        assert caught.value.status == 401
        assert caught.value.headers["www-authenticate"] == "Bearer"


def test_while_the_database_is_away_known_keys_live_on_for_a_while(clock: list[float]) -> None:
    secret, unseen = new_secret(), new_secret()
    rows = Rows((secret, key()), (unseen, key()))
    keys = Keys(rows, Breaker(pause=0))
    keys.authenticate(secret)
    assert keys.exist()
    rows.away = True
    clock[0] += access.STALE - 1
    assert keys.authenticate(secret).key_id == 7
    assert keys.exist()
    with pytest.raises(ApiError) as caught:
        keys.authenticate(unseen)
    assert (caught.value.status, caught.value.headers) == (503, {"retry-after": "2"})
    clock[0] += 2
    with pytest.raises(ApiError, match="cannot be checked"):
        keys.authenticate(secret)


def test_the_door_stays_shut_when_the_database_was_never_asked(clock: list[float]) -> None:
    rows = Rows()
    rows.away = True
    with pytest.raises(ApiError) as caught:
        Keys(rows, Breaker(pause=0)).exist()
    assert caught.value.status == 503


def test_the_first_key_counts_at_once_for_who_sends_it(clock: list[float]) -> None:
    """Without keys the caller at this machine may do everything: the holder of a new key must not pass for it."""
    rows, secret = Rows(), new_secret()
    keys = Keys(rows, Breaker(pause=0))
    assert not keys.exist()
    rows.away = True
    with pytest.raises(ApiError, match="does not answer"):
        keys.exist(secret)
    assert not keys.exist("the token of the start")
    rows.away, rows.rows = False, {hash_secret(secret): key()}
    assert not keys.exist()
    assert keys.exist(secret)
    assert keys.exist()


def test_wrong_keys_fill_no_memory_and_displace_no_good_one(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MOST_REMEMBERED", 10)
    secret = new_secret()
    rows = Rows((secret, key()))
    keys = Keys(rows, Breaker(pause=0))
    keys.authenticate(secret)
    for number in range(50):
        with pytest.raises(ApiError):
            keys.authenticate(str(number))
    assert (len(keys._known), len(keys._unknown)) == (1, 10)
    rows.away = True
    clock[0] += access.STALE - 1
    assert keys.authenticate(secret).key_id == 7


def test_the_bucket_refills() -> None:
    limit = RateLimit(per_minute=6)
    for _ in range(6):
        limit.spend(1, now=100.0)
    with pytest.raises(ApiError) as caught:
        limit.spend(1, now=103.0)
    assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "7"})
    limit.spend(2, now=103.0)
    limit.spend(1, now=110.0)


def test_buckets_of_the_latest_callers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_REMEMBERED", 10)
    limit = RateLimit(per_minute=6)
    for caller in range(50):
        limit.spend(caller, now=0.0)
    assert len(limit._buckets) == 10


def test_who_guesses_is_told_to_stop_and_shuts_nobody_out_who_shares_the_address(clock: list[float]) -> None:
    used, fresh = new_secret(), new_secret()
    keys = Keys(Rows((used, key()), (fresh, key())), Breaker(pause=0))
    keys.authenticate(used, "2001:db8::1")
    for number in range(access.WRONG_KEYS):
        with pytest.raises(ApiError, match="unknown"):
            keys.authenticate(f"wrong-{number}", f"2001:db8::{number:x}")  # one network, one customer
    with pytest.raises(ApiError) as caught:
        keys.authenticate("wrong", "2001:db8::1")
    assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
    assert keys.authenticate(fresh, "2001:db8::1").key_id == 7
    clock[0] += access.FRESH
    assert keys.authenticate(used, "2001:db8::1").key_id == 7
    for address in ("2001:db8:0:1::1", "10.0.0.1", None):
        with pytest.raises(ApiError, match="unknown"):
            keys.authenticate("wrong", address)


def test_a_key_counts_when_it_is_made_and_no_more_when_it_is_deleted(clock: list[float]) -> None:
    secret = new_secret()
    rows = Rows()
    keys = Keys(rows, Breaker(pause=0))
    for made in (False, True, False, True):
        rows.rows = {hash_secret(secret): key()} if made else {}
        clock[0] += access.FRESH
        with nullcontext() if made else pytest.raises(ApiError, match="unknown"):
            assert keys.authenticate(secret).key_id == 7


def test_no_limit_by_default() -> None:
    limit = RateLimit(0)
    for _ in range(1000):
        limit.spend(1, now=0.0)
