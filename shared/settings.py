"""Settings of producers and workers, from the environment, a `.env` file or flags.

`cli` or `main` load them once and pass them on; importing a module reads no environment variables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from imagemill.shared.errors import ConfigurationError
from imagemill.shared.options.base import OPERATIONS, Operation, validation_sentence
from imagemill.shared.redis_url import RedisUrl

PREFIX = "IMAGEMILL_"
BETWEEN = "__"
SECRET = (f"{PREFIX}REDIS_URL", f"{PREFIX}FETCH__HEADERS")
"""Variables whose values are not shown."""


def _from_json(value: object) -> object:
    """A list or object, given as JSON. Not left to pydantic-settings, whose errors don't name the variable."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('expected JSON: a list such as ["one", "two"], or an object such as {"one": 2}') from None


LIST = OBJECT = BeforeValidator(_from_json)


def _in_64s(size: str) -> str:
    if any(int(side) % 64 or int(side) == 0 for side in size.split("x")):
        raise ValueError("the width and height of a compiled model must be multiples of 64")
    return size


LogLevel = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR"],
    BeforeValidator(lambda level: level.upper() if isinstance(level, str) else level),
]
WarmSize = Annotated[str, Field(pattern=r"^\d{2,4}x\d{2,4}$"), AfterValidator(_in_64s)]


HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
OURS = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding")


def _headers(value: object) -> object:
    """The headers by host in lower case. Checked here in one go, since pydantic's own errors would quote what is secret."""
    if not isinstance(value, dict) or not all(isinstance(named, dict) for named in value.values()):
        raise ValueError("expected a JSON object of objects: host, then names and values of headers")
    for host, named in value.items():
        if not re.fullmatch(r"[^\s/@?#]+", host):
            raise ValueError("headers are given by host or host:port, such as cdn.example.com, not by URL")
        for name, text in named.items():
            text = text.get_secret_value() if isinstance(text, SecretStr) else text
            if not HEADER_NAME.fullmatch(name):
                raise ValueError(f"for {host}, one of the names is not the name of a header")
            if name.lower() in OURS:
                raise ValueError(f"for {host}, the header {name!r} can't be set")
            if not isinstance(text, str) or not text.strip() or not text.isprintable() or not text.isascii():
                raise ValueError(f"for {host}, the value of {name!r} must be one line of ASCII text")
    return {host.lower(): named for host, named in value.items()}


Headers = Annotated[dict[str, dict[str, SecretStr]], BeforeValidator(_headers), OBJECT]
"""By host or host:port, as in URLs. The validators run from the last to the first."""


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class S3Settings(Group):
    """The S3 server. Keys come from the AWS environment variables and files that boto3 reads."""

    endpoint_url: str | None = Field(None, description="URL of MinIO or another S3 server; empty: AWS")
    public_url: str | None = Field(None, description="URL of the S3 server in presigned links; empty: the endpoint URL")
    region: str = Field("us-east-1", description="region of the buckets")
    create_bucket: bool = Field(False, description="create the output bucket if it does not exist")
    read_buckets: Annotated[tuple[str, ...], LIST] = Field(
        (),
        description='what lists may use as sources: buckets, or folders such as "photos/in", or "*"; JSON list, read by the '
        "workers; empty: the bucket of the job's output",
    )
    connections: int = Field(
        32, ge=1, description="connections per process for boto3, which makes the requests that libcurl doesn't"
    )


class FetchSettings(Group):
    """Limits on image downloads."""

    connect_timeout: float = Field(5.0, gt=0, description="seconds to establish a connection")
    total_timeout: float = Field(60.0, gt=0, description="seconds for one download, including redirects")
    max_bytes: int = Field(64 * 2**20, gt=0, description="largest image file, in bytes")
    memory: int = Field(256 * 2**20, gt=0, description="maximum size of downloaded files in memory per child process, in bytes")
    max_redirects: int = Field(5, ge=0, description="maximum number of redirects to follow")
    allow_hosts: Annotated[tuple[str, ...], LIST] = Field((), description="hosts allowed to have private addresses; JSON list")
    allow_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], LIST] = Field(
        (), description="private networks to allow; JSON list"
    )
    ca_file: Path | None = Field(None, description="PEM file with CAs to trust besides the public ones")
    user_agent: str | None = Field(
        None, pattern=r"^[ -~]+$", description="the User-Agent that web servers see; empty: imagemill and its version"
    )
    headers: Headers = Field(
        {},
        description="secret headers for image servers, which no other host gets; JSON object by host or host:port, such as "
        '{"cdn.example.com": {"Authorization": "Bearer ..."}}',
    )
    threads: int = Field(
        256, ge=1, le=4096, description="maximum downloads at a time per child process, plus as many from slow hosts"
    )
    per_host: int = Field(256, ge=1, le=4096, description="maximum downloads at a time from one host per child process")


class FileSettings(Group):
    """Folders that file:// URLs may point to; none by default."""

    read_roots: Annotated[tuple[Path, ...], LIST] = Field((), description="folders that images may be read from; JSON list")
    write_roots: Annotated[tuple[Path, ...], LIST] = Field((), description="folders that results may be written to; JSON list")


class WeightsSettings(Group):
    """Model files."""

    folder: Path = Field(
        Path("~/.cache/imagemill/weights"), description="folder of the models that `imagemill models pull` downloads"
    )
    mirror: str | None = Field(None, description="URL of a mirror with the model files under their original paths")


class OnnxSettings(Group):
    """Models on ONNX Runtime."""

    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto", description="execution provider; auto: cuda on a node with a GPU, otherwise cpu"
    )
    gpu_mem_limit: int | None = Field(None, gt=0, description="maximum GPU memory per session, in bytes; empty: no limit")
    int8: bool = Field(False, description="use the 8-bit models that `imagemill models quantize` made")


class TorchSettings(Group):
    """Models on PyTorch."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="precision of torch models on a GPU; auto: fp16, but bf16 for lama if supported; CPUs always use fp32",
    )
    compile: bool = Field(False, description="compile models; takes about a minute per input shape")


class DiffusionSettings(Group):
    """Stable Diffusion."""

    warm_up: Annotated[tuple[WarmSize, ...], LIST] = Field(
        ("512x512",), description="sizes (WIDTHxHEIGHT) to compile models for when a node starts; JSON list"
    )
    loras: int = Field(8, ge=1, le=64, description="LoRAs kept in memory; the least recently used is dropped first")
    controlnets: int = Field(3, ge=1, le=16, description="ControlNets kept in memory; the least recently used is dropped first")
    safety_checker: bool = Field(False, description="reject results that the model's safety checker classifies as unsafe")


class WorkerSettings(Group):
    """One worker node."""

    gpu: int | None = Field(None, ge=0, description="index of the node's GPU; empty: CPU")
    children_per_gpu: int | None = Field(
        None,
        ge=1,
        le=16,
        description="child processes that share a GPU; empty: 2, but 1 if the node offers stylize with diffusion",
    )
    operations: Annotated[tuple[Operation, ...], LIST] = Field(OPERATIONS, description="operations to offer; JSON list")
    engines: Annotated[tuple[str, ...], LIST] = Field(("opencv",), description="engines to load; JSON list")
    max_pixels: int = Field(
        64_000_000, gt=0, description="maximum pixels in an image; larger ones are refused before they are decoded"
    )
    look_ahead: int = Field(128_000_000, gt=0, description="maximum decoded pixels in memory per child process")
    batch_wait: float = Field(0.05, ge=0, le=60, description="seconds that a batch on a GPU waits for more images")
    store_threads: int = Field(256, ge=1, le=4096, description="maximum uploads at a time per child process")
    reuse: bool = Field(True, description="remember results and copy them when the same image is requested again")
    lease_seconds: float = Field(
        20.0, ge=2, description="seconds without a heartbeat before a child's work is handed to others"
    )
    share_seconds: float = Field(3.0, gt=0, description="seconds of work that a child process takes at a time")
    shift_seconds: float = Field(60.0, gt=0, description="seconds after which a task ends and the next one continues")
    time_limit: float = Field(1800.0, gt=0, description="maximum seconds per task; a minute later its process is killed")
    soft_shutdown: float = Field(
        60.0, ge=0, description="seconds to finish current images after SIGQUIT (after SIGTERM they are always finished)"
    )
    metrics_port: int | None = Field(None, ge=1, le=65535, description="port on which the node serves its metrics; empty: none")
    metrics_host: str = Field("127.0.0.1", description="address on which the node serves its metrics")
    stall_limit: float = Field(
        600.0, gt=0, description="seconds on one batch after which a node counts as hung; must exceed the longest real batch"
    )
    expect_gpus: int | None = Field(None, ge=0, description="GPUs that this host must have; empty: those that are found")
    model_memory: int | None = Field(
        None,
        ge=0,
        description="maximum size of open models per child process, in bytes; the least recently used is closed first. "
        "Empty: half of its part of the GPU or, on a CPU, its part of a quarter of main memory",
    )
    load_timeout: float = Field(600.0, gt=0, description="maximum seconds to load the engines")


class Settings(BaseSettings):
    """All settings, as `IMAGEMILL_...` variables; two underscores separate group and name."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=BETWEEN,
        env_file=".env",
        env_ignore_empty=True,  # a compose file leaves a variable at its default with `IMAGEMILL_WORKER__GPU=`
        enable_decoding=False,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="URL of Redis, or of its Sentinels")
    expire_days: float = Field(7.0, gt=0, description="days after which Redis forgets a job")
    low_priority_hours: float = Field(1.0, gt=0, description="hours after which a low-priority job moves up to normal")
    owner_weights: Annotated[dict[str, PositiveFloat], OBJECT] = Field(
        {},
        description="share of the nodes that each owner gets, relative to 1 for all others; JSON object, read by the workers",
    )
    log_json: bool = Field(False, description="write logs as JSON lines")
    log_level: LogLevel = Field("INFO", description="lowest level of messages to log")
    tracing: bool = Field(
        False, description="send OpenTelemetry traces to the collector that the OTEL_EXPORTER_OTLP_... variables name"
    )
    trace_images: int = Field(1, ge=0, description="images per share that get their own spans in a trace")
    presets: Path | None = Field(None, description="file with your own presets, which add to or override the built-in ones")
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
        RedisUrl.parse(url.get_secret_value())
        return url


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, `.env` and `overrides`. Raises ConfigurationError, which names the wrong variables."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        raise ConfigurationError(validation_sentence(error, _variable, secret=SECRET)) from error


def _variable(location: Iterable[int | str]) -> str:
    """The variable of a wrong value, whose location may end with a list index or a member of a union."""
    names = takewhile(lambda part: isinstance(part, str) and part.isidentifier(), location)
    return PREFIX + BETWEEN.join(map(str, names)).upper()
