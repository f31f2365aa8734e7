"""`imagemill demo`: the main job on one machine, with everything that it needs started and stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn
from urllib.parse import quote, unquote, urlsplit

from pydantic import SecretStr
from rich import box
from rich.console import Console
from rich.table import Column, Table

from imagemill.producer import terminal as show
from imagemill.producer.client import Client
from imagemill.producer.demo_site import Site, gather
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.outliers import outliers
from imagemill.producer.report import JobPage, Picture, render
from imagemill.producer.sources import read_sources
from imagemill.producer.spec import job_spec
from imagemill.shared.errors import ImagemillError, UsageError
from imagemill.shared.messages import Job, JobStatus, Row
from imagemill.shared.settings import Settings

MARK = ".imagemill-demo"
"""Says that a folder is a demo's own and may be wiped."""
OWN_NAMES = ("photos", "lists", "results", "redis", "worker.log", "report.html")
CHILDREN = 2
READY_SECONDS = 120.0
STOP_SECONDS = 20.0
OPTIONS: dict[str, dict[str, str]] = {
    "remove-background": {},
    "inpaint": {"mask_feather": "2"},
    "stylize": {"style": "stylization"},
}


@dataclass
class Run:
    """One job of the demo."""

    job: str
    spec: Job
    status: JobStatus
    rows: list[Row]


def run(out: Path, *, images: Path | None, count: int | None, keep: bool, console: Console) -> int:
    """Run the demo in the folder `out`; its exit status: 0 if exactly the deliberately bad addresses failed.

    Everything it started has ended when it returns, also after Ctrl-C (then 130), TERM or an error.
    """
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        folder = stack.enter_context(_own_folder(out))
        try:
            return _run(stack, interrupts, folder, images, count, keep, console)
        except KeyboardInterrupt:
            show.say(console, "stopping what the demo started")
            return 130


def _run(
    stack: ExitStack, interrupts: Interrupts, folder: Path, images: Path | None, count: int | None, keep: bool, console: Console
) -> int:
    show.say(console, "starting a Redis, a worker with two children and a server of photos on this machine")
    with interrupts.held():
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        environment = {"IMAGEMILL_REDIS_URL": redis.url, "IMAGEMILL_FILES__WRITE_ROOTS": json.dumps([str(folder)])}
        site = stack.enter_context(Site(gather(folder, images, count)))
        environment["IMAGEMILL_FETCH__ALLOW_HOSTS"] = json.dumps([site.host])
        worker = stack.enter_context(WorkerProcess(folder, environment))
    # Built without reading the environment: the user's own Redis has no part in the demo.
    client = stack.enter_context(Client(Settings.model_construct(redis_url=SecretStr(redis.url))))
    worker.wait_until_ready(client, console)
    runs = _submit_all(client, folder, site, count)
    _watch_all(client, runs, worker, console)
    for each in runs:
        each.rows = list(client.results(each.job))
    page = folder / "report.html"
    pages = [JobPage(each.status, each.spec, each.rows, outliers(each.rows)) for each in runs]
    page.write_text(render(pages, picture=_relative(folder, site), title="imagemill demo"), encoding="utf-8")
    code = _summarize(runs, site, page, console)
    if keep:
        _keep(environment, worker, console)
    return code


class Interrupts:
    """Inside, the first Ctrl-C or TERM raises; those that follow while things are being stopped are ignored."""

    def __init__(self) -> None:
        self._holding = False
        self._held: int | None = None

    def __enter__(self) -> Interrupts:
        self._before = {which: signal.signal(which, self._handle) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What comes meanwhile raises at the end: a process that was started and not yet noted down would stay behind."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._held is not None:
            self._raise(self._held)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._holding:
            self._held = number
        else:
            self._raise(number)

    def _raise(self, number: int) -> NoReturn:
        for which in self._before:
            signal.signal(which, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


@contextmanager
def _own_folder(out: Path) -> Iterator[Path]:
    """The demo's folder, wiped of an earlier demo, and locked. Raises UsageError for a folder with other things in it."""
    folder = out.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / MARK).exists():
            raise UsageError(f"{out} is not empty and no demo's folder: name another one with --out")
        mark = (folder / MARK).open("w")
    except OSError as error:
        raise UsageError(f"{out} can't be used as the demo's folder: {error.strerror}") from error
    with mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another demo is running in {out}") from error
        for name in OWN_NAMES:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        yield folder


class WorkerProcess:
    """`imagemill worker` in a session of its own, so that Ctrl-C reaches it only through us."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self._log = folder / "worker.log"
        self._folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("IMAGEMILL_")}
        self._environment = {**kept, **settings}

    def __enter__(self) -> WorkerProcess:
        command = [sys.executable, "-m", "imagemill.producer.cli", "worker", "--cpu", "--concurrency", str(CHILDREN)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own program, no shell
                command,
                cwd=self._folder,  # where no .env of the user's lies
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(self, *exc: object) -> None:
        """Ask it to stop, with its children; insist after twenty seconds."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except BaseException as error:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise

    def wait_until_ready(self, client: Client, console: Console) -> None:
        """Returns when the node reports that all its children are loaded. Raises ImagemillError if that does not happen."""
        deadline = time.monotonic() + READY_SECONDS
        while not any(node.ready for node in client.nodes()):
            self.check(console, wait=0.1)
            if time.monotonic() > deadline:
                self._show_log(console)
                raise ImagemillError(f"the worker was not ready after {READY_SECONDS:.0f} s; its log is {self._log}")

    def check(self, console: Console, *, wait: float) -> None:
        """Returns after `wait` seconds; raises ImagemillError at once if the process ends."""
        try:
            status = self._process.wait(wait)
        except subprocess.TimeoutExpired:
            return
        self._show_log(console)
        raise ImagemillError(f"the worker ended with status {status}; its log is {self._log}")

    def _show_log(self, console: Console) -> None:
        for line in self._log.read_text(errors="replace").splitlines()[-20:]:
            show.say(console, f"  {line}", "dim")


def _submit_all(client: Client, folder: Path, site: Site, count: int | None) -> list[Run]:
    (folder / "results").mkdir()
    runs = []
    for operation, path in site.lists(count).items():
        output = {"url": (folder / "results" / operation).as_uri(), "key": "{index:06d}-{name}"}
        spec = job_spec(operation, "opencv", OPTIONS[operation], dict(output), {"attempts": 2})
        submission = client.submit(read_sources([str(path)], s3=client.s3), spec)
        runs.append(Run(submission.job, spec, client.status(submission.job), []))
    return runs


def _watch_all(client: Client, runs: list[Run], worker: WorkerProcess, console: Console) -> None:
    """All jobs on one board, until the last is over."""
    with show.Board(console) as board:
        while True:
            for each in runs:
                each.status = client.status(each.job)
                board.show(each.status)
            if all(each.status.over for each in runs):
                return
            worker.check(console, wait=0.2)


def _relative(folder: Path, site: Site) -> Picture:
    """What maps addresses of the demo to paths beside the page, so that it works when the server is gone."""

    def picture(url: str) -> str | None:
        if url.startswith(site.base):
            return url.removeprefix(site.base).partition("?")[0]
        path = Path(unquote(urlsplit(url).path))
        return quote(path.relative_to(folder).as_posix()) if path.is_relative_to(folder) else None

    return picture


def _summarize(runs: list[Run], site: Site, page: Path, console: Console) -> int:
    """Print what came out; 0 if exactly the bad addresses failed."""
    out = show.make_console(stderr=False)
    failures: dict[tuple[str, str, str], int] = {}
    surprises = []
    for each in runs:
        for row in each.rows:
            if row.state == "failed":
                key = (row.source.removeprefix(site.base), row.code or "", row.message or "")
                failures[key] = failures.get(key, 0) + 1
            if (row.state == "done") == (row.source in site.bad):
                surprises.append(f"{each.spec.operation}: {row.source} is {row.state}")
    table = Table(
        Column("failed", overflow="fold"),
        "code",
        Column("why", overflow="fold"),
        Column("jobs", justify="right"),
        box=box.SIMPLE_HEAD,
    )
    for (source, code, why), count in failures.items():
        table.add_row(show.plain(source), code, show.plain(why), str(count))
    out.print(table)
    out.print(show.summary_table(each.status for each in runs))
    show.say(out, f"before and after: {page}")
    for surprise in surprises:
        show.say(console, f"unexpected: {surprise}", "red")
    if not surprises:
        show.say(console, f"as it should be: every photo is done, and only the {len(site.bad)} bad addresses per job failed")
    return 1 if surprises else 0


def _keep(environment: dict[str, str], worker: WorkerProcess, console: Console) -> None:
    """Leave everything running until Ctrl-C."""
    show.say(console, "still running, until Ctrl-C; in another terminal:")
    show.say(console, f"  export IMAGEMILL_REDIS_URL={environment['IMAGEMILL_REDIS_URL']}")
    show.say(console, "  imagemill jobs")
    try:
        while True:
            worker.check(console, wait=1.0)
    except KeyboardInterrupt:
        show.say(console, "stopping what the demo started")
