from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.errors import UnsupportedUrl
from imagemill.shared.settings import FetchSettings
from imagemill.worker.transfer.addresses import allowed, is_public, wire

REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.7",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::8.8.8.8",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:10::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "100.63.255.255",
    "172.32.0.1",
    "223.255.255.254",
    "168.63.129.17",
    "2606:4700::1111",
    "2a00::1",
]
PUBLIC += ["::ffff:8.8.8.8", "2001:4860:4860::8888"]


@pytest.mark.parametrize("address", REFUSED)
def test_non_public_address_is_not_allowed(address: str) -> None:
    assert not allowed(address, "example.org", 80, FetchSettings())


@pytest.mark.parametrize("address", PUBLIC)
def test_public_address_is_allowed(address: str) -> None:
    assert allowed(address, "example.org", 80, FetchSettings())


@given(st.ip_addresses(v=4))
def test_embedded_ipv4_address_is_not_public_and_mapped_one_is_treated_as_ipv4(inner: IPv4Address) -> None:
    number = int(inner)
    wrapped = [IPv6Address(number), IPv6Address(0x0064_FF9B << 96 | number), IPv6Address(0x2002 << 112 | number << 80)]
    assert not any(is_public(ip) for ip in wrapped)
    assert allowed(str(IPv6Address(0xFFFF << 32 | number)), "h", 80, FetchSettings()) == is_public(inner)


@given(st.ip_addresses())
def test_special_address_is_not_public(ip: IPv4Address | IPv6Address) -> None:
    inside = ip.is_private or ip.is_multicast or ip.is_loopback or ip.is_link_local or ip.is_unspecified
    assert not (inside and is_public(ip))


@pytest.mark.parametrize(
    ("entry", "host", "port", "expected"),
    [
        ("minio", "minio", 9000, True),
        ("MinIO", "minio", 9000, True),
        ("minio:9000", "minio", 9000, True),
        ("minio:9000", "minio", 22, False),
        ("minio", "minio.evil.example", 80, False),
        ("minio", "xminio", 80, False),
        ("[::1]:80", "[::1]", 80, True),
        ("[::1]:80", "[::1]", 81, False),
    ],
)
def test_listed_host_is_allowed(entry: str, host: str, port: int, expected: bool) -> None:
    assert allowed("10.0.0.5", host, port, FetchSettings(allow_hosts=(entry,))) is expected


def test_listed_network_is_allowed() -> None:
    settings = FetchSettings.model_validate({"allow_networks": ["10.1.0.0/16", "fd00::/8"]})
    assert allowed("10.1.2.3", "h", 80, settings)
    assert allowed("::ffff:10.1.2.3", "h", 80, settings)
    assert allowed("fd12::1", "h", 80, settings)
    assert not allowed("10.2.0.1", "h", 80, settings)
    assert not allowed("64:ff9b::10.1.2.3", "h", 80, settings)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://Example.ORG", "http://example.org/"),
        ("https://example.org:443/a#part", "https://example.org/a"),
        ("http://example.org:8080/a b/ü.jpg?q=ä b&x=%20", "http://example.org:8080/a%20b/%C3%BC.jpg?q=%C3%A4%20b&x=%20"),
        ("http://example.org/100%.jpg", "http://example.org/100%25.jpg"),
        ("http://example.org/a%2Fb%zz", "http://example.org/a%2Fb%25zz"),
        ('http://example.org/"<a>"', "http://example.org/%22%3Ca%3E%22"),
        ("http://example.org/画像.png", "http://example.org/%E7%94%BB%E5%83%8F.png"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://straße.example/", "http://xn--strae-oqa.example/"),
        ("http://例え。テスト/", "http://xn--r8jz45g.xn--zckzah/"),
        ("http://i❤️.example/", "http://xn--i-7iq.example/"),
        ("http://my_bücher.example/", "http://xn--my_bcher-95a.example/"),
        ("http://[::FFFF:127.0.0.1]:81/x", f"http://[{IPv6Address('::ffff:127.0.0.1')}]:81/x"),  # from 3.13 on with dots
        ("http://example.org?q", "http://example.org/?q"),
        ("http://example.org/x?Signature=a%2Bb%3D&k=[1]", "http://example.org/x?Signature=a%2Bb%3D&k=[1]"),
    ],
)
def test_wire_encodes_url(url: str, expected: str) -> None:
    assert wire(url).url == expected


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///path",
        "http://a b/",
        "http://good.example\\@evil.example/",
        "http://good.example%00.evil/",
        "http://ex%61mple.org/",
        "http://user:word@example.org/",
        "http://example.org:99999/",
        "http://[fe80::1%25eth0]/",
        "http://[::1",
        "http://℀.example/",
        "ftp://example.org/",
    ],
)
def test_wire_rejects_invalid_url(url: str) -> None:
    with pytest.raises(UnsupportedUrl):
        wire(url)


@given(st.text())
def test_wire_gives_stable_ascii_url_for_any_path(text: str) -> None:
    try:
        target = wire(f"http://example.org/{text}")
    except UnsupportedUrl:
        return
    assert target.host == "example.org"
    assert target.url.startswith("http://example.org/")
    assert target.url.isascii()
    assert " " not in target.url
    assert wire(target.url) == target


@given(st.text(max_size=40))
def test_wire_gives_host_that_urlsplit_reads_from_url(text: str) -> None:
    try:
        target = wire(f"http://{text}/")
    except UnsupportedUrl:
        return
    parts = urlsplit(target.url)
    assert parts.netloc in (target.host, f"{target.host}:{target.port}")
    assert parts.username is None
