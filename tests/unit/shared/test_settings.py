"""Settings from the environment, a `.env` file or arguments; errors name the variable, and secrets stay secret."""

from __future__ import annotations

import os
import pickle
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from imagemill.shared.errors import ConfigurationError
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.settings import Settings, load_settings

URL = "redis://:hush@redis.example:6379/1"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide this machine's own settings."""
    for name in os.environ:
        if name.startswith("IMAGEMILL_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.removeprefix("IMAGEMILL_").lower().split("__"):
        value = getattr(value, part)
    return value


def test_defaults_are_complete_and_grant_no_access() -> None:
    settings = load_settings()
    assert settings.redis_url.get_secret_value() == "redis://127.0.0.1:6379/0"
    assert settings.worker.gpu is None
    assert settings.worker.operations == OPERATIONS
    assert (settings.fetch.allow_hosts, settings.fetch.allow_networks) == ((), ())
    assert (settings.files.read_roots, settings.files.write_roots) == ((), ())
    assert settings.s3.create_bucket is False


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("IMAGEMILL_EXPIRE_DAYS", "0.5", 0.5),
        ("IMAGEMILL_LOG_JSON", "true", True),
        ("IMAGEMILL_LOW_PRIORITY_HOURS", "0.25", 0.25),
        ("IMAGEMILL_OWNER_WEIGHTS", '{"ann": 2, "bob@example.com": 0.5}', {"ann": 2.0, "bob@example.com": 0.5}),
        ("IMAGEMILL_WORKER__SHARE_SECONDS", "10", 10.0),
        ("IMAGEMILL_S3__ENDPOINT_URL", "http://minio:9000", "http://minio:9000"),
        ("IMAGEMILL_S3__CREATE_BUCKET", "yes", True),
        ("IMAGEMILL_FETCH__ALLOW_HOSTS", '["images.internal", "other"]', ("images.internal", "other")),
        ("IMAGEMILL_FETCH__ALLOW_NETWORKS", '["10.0.0.0/8", "fd00::/8"]', (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))),
        ("IMAGEMILL_FILES__WRITE_ROOTS", '["/srv/out"]', (Path("/srv/out"),)),
        ("IMAGEMILL_FILES__READ_ROOTS", "[]", ()),
        ("IMAGEMILL_WORKER__GPU", "3", 3),
        ("IMAGEMILL_WORKER__OPERATIONS", '["inpaint"]', ("inpaint",)),
        ("IMAGEMILL_WORKER__ENGINES", '["opencv", "rembg"]', ("opencv", "rembg")),
        ("imagemill_worker__time_limit", "60", 60.0),
    ],
)
@pytest.mark.parametrize("where", ["environment", ".env"])
def test_variables_are_read(monkeypatch: pytest.MonkeyPatch, where: str, name: str, text: str, read: Any) -> None:
    if where == "environment":
        monkeypatch.setenv(name, text)
    else:
        Path(".env").write_text(f"UNRELATED=1\n{name}='{text}'\n")
    settings = load_settings()
    assert value(settings, name.upper()) == read
    assert settings.fetch.max_redirects == 5  # the group's other settings keep their defaults


def test_environment_overrides_the_file_and_arguments_override_both(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("IMAGEMILL_EXPIRE_DAYS=1\nIMAGEMILL_WORKER__GPU=1\nIMAGEMILL_LOG_JSON=true\n")
    monkeypatch.setenv("IMAGEMILL_EXPIRE_DAYS", "2")
    monkeypatch.setenv("IMAGEMILL_WORKER__LEASE_SECONDS", "2")
    settings = load_settings(redis_url=URL, log_json=False)
    assert (settings.expire_days, settings.worker.gpu, settings.worker.lease_seconds) == (2.0, 1, 2.0)
    assert (settings.log_json, settings.redis_url.get_secret_value()) == (False, URL)


def test_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "WORKER__GPU", "S3__ENDPOINT_URL", "FETCH__ALLOW_HOSTS", "EXPIRE_DAYS"):
        monkeypatch.setenv(f"IMAGEMILL_{name}", "")
    assert load_settings() == Settings(_env_file=None)  # type: ignore[call-arg]
    assert load_settings().worker.gpu is None


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("IMAGEMILL_EXPIRE_DAYS", "0", "greater than 0, not '0'"),
        ("IMAGEMILL_EXPIRE_DAYS", "a week", "not 'a week'"),
        ("IMAGEMILL_LOW_PRIORITY_HOURS", "0", "greater than 0"),
        ("IMAGEMILL_OWNER_WEIGHTS", "ann=2", 'an object such as {"one": 2}'),
        ("IMAGEMILL_OWNER_WEIGHTS", '["ann"]', "dictionary"),
        ("IMAGEMILL_WORKER__GPU", "-1", "greater than or equal to 0"),
        ("IMAGEMILL_WORKER__GPU", "first", "valid integer"),
        ("IMAGEMILL_WORKER__LEASE_SECONDS", "0.1", "greater than or equal to 2"),
        ("IMAGEMILL_WORKER__OPERATIONS", '["stylise"]', "'stylize', not 'stylise'"),
        ("IMAGEMILL_WORKER__OPERATIONS", "stylize", "expected JSON: a list such as"),
        ("IMAGEMILL_WORKER__OPERATIONS", '{"stylize": 1}', "tuple"),
        ("IMAGEMILL_WORKER__SPEED", "fast", "not permitted"),
        ("IMAGEMILL_WORKER", "fast", "dictionary"),
        ("IMAGEMILL_FETCH__ALLOW_HOSTS", "images.internal", "expected JSON: a list such as"),
        ("IMAGEMILL_FETCH__ALLOW_NETWORKS", '["10.0.0.0/99"]', "not a valid IPv4 network, not '10.0.0.0/99'"),
        ("IMAGEMILL_FETCH__USER_AGENT", "shop\r\nbot", "match pattern"),
        ("IMAGEMILL_FETCH__HEADERS", "X-Token: hush", "expected JSON"),
        ("IMAGEMILL_FETCH__HEADERS", '["hush"]', "JSON object of objects"),
        ("IMAGEMILL_FETCH__HEADERS", '{"cdn.example": "hush"}', "JSON object of objects"),
        ("IMAGEMILL_FETCH__HEADERS", '{"https://cdn.example": {"X-Token": "hush"}}', "not by URL"),
        ("IMAGEMILL_FETCH__HEADERS", '{"localhost": {"Bearer hush": "hush"}}', "not the name of a header"),
        ("IMAGEMILL_FETCH__HEADERS", '{"localhost": {"Content-Length": "hush"}}', "'Content-Length' can't be set"),
        ("IMAGEMILL_FETCH__HEADERS", '{"localhost": {"X-Token": "hush\\r\\nX: y"}}', "one line of ASCII text"),
        ("IMAGEMILL_FETCH__HEADERS", '{"localhost": {"X-Token": 5}}', "one line of ASCII text"),
        ("IMAGEMILL_FILES__WRITE_ROOTS", "/srv/out", "expected JSON: a list such as"),
        ("IMAGEMILL_S3__CREATE_BUCKET", "perhaps", "boolean"),
        ("IMAGEMILL_REDIS_URL", "redis.example:6379", "redis://"),
        ("IMAGEMILL_REDIS_URL", "http://redis.example", "redis://"),
        ("IMAGEMILL_REDIS_URL", "redis://redis.example:6379/first", "redis://"),
    ],
)
def test_error_names_the_variable_and_the_reason(monkeypatch: pytest.MonkeyPatch, name: str, text: str, reason: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert caught.value.message.startswith(f"{name}: ")
    assert reason in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.message.count("IMAGEMILL_") == 1
    assert "hush" not in f"{caught.value!r} {caught.value.__cause__}"


def test_error_names_the_owner_of_a_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEMILL_OWNER_WEIGHTS", '{"ann": 1, "bob": 0}')
    with pytest.raises(ConfigurationError, match=r"^IMAGEMILL_OWNER_WEIGHTS__BOB: .*greater than 0, not 0$"):
        load_settings()


def test_error_names_all_wrong_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORKER__GPU", "S3__CONNECTIONS", "EXPIRE_DAYS"):
        monkeypatch.setenv(f"IMAGEMILL_{name}", "none")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    names = [part.partition(":")[0] for part in caught.value.message.split("; ")]
    assert sorted(names) == ["IMAGEMILL_EXPIRE_DAYS", "IMAGEMILL_S3__CONNECTIONS", "IMAGEMILL_WORKER__GPU"]


@pytest.mark.parametrize(
    "url",
    ["redis://:hush/hush@redis.example:6379/0", "redis://:hush@redis.example:hush", "hush", "amqp://u:hush@redis.example/0"],
)
def test_error_hides_the_password_of_an_invalid_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("IMAGEMILL_REDIS_URL", url)
    with pytest.raises(ConfigurationError, match="percent-encoded") as caught:
        load_settings()
    assert "hush" not in f"{caught.value!r} {caught.value.__cause__}"


@pytest.mark.parametrize("url", [URL, "rediss://user:pa%2Fss@redis.example/0", "redis://redis.example", "redis://[::1]:6379/"])
def test_redis_urls(url: str) -> None:
    assert load_settings(redis_url=url).redis_url.get_secret_value() == url


def test_printed_and_dumped_settings_show_no_password() -> None:
    settings = load_settings(redis_url=URL, fetch={"headers": {"cdn.example": {"Authorization": "Bearer hush"}}})
    assert settings.fetch.headers["cdn.example"]["Authorization"].get_secret_value() == "Bearer hush"
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert "hush" not in text
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301  # our own data


def test_settings_are_frozen() -> None:
    settings = load_settings()
    for holder, name in ((settings, "redis_url"), (settings.worker, "gpu"), (settings.s3, "region")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(holder, name, None)
