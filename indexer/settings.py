"""Settings that every command shares: one class, read from the environment (`LINEUP_...`) once at start."""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


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
    database_connections: int = Field(default=20, ge=4)
    """Connections to PostgreSQL that one process opens at most, beside the one that it listens on; all processes
    together must stay below its `max_connections`."""
    checkpoint: Path | None = None
    """Checkpoint folder; unset: the active checkpoint's, before there is one `checkpoint` in the home folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where embeddings and searches are computed; `auto` takes a GPU where there is one."""
    engine: Literal["auto", "torch", "openvino", "openvino-f32"] = "auto"
    """What embeds in serving and indexing: `auto`, which the trainer always takes, is OpenVINO on a CPU where it
    fits, else torch; `openvino-f32` never rounds to bfloat16."""
    index: str | None = Field(default=None, repr=False)
    """Where neighbours are searched: `milvus+http://user:password@host:19530` for a Milvus of one's own (`https` too;
    `?index=IVF_SQ8` at the end takes a quarter of its memory); unset: in the memory of each process."""
    blobs: str | None = None
    """Object storage for thumbnails, and kept uploads of references, `s3://bucket/prefix` (or gs, az, file:///folder);
    credentials come from the usual environment (AWS_..., GOOGLE_..., AZURE_...). Unset: in PostgreSQL."""
    k: int = Field(default=10, ge=1, le=1000)
    """Neighbours that vote, a count."""
    max_false_alarm: float = Field(default=0.05, gt=0, lt=1)
    """Share of real images that may be called fake, 0..1."""
    max_miss: float = Field(default=0.05, gt=0, lt=1)
    """Share of fake images that may be called real, 0..1."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Largest image that is decoded, width times height in pixels."""
    image_seconds: float = Field(default=20.0, gt=0)
    """Time that decoding an image and reading what it says of itself may take, seconds; then its process is ended."""
    private_addresses: bool = False
    """Let jobs, `rebuild --checkpoint` and `LINEUP_THUMBNAILS_FROM` fetch over https from servers that are not public,
    and jobs tell such of their end. true or false."""

    @field_validator("database_url")
    @classmethod
    def _is_postgres(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"postgres(ql)?(\+psycopg)?://", url):
            raise ValueError("not a URL like postgresql://user:password@host:5432/name")
        return url

    @field_validator("index")
    @classmethod
    def _is_engine(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"milvus\+https?://[^/?]", url):
            raise ValueError("not a URL like milvus+http://host:19530; unset it to search in memory")
        return url

    @field_validator("blobs")
    @classmethod
    def _is_object_storage(cls, place: str | None) -> str | None:
        if place is not None and not re.fullmatch(r"((s3|gs|az)://[^/?#@]+|file://)(/[^?#]*)?", place):
            raise ValueError("not like s3://bucket/prefix, gs://..., az://... or file:///folder")
        return place

    @classmethod
    def read(cls, **overrides: Any) -> Self:
        """Read the environment; `overrides` that are not None win, as command-line options do.

        Raises:
            SettingsError: A value is out of range or of the wrong type.
        """
        try:
            return cls(**{name: value for name, value in overrides.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            name = "_".join(["LINEUP", *(str(part).upper() for part in first["loc"])])
            field = cls.model_fields.get(str(first["loc"][0]))
            value = f"is {first['input']!r}" if field is None or field.repr else "is wrong"  # it may hold a secret
            reason = first["msg"].removeprefix("Value error, ")
            raise SettingsError(f"{name} {value}: {reason[0].lower()}{reason[1:]}") from None

    @property
    def checkpoint_folder(self) -> Path:
        """The checkpoint folder that is named, or the home's."""
        return self.checkpoint or self.home / "checkpoint"
