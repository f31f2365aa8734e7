"""S3 and image servers whose certificates are from a CA of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imagemill.shared import errors
from imagemill.shared.s3 import make_client, storing
from imagemill.shared.settings import FetchSettings, FileSettings, S3Settings
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.network import Network
from tests.conftest import photo
from tests.services.certificates import Authority, with_tls
from tests.services.images import ImageServer, answers
from tests.stores import NoS3

pytestmark = pytest.mark.integration

BUCKETS = b"<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def url(ca: Authority) -> Iterator[str]:
    """A server at `localhost` that has an image, and answers like S3 with no bucket."""
    server = ImageServer({"/1.png": photo(1), "/": answers(200, BUCKETS, "application/xml")})
    url = with_tls(server, ca.sign("server", "localhost"))
    with server:
        yield url


def test_s3_trusts_the_bundle_only(url: str, ca: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)

    def buckets() -> object:
        with storing("buckets"):
            return make_client(S3Settings(endpoint_url=url)).list_buckets()["Buckets"]

    with pytest.raises(
        errors.StorageUnavailable, match=r"no TLS connection to the S3 server; AWS_CA_BUNDLE .*certificate verify failed"
    ):
        buckets()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(ca.file))
    assert buckets() == []
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    with pytest.raises(errors.ConfigurationError, match=r"AWS_CA_BUNDLE=.*missing.pem: No such file"):
        buckets()


def test_images_come_from_servers_with_a_private_ca(url: str, ca: Authority, tmp_path: Path, network: Network) -> None:
    def fetcher(**settings: object) -> Fetcher:
        allowed = FetchSettings(allow_hosts=("localhost",), **settings)  # type: ignore[arg-type]
        return Fetcher(allowed, FileSettings(), NoS3(network), network)

    with pytest.raises(errors.Unreachable, match="TLS connection failed"):
        network.call(fetcher().fetch(f"{url}/1.png"))
    assert network.call(fetcher(ca_file=ca.file).fetch(f"{url}/1.png")).data == photo(1)
    (tmp_path / "empty.pem").touch()
    with pytest.raises(errors.ConfigurationError, match=r"IMAGEMILL_FETCH__CA_FILE=.*empty.pem can't be used"):
        fetcher(ca_file=tmp_path / "empty.pem")
