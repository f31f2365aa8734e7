"""`imagemill doctor`: what is wrong, how to mend it, and an exit status for scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from imagemill.producer.cli import main
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.engines import find_engine
from imagemill.shared.fleet import Fleet
from imagemill.shared.messages import Node
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.queues import worker_queues
from imagemill.worker.node import doctor as module
from imagemill.worker.operations import registry
from tests.services.s3 import S3Server, free_ports

PASSWORD = "correct-horse"
Doctor = Callable[..., Result]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doctor:
    """Runs `imagemill doctor` in an empty folder, with S3 where nobody listens unless it is told otherwise."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("IMAGEMILL_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(redis_url: str, *flags: str, s3: S3Server | None = None, **settings: str) -> Result:
        keys = s3.environment if s3 else {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": PASSWORD}
        endpoint = s3.endpoint_url if s3 else f"http://127.0.0.1:{free_ports(1)[0]}"
        environment = {"IMAGEMILL_REDIS_URL": redis_url, "IMAGEMILL_S3__ENDPOINT_URL": endpoint, **keys, **settings}
        return CliRunner(env=environment).invoke(main, ["doctor", *flags])

    return run


def nobody(user: str = "") -> str:
    """An address where no Redis listens."""
    return f"redis://{user}127.0.0.1:{free_ports(1)[0]}/0"


def findings(result: Result) -> dict[str, dict[str, Any]]:
    """By check, the last of each."""
    return {finding["check"]: finding for finding in map(json.loads, result.stdout.splitlines())}


def node(ready: bool = True) -> Node:
    queues = tuple(worker_queues(OPERATIONS, ["opencv"]))
    return Node(node="cpu@here", host="here", pid=1, device="cpu", queues=queues, children=2, ready=ready)


def test_all_is_well(doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    fleet = Fleet(own_redis.url)
    fleet.report_node(node())
    fleet.close()
    result = doctor(own_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 0, result.output
    found = findings(result)
    assert {check: finding["state"] for check, finding in found.items()} == dict.fromkeys(
        ("redis", "workers", "s3", "disk", "models", "gpu"), "ok"
    )
    assert all(finding.keys() == {"check", "state", "found", "mend"} and finding["mend"] == "" for finding in found.values())
    assert found["workers"]["found"] == "cpu@here: 2 children, ready"
    for text in (result.output, doctor(own_redis.url, s3=s3_server).output):
        assert s3_server.secret_key not in text


def test_redis_is_gone_and_how_to_mend_it(doctor: Doctor) -> None:
    result = doctor(nobody(f":{PASSWORD}@"))
    assert result.exit_code == 3
    text = " ".join(result.output.split())
    assert "failed redis:" in text
    assert "mend: start Redis, or set IMAGEMILL_REDIS_URL to where it is" in text
    assert "models: stylize (opencv)" in text, "the other checks are made all the same"
    assert PASSWORD not in text


def test_a_wrong_password_is_told_without_it(doctor: Doctor, own_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.config_set("requirepass", PASSWORD)
    wrong = own_redis.url.replace("://", "://:battery-staple@")
    result = doctor(wrong, "--json")
    assert result.exit_code == 3
    assert findings(result)["redis"]["state"] == "failed"
    right = doctor(own_redis.url.replace("://", f"://:{PASSWORD}@"), "--json")
    assert findings(right)["redis"]["state"] == "ok"
    for text in (result.output, right.output):
        assert "battery-staple" not in text
        assert PASSWORD not in text


@pytest.mark.parametrize(
    ("option", "value", "found", "mend"),
    [
        ("appendonly", "no", "a restart forgets all jobs", "--appendonly yes"),
        ("maxmemory-policy", "allkeys-lru", "it may evict jobs", "--maxmemory-policy noeviction"),
    ],
)
def test_a_redis_that_may_forget_is_a_warning(
    option: str, value: str, found: str, mend: str, doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server
) -> None:
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.config_set(option, value)
    result = doctor(own_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 0
    finding = findings(result)["redis"]
    assert finding["state"] == "warning"
    assert found in finding["found"]
    assert mend in finding["mend"]


@pytest.mark.parametrize(
    ("reported", "said"), [(None, "no node listens to 9 of the queues"), (node(ready=False), "cpu@here: 2 children, loading")]
)
def test_nobody_would_work_on_a_job_yet(
    reported: Node | None, said: str, doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server
) -> None:
    if reported:
        fleet = Fleet(own_redis.url)
        fleet.report_node(reported)
        fleet.close()
    result = doctor(own_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 0
    finding = findings(result)["workers"]
    assert finding["state"] == "warning"
    assert said in finding["found"]


def test_s3_is_gone(doctor: Doctor, own_redis: EmbeddedRedis) -> None:
    result = doctor(own_redis.url, "--json")
    assert result.exit_code == 3
    finding = findings(result)["s3"]
    assert finding["state"] == "failed"
    assert finding["found"].count("http://127.0.0.1") == 1
    assert "IMAGEMILL_S3__ENDPOINT_URL" in finding["mend"]
    assert PASSWORD not in result.output


def test_keys_that_may_list_nothing_are_a_warning(doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    result = doctor(own_redis.url, "--json", s3=s3_server, AWS_SECRET_ACCESS_KEY=PASSWORD)
    assert result.exit_code == 0
    assert findings(result)["s3"]["state"] == "warning"
    assert PASSWORD not in result.output


def test_an_s3_address_that_is_none(doctor: Doctor, own_redis: EmbeddedRedis) -> None:
    result = doctor(own_redis.url, "--json", IMAGEMILL_S3__ENDPOINT_URL="minio:9000")
    assert result.exit_code in (2, 3)
    assert isinstance(result.exception, SystemExit), "a sentence, no traceback"
    assert "minio:9000" in result.output


def test_a_full_disk_is_a_warning(
    doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_DISK", 2**62)
    finding = findings(doctor(own_redis.url, "--json", s3=s3_server))["disk"]
    assert finding["state"] == "warning"
    assert "TMPDIR" in finding["mend"]


def test_an_engine_whose_library_is_missing(
    doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(find_engine("stylize", "opencv"), module="no_such_library.engine:Stylize")
    monkeypatch.setattr(registry, "ENGINES", [row])
    result = doctor(own_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 2
    finding = findings(result)["models"]
    assert finding["state"] == "failed"
    assert "pip install 'imagemill[worker]'" in finding["found"]


def test_the_canary_needs_redis_and_a_node_of_this_host(doctor: Doctor, own_redis: EmbeddedRedis) -> None:
    fleet = Fleet(own_redis.url)
    fleet.report_node(node().model_copy(update={"host": "another"}))
    fleet.close()
    for url, mend in ((own_redis.url, "look at the worker's log"), (nobody(), "start Redis")):
        result = doctor(url, "--worker", "--json")
        assert result.exit_code == 3
        (finding,) = findings(result).values()
        assert (finding["check"], finding["state"]) == ("worker", "failed")
        assert mend in finding["mend"]
