"""Redirects, and no way into private networks."""

from __future__ import annotations

from pathlib import Path

import pycurl
import pytest

from imagemill.shared import errors
from imagemill.worker.transfer.fetch import Fetched, Fetcher
from tests.services.certificates import Authority, with_tls
from tests.services.images import Handler, ImageServer, Route, answers, redirect, reply
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


# --- cookies and headers ---


def gate(name: str, then: bytes | str, *attributes: str) -> Route:
    """A route that sets a cookie and redirects to itself, and answers `then`, or redirects there, if the cookie comes back."""

    def send(handler: Handler) -> None:
        if f"{name}=1" not in handler.headers.get("Cookie", ""):
            cookie = "; ".join((f"{name}=1", *attributes))
            reply(handler, 302, b"", headers={"Location": handler.path, "Set-Cookie": cookie})
        elif isinstance(then, bytes):
            reply(handler, 200, then)
        else:
            reply(handler, 302, b"", headers={"Location": then})

    return send


def test_cookies_are_kept_within_one_chain_and_then_forgotten(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = gate("a", "/b.png", "Path=/", "Max-Age=3600")
    images.routes["/b.png"] = gate("b", PNG)
    for _ in range(3):
        assert got(fetcher, images.url("/a.png")).data == PNG
    assert (images.hits["/a.png"], images.hits["/b.png"]) == (6, 6)
    images.routes["/c.png"] = PNG
    got(fetcher, images.url("/c.png"))
    assert "Cookie" not in images.last_headers


def test_cookies_are_forgotten_before_a_retry(fetcher: Fetcher, images: ImageServer) -> None:
    cookies = list[str | None]()

    def busy(handler: Handler) -> None:
        cookies.append(handler.headers.get("Cookie"))
        reply(handler, 503, b"", headers={"Set-Cookie": "a=1", "Retry-After": "0"})

    images.routes["/a.png"] = busy
    caught(fetcher, images.url("/a.png"), errors.ServerError, attempts=2)
    assert cookies == [None, None]


@pytest.mark.parametrize("attributes", [(), ("Domain=localhost",), ("Domain=.localhost", "Path=/"), ("Domain=com",)])
def test_cookies_go_to_no_other_host(fetcher: Fetcher, images: ImageServer, attributes: tuple[str, ...]) -> None:
    with ImageServer({"/a.png": PNG}) as other:
        for place in (other.url("/a.png", "localhost"), other.url("/a.png", "a.localhost"), images.url("/b.png")):
            images.routes["/a.png"] = answers(302, headers={"Location": place, "Set-Cookie": "; ".join(("a=1", *attributes))})
            images.routes["/b.png"] = PNG
            assert got(fetcher, images.url("/a.png", "localhost")).data == PNG
            assert "Cookie" not in {**other.last_headers, **images.last_headers}


def test_no_handle_of_libcurl_remembers_cookies(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = answers(200, PNG, headers={"Set-Cookie": "a=1; Path=/"})
    for _ in range(2):
        got(fetcher, images.url("/a.png"))
        assert "Cookie" not in images.last_headers
    with fetcher.network.handle() as handle:  # the one that was used
        assert handle.getinfo(pycurl.INFO_COOKIELIST) == []


def test_user_agent_can_be_set(make: MakeFetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = PNG
    got(make(**LOOPBACK, user_agent="shop-bot/1.0 (+https://shop.example)"), images.url("/a.png"))
    assert images.last_headers["User-Agent"] == "shop-bot/1.0 (+https://shop.example)"


def test_headers_go_to_their_host_alone(make: MakeFetcher, images: ImageServer) -> None:
    seen = dict[str, dict[str, str]]()

    def note(name: str, then: Route) -> Route:
        def send(handler: Handler) -> None:
            seen[name] = dict(handler.headers.items())
            then(handler) if callable(then) else reply(handler, 200, then)

        return send

    with ImageServer({"/b.png": note("other port", redirect(images.url("/c.png", "LOCALHOST")))}) as other:
        images.routes["/a.png"] = note("first", redirect(other.url("/b.png")))
        images.routes["/c.png"] = note("other host", redirect(images.url("/d.png")))
        images.routes["/d.png"] = note("back again", PNG)
        secret = {"Authorization": "Bearer hunter2", "User-Agent": "mine"}
        headers = {f"127.0.0.1:{images.port}": secret, "Localhost": {"X-Token": "other"}}
        assert got(make(**LOOPBACK, headers=headers), images.url("/a.png")).data == PNG
    got_by = {name: (given.get("Authorization"), given.get("X-Token")) for name, given in seen.items()}
    assert got_by == {
        "first": ("Bearer hunter2", None),
        "other port": (None, None),
        "other host": (None, "other"),
        "back again": ("Bearer hunter2", None),
    }
    assert seen["first"]["User-Agent"] == "mine"


def test_headers_are_not_sent_without_tls_after_a_request_with_it(
    make: MakeFetcher, images: ImageServer, tmp_path: Path
) -> None:
    ca = Authority(tmp_path)
    secure = ImageServer({"/a.png": redirect(images.url("/a.png", "localhost"))})
    url = with_tls(secure, ca.sign("server", "localhost"))
    images.routes["/a.png"] = PNG
    fetcher = make(**LOOPBACK, ca_file=ca.file, headers={"localhost": {"Authorization": "Bearer hunter2"}})
    with secure:
        assert got(fetcher, f"{url}/a.png").data == PNG
    assert secure.last_headers["Authorization"] == "Bearer hunter2"
    assert "Authorization" not in images.last_headers
    got(fetcher, images.url("/a.png", "localhost"))  # as the list says
    assert images.last_headers["Authorization"] == "Bearer hunter2"


def test_long_locations_do_not_fill_messages(fetcher: Fetcher, images: ImageServer) -> None:
    images.routes["/a.png"] = redirect(f"/{'ü' * 5_000}.png")
    message = caught(fetcher, images.url("/a.png"), errors.NotFound).message
    assert len(message) < 500
    assert "(status 404)" in message
