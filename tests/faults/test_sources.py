"""Servers of images that misbehave for a while, or are slow, cost only time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from imagemill.producer.client import Client
from tests.conftest import photo
from tests.faults.jobs import check_complete, submit_urls
from tests.services.images import Handler, ImageServer, Route, answers, reply, reset, stalled, truncated
from tests.workers import WorkerProcess, wait_until

pytestmark = pytest.mark.integration


def at_first(fault: Route, then: bytes) -> Route:
    """A route with this fault for the first request."""
    left = [fault]

    def send(handler: Handler) -> None:
        route = left.pop() if left else then
        if callable(route):
            route(handler)
        else:
            reply(handler, 200, route)

    return send


def test_downloads_that_fail_at_first_are_tried_again(
    client: Client, images: ImageServer, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["IMAGEMILL_FETCH__TOTAL_TIMEOUT"] = "2"
    faults: list[Route] = [
        reset(photo(0)),
        stalled(photo(1), images.released),
        truncated(photo(2), 100),
        answers(200, photo(3), headers={"Content-Length": "1000"}),  # announces less than it sends
        answers(429, b"later", "text/plain", {"Retry-After": "1"}),
        answers(500, b"sorry", "text/plain"),
        answers(503, b"later", "text/plain", {"Retry-After": "1"}),
    ]
    for n, fault in enumerate(faults):
        images.routes[f"/{n}.png"] = at_first(fault, photo(n))
    with WorkerProcess(environment, tmp_path, fake="Invert") as node:
        node.wait_ready()
        job = submit_urls(client, [images.url(f"/{n}.png") for n in range(len(faults))], tmp_path)
        check_complete(client, job, len(faults), tmp_path)
    attempts = [row.attempts for row in client.results(job)]
    assert attempts.pop(3) in (2, 3)  # what was sent too much may spoil the next answer on that connection
    assert attempts == [2] * (len(faults) - 1)


def test_slow_host_holds_up_only_its_own_images(
    client: Client, images: ImageServer, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["IMAGEMILL_FETCH__THREADS"] = "2"
    respond, count = threading.Event(), 24

    def slowly(handler: Handler) -> None:
        respond.wait(60)
        reply(handler, 200, photo(int(handler.path[1:-4])))

    with ImageServer() as slow, WorkerProcess(environment, tmp_path, fake="Invert") as node:
        slow.fallback = slowly
        images.routes |= {f"/{n}.png": photo(n) for n in range(count)}
        node.wait_ready()
        urls = [(images if n % 2 else slow).url(f"/{n}.png") for n in range(count)]
        job = submit_urls(client, urls, tmp_path)
        wait_until(lambda: client.status(job).done == count // 2, "all images of the other host are done")
        respond.set()
        check_complete(client, job, count, tmp_path)
