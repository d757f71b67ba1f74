"""Settings of the service alone, beside those that every command shares; `lineup` knows the names of all of them."""

import os
import re
import secrets
import sys
from difflib import get_close_matches
from functools import cache
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator

from indexer.settings import Settings, SettingsError

ELSEWHERE = (
    *("LINEUP_DB_PASSWORD", "LINEUP_CHECKPOINT_DIR", "LINEUP_TARGET"),
    *("LINEUP_TLS_DIR", "LINEUP_IMAGES_DIR", "LINEUP_ADDRESS"),
    *("LINEUP_TEST_DEBIAN", "LINEUP_SOAK_MINUTES", "LINEUP_SOAK_REPORT", "LINEUP_SOAK_FILES", "LINEUP_SOAK_SEQUENCES"),
    *("LINEUP_SOAK_KILLS", "LINEUP_SOAK_REQUESTS", "LINEUP_SOAK_LEADERS", "LINEUP_SOAK_ENGINES", "LINEUP_WEED"),
    *("LINEUP_MILVUS_SERVER", "LINEUP_MILVUS_LITE", "LINEUP_TEST_MILVUS"),
)
"""Variables that are no settings: docker's compose file reads the first six, the tests the others."""
CLOSE = 0.8
"""Likeness, 0..1, from which on a name is a misspelt setting; those of a Service called lineup are below."""
ADDRESS = re.compile(r"[a-z]+://")
PLACE = re.compile(r"(file://|(s3|gs|az|hf|https)://[^/?#@]+)/([^?#]*/)?")


def listed(setting: str) -> tuple[str, ...]:
    """What a setting lists, with commas between."""
    return tuple(filter(None, map(str.strip, setting.split(","))))


class ServiceSettings(Settings):
    """What an installation may change: the indexer's settings, and how the service judges, answers and records."""

    host: str = "127.0.0.1"
    """Address that `lineup serve` listens on; anything but loopback needs API keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port that `lineup serve` listens on; 0 picks a free one."""
    token: str = Field(default_factory=secrets.token_urlsafe, pattern="^[A-Za-z0-9._~-]{16,}$", repr=False)
    """What a request must bring while there is no API key, at least 16 of `A-Z a-z 0-9 . _ ~ -`; unset: a new one at
    each start, which `lineup serve` prints."""
    open: bool = False
    """Ask this machine's requests for no token while there is no API key: a proxy here then lets in whoever reaches
    it. true or false."""
    prior: float = Field(default=0.5, gt=0, lt=1)
    """Probability, 0..1, that an image is fake before looking at it; shifts the probabilities, not the thresholds."""
    unknown: float = Field(default=0.05, ge=0, lt=1)
    """p-value, 0..1, below which a fake is said to come from an unknown generator."""
    max_upload_bytes: int = Field(default=20 * 1024 * 1024, ge=1)
    """Largest uploaded image, bytes."""
    record: bool = True
    """Keep each verdict in the table `detection`: hash, embedding and result, never the image. true or false."""
    record_days: int = Field(default=0, ge=0)
    """Days after which a kept verdict is deleted; 0 keeps it for ever."""
    keep_thumbnails: bool = False
    """Keep with each verdict a thumbnail of the image, of at most 256 pixels; enrolled from it, a reference has that
    picture. true or false."""
    thumbnails_from: str = ""
    """Places whose files a service may read for pictures of references that have none, each ending with a slash,
    `file:///data/images/,s3://bucket/set/,https://host/` (or gs, az, `hf://datasets/owner/`); empty: none."""
    keep_uploads: bool = True
    """Keep the bytes of references added over HTTP, so that a new checkpoint can embed them again. true or false."""
    flip_uncertain: bool = False
    """Call a verdict uncertain when it flips under re-encoding (asked for by `explain=stability`). true or false."""
    max_files: int = Field(default=32, ge=1, le=1000)
    """Images in one request, a count."""
    max_request_bytes: int = Field(default=256 * 1024 * 1024, ge=1)
    """Largest request body, bytes."""
    max_inflight_bytes: int = Field(default=512 * 1024 * 1024, ge=1, validate_default=True)
    """Bodies of all requests in work together, bytes; what would exceed it is answered 503."""
    request_seconds: float = Field(default=60.0, gt=0)
    """Time a request may take, upload included, seconds."""
    max_job_images: int = Field(default=10_000, ge=1)
    """Images in one job, a count."""
    max_waiting_images: int = Field(default=100_000, ge=1)
    """Images of all jobs that are not judged yet, a count; a job that would exceed it, or half of it for one key, is
    answered 503."""
    max_waiting_bytes: int = Field(default=4 * 1024**3, ge=1)
    """Uploads of all jobs, kept in the database until they are judged, bytes; a job that would exceed it, or half
    of it for one key, is answered 503."""
    job_days: int = Field(default=30, ge=0)
    """Days after which a job that has ended is deleted with its results; 0 keeps it for ever."""
    webhook_secret: str | None = Field(default=None, min_length=16, repr=False)
    """What signs the word of a job's end (HMAC-SHA256), at least 16 characters; unset: jobs may have no webhook."""
    rate_limit: int = Field(default=0, ge=0)
    """Requests that one API key may make of one process per minute; 0 is no limit."""
    cors_origins: str = ""
    """Origins of web pages that may call the API with a key, `https://a.example,https://b.example`; empty: none."""

    @field_validator("port", mode="before")
    @classmethod
    def _is_no_address(cls, port: Any) -> Any:
        if isinstance(port, str) and ADDRESS.match(port):
            remedy = "rename the Service, or set enableServiceLinks: false for the pod"
            raise ValueError(f"no port, 0..65535; Kubernetes sets it so for a Service called lineup: {remedy}")
        return port

    @field_validator("max_inflight_bytes")
    @classmethod
    def _holds_the_largest_request(cls, most: int, info: ValidationInfo) -> int:
        if most < (largest := info.data.get("max_request_bytes", 0)):
            raise ValueError(f"less than one request may have, LINEUP_MAX_REQUEST_BYTES ({largest})")
        return most

    @field_validator("thumbnails_from")
    @classmethod
    def _are_places(cls, places: str) -> str:
        for place in listed(places):
            if not PLACE.fullmatch(place):
                raise ValueError(f"{place!r} is no place like file:///images/ or s3://bucket/, which end with a slash")
        return places

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: str) -> str:
        for origin in listed(origins):
            if not re.fullmatch(r"https?://[^\s/?#@*]+", origin):
                raise ValueError(f"{origin!r} is no origin like https://a.example, without a path")
        return origins

    @property
    def thumbnail_places(self) -> tuple[str, ...]:
        """Those of `thumbnails_from`."""
        return listed(self.thumbnails_from)

    @classmethod
    def read(cls, **overrides: Any) -> Self:
        """Read the environment once its names are known to be right; see `Settings.read`."""
        check_names()
        return super().read(**overrides)


def check_names() -> None:
    """Refuse a misspelt variable, which would leave the default in force unseen, and warn of other unknown ones.

    Raises:
        SettingsError: A variable `LINEUP_...` is no setting, and its name is close to one.
    """
    settings = {f"LINEUP_{name.upper()}" for name in ServiceSettings.model_fields}
    known, foreign = settings.union(ELSEWHERE), []
    for name in sorted(name for name in os.environ if name.upper().startswith("LINEUP_") and name.upper() not in known):
        nearest = get_close_matches(name.upper(), settings, 1, CLOSE)
        if nearest and not ADDRESS.match(os.environ[name]):  # LINEUP_API_PORT=tcp://... is of a Service lineup-api
            raise SettingsError(f"{name} is no setting; the nearest is {nearest[0]}: correct its name, or unset it")
        foreign.append(name)
    if foreign:
        _warn_of(", ".join(foreign))


@cache
def _warn_of(names: str) -> None:
    """Say once what is ignored."""
    print(f"warning: ignored, as no settings of Lineup: {names}", file=sys.stderr)
