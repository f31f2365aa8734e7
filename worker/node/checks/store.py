"""Checks of S3: the server, the buckets of outputs, and the address that links lead to."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

from imagemill.shared import s3
from imagemill.shared.errors import AccessDenied, ConfigurationError, ImageError, ImagemillError, NotFound, ServiceUnavailable
from imagemill.shared.ledger.reading import ReadLedger
from imagemill.shared.settings import S3Settings, Settings
from imagemill.shared.urls import shown, shown_server
from imagemill.worker.node.checks.broker import SET_CLOCKS
from imagemill.worker.node.checks.finding import Finding, State

SET_S3 = "set IMAGEMILL_S3__ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; not needed for file:// outputs"
START_S3 = "start the S3 server, or set IMAGEMILL_S3__ENDPOINT_URL to its address; not needed for file:// outputs"
SET_PUBLIC = (
    "set IMAGEMILL_S3__PUBLIC_URL to the address under which browsers reach the S3 server, such as https://s3.example.com"
)
PROBE = ".imagemill-doctor"
"""The object that is written below each output and deleted again."""
LATEST_JOBS = 20
"""Jobs whose outputs are checked if none is named."""
INSIDE = (".local", ".localdomain", ".internal", ".lan", ".home.arpa", ".intranet", ".svc")
"""Endings of names that no public name server knows."""


def check_s3(settings: Settings, outputs: Mapping[str, State]) -> Iterator[Finding]:
    """Does S3 respond and accept the keys, can browsers open links, and can the outputs be written to?

    `outputs` maps URLs to the state of a finding if nothing can be written there.
    """
    endpoint = shown_server(settings.s3.endpoint_url or "AWS")
    problem, buckets = _buckets(settings.s3, endpoint)
    if problem is None:
        yield Finding("s3", "ok", f"{endpoint} responds; {buckets} buckets")
    else:
        # Only a warning when access is denied: keys restricted to one bucket are good practice, not a fault.
        unusable = problem.retryable or isinstance(problem, ConfigurationError)
        yield Finding("s3", "failed" if unusable else "warning", problem.message, _fix(problem))
        if unusable:
            return
    for url, state in outputs.items():
        if urlsplit(url).scheme == "s3":
            yield _writable(settings.s3, url, state)
    yield from _public(settings.s3, works=problem is None)


def _buckets(settings: S3Settings, what: str) -> tuple[ImagemillError | None, int]:
    """Why the server can't be asked for its buckets, or their number."""
    try:
        reply = s3.make_client(settings, patient=False).list_buckets()
    except Exception as error:  # noqa: BLE001
        return (error if isinstance(error, ConfigurationError) else s3.translate(error, what)), 0
    if "Buckets" not in reply:
        return ConfigurationError(f"{what} responds, but not like an S3 server; it may be its console, or another server"), 0
    return None, len(reply["Buckets"])


def _fix(problem: ImagemillError) -> str:
    if "clocks" in problem.message:
        return SET_CLOCKS
    if "SSLError" in problem.message:
        return "set AWS_CA_BUNDLE to the file with the certificate of the CA that signed the server's; check the clock"
    if isinstance(problem, ImageError) and problem.retryable:
        return START_S3
    return SET_S3


def outputs_of_jobs(settings: Settings) -> list[str]:
    """One S3 output per bucket of the latest jobs."""
    with suppress(ServiceUnavailable):  # it has just answered
        jobs = ReadLedger.of(settings).jobs(LATEST_JOBS)
        return list({s3.split(job.output)[0]: job.output for job in jobs if job.output.startswith("s3://")}.values())
    return []


def _writable(settings: S3Settings, url: str, state: State) -> Finding:
    """Can an object be stored below an output, and deleted again?"""
    bucket, prefix = s3.split(url.rstrip("/"))
    client, place = s3.make_client(settings, patient=False), {"Bucket": bucket, "Key": f"{prefix}/{PROBE}".lstrip("/")}
    problem = _attempt(lambda: client.put_object(Body=b"", **place), f"bucket {bucket!r}")
    if isinstance(problem, NotFound) and settings.create_bucket:
        return Finding("s3", "ok", f"there is no bucket {bucket!r}; workers will create it")
    if isinstance(problem, NotFound):
        at = f" --endpoint-url {shown_server(settings.endpoint_url)}" if settings.endpoint_url else ""
        fix = f"aws s3 mb s3://{bucket}{at}, or set IMAGEMILL_S3__CREATE_BUCKET=true on the workers"
        return Finding("s3", state, f"there is no bucket {bucket!r}", fix)
    if problem is not None:
        fix = f"read the S3 server's log; then imagemill doctor --output {shown(url)}"
        if isinstance(problem, AccessDenied):
            fix = f"allow these keys s3:PutObject in {bucket!r}, or use others: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return Finding("s3", state, f"nothing can be written to {shown(url)}: {problem.message}", fix)
    left = _attempt(lambda: client.delete_object(**place), url)
    also = f"; these keys may not delete, so the empty object {place['Key']} remains" if left else ""
    return Finding("s3", "ok", f"{shown(url)} can be written to{also}")


def _attempt(request: Callable[[], object], what: str) -> ImageError | None:
    """The error of a request to S3, None if it succeeds."""
    try:
        request()
    except Exception as error:  # noqa: BLE001
        return s3.translate(error, what)
    return None


def _public(settings: S3Settings, *, works: bool) -> Iterator[Finding]:
    """Can a browser open the links to results? Without a public URL they lead to the endpoint."""
    url = settings.public_url or settings.endpoint_url
    if url is None:
        return  # AWS
    at = shown_server(url)
    host = urlsplit(url).hostname or ""
    where = _where(host)
    if where == "inside" or (where and not settings.public_url):
        reach = {
            "inside": f"{host!r} is a name that only this network knows",
            "loopback": "only this host can open them",
            "private": "that address is private: only its own network can open them",
        }[where]
        intended = f"; if that is intended, set it to {at}" if where != "inside" else ""
        yield Finding("s3", "warning", f"links to results lead to {at}, but {reach}", SET_PUBLIC + intended)
    elif where == "loopback":  # what it leads to depends on the host, and this may be a container
        yield Finding("s3", "ok", f"links to results lead to {at}: only browsers on the S3 server's host can open them")
    elif settings.public_url:
        public = settings.model_copy(update={"endpoint_url": url})
        problem, _ = _buckets(public, at)
        if problem is None or (isinstance(problem, AccessDenied) and not works):
            yield Finding("s3", "ok", f"links to results lead to {at}, which responds")
        else:
            fix = f"curl -I {at} on a browser's host; set IMAGEMILL_S3__PUBLIC_URL; a proxy must keep the Host header"
            yield Finding("s3", "warning", f"links to results lead to a URL that fails: {problem.message}", fix)


def _where(host: str) -> str:
    """`inside`, `loopback` or `private`, for a host that not every browser can reach, otherwise an empty string."""
    addresses = []
    try:
        addresses = [ip_address(host)]
    except ValueError:
        if host == "localhost":
            return "loopback"
        if "." not in host or host.endswith(INSIDE) or ".svc." in host:
            return "inside"
        with suppress(OSError):
            addresses = [ip_address(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    if not addresses or any(address.is_global for address in addresses):
        return ""
    return "loopback" if all(address.is_loopback for address in addresses) else "private"
