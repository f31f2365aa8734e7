"""Settings of producers and workers: from the environment, a `.env` file, or flags.

Built once in `cli` or `main` and passed on; nothing reads the environment at import.
"""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Network
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from imagemill.shared.errors import ConfigurationError
from imagemill.shared.options.base import OPERATIONS, Operation

PREFIX = "IMAGEMILL_"
BETWEEN = "__"


def _from_json(value: object) -> object:
    """A list as a variable holds it. Read here and not by pydantic-settings, whose errors don't name the variable."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('a JSON list is expected, such as ["one", "two"]') from None


LIST = BeforeValidator(_from_json)


def _in_64s(size: str) -> str:
    if any(int(side) % 64 or int(side) == 0 for side in size.split("x")):
        raise ValueError("the sides of a compiled model's size are multiples of 64")
    return size


WarmSize = Annotated[str, Field(pattern=r"^\d{2,4}x\d{2,4}$"), AfterValidator(_in_64s)]


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
    allow_hosts: Annotated[tuple[str, ...], LIST] = Field(
        (), description="hosts allowed although their address is private; JSON list"
    )
    allow_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], LIST] = Field(
        (), description="networks allowed although private; JSON list"
    )
    threads: int = Field(16, ge=1, le=256, description="images fetched and prepared at a time, per child")


class FileSettings(Group):
    """Folders that file:// addresses may name; none by default."""

    read_roots: Annotated[tuple[Path, ...], LIST] = Field((), description="folders that images may be read from; JSON list")
    write_roots: Annotated[tuple[Path, ...], LIST] = Field(
        (), description="folders that results may be written below; JSON list"
    )


class WeightsSettings(Group):
    """The models' files."""

    folder: Path = Field(
        Path("~/.cache/imagemill/weights"), description="where `imagemill models pull` puts them, and nodes read them"
    )
    mirror: str | None = Field(None, description="address of a server that has the files under their own hosts' paths")


class OnnxSettings(Group):
    """How models run on onnxruntime."""

    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto", description="what models run on: auto is cuda on a GPU's node, else cpu"
    )
    gpu_mem_limit: int | None = Field(None, gt=0, description="bytes of GPU memory that a session may take; empty is no limit")
    int8: bool = Field(False, description="models in 8 bits, where `imagemill models quantize` has made them")


class TorchSettings(Group):
    """How models run on torch."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="what models calculate in on a GPU: auto is fp16, for lama bf16 where the GPU has it; on a CPU it is fp32",
    )
    compile: bool = Field(False, description="compile models for each shape that they meet, which takes a minute for each")


class DiffusionSettings(Group):
    """How Stable Diffusion runs."""

    warm_up: Annotated[tuple[WarmSize, ...], LIST] = Field(
        ("512x512",), description="sizes, WIDTHxHEIGHT, that a compiled model is made ready for at the node's start; JSON list"
    )
    loras: int = Field(8, ge=1, le=64, description="LoRAs kept in memory; the least recently used is dropped beyond that")
    safety_checker: bool = Field(False, description="refuse results that the model's safety checker takes for unsafe")


class WorkerSettings(Group):
    """One worker node."""

    gpu: int | None = Field(None, ge=0, description="index of the GPU this node is pinned to; empty is the CPU")
    operations: Annotated[tuple[Operation, ...], LIST] = Field(OPERATIONS, description="operations this node offers; JSON list")
    engines: Annotated[tuple[str, ...], LIST] = Field(("opencv",), description="engines this node loads; JSON list")
    max_pixels: int = Field(64_000_000, gt=0, description="pixels of one image; more are refused before decoding")
    look_ahead: int = Field(128_000_000, gt=0, description="decoded pixels held at a time, per child")
    batch_wait: float = Field(0.05, ge=0, le=60, description="seconds that images wait for company on a GPU")
    store_threads: int = Field(4, ge=1, le=64, description="images finished, encoded and uploaded at a time, per child")
    reuse: bool = Field(True, description="remember results, and copy them where the same image is asked for again")
    lease_seconds: float = Field(20.0, ge=2, description="a chunk whose worker is silent this long is given to another")
    missing_seconds: float = Field(30.0, gt=0, description="a waiting chunk that no queue holds is published again after this")
    time_limit: float = Field(1800.0, gt=0, description="seconds after which a chunk's process is killed")
    soft_shutdown: float = Field(
        60.0, ge=0, description="seconds a node waits for its images on SIGQUIT; on SIGTERM it finishes them"
    )
    load_timeout: float = Field(600.0, gt=0, description="seconds that loading the engines may take")


class Settings(BaseSettings):
    """Everything, as `IMAGEMILL_...` variables; groups are joined by two underscores."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=BETWEEN,
        env_file=".env",
        env_ignore_empty=True,  # `IMAGEMILL_WORKER__GPU=` is how a compose file leaves it at its default
        enable_decoding=False,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="the Redis that holds queue and ledger")
    expire_days: float = Field(7.0, gt=0, description="days that Redis remembers a job")
    log_json: bool = Field(False, description="logs as JSON lines")
    presets: Path | None = Field(None, description="a file of presets beside those that ship")
    s3: S3Settings = S3Settings()
    fetch: FetchSettings = FetchSettings()
    files: FileSettings = FileSettings()
    weights: WeightsSettings = WeightsSettings()
    onnx: OnnxSettings = OnnxSettings()
    torch: TorchSettings = TorchSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    worker: WorkerSettings = WorkerSettings()

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: SecretStr) -> SecretStr:
        if not _is_redis(url.get_secret_value()):
            raise ValueError("an address redis://:PASSWORD@HOST:PORT/DATABASE is expected, odd characters percent-encoded")
        return url


def load_settings(**overrides: object) -> Settings:
    """Settings from environment, `.env` and `overrides`; ConfigurationError names the variable that is wrong."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        raise ConfigurationError(_complaints(error)) from error


def _is_redis(url: str) -> bool:
    """Whether both redis-py and kombu understand an address."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError where it is none
    except ValueError:
        return False
    database = parts.path.strip("/")
    return parts.scheme in ("redis", "rediss") and (not database or database.isdecimal())


def _complaints(error: ValidationError) -> str:
    """All that is wrong in one line, each with its variable."""
    said: dict[str, str] = {}
    for fault in error.errors(include_url=False, include_context=False):
        # What follows the names in `loc` is a place in a list, or which part of a union did not fit.
        names = takewhile(lambda part: isinstance(part, str) and part.isidentifier(), fault["loc"])
        variable = PREFIX + BETWEEN.join(map(str, names)).upper()
        reason = fault["msg"].removeprefix("Value error, ")
        given = fault["input"]
        told = isinstance(given, str | int | float) and len(str(given)) <= 80 and variable != f"{PREFIX}REDIS_URL"
        said.setdefault(variable, f"{variable}: {reason[:1].lower()}{reason[1:]}{f', not {given!r}' if told else ''}")
    return "; ".join(said.values())
