"""Faults planted in Redis and S3, and what `imagemill doctor` says about them."""

from __future__ import annotations

import socket
import uuid
from typing import Any

import boto3
import pytest
import redis
from click.testing import CliRunner

from imagemill.producer.cli import main
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.fleet import Fleet
from tests.services.images import ImageServer
from tests.services.s3 import S3Server
from tests.services.s3_proxy import S3Proxy
from tests.unit.worker.node.doctors import PASSWORD, Doctor, findings, listed, node, problems
from tests.workers import wait_until


@pytest.fixture
def healthy_redis(own_redis: EmbeddedRedis) -> EmbeddedRedis:
    """A Redis that knows a node."""
    fleet = Fleet(own_redis.url)
    fleet.report_node(node())
    fleet.close()
    return own_redis


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """A bucket that exists."""
    name = f"doctor-{uuid.uuid4().hex[:8]}"
    client_of(s3_server).create_bucket(Bucket=name)
    return name


def client_of(server: S3Server) -> Any:
    keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key}
    return boto3.client("s3", endpoint_url=server.endpoint_url, region_name="us-east-1", **keys)


def objects(server: S3Server, bucket: str) -> list[str]:
    client = client_of(server)
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.mark.parametrize(
    ("user", "found", "fix"),
    [
        (":battery-staple@", "refuses the password in IMAGEMILL_REDIS_URL", "percent-encoded"),
        ("shop:battery-staple@", "refuses the password of the user 'shop' in IMAGEMILL_REDIS_URL", "ACL LIST"),
        ("", "asks for a password, and IMAGEMILL_REDIS_URL has none", "IMAGEMILL_REDIS_URL=redis://:PASSWORD@127.0.0.1:"),
    ],
)
def test_wrong_or_missing_redis_password(
    user: str, found: str, fix: str, doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server
) -> None:
    with redis.Redis.from_url(own_redis.url) as raw:
        raw.config_set("requirepass", PASSWORD)
    result = doctor(own_redis.url.replace("://", f"://{user}"), "--json", s3=s3_server)
    assert result.exit_code == 3
    (problem,) = problems(result)
    assert problem[:2] == ("redis", "failed")
    assert problem[2] == f"Redis at 127.0.0.1:{own_redis.port} {found}"
    assert fix in problem[3]
    assert "HELLO" not in result.output
    assert "battery-staple" not in result.output


def test_tls_where_redis_has_none(doctor: Doctor, own_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    result = doctor(own_redis.url.replace("redis://", f"rediss://:{PASSWORD}@"), "--json", s3=s3_server)
    (problem,) = problems(result)
    assert "use redis:// if it has no TLS there" in problem[3]
    assert PASSWORD not in result.output


def test_redis_with_snapshots_only(doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    with redis.Redis.from_url(healthy_redis.url) as raw:
        raw.config_set("appendonly", "no")
        raw.config_set("save", "3600 1")
    ((check, state, found, fix),) = problems(doctor(healthy_redis.url, "--json", s3=s3_server))
    assert (check, state) == ("redis", "warning")
    assert "jobs since the last snapshot are lost" in found
    assert "CONFIG SET appendonly yes" in fix


def test_redis_that_could_not_save(doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    (healthy_redis.folder / "dump.rdb").mkdir()  # where its file should be
    with redis.Redis.from_url(healthy_redis.url) as raw:
        raw.config_set("save", "3600 1")
        raw.bgsave()
        wait_until(lambda: raw.info()["rdb_last_bgsave_status"] == "err", "Redis to fail")
        with pytest.raises(redis.ResponseError, match="MISCONF"):
            raw.set("key", "value")
    result = doctor(healthy_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 3
    found, fix = next(problem[2:] for problem in problems(result) if problem[:2] == ("redis", "failed"))
    assert "could not save a snapshot" in found
    assert "INFO persistence" in fix
    with redis.Redis.from_url(healthy_redis.url) as raw:
        raw.config_set("save", "")  # or it would not end


def test_full_redis_that_evicts(doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    with redis.Redis.from_url(healthy_redis.url) as raw:
        raw.config_set("maxmemory-policy", "volatile-lru")  # nothing volatile is evicted yet
        raw.config_set("maxmemory", raw.info()["used_memory"] + 20_000)
    evicts, full = problems(doctor(healthy_redis.url, "--json", s3=s3_server))
    assert "may evict jobs when full: its maxmemory-policy is volatile-lru" in evicts[2]
    assert "of its memory limit is used" in full[2]


def test_replica(doctor: Doctor, healthy_redis: EmbeddedRedis, redis_server: EmbeddedRedis, s3_server: S3Server) -> None:
    with redis.Redis.from_url(healthy_redis.url) as raw:
        raw.replicaof("127.0.0.1", redis_server.port)
    assert any("it is a replica" in problem[2] for problem in problems(doctor(healthy_redis.url, "--json", s3=s3_server)))


def test_missing_bucket(doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server) -> None:
    result = doctor(healthy_redis.url, "--json", "--output", "s3://no-such-bucket/spring", s3=s3_server)
    assert result.exit_code == 3
    ((check, state, found, fix),) = problems(result)
    assert (check, state, found) == ("s3", "failed", "there is no bucket 'no-such-bucket'")
    assert f"aws s3 mb s3://no-such-bucket --endpoint-url {s3_server.endpoint_url}" in fix
    assert "IMAGEMILL_S3__CREATE_BUCKET=true" in fix
    created = doctor(
        *(healthy_redis.url, "--json", "--output", "s3://no-such-bucket/spring"),
        **{"s3": s3_server, "IMAGEMILL_S3__CREATE_BUCKET": "true"},
    )
    assert (created.exit_code, problems(created)) == (0, [])


def test_missing_bucket_of_a_job(
    doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEMILL_REDIS_URL", healthy_redis.url)
    command = ["submit", "-", "--operation", "stylize", "--output", "s3://job-bucket/spring"]
    assert CliRunner().invoke(main, command, input="http://127.0.0.1:9/one.jpg\n").exit_code == 0
    result = doctor(healthy_redis.url, "--json", s3=s3_server)
    assert result.exit_code == 0, "the bucket of an old job may well be gone"
    ((check, state, found, fix),) = problems(result)
    assert (check, state, found) == ("s3", "warning", "there is no bucket 'job-bucket'")
    assert "aws s3 mb" in fix


def test_bucket_that_can_be_written_to_is_left_as_it_was(
    doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server, bucket: str
) -> None:
    result = doctor(healthy_redis.url, "--json", "--output", f"s3://{bucket}/spring/", s3=s3_server)
    assert (result.exit_code, problems(result)) == (0, [])
    assert f"s3://{bucket}/spring can be written to" in [finding["found"] for finding in listed(result)]
    assert objects(s3_server, bucket) == []


def test_read_only_bucket(doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server, bucket: str) -> None:
    with S3Proxy(s3_server.endpoint_url, read_only=True) as proxy:
        endpoint = {"IMAGEMILL_S3__ENDPOINT_URL": proxy.url}
        result = doctor(healthy_redis.url, "--json", "--output", f"s3://{bucket}", s3=s3_server, **endpoint)
    assert result.exit_code == 3
    ((check, state, found, fix),) = problems(result)
    assert (check, state) == ("s3", "failed")
    assert f"nothing can be written to s3://{bucket}" in found
    assert "refuses access" in found
    assert f"allow these keys s3:PutObject in '{bucket}'" in fix
    assert s3_server.secret_key not in result.output


@pytest.mark.parametrize(
    ("public", "reach"),
    [
        ("", "only this host can open them"),
        ("http://minio:9000", "'minio' is a name that only this network knows"),
        ("http://s3.shop.internal", "'s3.shop.internal' is a name that only this network knows"),
    ],
)
def test_links_that_browsers_cannot_open(
    public: str, reach: str, doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server
) -> None:
    result = doctor(healthy_redis.url, "--json", s3=s3_server, IMAGEMILL_S3__PUBLIC_URL=public)
    assert result.exit_code == 0
    ((check, state, found, fix),) = problems(result)
    assert (check, state) == ("s3", "warning")
    assert f"links to results lead to {public or s3_server.endpoint_url}, but {reach}" in found
    assert "set IMAGEMILL_S3__PUBLIC_URL to the address under which browsers reach" in fix


def test_public_url_that_does_not_respond(
    doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def stand_in(host: str, *rest: object, **more: object) -> object:
        if host == "s3.example.com":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", stand_in)
    result = doctor(healthy_redis.url, "--json", s3=s3_server, IMAGEMILL_S3__PUBLIC_URL="https://s3.example.com")
    ((_, state, found, fix),) = problems(result)
    assert state == "warning"
    assert "links to results lead to a URL that fails: https://s3.example.com: no connection" in found
    assert "curl -I https://s3.example.com" in fix


def test_endpoint_that_is_not_an_s3_server(
    doctor: Doctor, healthy_redis: EmbeddedRedis, s3_server: S3Server, images: ImageServer
) -> None:
    images.routes["/"] = b"<html>A console</html>"
    endpoint = {"IMAGEMILL_S3__ENDPOINT_URL": images.url("")}
    result = doctor(healthy_redis.url, "--json", s3=s3_server, **endpoint)
    assert result.exit_code == 3
    ((_, state, found, fix),) = problems(result)
    assert (state, "not like an S3 server" in found) == ("failed", True)
    assert "set IMAGEMILL_S3__ENDPOINT_URL" in fix


@pytest.mark.timeout(60)
def test_doctor_ends_when_no_service_responds(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        endpoint = dict.fromkeys(("IMAGEMILL_S3__ENDPOINT_URL", "IMAGEMILL_S3__PUBLIC_URL"), f"http://127.0.0.1:{port}")
        result = doctor(f"redis://:{PASSWORD}@127.0.0.1:{port}/0", "--json", **endpoint)
    assert result.exit_code == 3
    found = findings(result)
    assert "does not respond within 5 s" in found["redis"]["found"]
    assert f"open port {port} in the firewall" in found["redis"]["fix"]
    assert "did not respond in time" in found["s3"]["found"]
    assert PASSWORD not in result.output
