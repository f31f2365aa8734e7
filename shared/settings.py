"""Settings of producers and workers: from the environment, a `.env` file, or flags.

Built once in `cli` or `main` and passed on; nothing reads the environment at import.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import ConfigurationError
from shared.options import OPERATIONS, Operation, validation_sentence


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class S3Settings(Group):
    """Where S3 is. Keys come from the AWS variables and files, as boto3 knows them."""

    endpoint_url: str | None = Field(None, description="address of MinIO or another S3 server; empty is AWS")
    public_url: str | None = Field(None, description="address under which browsers reach the S3 server, for presigned links")
    region: str = Field("us-east-1", description="region of the buckets")
    create_bucket: bool = Field(False, description="create a missing output bucket on demand")
    connections: int = Field(32, ge=1, description="connections kept per process")


class FetchSettings(Group):
    """Limits on downloads."""

    connect_timeout: float = Field(5.0, gt=0, description="seconds to connect")
    total_timeout: float = Field(60.0, gt=0, description="seconds for one download, redirects included")
    max_bytes: int = Field(64 * 2**20, gt=0, description="bytes of one image file")
    max_redirects: int = Field(5, ge=0, description="redirects followed")
    allow_hosts: tuple[str, ...] = Field((), description="hosts allowed although their address is private; JSON list")
    allow_networks: tuple[IPv4Network | IPv6Network, ...] = Field(
        (), description="networks allowed although private; JSON list"
    )
    threads: int = Field(16, ge=1, le=256, description="images fetched and prepared at a time, per child")


class FileSettings(Group):
    """Folders that file:// addresses may name; none by default."""

    read_roots: tuple[Path, ...] = Field((), description="folders that images may be read from; JSON list")
    write_roots: tuple[Path, ...] = Field((), description="folders that results may be written below; JSON list")


class WorkerSettings(Group):
    """One worker node."""

    gpu: int | None = Field(None, ge=0, description="index of the GPU this node is pinned to; empty is the CPU")
    operations: tuple[Operation, ...] = Field(OPERATIONS, description="operations this node offers; JSON list")
    engines: tuple[str, ...] = Field(("opencv",), description="engines this node loads; JSON list")
    max_pixels: int = Field(64_000_000, gt=0, description="pixels of one image; more are refused before decoding")
    look_ahead: int = Field(128_000_000, gt=0, description="decoded pixels held at a time, per child")
    store_threads: int = Field(4, ge=1, le=64, description="images finished, encoded and uploaded at a time, per child")
    lease_seconds: float = Field(20.0, ge=2, description="a chunk whose worker is silent this long is given to another")
    missing_seconds: float = Field(30.0, gt=0, description="a waiting chunk that no queue holds is published again after this")
    time_limit: float = Field(1800.0, gt=0, description="seconds after which a chunk's process is killed")
    soft_shutdown: float = Field(60.0, ge=0, description="seconds that a stopping node waits for its current images")
    load_timeout: float = Field(600.0, gt=0, description="seconds that loading the engines may take")


class Settings(BaseSettings):
    """Everything, as `IMAGEMILL_...` variables; groups are joined by two underscores."""

    model_config = SettingsConfigDict(
        env_prefix="IMAGEMILL_",
        env_nested_delimiter="__",
        env_file=".env",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="the Redis that holds queue and ledger")
    expire_days: float = Field(7.0, gt=0, description="days that Redis remembers a job")
    log_json: bool = Field(False, description="logs as JSON lines")
    s3: S3Settings = S3Settings()
    fetch: FetchSettings = FetchSettings()
    files: FileSettings = FileSettings()
    worker: WorkerSettings = WorkerSettings()


def load_settings(**overrides: object) -> Settings:
    """Settings from environment, `.env` and `overrides`; ConfigurationError names the variable that is wrong."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        raise ConfigurationError(f"settings: {validation_sentence(error)}") from error
