"""URLs of Redis: what they may contain, and how redis-py and Celery get it."""

from __future__ import annotations

import pytest

from imagemill.shared.redis_url import RedisUrl


@pytest.mark.parametrize(
    ("url", "hosts", "database"),
    [
        ("redis://redis.example", (("redis.example", 6379),), 0),
        ("redis://redis.example:1234/5", (("redis.example", 1234),), 5),
        ("rediss://[::1]:6379/", (("::1", 6379),), 0),
        ("redis+sentinel://a,b:1,[::1]:2/main", (("a", 26379), ("b", 1), ("::1", 2)), 0),
        ("rediss+sentinel://a/main/3", (("a", 26379),), 3),
    ],
)
def test_hosts_and_database(url: str, hosts: tuple[tuple[str, int], ...], database: int) -> None:
    found = RedisUrl.parse(url)
    assert (found.hosts, found.database) == (hosts, database)
    assert found.primary == ("main" if "sentinel" in url else None)


def test_celery_gets_one_url_per_sentinel_and_quoted_passwords() -> None:
    url = RedisUrl.parse("redis+sentinel://ann:p%3Ba%2Fs@a:1,[::1]/main/2?sentinel_password=hush")
    assert url.for_celery == "sentinel://ann:p%3Ba%2Fs@a:1/2;sentinel://ann:p%3Ba%2Fs@[::1]:26379/2"
    assert (url.username, url.password, url.sentinel_login) == ("ann", "p;a/s", {"password": "hush"})


@pytest.mark.parametrize(
    "url",
    [
        "redis://a,b/0",
        "redis://a/main",
        "redis://a/0#b",
        "redis://a:port",
        "redis+sentinel://a,b",
        "redis+sentinel://a,,b/main",
        "redis+sentinel://a/main/x",
        "sentinel://a/main",
        "http://a",
    ],
)
def test_wrong_urls_are_refused_without_quoting_them(url: str) -> None:
    with pytest.raises(ValueError, match=r"^expected redis.*percent-encoded$"):
        RedisUrl.parse(url.replace("://", "://:hush@"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://a?ssl_ca_certs=ca.pem", "'ssl_ca_certs' is only with a URL that begins with rediss"),
        ("rediss://a?sentinel_password=hush", "'sentinel_password' is only with a URL that begins with redis.sentinel"),
        ("rediss://a?ssl_ca_cert=ca.pem", "'ssl_ca_cert' is unknown"),
        ("rediss://a?ssl_cert_reqs=optional", "ssl_cert_reqs must be"),
        ("rediss://a?ssl_keyfile=key.pem", "ssl_keyfile needs ssl_certfile"),
    ],
)
def test_wrong_parameters_are_named(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        RedisUrl.parse(url)
    assert "hush" not in str(caught.value)


def test_printed_url_has_no_password() -> None:
    assert "hush" not in repr(RedisUrl.parse("redis+sentinel://:hush@a/main?sentinel_password=hush"))


def test_certificates_are_checked_unless_the_url_says_otherwise() -> None:
    assert RedisUrl.parse("rediss://a").tls == {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
    assert RedisUrl.parse("rediss://a?ssl_cert_reqs=none").tls == {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    assert RedisUrl.parse("redis://a").tls == {}
