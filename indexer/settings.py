"""Settings shared by every command: one class, read from the environment (`LINEUP_...`) once at start."""

import os
import re
import secrets
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ELSEWHERE = (
    *("LINEUP_DB_PASSWORD", "LINEUP_CHECKPOINT_DIR", "LINEUP_TARGET"),
    *("LINEUP_TEST_DEBIAN", "LINEUP_SOAK_MINUTES", "LINEUP_SOAK_REPORT"),
)
"""Variables that are no settings: docker's compose file reads the first, the tests the others."""


class SettingsError(ValueError):
    """A setting holds a value that cannot be used. The message is one line and names the variable."""


class Settings(BaseSettings):
    """What an installation may change. Each field is the environment variable `LINEUP_` plus its name."""

    model_config = SettingsConfigDict(
        env_prefix="LINEUP_", env_ignore_empty=True, use_attribute_docstrings=True, frozen=True, extra="forbid"
    )

    home: Path = Path("lineup-data")
    """Folder for the embedded database, index snapshots and the default checkpoint."""
    database_url: str | None = Field(default=None, repr=False)
    """PostgreSQL to use, `postgresql://user:password@host:port/name`; unset: an embedded one under the home folder."""
    checkpoint: Path | None = None
    """Checkpoint folder; unset: the active checkpoint's, before there is one `checkpoint` in the home folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where embeddings and searches are computed; `auto` takes a GPU where there is one."""
    engine: Literal["auto", "torch", "openvino", "openvino-f32"] = "auto"
    """What embeds in serving and indexing: `auto`, which the trainer always takes, is OpenVINO on a CPU where it
    fits, else torch; `openvino-f32` never rounds to bfloat16."""
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
    k: int = Field(default=10, ge=1, le=1000)
    """Neighbours that vote, a count."""
    max_false_alarm: float = Field(default=0.05, gt=0, lt=1)
    """Share of real images that may be called fake, 0..1."""
    max_miss: float = Field(default=0.05, gt=0, lt=1)
    """Share of fake images that may be called real, 0..1."""
    prior: float = Field(default=0.5, gt=0, lt=1)
    """Probability, 0..1, that an image is fake before looking at it; shifts the probabilities, not the thresholds."""
    unknown: float = Field(default=0.05, ge=0, lt=1)
    """p-value, 0..1, below which a fake is said to come from an unknown generator."""
    max_upload_bytes: int = Field(default=20 * 1024 * 1024, ge=1)
    """Largest uploaded image, bytes."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Largest image that is decoded, width times height in pixels."""
    record: bool = True
    """Keep each verdict in the table `detection`: hash, embedding and result, never the image. true or false."""
    record_days: int = Field(default=0, ge=0)
    """Days after which a kept verdict is deleted; 0 keeps it for ever."""
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
    rate_limit: int = Field(default=0, ge=0)
    """Requests that one API key may make per minute; 0 is no limit."""
    cors_origins: str = ""
    """Origins of web pages that may call the API with a key, `https://a.example,https://b.example`; empty: none."""

    @field_validator("database_url")
    @classmethod
    def _is_postgres(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"postgres(ql)?(\+psycopg)?://", url):
            raise ValueError("not a URL like postgresql://user:password@host:5432/name")
        return url

    @field_validator("max_inflight_bytes")
    @classmethod
    def _holds_the_largest_request(cls, most: int, info: ValidationInfo) -> int:
        if most < (largest := info.data.get("max_request_bytes", 0)):
            raise ValueError(f"less than one request may have, LINEUP_MAX_REQUEST_BYTES ({largest})")
        return most

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: str) -> str:
        for origin in filter(None, map(str.strip, origins.split(","))):
            if not re.fullmatch(r"https?://[^\s/?#@*]+", origin):
                raise ValueError(f"{origin!r} is no origin like https://a.example, without a path")
        return origins

    @property
    def checkpoint_folder(self) -> Path:
        """The checkpoint folder that is named, or the home's."""
        return self.checkpoint or self.home / "checkpoint"


def read_settings(**overrides: Any) -> Settings:
    """Read the environment; `overrides` that are not None win, as command-line options do.

    Raises:
        SettingsError: A value is out of range or of the wrong type, or a variable `LINEUP_...` is no setting.
    """
    check_names()
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(["LINEUP", *(str(part).upper() for part in first["loc"])])
        field = Settings.model_fields.get(str(first["loc"][0]))
        value = f"is {first['input']!r}" if field is None or field.repr else "is wrong"  # it may hold a secret
        reason = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{name} {value}: {reason[0].lower()}{reason[1:]}") from None


def check_names() -> None:
    """Refuse a misspelt variable, which would leave the default in force unseen.

    Raises:
        SettingsError: A variable `LINEUP_...` is no setting.
    """
    known = {f"LINEUP_{name.upper()}" for name in Settings.model_fields}
    for name in sorted(name for name in os.environ if name.upper().startswith("LINEUP_")):
        if name.upper() not in known.union(ELSEWHERE):
            nearest = get_close_matches(name.upper(), known, 1, 0)[0]
            raise SettingsError(f"{name} is no setting; the nearest is {nearest}: correct its name, or unset it")
