"""Two versions of imagemill at one Redis: either may be upgraded first, and both may work on one job.

    python -m bench.upgrade --old REV [--images N]

REV is a git revision, whose code is run with this environment's packages. Every image must be done, right, and stored once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from bench.ending import end_on_sigterm
from imagemill.producer.embedded_redis import EmbeddedRedis
from tests.conftest import client_for, environment_for, photo
from tests.faults.jobs import check_complete
from tests.services.images import ImageServer
from tests.workers import ROOT, WorkerProcess, wait_until

WORKS = {"IMAGEMILL_TEST_SECONDS": "0.05", "IMAGEMILL_WORKER__OPERATIONS": '["stylize"]'}


class Upgrade:
    """A Redis, images, and two trees of code: `old` and `new`."""

    def __init__(self, old: Path, folder: Path, count: int) -> None:
        self.trees = {"old": old, "new": ROOT}
        self.folder, self.count = folder, count

    def __enter__(self) -> Upgrade:
        self._exit = ExitStack()
        self.redis = self._exit.enter_context(EmbeddedRedis(self.folder / "redis"))
        images = self._exit.enter_context(ImageServer({f"/{n}.png": photo(n) for n in range(self.count)}))
        self.list = self.folder / "urls.txt"
        self.list.write_text("".join(f"{images.url(f'/{n}.png')}\n" for n in range(self.count)))
        self.client = self._exit.enter_context(client_for(self.redis.url))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def environment(self, version: str) -> dict[str, str]:
        """Environment variables with which Python imports this version."""
        tree = self.trees[version]
        return environment_for(self.redis.url, self.folder, **WORKS) | {"PYTHONPATH": f"{tree / 'src'}:{tree}"}

    @contextmanager
    def node(self, version: str, name: str = "") -> Iterator[WorkerProcess]:
        """A node of this version."""
        node = WorkerProcess(self.environment(version), self.folder, name=name or version, fake="Invert")
        node.command = [part.replace(str(ROOT), str(self.trees[version])) for part in node.command]
        with node:
            yield node.wait_ready()

    def submit(self, version: str) -> str:
        """Submit the list with this version's command line; returns the job."""
        place = (self.folder / "out").as_uri()
        command = [sys.executable, "-m", "imagemill.producer.cli", "submit", str(self.list), "--operation", "stylize"]
        command += ["--output", place, "--name", f"by-{version}"]
        subprocess.run(command, env=self.environment(version), cwd=self.folder, check=True, capture_output=True, timeout=60)
        return f"by-{version}"

    def finish(self, job: str) -> str:
        """Wait, check everything, and tell which nodes did how many images."""
        check_complete(self.client, job, self.count, self.folder)
        done = [row.result.node for row in self.client.results(job) if row.result]
        return ", ".join(f"{done.count(node)} by {node}" for node in sorted(set(done)))


def one_node(producer: str, node: str) -> Callable[[Upgrade], str]:
    def run(at: Upgrade) -> str:
        with at.node(node):
            return at.finish(at.submit(producer))

    return run


def both(producer: str, dies: str) -> Callable[[Upgrade], str]:
    """Nodes of both versions share a job; one of them is killed, and the other inherits its work."""

    def run(at: Upgrade) -> str:
        with at.node("old") as old, at.node("new") as new:
            job = at.submit(producer)
            wait_until(lambda: at.client.status(job).done >= at.count // 3, "a third is done")
            (old if dies == "old" else new).kill()
            told = at.finish(job)
        assert "old" in told, told
        assert "new" in told, told
        return told

    return run


def replaced(first: str, then: str) -> Callable[[Upgrade], str]:
    """A node of one version is stopped in the middle of a job, and one of the other starts with its name."""

    def run(at: Upgrade) -> str:
        with at.node(first, "node"):
            job = at.submit(first)
            wait_until(lambda: at.client.status(job).done >= at.count // 3, "a third is done")
        assert not at.client.status(job).over, "the job is too small"
        with at.node(then, "node"):
            return at.finish(job)

    return run


CASES: dict[str, Callable[[Upgrade], str]] = {
    "old producer, new node": one_node("old", "new"),
    "new producer, old node": one_node("new", "old"),
    "old producer, both nodes, the old one dies": both("old", "old"),
    "new producer, both nodes, the new one dies": both("new", "new"),
    "upgrade in the middle of a job": replaced("old", "new"),
    "downgrade in the middle of a job": replaced("new", "old"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.upgrade", description="Run two versions at one Redis.")
    parser.add_argument("--old", metavar="REV", required=True, help="git revision of the other version")
    parser.add_argument("--images", type=int, default=200, help="images per job")
    arguments = parser.parse_args()
    end_on_sigterm()
    console, failed = Console(), False
    with tempfile.TemporaryDirectory(prefix="imagemill-upgrade-") as folder:
        old = Path(folder) / "old"
        old.mkdir()
        code = subprocess.run(["git", "-C", str(ROOT), "archive", arguments.old], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(old)], input=code, check=True)
        for number, (name, run) in enumerate(CASES.items()):
            try:
                with Upgrade(old, Path(folder) / str(number), arguments.images) as at:
                    told = run(at)
            except (AssertionError, subprocess.SubprocessError) as error:
                told, failed = f"[bold red]did NOT hold[/]: {error}", True
            console.print(f"{name}: {told}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
