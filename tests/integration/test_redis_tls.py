"""Redis with TLS: the same URL for the ledger, Celery and Flower, and errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

from imagemill.shared.broker import Publisher, make_app
from imagemill.shared.connection import connect, reachable
from imagemill.shared.errors import BrokerUnavailable, ConfigurationError
from imagemill.shared.settings import Settings
from tests.conftest import client_for, environment_for
from tests.faults.jobs import check_complete, submit
from tests.services.certificates import Authority, Certificate
from tests.services.images import ImageServer
from tests.services.redis import configured_redis
from tests.workers import WorkerProcess

pytestmark = pytest.mark.integration

LANE = "stylize.opencv"
USER = "user imagemill on >hush ~imagemill* ~_kombu* ~unacked* ~*.pidbox ~celeryev* &* +@all -@admin -@dangerous +info"
"""As docs/deployment/several-hosts.md has it."""


@dataclass(frozen=True)
class Site:
    """A Redis at `localhost` that asks for certificates signed by `ca`; `other` is an authority that it doesn't know."""

    port: int
    ca: Authority
    other: Authority
    mine: Certificate
    theirs: Certificate

    def url(self, host: str = "localhost", **parameters: object) -> str:
        known = {"ssl_ca_certs": self.ca.file, "ssl_certfile": self.mine.file, "ssl_keyfile": self.mine.key} | parameters
        given = {name: str(value) for name, value in known.items() if value is not None}
        return f"rediss://imagemill:hush@{host}:{self.port}/0?{urlencode(given)}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("tls")
    ca, other = Authority(folder / "ca"), Authority(folder / "other")
    server = ca.sign("redis", "localhost")
    tls = [f"tls-cert-file {server.file}", f"tls-key-file {server.key}", f"tls-ca-cert-file {ca.file}"]
    lines = ["bind 127.0.0.1", "port 0", "tls-port PORT", *tls, "user default off", USER]
    with configured_redis(folder / "redis", *lines) as port:
        yield Site(port, ca, other, ca.sign("mine"), other.sign("theirs"))


def publisher(url: str) -> Publisher:
    return Publisher(make_app(Settings(_env_file=None, redis_url=url)))  # type: ignore[call-arg]


@reachable()
def ping(url: str) -> None:
    with connect(url) as client:
        client.ping()


def test_job_runs_over_tls_as_a_user_with_few_rights(site: Site, images: ImageServer, tmp_path: Path) -> None:
    environment = environment_for(site.url(), tmp_path)
    with WorkerProcess(environment, tmp_path, fake="Invert") as node, client_for(site.url()) as client:
        node.wait_ready()
        job = submit(client, images, tmp_path, 6)
        check_complete(client, job, 6, tmp_path)
        assert node.fleet.nodes()
    assert "NOPERM" not in node.log.read_text()
    assert "insecure" not in node.log.read_text()


@pytest.mark.parametrize("part", ["ledger", "celery"])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"host": "127.0.0.1"}, "certificate does not match the address"),
        ({"ssl_ca_certs": None}, "from a CA that this host doesn't know"),
        ({"ssl_ca_certs": "OTHER"}, "from a CA that this host doesn't know"),
        ({"ssl_certfile": None, "ssl_keyfile": None}, "client certificate"),
        ({"ssl_certfile": "THEIRS", "ssl_keyfile": "THEIR KEY"}, "client certificate"),
    ],
)
def test_refused_connections_say_why(site: Site, part: str, wrong: dict[str, str | None], reason: str) -> None:
    files = {"OTHER": site.other.file, "THEIRS": site.theirs.file, "THEIR KEY": site.theirs.key}
    url = site.url(**{name: files.get(value or "", value) for name, value in wrong.items()})  # type: ignore[arg-type]
    with pytest.raises(BrokerUnavailable, match=reason) as caught:
        publisher(url).wake(LANE) if part == "celery" else ping(url)
    assert "hush" not in str(caught.value)


def test_files_that_cannot_be_used_are_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for parameter, file, reason in (
        ("ssl_ca_certs", tmp_path / "missing.pem", "missing.pem: No such file or directory"),
        ("ssl_ca_certs", tmp_path / "empty.pem", "empty.pem: not a PEM file"),
        ("ssl_certfile", tmp_path / "missing.pem", "No such file or directory"),
        ("ssl_keyfile", site.theirs.key, "the key does not belong to the certificate"),
    ):
        for use in (connect, publisher):
            with pytest.raises(ConfigurationError, match=rf"^IMAGEMILL_REDIS_URL: .*{parameter}=.*{reason}"):
                use(site.url(**{parameter: file}))
