"""docs/deployment/several-hosts.md: what it configures works as shown, apart from addresses and passwords."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import client_for, environment_for
from tests.faults.jobs import check_complete, submit
from tests.integration.jobs import cli
from tests.services.hosts import Hosts
from tests.services.images import ImageServer
from tests.services.redis import configured_redis
from tests.workers import ROOT, WorkerProcess

pytestmark = pytest.mark.integration

PAGE = (ROOT / "docs" / "deployment" / "several-hosts.md").read_text()


def block(title: str, number: int = 0) -> str:
    return re.findall(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)[number]


def variable(number: int) -> str:
    """The URL of Redis, first without Sentinels."""
    read = f'{block("imagemill.env", number)}\nprintf %s "$IMAGEMILL_REDIS_URL"'
    return subprocess.run(["sh", "-ec", read], check=True, capture_output=True, text=True).stdout


def test_redis_sentinels_and_nodes_as_on_the_page(tmp_path: Path, images: ImageServer) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")

    def here(text: str) -> str:
        text = text.replace("/etc/imagemill", str(tmp_path)).replace("dir /var/lib/redis\n", "")
        text = re.sub(r"10\.0\.0\.\d+", "127.0.0.1", text.replace("bind 127.0.0.1 10.0.0.11", "bind 127.0.0.1"))
        return re.sub(r"tls-port \d+", "tls-port PORT", text)

    commands = here(block("in a folder of its own"))
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True)
    with ExitStack() as stack:
        redis = here(block("redis.conf")).splitlines()
        primary = stack.enter_context(configured_redis(tmp_path / "primary", *redis))
        follow = here(block("replica.conf")).replace("6379", str(primary))
        stack.enter_context(configured_redis(tmp_path / "replica", *redis, follow))
        sentinel = here(block("sentinel.conf")).replace(" 6379 ", f" {primary} ").splitlines()
        ports = [
            stack.enter_context(configured_redis(tmp_path / f"sentinel{number}", *sentinel, sentinel=True))
            for number in range(3)
        ]
        direct = here(variable(0)).replace("6379", str(primary))
        found = iter(ports)
        watched = re.sub("26379", lambda _: str(next(found)), here(variable(1)))
        assert watched.startswith("rediss+sentinel://")
        for url in (direct, watched):
            environment = environment_for(url, tmp_path, IMAGEMILL_S3__ENDPOINT_URL="http://127.0.0.1:1")
            told = cli(environment, "doctor").stdout
            assert re.search(r"ok +redis: version", told), told
        with WorkerProcess(environment, tmp_path, fake="Invert") as node, client_for(watched) as client:
            node.wait_ready()
            check_complete(client, submit(client, images, tmp_path, 3), 3, tmp_path)


def test_firewall_of_the_page() -> None:
    if shutil.which("nft") is None:
        pytest.skip("nftables is not installed")
    with Hosts("redis", "fleet", "stranger") as hosts:
        with hosts.at("redis"):
            rules = block("/etc/nftables.conf").replace("10.0.0.0/24", hosts.address("fleet"))
            done = subprocess.run(["nft", "-f", "-"], input=rules, text=True, capture_output=True, check=False)
            if "not supported" in done.stderr:
                pytest.skip(f"this kernel has no nftables: {done.stderr}")
            assert done.returncode == 0, done.stderr
            server = socket.create_server(("0.0.0.0", 6379))
        with server:
            reached = {name: reaches(hosts, name, hosts.address("redis")) for name in hosts.names}
    assert reached == {"redis": True, "fleet": True, "stranger": False}


def reaches(hosts: Hosts, name: str, address: str) -> bool:
    with hosts.at(name):
        try:
            socket.create_connection((address, 6379), timeout=1).close()
        except TimeoutError:
            return False
        return True
