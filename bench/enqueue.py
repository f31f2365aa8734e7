"""Cost of submitting 50,000 URLs, compared with one plain Celery message per image.

    python -m bench.enqueue [ROUNDS]

Each round has its own Redis and runs a new process for each side in turn; Redis is emptied in between. CPU time covers
the whole process: start, imports, reading the list, ledger and publishing. Images per second exclude the imports on
both sides and, on the plain side, reading the list.
"""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.figures import Figure, figure, print_figures

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 50_000
PLAIN_IMAGES = 3_000
"""Enough, as every message costs the same."""
URL_LENGTH = 120


def run(rounds: int = 5) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        urls = write_list(Path(folder, "urls.txt"))
        results = [_round(Path(folder, f"redis-{n}"), urls) for n in range(rounds)]
    values = {key: [result[key] for result in results] for key in results[0]}
    return [
        figure("enqueue 50,000 images: CPU of the whole process", values["cpu"], "s", 4.0, at_most=True),
        figure("enqueue: Redis memory per image, with the ledger", values["bytes"], "bytes", 150.0, at_most=True),
        figure("enqueue: images/s, ours / one apply_async per image", values["speed_ratio"], "x", 25.0),
        figure("enqueue: Redis memory, one apply_async per image / ours", values["bytes_ratio"], "x", 12.0),
    ]


def write_list(file: Path) -> Path:
    """Write the list of URLs to a file, and return the file."""
    file.write_text("\n".join(make_urls(IMAGES)))
    return file


def make_urls(count: int) -> Iterator[str]:
    """URLs like a shop's: a common prefix, then a path that hardly compresses."""
    source = random.Random(20260730)
    alphabet = string.ascii_lowercase + string.digits
    head, tail = "https://cdn.example.com/photos/2026/07/", ".jpg"
    middle = URL_LENGTH - len(head) - len(tail)
    return (f"{head}{''.join(source.choices(alphabet, k=middle))}{tail}" for _ in range(count))


def _round(folder: Path, urls: Path) -> dict[str, float]:
    import redis

    from imagemill.producer.embedded_redis import EmbeddedRedis

    with EmbeddedRedis(folder) as server, redis.Redis.from_url(server.url) as client:
        ours = submit_in_new_process(server.url, urls, client)
        client.flushall()
        plain = _process("plain", server.url, urls, client)
        assert client.llen("celery") == PLAIN_IMAGES
    return {
        "cpu": ours["cpu"],
        "bytes": ours["bytes"] / IMAGES,
        "speed_ratio": (IMAGES / ours["seconds"]) / (PLAIN_IMAGES / plain["seconds"]),
        "bytes_ratio": (plain["bytes"] / PLAIN_IMAGES) / (ours["bytes"] / IMAGES),
    }


def submit_in_new_process(redis_url: str, urls: Path, client: Any) -> dict[str, float]:
    """CPU time in seconds and bytes in Redis that our submit takes for the whole list."""
    return _process("imagemill", redis_url, urls, client)


def _process(side: str, redis_url: str, urls: Path, client: Any) -> dict[str, float]:
    """Time and CPU time in seconds that a new process takes, and bytes that it adds to Redis."""
    before = client.info("memory")["used_memory"]
    command = [sys.executable, "-m", "bench.enqueue", side, redis_url, str(urls)]
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(urls.parent), "PYTHONPATH": path}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=urls.parent).stdout
    after = client.info("memory")["used_memory"]
    return {**json.loads(output), "bytes": after - before}


def _submit(redis_url: str, urls: str) -> dict[str, float]:
    """Our side; runs in its own process."""
    from imagemill.producer.client import Client
    from imagemill.producer.sources import read_sources
    from imagemill.shared.broker import Publisher  # noqa: F401  # imports Celery, as the other side does
    from imagemill.shared.messages import Job, Output
    from imagemill.shared.settings import load_settings

    start = time.perf_counter()
    with Client(load_settings(redis_url=redis_url)) as client:
        spec = Job(operation="stylize", output=Output(url="s3://results/sketches"))
        submission = client.submit(read_sources([urls], s3=client.s3), spec)
    assert submission.total == IMAGES
    used = os.times()
    return {"cpu": used.user + used.system, "seconds": time.perf_counter() - start}


def _apply_async(redis_url: str, urls: str) -> dict[str, float]:
    """Plain Celery, one message per image, as in its introduction; runs in its own process."""
    from celery import Celery

    app = Celery("plain", broker=redis_url, set_as_current=False)
    task = app.task(name="plain.stylize", ignore_result=True)(_nothing)
    lines = Path(urls).read_text().splitlines()[:PLAIN_IMAGES]
    start = time.perf_counter()
    for url in lines:
        task.apply_async(args=[url], kwargs={"output": "s3://results/sketches"})
    used = os.times()
    return {"cpu": used.user + used.system, "seconds": time.perf_counter() - start}


def _nothing(url: str, output: str) -> None:
    """Never runs; only its messages matter."""


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["imagemill"]:
        print(json.dumps(_submit(*arguments[1:])))
    elif arguments[:1] == ["plain"]:
        print(json.dumps(_apply_async(*arguments[1:])))
    else:
        print_figures(run)


if __name__ == "__main__":
    _main(sys.argv[1:])
