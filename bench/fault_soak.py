"""What only shows in memory: a node whose child runs out of it, and one that works for long."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from PIL import Image

from bench.fault_run import FaultRun, Row
from imagemill.shared.ledger.scripts import key
from tests.workers import WorkerProcess

CGROUPS = Path("/sys/fs/cgroup/memory")
LIMIT = 640 << 20
"""Bytes that all processes of a node may take together: more than they need, and less than the image does."""
SHARE = 0.05
"""How much more may be used at the end than after a tenth of the images."""
SAMPLE_SECONDS = 0.5
FEW = {"files": 4, "threads": 4, "sockets": 4}
"""Changes that are no leak, since connections and threads are made when they are first needed."""


# --- out of memory ----------------------------------------------------------------------------------------------------


def out_of_memory(run: FaultRun) -> str:
    """An image takes more memory than there is: the kernel kills the child that works on it."""
    white = io.BytesIO()
    Image.new("RGB", (40, 40), "white").save(white, "PNG")
    url = run.images.url("/white.png")
    run.pictures[url] = run.images.routes["/white.png"] = white.getvalue()
    node = run.node("node", fake="Greedy", concurrency=2)
    with limited(node) as group:
        urls = [run.images.url(f"/{number}.png") for number in run.numbers(run.count(200, 40))]
        job = run.submit_urls([*urls[:20], url, *urls[20:]])
        run.wait(job, 300)
        kills = killed(group)
        counts = run.check(job, failed=1, again=None)
    (row,) = (row for row in run.client.results(job) if row.state == "failed")
    assert (row.source, row.code) == (url, "worker_lost"), row
    assert row.attempts <= 3, row
    assert node.process.poll() is None, "the node has ended"
    by = f"the kernel, {kills} times" if group else "itself, as no memory limit could be set"
    return f"{counts}; killed by {by}; {row.attempts} attempts"


@contextmanager
def limited(node: WorkerProcess) -> Iterator[Path | None]:
    """Put a node into a control group with little memory; yields its folder, or None where that is not possible."""
    group = CGROUPS / f"imagemill-faults-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        for pid in (node.process.pid, *node.children()):
            (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):
                (CGROUPS / "cgroup.procs").write_text(pid)
        group.rmdir()


def killed(group: Path | None) -> int:
    """How many processes of a control group the kernel has killed."""
    if group is None:
        return 0
    lines = dict(line.split() for line in (group / "memory.oom_control").read_text().splitlines())
    kills = int(lines["oom_kill"])
    assert kills, "the kernel has killed nothing"
    return kills


# --- soak -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Used:
    """What a node uses, with its children, and what Redis does apart from the job."""

    done: int
    rss: float
    files: float
    threads: float
    sockets: float
    redis: float
    job: float
    """Redis' memory that the job itself takes."""


def soak(run: FaultRun) -> str:
    """Many small images go through one node."""
    count = run.count(20_000, 2000)
    node = run.node("node", concurrency=2)
    job = run.submit(count)
    samples: list[Used] = []
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, node, job, samples, over), daemon=True)
    watcher.start()
    run.wait(job, count / 2)
    over.set()
    watcher.join()
    counts = run.check(job)
    half = count * 0.05
    early = [used for used in samples if abs(used.done - count * 0.1) <= half]
    late = [used for used in samples if count - 2 * half <= used.done < count]
    assert early, f"too fast to measure: {[used.done for used in samples]}"
    assert late, f"too fast to measure: {[used.done for used in samples]}"
    told, wrong = [], []
    for name, unit in (("rss", "MiB"), ("files", ""), ("threads", ""), ("sockets", ""), ("redis", "MiB")):
        before, after = (median(getattr(used, name) for used in part) for part in (early, late))
        scale = 2**20 if unit else 1
        told.append(f"{name} {before / scale:.4g} -> {after / scale:.4g} {unit}".strip())
        if after > before * (1 + SHARE) and after - before > FEW.get(name, 0):
            wrong.append(f"{name} grew by {100 * (after / before - 1):.1f} %")
    told.append(f"Redis without the job's own {samples[-1].job / samples[-1].done:.0f} bytes per result")
    assert not wrong, f"{'; '.join(wrong)} ({', '.join(told)})"
    return f"{counts}; {', '.join(told)}"


def _watch(run: FaultRun, node: WorkerProcess, job: str, samples: list[Used], over: threading.Event) -> None:
    """Measure now and then."""
    with run.client_of(run.redis.port) as raw:
        while not over.wait(SAMPLE_SECONDS):
            with suppress(psutil.Error):
                done = raw.hlen(key(job, "results"))
                its = sum(raw.memory_usage(name, samples=0) or 0 for name in raw.scan_iter(f"{key(job)}*"))
                memory = raw.info("memory")
                samples.append(_measure(node, done, memory["used_memory"] - memory["mem_clients_normal"] - its, its))


def _measure(node: WorkerProcess, done: int, redis: float, its: float) -> Used:
    parent = psutil.Process(node.process.pid)
    family = [parent, *parent.children(recursive=True)]
    rss = sum(one.memory_info().rss for one in family)
    files, threads = sum(one.num_fds() for one in family), sum(one.num_threads() for one in family)
    sockets = sum(len(one.net_connections()) for one in family)
    return Used(done, rss, files, threads, sockets, redis, its)


ROWS = [
    Row("out-of-memory", "the neighbours are done; 3 attempts at most", out_of_memory),
    Row("soak", f"RSS, files, threads, sockets and Redis' memory at the end within {SHARE:.0%} of those at 10 %", soak),
]
