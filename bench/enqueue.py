"""What it costs to put 50,000 addresses on the queue, beside one plain Celery message per image.

    python bench/enqueue.py [ROUNDS]

Each round starts a fresh process for either side, one after the other, on a Redis of its own that is
emptied in between. CPU seconds are of the whole process: start, imports, reading the list, ledger,
publishing. Images per second are counted from after the imports on both sides; the plain side is given its list for free.
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
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 50_000
PLAIN_IMAGES = 3_000
"""One message per image costs the same each, so fewer of them tell as much."""
ADDRESS_LENGTH = 120


def run(rounds: int = 5) -> list[dict[str, Any]]:
    """Measure `rounds` times; per figure its name, the median, goal, unit, whether the goal holds, and how many rounds."""
    with tempfile.TemporaryDirectory() as folder:
        addresses = Path(folder, "addresses.txt")
        addresses.write_text("\n".join(_addresses()))
        found = [_round(Path(folder, f"redis-{n}"), addresses) for n in range(rounds)]
    at_most = [
        ("enqueue 50,000 images: CPU of the whole process", 4.0, "s", "cpu"),
        ("enqueue: Redis per image, ledger included", 150.0, "bytes", "bytes"),
    ]
    at_least = [
        ("enqueue: images/s, times those of one apply_async per image", 25.0, "x", "speed_ratio"),
        ("enqueue: one apply_async per image takes so many times our Redis", 12.0, "x", "bytes_ratio"),
    ]
    figures = []
    for name, goal, unit, key in at_most + at_least:
        value = float(f"{median(one[key] for one in found):.4g}")
        holds = value <= goal if (name, goal, unit, key) in at_most else value >= goal
        figures.append({"name": name, "value": value, "goal": goal, "unit": unit, "holds": holds, "rounds": rounds})
    return figures


def _addresses() -> list[str]:
    """Addresses as a shop has them: a common beginning, then a path that hardly compresses."""
    source = random.Random(20260730)
    alphabet = string.ascii_lowercase + string.digits
    head, tail = "https://cdn.example.com/photos/2026/07/", ".jpg"
    middle = ADDRESS_LENGTH - len(head) - len(tail)
    return [f"{head}{''.join(source.choices(alphabet, k=middle))}{tail}" for _ in range(IMAGES)]


def _round(folder: Path, addresses: Path) -> dict[str, float]:
    import redis

    from imagemill.producer.embedded_redis import EmbeddedRedis

    with EmbeddedRedis(folder) as server, redis.Redis.from_url(server.url) as client:
        ours = _process("imagemill", server.url, addresses, client)
        queued = client.llen("imagemill.stylize.opencv") * 32
        assert IMAGES <= queued < IMAGES + 32, queued
        client.flushall()
        plain = _process("plain", server.url, addresses, client)
        assert client.llen("celery") == PLAIN_IMAGES
    return {
        "cpu": ours["cpu"],
        "bytes": ours["bytes"] / IMAGES,
        "speed_ratio": (IMAGES / ours["seconds"]) / (PLAIN_IMAGES / plain["seconds"]),
        "bytes_ratio": (plain["bytes"] / PLAIN_IMAGES) / (ours["bytes"] / IMAGES),
    }


def _process(side: str, url: str, addresses: Path, client: Any) -> dict[str, float]:
    """Seconds, CPU seconds and bytes of Redis that a fresh process takes."""
    before = client.info("memory")["used_memory"]
    command = [sys.executable, __file__, side, url, str(addresses)]
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(addresses.parent), "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=addresses.parent).stdout
    after = client.info("memory")["used_memory"]
    return {**json.loads(said), "bytes": after - before}


def _submit(url: str, addresses: str) -> dict[str, float]:
    """Our side, in its own process."""
    from imagemill.producer.client import Client
    from imagemill.producer.sources import read_sources
    from imagemill.shared.broker import Publisher  # noqa: F401  # brings Celery along, as on the other side
    from imagemill.shared.messages import Job, Output
    from imagemill.shared.settings import load_settings

    start = time.perf_counter()
    with Client(load_settings(redis_url=url)) as client:
        spec = Job(operation="stylize", output=Output(url="s3://results/sketches"))
        submission = client.submit(read_sources([addresses], s3=client.s3), spec)
    assert submission.total == IMAGES
    used = os.times()
    return {"cpu": used.user + used.system, "seconds": time.perf_counter() - start}


def _apply_async(url: str, addresses: str) -> dict[str, float]:
    """Celery as its first page shows it, in its own process: one message per image."""
    from celery import Celery

    app = Celery("plain", broker=url, set_as_current=False)
    task = app.task(name="plain.stylize", ignore_result=True)(_nothing)
    lines = Path(addresses).read_text().splitlines()[:PLAIN_IMAGES]
    start = time.perf_counter()
    for address in lines:
        task.apply_async(args=[address], kwargs={"output": "s3://results/sketches"})
    used = os.times()
    return {"cpu": used.user + used.system, "seconds": time.perf_counter() - start}


def _nothing(address: str, output: str) -> None:
    """Never run: only its messages are counted."""


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["imagemill"]:
        print(json.dumps(_submit(*arguments[1:])))
    elif arguments[:1] == ["plain"]:
        print(json.dumps(_apply_async(*arguments[1:])))
    else:
        for figure in run(*(int(argument) for argument in arguments[:1])):
            print(json.dumps(figure))


if __name__ == "__main__":
    _main(sys.argv[1:])
