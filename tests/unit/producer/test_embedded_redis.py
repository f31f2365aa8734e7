"""The embedded Redis keeps its data across restarts and stops when asked."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from imagemill.producer.embedded_redis import EmbeddedRedis, find_server
from imagemill.shared.errors import BrokerUnavailable, MissingExtra
from tests.services.redis import require_redis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """Not started yet."""
    require_redis()
    server = EmbeddedRedis(tmp_path / "redis")
    yield server
    server.stop()


def ask(server: EmbeddedRedis, *command: str) -> Any:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        return client.execute_command(*command)


def process(server: EmbeddedRedis) -> int:
    with redis.Redis.from_url(server.url) as client:
        return int(client.info("server")["process_id"])


def test_server_listens_on_loopback_with_settings_a_ledger_needs(server: EmbeddedRedis) -> None:
    assert not server.running
    assert server.start() == server.url == f"redis://127.0.0.1:{server.port}/0"
    assert server.running
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        settings = {name: client.config_get(name)[name] for name in ("bind", "appendonly", "appendfsync", "maxmemory-policy")}
    assert settings == {"bind": "127.0.0.1", "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}


def test_second_start_keeps_the_running_server(server: EmbeddedRedis) -> None:
    url, first = server.start(), process(server)
    assert server.start() == url
    assert process(server) == first


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_server_restarts_on_the_same_port_with_its_data(end: str, server: EmbeddedRedis) -> None:
    server.start()
    port, first = server.port, process(server)
    ask(server, "SET", "key", "value")
    getattr(server, end)()
    assert not server.running
    assert not psutil.pid_exists(first)
    with pytest.raises(redis.ConnectionError):
        ask(server, "PING")
    server.start()
    assert (server.port, ask(server, "GET", "key")) == (port, "value")
    assert process(server) != first


def test_server_stops_at_the_end_of_its_context(tmp_path: Path, server: EmbeddedRedis) -> None:
    with EmbeddedRedis(tmp_path / "another") as another:
        server.start()
        assert another.port != server.port
        first = process(another)
    assert not psutil.pid_exists(first)
    another.stop()
    another.kill()
    assert server.running, "another server is not affected"


def test_server_runs_in_its_own_session_out_of_reach_of_ctrl_c(server: EmbeddedRedis) -> None:
    server.start()
    assert os.getsid(process(server)) != os.getsid(0)


def test_server_can_be_started_again_after_a_crash(server: EmbeddedRedis) -> None:
    server.start()
    ask(server, "SET", "key", "value")
    victim = psutil.Process(process(server))
    victim.send_signal(signal.SIGKILL)
    victim.wait(10)
    assert not server.running
    server.start()
    assert ask(server, "GET", "key") == "value"


def test_restart_fails_when_the_port_has_been_taken(server: EmbeddedRedis) -> None:
    server.start()
    server.stop()
    with (
        socket.create_server(("127.0.0.1", server.port)),
        pytest.raises(BrokerUnavailable, match=f"did not start: .*port {server.port}"),
    ):
        server.start()
    assert not server.running


def test_restart_fails_when_another_redis_listens_on_the_port(server: EmbeddedRedis, tmp_path: Path) -> None:
    server.start()
    server.stop()
    another = EmbeddedRedis(tmp_path / "another")
    another.port = server.port
    with another, pytest.raises(BrokerUnavailable):
        server.start()
    assert not server.running


def stand_in(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_start_error_quotes_the_servers_log(server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "bin", "redis-server", "echo starting; echo this machine is too old >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(BrokerUnavailable, match="the embedded Redis did not start: this machine is too old"):
        server.start()
    assert not server.running


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_server_on_the_path_is_preferred(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stand_in(tmp_path / "bin", name, "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_server() == str(path)


def test_missing_server_is_reported_with_what_to_install(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"no Redis server found: install redis-server .* pip install 'imagemill\[demo\]'"):
        server.start()
    assert not server.running
