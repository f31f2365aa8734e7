"""Redirects, and no way into private networks."""

from __future__ import annotations

import pytest

from imagemill.shared import errors
from imagemill.worker.transfer.fetch import Fetched, Fetcher
from tests.services.images import ImageServer, redirect
from tests.unit.worker.transfer.samples import LOOPBACK, PNG, MakeFetcher, caught, got


def test_redirects_are_followed(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/1"] = redirect("/2?q=1", 301)
    images.routes["/2"] = redirect("3", 307)
    images.routes["/3"] = redirect(images.url("/ü x.png"), 308)
    images.routes["/%C3%BC%20x.png"] = PNG
    assert got(fetcher, images.url("/1")) == Fetched(PNG, 1, len(PNG))


def test_redirect_limit_is_exact(make: MakeFetcher, images: ImageServer) -> None:
    images.routes.update({f"/{n}": redirect(f"/{n + 1}") for n in range(3)})
    images.routes["/3"] = PNG
    assert got(make(**LOOPBACK, max_redirects=3), images.url("/0")).data == PNG
    caught(make(**LOOPBACK, max_redirects=2), images.url("/0"), errors.TooManyRedirects)


def test_redirect_loop_fails_without_retry(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/loop"] = redirect("/loop")
    error = caught(fetcher, images.url("/loop"), errors.TooManyRedirects, attempts=3)
    assert images.hits["/loop"] == 6
    assert error.tries == 1


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "s3://bucket/key", "gopher://127.0.0.1:6379/_INFO", "data:image/png,x"]
)
def test_redirect_to_other_scheme_is_forbidden(fetcher: Fetcher, images: ImageServer, location: str) -> None:
    images.routes["/a.png"] = redirect(location)
    caught(fetcher, images.url("/a.png"), errors.ForbiddenAddress)


@pytest.mark.parametrize("location", ["http://user:hunter2@127.0.0.1/", "http://[::1/", "http://a b/", "http://x%00y/"])
def test_redirect_to_invalid_url_is_unsupported(fetcher: Fetcher, images: ImageServer, location: str) -> None:
    images.routes["/a.png"] = redirect(location)
    assert "hunter2" not in caught(fetcher, images.url("/a.png"), errors.UnsupportedUrl).message


def test_error_after_redirect_names_both_urls_without_queries(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = redirect("/gone.png?Signature=secret")
    message = caught(fetcher, images.url("/a.png"), errors.NotFound).message
    assert "/a.png" in message
    assert "/gone.png" in message
    assert "secret" not in message


# --- private networks ---


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "LOCALHOST.",
        "2130706433",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "0",
        "[::ffff:127.0.0.1]",
        "[::1]",
        "[::]",
    ],
)
def test_loopback_is_forbidden_in_any_spelling(make: MakeFetcher, images: ImageServer, host: str) -> None:
    images.routes["/a.png"] = PNG
    error = caught(make(), images.url("/a.png", host), errors.ForbiddenAddress, attempts=3)
    assert "IMAGEMILL_FETCH__ALLOW_HOSTS" in error.message
    assert error.tries == 1
    assert images.connections == 0


@pytest.mark.parametrize("host", ["10.0.0.1", "169.254.169.254", "[fd00:ec2::254]", "224.0.0.1", "[64:ff9b::a00:1]"])
def test_private_network_is_forbidden_without_connecting(make: MakeFetcher, host: str) -> None:
    caught(make(), f"http://{host}/latest/meta-data", errors.ForbiddenAddress)


def test_redirect_into_private_network_is_forbidden(make: MakeFetcher, images: ImageServer) -> None:
    with ImageServer({"/secret": PNG}) as inside:
        fetcher = make(allow_hosts=[f"127.0.0.1:{images.port}"])
        for location in (inside.url("/secret"), inside.url("/secret", "localhost"), inside.url("/secret", "0x7f000001")):
            images.routes["/a.png"] = redirect(location)
            assert "redirected" in caught(fetcher, images.url("/a.png"), errors.ForbiddenAddress).message
        assert inside.connections == 0
    assert images.hits["/a.png"] == 3


def test_allowing_host_name_does_not_allow_its_address(make: MakeFetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = PNG
    fetcher = make(allow_hosts=["localhost"])
    assert got(fetcher, images.url("/a.png", "localhost")).data == PNG
    # the open connection belongs to the name and must not be reused for the bare address
    caught(fetcher, images.url("/a.png"), errors.ForbiddenAddress)


def test_allowing_address_does_not_allow_host_name(make: MakeFetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = PNG
    fetcher = make(allow_hosts=["127.0.0.1"])
    got(fetcher, images.url("/a.png"))
    caught(fetcher, images.url("/a.png", "localhost"), errors.ForbiddenAddress)
