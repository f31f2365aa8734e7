"""The URL of Redis, in one form for the ledger, Celery and Flower.

    redis://USER:PASSWORD@HOST:6379/DATABASE
    rediss://...?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE       with TLS
    redis+sentinel://USER:PASSWORD@HOST:26379,HOST:26379/PRIMARY/DATABASE   the primary that Sentinels name
    rediss+sentinel://...                                                   with TLS, to Redis and to the Sentinels

Sentinels may have a user and password of their own: `?sentinel_username=NAME&sentinel_password=PASSWORD`.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from imagemill.shared.errors import ConfigurationError, sentence

SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")
TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs")
SENTINEL = ("sentinel_username", "sentinel_password")
AT_REDIS = re.compile(r"/?(?P<database>\d*)/?")
AT_SENTINELS = re.compile(r"/(?P<primary>[^/]+)(/(?P<database>\d+))?/?")
VARIABLE = "IMAGEMILL_REDIS_URL"

_quoted = partial(quote, safe="")


@dataclass(frozen=True)
class RedisUrl:
    """A parsed URL. `hosts` are those of the Sentinels if there is a `primary`, the name that they know Redis by."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    username: str
    password: str = field(repr=False)
    database: int
    primary: str | None
    options: Mapping[str, str] = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """Raises ValueError, with a message that contains no secret."""
        sentinels = "+sentinel:" in url[:20]
        try:
            parts = urlsplit(url)
            user, _, hosts = parts.netloc.rpartition("@")
            username, _, password = user.partition(":")
            pairs = [_host(host, 26379) for host in hosts.split(",")] if sentinels else [_host(hosts or "localhost", 6379)]
            place = (AT_SENTINELS if sentinels else AT_REDIS).fullmatch(parts.path)
            if parts.scheme not in SCHEMES or parts.fragment or place is None:
                raise ValueError
        except ValueError:
            end = "HOST:PORT,HOST:PORT/PRIMARY/DATABASE" if sentinels else "HOST:PORT/DATABASE"
            form = f"{'redis+sentinel' if sentinels else 'redis'}://:PASSWORD@{end}"
            raise ValueError(f"expected {form}, with special characters percent-encoded") from None
        return cls(
            scheme=parts.scheme,
            hosts=tuple(pairs),
            username=unquote(username),
            password=unquote(password),
            database=int(place["database"] or 0),
            primary=unquote(place["primary"]) if sentinels else None,
            options=_options(parts.scheme, parts.query),
        )

    @property
    def encrypted(self) -> bool:
        """Whether connections use TLS."""
        return self.scheme.startswith("rediss")

    @property
    def tls(self) -> dict[str, Any]:
        """redis-py's options for TLS, which Celery and Flower understand too; none without TLS.

        Raises ConfigurationError for a file that is missing or can't be used.
        """
        if not self.encrypted:
            return {}
        # Left to itself, Celery checks no certificate.
        chosen = {"ssl_cert_reqs": "required", **{name: self.options[name] for name in TLS if name in self.options}}
        _check_files(chosen)
        return {**chosen, "ssl_check_hostname": chosen["ssl_cert_reqs"] == "required"}

    @property
    def sentinel_login(self) -> dict[str, str]:
        """redis-py's `username` and `password` for the Sentinels, as far as they have them."""
        return {name.removeprefix("sentinel_"): self.options[name] for name in SENTINEL if name in self.options}

    @property
    def plain(self) -> str:
        """The URL without parameters, for redis-py if there is no Sentinel."""
        host, port = self.hosts[0]
        return f"{self.scheme}://{self._user}{_bracketed(host)}:{port}/{self.database}"

    @property
    def for_celery(self) -> str:
        """The URL without parameters, as Celery expects it: with Sentinels, one URL for each."""
        if self.primary is None:
            return self.plain
        return ";".join(f"sentinel://{self._user}{_bracketed(host)}:{port}/{self.database}" for host, port in self.hosts)

    @property
    def _user(self) -> str:
        return f"{_quoted(self.username)}:{_quoted(self.password)}@" if self.username or self.password else ""


def _host(text: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.path or "," in text:
        raise ValueError
    return parts.hostname, parts.port or port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else _quoted(host)


def _options(scheme: str, query: str) -> dict[str, str]:
    given = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    known = (TLS if scheme.startswith("rediss") else ()) + (SENTINEL if scheme.endswith("+sentinel") else ())
    for name in given:
        if name not in known:
            reason = f"only with a URL that begins with {'rediss' if name in TLS else 'redis+sentinel'}"
            raise ValueError(f"the parameter {name!r} is {reason if name in TLS + SENTINEL else 'unknown'}")
    if given.get("ssl_cert_reqs", "required") not in ("required", "none"):
        raise ValueError("ssl_cert_reqs must be 'required', which is the default, or 'none'")
    if "ssl_keyfile" in given and "ssl_certfile" not in given:
        raise ValueError("ssl_keyfile needs ssl_certfile")
    return given


def _check_files(tls: Mapping[str, str]) -> None:
    """redis-py would name neither the parameter nor the file, and only when it connects."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca, certificate, key = (tls.get(name) for name in TLS[:3])
    try:
        what = f"ssl_ca_certs={ca}"
        if ca is not None:
            context.load_verify_locations(ca)
        what = f"ssl_certfile={certificate}" + (f" with ssl_keyfile={key}" if key else "")
        if certificate is not None:
            context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        mismatch = "KEY_VALUES_MISMATCH" in str(error)
        reason = "the key does not belong to the certificate" if mismatch else "not a PEM file with what is expected there"
        raise ConfigurationError(f"{VARIABLE}: {what}: {reason}") from error
    except OSError as error:
        raise ConfigurationError(f"{VARIABLE}: {what}: {error.strerror or sentence(error)}") from error


def _no_password() -> str:
    raise OSError("the key must not be encrypted")
