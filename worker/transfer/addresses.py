"""Decide which addresses a download may connect to, and put URLs into the form that is requested."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import quote, urlsplit

import idna

from imagemill.shared.errors import UnsupportedUrl
from imagemill.shared.settings import FetchSettings
from imagemill.shared.urls import shown

# Only this part of IPv6 is allocated as public. The rest includes loopback, IPv4-compatible (::/96), NAT64 (64:ff9b::/96
# and 64:ff9b:1::/48), unique local, link-local and multicast.
PUBLIC_V6 = ip_network("2000::/3")
# Networks that lead inside or nowhere, although some Python versions' `ipaddress.is_global` accepts them.
NOT_PUBLIC = (
    ip_network("168.63.129.16/32"),  # Azure's host
    ip_network("192.0.0.0/24"),  # protocol assignments; Oracle's metadata
    ip_network("192.88.99.0/24"),  # 6to4 relays
    ip_network("224.0.0.0/4"),  # multicast
    ip_network("2001::/23"),  # protocol assignments; Teredo (2001::/32) carries IPv4 addresses
    ip_network("2002::/16"),  # 6to4 carries IPv4 addresses
    ip_network("3fff::/20"),  # documentation
)

HOST = re.compile(r"[a-z0-9_.-]{1,253}")
# Characters that browsers send unencoded; all others are percent-encoded.
PLAIN = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in '"#<>\\`{}')
PORTS = {"http": 80, "https": 443}


def allowed(address: str, host: str, port: int, settings: FetchSettings) -> bool:
    """Whether a download from `host`:`port` may connect to `address`.

    Public addresses are always allowed; others only if the operator lists the host (`host` or `host:port` as in the URL,
    IPv6 in brackets) or a network containing the address. IPv4-mapped IPv6 addresses (::ffff:0:0/96) are treated as IPv4,
    since the system connects to the IPv4 address.
    """
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    listed = {entry.lower() for entry in settings.allow_hosts} & {host.lower(), f"{host.lower()}:{port}"}
    return is_public(ip) or bool(listed) or any(ip in network for network in settings.allow_networks)


def is_public(ip: IPv4Address | IPv6Address) -> bool:
    """Whether an address belongs to the public internet and can't reach another one through a gateway."""
    return ip.is_global and (ip.version == 4 or ip in PUBLIC_V6) and not any(ip in network for network in NOT_PUBLIC)


@dataclass(frozen=True)
class Target:
    """A URL in ASCII, with its host (IPv6 in brackets) and port."""

    url: str
    host: str
    port: int


def wire(url: str) -> Target:
    """An http or https URL as requested: host in IDNA, path and query percent-encoded, no fragment.

    The URL is rebuilt from its parts so that libcurl can't parse a different host from it. Raises UnsupportedUrl if the
    URL or its host is invalid.
    """
    try:
        parts = urlsplit(url)
        if "@" in parts.netloc or "%" in parts.netloc:  # credentials, encoded host, zone ID: parsers disagree on these
            raise ValueError("more than host and port")
        host = _ascii_host(parts.hostname or "")
        port = parts.port or PORTS[parts.scheme]
    except (ValueError, KeyError) as error:
        raise UnsupportedUrl(f"{shown(url)} is not a valid URL") from error
    at = host if port == PORTS[parts.scheme] else f"{host}:{port}"
    query = f"?{_encoded(parts.query)}" if parts.query else ""
    return Target(f"{parts.scheme}://{at}{_encoded(parts.path) or '/'}{query}", host, port)


@lru_cache(1024)
def _ascii_host(host: str) -> str:
    if ":" in host:
        return f"[{IPv6Address(host)}]"
    # UTS 46, non-transitional, like browsers: ß stays ß. idna.encode() would also reject `_` and emoji, which browsers accept.
    labels = idna.uts46_remap(host, std3_rules=False).split(".")
    name = ".".join(label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in labels)
    if not HOST.fullmatch(name):
        raise ValueError(f"{host!r} is not a valid host")
    return name


def _encoded(text: str) -> str:
    """Percent-encode where needed; existing escapes stay, a lone % becomes %25."""
    # surrogateescape: raw bytes of a Location header are sent back unchanged
    return re.sub("%(?![0-9A-Fa-f]{2})", "%25", quote(text, safe=PLAIN, errors="surrogateescape"))
