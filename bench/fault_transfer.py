"""Faults of the servers that images come from and go to."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from urllib.parse import urlsplit

from bench.fault_run import FaultRun, Row, photo_of, send_photo
from imagemill.shared.ledger.scripts import key
from tests.services import images
from tests.services.images import Handler, ImageServer, Route
from tests.services.proxy import Proxy
from tests.services.s3_proxy import S3Proxy
from tests.services.small_disk import small_disk
from tests.workers import wait_until

SECONDS = 0.05
"""How long the engine takes per image."""
WORKS = {"IMAGEMILL_TEST_SECONDS": str(SECONDS)}
STORED = "0 failed, 0 computed twice"
CUT_BYTES = 10_000
"""What a connection carries before it is reset; a result has about 5,000 bytes."""


# --- the store --------------------------------------------------------------------------------------------------------


def s3_down(run: FaultRun) -> str:
    """The S3 server refuses connections."""
    seconds = run.count(300, 15)
    assert run.s3 is not None
    with Proxy(urlsplit(run.s3.endpoint_url).port or 0) as proxy:
        node = run.node("node", concurrency=2, IMAGEMILL_S3__ENDPOINT_URL=proxy.url(), **WORKS)
        job = run.submit(run.count(600, 150))
        run.wait_done(job, 20)
        begun = time.time()
        proxy.set("refuse")
        wait_until(lambda: "S3" in (run.client.status(job).why or ""), "the status says why the job waits")
        why = run.client.status(job).why
        time.sleep(max(0.0, begun + seconds - time.time()))
        done = run.client.status(job).done
        proxy.set("pass")
        ended = time.time()
        run.wait(job, 300)
        counts = run.check(job)
        assert node.process.poll() is None, "the node has ended"
    normal = run.back_to_normal(job, begun, ended)
    return f"{counts}; down {seconds} s with {done} images done; why: {why!r}; normal {normal:.1f} s later"


def s3_slow(run: FaultRun) -> str:
    """Each PUT takes long."""
    seconds, count = run.count(5, 1), run.count(200, 40)
    assert run.s3 is not None
    with S3Proxy(run.s3.endpoint_url, put_seconds=seconds) as proxy:
        run.node("node", concurrency=2, IMAGEMILL_S3__ENDPOINT_URL=proxy.url, **WORKS)
        job = run.submit(count)
        start = time.monotonic()
        run.wait(job, 60 + 2 * seconds * count)
        rate = count / (time.monotonic() - start)
        return f"{run.check(job)}; {seconds} s per PUT, {rate:.2f} images/s"


def s3_busy(run: FaultRun) -> str:
    """The S3 server answers every second PUT with 503 SlowDown."""
    assert run.s3 is not None
    with S3Proxy(run.s3.endpoint_url, busy=True) as proxy:
        run.node("node", concurrency=2, IMAGEMILL_S3__ENDPOINT_URL=proxy.url, **WORKS)
        job = run.submit(run.count(600, 60))
        run.wait(job, 600)
        return f"{run.check(job)}; {proxy.refused} of {proxy.puts} PUTs refused"


def s3_reset(run: FaultRun) -> str:
    """Every connection to the S3 server is reset in the middle of the second or third result."""
    assert run.s3 is not None
    with Proxy(urlsplit(run.s3.endpoint_url).port or 0) as proxy:
        proxy.cut_up = CUT_BYTES
        run.node("node", concurrency=2, IMAGEMILL_S3__ENDPOINT_URL=proxy.url(), **WORKS)
        job = run.submit(run.count(600, 60))
        run.wait_done(job, run.count(500, 50), 600)
        cuts = proxy.cuts
        proxy.cut_up = None  # or else the manifest, which is larger, never arrives
        run.wait(job, 300)
        assert cuts, "no connection was reset"
        return f"{run.check(job)}; {cuts} connections reset in a request's body"


# --- the sources ------------------------------------------------------------------------------------------------------


def at_first(times: int, fault: Route, then: bytes) -> Route:
    """A route with this fault for the first requests."""
    left = [fault] * times

    def send(handler: Handler) -> None:
        route = left.pop() if left else then
        if callable(route):
            route(handler)
        else:
            images.reply(handler, 200, route)

    return send


def sources(run: FaultRun) -> str:
    """Source servers misbehave at first, in every way."""
    each = run.count(20, 4)
    faults: dict[str, tuple[int, Callable[[bytes], Route]]] = {
        "reset": (2, images.reset),
        "stall": (1, lambda data: images.stalled(data, run.images.released)),
        "too long": (2, lambda data: images.truncated(data, 100)),
        "too short": (1, lambda data: images.answers(200, data, headers={"Content-Length": str(len(data) // 2)})),
        "429": (2, lambda _: images.answers(429, b"later", "text/plain", {"Retry-After": "2"})),
        "500": (2, lambda _: images.answers(500, b"sorry", "text/plain")),
        "503": (1, lambda _: images.answers(503, b"later", "text/plain", {"Retry-After": "1"})),
    }
    run.node("node", IMAGEMILL_FETCH__TOTAL_TIMEOUT="3", **WORKS)
    urls = [run.images.url(f"/{number}.png") for number in run.numbers((len(faults) + 1) * each)]
    for number, url in enumerate(urls):
        data, path = photo_of(url), urlsplit(url).path
        if number % (len(faults) + 1) < len(faults):
            times, fault = list(faults.values())[number % (len(faults) + 1)]
            run.images.routes[path] = at_first(times, fault(data), data)
    job = run.submit_urls(urls)
    run.wait(job, 300)
    counts = run.check(job)
    attempts = max(row.attempts for row in run.client.results(job))
    assert attempts <= 3, f"{attempts} attempts"
    return f"{counts}; {', '.join(faults)} {each} times each, attempts at most {attempts}"


def slow_host(run: FaultRun) -> str:
    """One of ten hosts takes long for each image."""
    seconds, each = run.count(10, 3), run.count(100, 30)
    run.node("node", IMAGEMILL_TEST_SECONDS="0.02")
    with ExitStack() as stack:
        hosts = [stack.enter_context(ImageServer()) for _ in range(10)]
        for host in hosts:
            host.fallback = send_photo
        alone, _ = _others(run, hosts[1:], each)

        def slowly(handler: Handler) -> None:
            hosts[0].released.wait(seconds)
            send_photo(handler)

        hosts[0].fallback = slowly
        beside, whole = _others(run, hosts, each)
        ratio = beside / alone
        told = f"{alone:.1f} images/s from nine hosts, {beside:.1f} beside a tenth that takes {seconds} s; ratio {ratio:.2f}"
        assert ratio >= 0.9, told
        return f"{told}; all {10 * each} images in {whole:.0f} s"


def _others(run: FaultRun, hosts: list[ImageServer], each: int) -> tuple[float, float]:
    """Images per second of the last nine hosts in a job with as many images of each of these; and its seconds."""
    numbers = run.numbers(each * len(hosts))
    job = run.submit_urls([hosts[place % len(hosts)].url(f"/{number}.png") for place, number in enumerate(numbers)])
    run.wait(job, 600)
    run.check(job)
    events = run.raw.xrange(key(job, "events"))
    recorded = [(int(fields["i"]) % len(hosts), int(at.split("-")[0]) / 1000) for at, fields in events if "i" in fields]
    times = sorted(moment for host, moment in recorded if host >= len(hosts) - 9)
    return len(times) / (times[-1] - times[0]), max(moment for _, moment in recorded) - times[0]


# --- a full disk ------------------------------------------------------------------------------------------------------


def disk_full(run: FaultRun) -> str:
    """The disk for results fills up in the middle of a job; once there is space, a retry completes it."""
    count, room = run.count(400, 60), run.count(200, 30)
    results = count + count // 2 + 20  # the manifest takes half as much
    out = run.folder / "out"
    with small_disk(out, results * 8192):  # a result takes two pages
        filler = out / "filler"
        filler.write_bytes(bytes((results - room) * 8192))
        node = run.node("node", **WORKS)
        job = run.submit(count)
        status = run.wait(job, 300)
        errors = [row for row in run.client.results(job) if row.state == "failed"]
        messages = {(row.code, (row.message or "").rpartition(": ")[2]) for row in errors}
        assert errors, "the disk was not full"
        assert all("no space left" in message for _, message in messages), messages
        assert not [*out.rglob("*.part")], "partial files are left"
        assert len([*out.glob("*/*.png")]) == status.done
        filler.unlink()
        retried = run.client.retry(job)
        assert retried == len(errors)
        run.wait(job, 300)
        counts = run.check(job, again=None, late=True)
        assert node.process.poll() is None, "the node has ended"
        return f"{len(errors)} images failed with {sorted(messages)}; after a retry of {retried}: {counts}"


ROWS = [
    Row("s3-down", f"{STORED}; the status says why it is waiting", s3_down, s3=True),
    Row("s3-slow", STORED, s3_slow, s3=True),
    Row("s3-busy", STORED, s3_busy, s3=True),
    Row("s3-reset", STORED, s3_reset, s3=True),
    Row("sources", "retried, at most 3 attempts", sources),
    Row("slow-host", "the other hosts at full speed", slow_host),
    Row("disk-full", "clear error, no partial files; a retry completes the job", disk_full),
]
