"""`imagemill doctor`: its findings, fixes and exit statuses."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.dead import DeadLetters
from imagemill.shared.engines import find_engine
from imagemill.shared.fleet import Fleet
from imagemill.shared.messages import Node
from imagemill.worker.node.checks import broker, host
from imagemill.worker.operations import registry
from tests.services.s3 import S3Server
from tests.unit.worker.node.doctors import PASSWORD, Doctor, findings, listed, node, problems, unreachable


def test_doctor_reports_ok_for_every_check(doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    fleet = Fleet(own_redis.url)
    fleet.report_node(node())
    fleet.close()
    result = doctor(own_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 0, result.output
    found = findings(result)
    assert found.keys() == {"redis", "workers", "s3", "disk", "memory", "models", "gpu"}
    assert all(finding.keys() == {"check", "state", "found", "fix"} for finding in found.values())
    assert all((finding["state"], finding["fix"]) == ("ok", "") for finding in listed(result))
    assert found["workers"]["found"] == "cpu@here: 2 children, ready"
    for text in (result.output, doctor(own_redis.url, s3=s3_server).output):
        assert s3_server.secret_key not in text


def test_doctor_warns_about_dead_letters(doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    letters = DeadLetters(own_redis.url)
    letters.add("imagemill:nodes", "not JSON", b"null")
    letters.close()
    found = findings(doctor(own_redis.url, "--json", s3=s3_server))["redis"]
    assert (found["state"], found["found"]) == ("warning", "entries that could not be read and were set aside: 1")
    assert "imagemill jobs --dead" in found["fix"]


def test_doctor_suggests_a_fix_when_redis_is_unreachable(doctor: Doctor) -> None:
    result = doctor(unreachable(f":{PASSWORD}@"))
    assert result.exit_code == 3
    text = " ".join(result.output.split())
    assert "failed redis:" in text
    assert "fix: start Redis, or set IMAGEMILL_REDIS_URL" in text
    assert "models: stylize (opencv)" in text, "the other checks still run"
    assert PASSWORD not in text


def test_doctor_never_prints_the_redis_password(doctor: Doctor, own_redis: EmbeddedRedis) -> None:
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
    ("option", "value", "found", "fix"),
    [
        ("appendonly", "no", "all jobs are lost on a restart", "CONFIG SET appendonly yes"),
        ("maxmemory-policy", "allkeys-lru", "may evict jobs", "CONFIG SET maxmemory-policy noeviction"),
    ],
)
def test_doctor_warns_when_redis_may_lose_jobs(
    option: str, value: str, found: str, fix: str, doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server
) -> None:
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.config_set(option, value)
    result = doctor(own_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 0
    finding = findings(result)["redis"]
    assert finding["state"] == "warning"
    assert found in finding["found"]
    assert fix in finding["fix"]


def test_doctor_warns_about_a_wrong_clock(
    doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(broker, "time", SimpleNamespace(time=lambda: now - 3600))
    finding = findings(doctor(own_redis.url, "--json", s3=s3_server))["redis"]
    assert finding["state"] == "warning"
    assert re.search(r"are (359|360)\d s apart", finding["found"])
    assert "clocks" in finding["fix"]


def test_doctor_fails_for_a_lane_out_of_service(doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    fleet = Fleet(own_redis.url)
    lanes = ("remove-background.opencv", "inpaint.opencv")
    fleet.report_node(node().model_copy(update={"lanes": lanes, "faults": {"stylize.opencv": "it can't be opened"}}))
    fleet.close()
    result = doctor(own_redis.url, "--json", s3=s3_server)
    finding = findings(result)["workers"]
    assert finding["found"] == "cpu@here: stylize.opencv is out of service: it can't be opened"
    assert (finding["state"], finding["fix"]) == ("failed", "repair or replace its files; the node notices")


@pytest.mark.parametrize(
    ("reported", "message"), [(None, "3 lanes have no node"), (node(ready=False), "cpu@here: 2 children, loading")]
)
def test_doctor_warns_when_no_node_is_ready(
    reported: Node | None, message: str, doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server
) -> None:
    if reported:
        fleet = Fleet(own_redis.url)
        fleet.report_node(reported)
        fleet.close()
    result = doctor(own_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 0
    finding = findings(result)["workers"]
    assert finding["state"] == "warning"
    assert message in finding["found"]


def test_doctor_fails_when_s3_is_unreachable(doctor: Doctor, own_redis: EmbeddedRedis) -> None:
    result = doctor(own_redis.url, "--json")
    assert result.exit_code == 3
    finding = findings(result)["s3"]
    assert finding["state"] == "failed"
    assert finding["found"].count("http://127.0.0.1") == 1
    assert "IMAGEMILL_S3__ENDPOINT_URL" in finding["fix"]
    assert PASSWORD not in result.output


def test_doctor_only_warns_when_s3_denies_access(doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    result = doctor(own_redis.url, "--json", s3=s3_server, AWS_SECRET_ACCESS_KEY=PASSWORD)
    assert result.exit_code == 0
    assert [problem[:2] for problem in problems(result) if problem[0] == "s3"] == [("s3", "warning")]
    assert PASSWORD not in result.output


def test_doctor_reports_an_invalid_s3_endpoint(doctor: Doctor, own_redis: EmbeddedRedis) -> None:
    result = doctor(own_redis.url, "--json", IMAGEMILL_S3__ENDPOINT_URL="minio:9000")
    assert result.exit_code in (2, 3)
    assert isinstance(result.exception, SystemExit), "a message instead of a traceback"
    assert "minio:9000" in result.output


def test_doctor_warns_when_the_disk_is_nearly_full(
    doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "LEAST_DISK", 2**62)
    found = [problem for problem in problems(doctor(own_redis.url, "--json", s3=s3_server)) if problem[0] == "disk"]
    assert {problem[1] for problem in found} == {"warning"}
    assert any("TMPDIR" in problem[3] for problem in found)


def test_doctor_fails_when_the_library_of_an_engine_is_missing(
    doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(find_engine("stylize", "opencv"), module="no_such_library.engine:Stylize")
    monkeypatch.setattr(registry, "ENGINES", [row])
    result = doctor(own_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 2
    finding = findings(result)["models"]
    assert finding["state"] == "failed"
    assert "pip install 'imagemill[worker]'" in finding["found"]


def test_canary_fails_without_redis_or_without_a_node_on_this_host(doctor: Doctor, own_redis: EmbeddedRedis) -> None:
    fleet = Fleet(own_redis.url)
    fleet.report_node(node().model_copy(update={"host": "another"}))
    fleet.close()
    for url, fix in ((own_redis.url, "look at the worker's log"), (unreachable(), "start Redis")):
        result = doctor(url, "--worker", "--json")
        assert result.exit_code == 3
        (finding,) = findings(result).values()
        assert (finding["check"], finding["state"]) == ("worker", "failed")
        assert fix in finding["fix"]
