"""`imagemill demo`: every operation on one machine, with everything it needs started and stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from pydantic import SecretStr
from rich import box
from rich.console import Console
from rich.table import Column, Table

from imagemill.producer.client import Client
from imagemill.producer.demo_photos import gather
from imagemill.producer.demo_processes import MODEL, ModelPull, WorkerProcess, interruptible, uninterrupted, weights_variables
from imagemill.producer.demo_site import Site
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.following import Board
from imagemill.producer.outliers import outliers
from imagemill.producer.report import JobPage, render
from imagemill.producer.sources import read_sources
from imagemill.producer.spec import job_spec
from imagemill.producer.terminal import make_console, plain, say, summary_table
from imagemill.shared.errors import ConfigurationError, ImagemillError, MissingExtra, UsageError
from imagemill.shared.settings import Settings, load_settings
from imagemill.shared.urls import path_of

MARK = ".imagemill-demo"
"""Marks a folder that belongs to the demo and may be wiped."""
OWN_NAMES = ("photos", "lists", "results", "redis", "model.log", "worker.log", "report.html")

PLANS: dict[str, tuple[str, str, dict[str, str]]] = {
    "rembg": ("remove-background", "rembg", {"model": MODEL}),
    "opencv": ("remove-background", "opencv", {}),
    "inpaint": ("inpaint", "opencv", {"mask_feather": "2"}),
    "stylize": ("stylize", "opencv", {"style": "stylization"}),
}
"""Operation, engine and options of the job for each use (imagemill.producer.demo_photos.USES), most impressive first."""


@dataclass(frozen=True)
class Options:
    """What the demo is asked for; `images` is a folder of the user's, `count` the photos per job."""

    images: Path | None = None
    count: int | None = None
    keep: bool = False
    engine: Literal["auto", "opencv", "rembg"] = "auto"
    offline: bool = False


def run(out: Path, options: Options, console: Console) -> int:
    """Run the demo in the folder `out`. Exit status 0 if exactly the deliberately bad URLs failed.

    Everything it started has stopped when it returns, also after Ctrl-C (then 130), SIGTERM or an error.
    """
    with interruptible(), _own_folder(out) as folder, ExitStack() as stack:
        try:
            return _run(stack, folder, options, console)
        except KeyboardInterrupt:
            say(console, "stopping everything the demo started")
            return 130


def _run(stack: ExitStack, folder: Path, options: Options, console: Console) -> int:
    material = gather(folder, options.images, options.count)
    engines, variables = _engines(folder, options, console)
    say(console, "starting a Redis, a worker with two children and a photo server on this machine")
    with uninterrupted():
        redis = stack.enter_context(EmbeddedRedis(folder / "redis"))
        site = stack.enter_context(Site(material))
        variables |= {
            "IMAGEMILL_REDIS_URL": redis.url,
            "IMAGEMILL_FILES__WRITE_ROOTS": json.dumps([str(folder)]),
            "IMAGEMILL_FETCH__ALLOW_HOSTS": json.dumps([site.host]),
            "IMAGEMILL_WORKER__ENGINES": json.dumps(sorted({"opencv", *engines})),
        }
        worker = stack.enter_context(WorkerProcess(folder, variables))
    # Built without reading the environment: the demo must not use the user's Redis.
    client = stack.enter_context(Client(Settings.model_construct(redis_url=SecretStr(redis.url))))
    worker.wait_until_ready(client, console)
    jobs = _submit_all(client, folder, site, engines, options.count)
    _watch_all(client, jobs.values(), worker, console)
    pages = _pages(client, jobs)
    path = folder / "report.html"
    lead = f"Each job's list also has {len(site.bad)} deliberately bad URLs: each of them fails with its own error code."
    html = render(pages, picture=lambda url: _relative(url, folder, site), title="imagemill demo", lead=lead)
    path.write_text(html, encoding="utf-8")
    code = _summarize(pages, site, path, console)
    if options.keep:
        say(console, "everything keeps running until Ctrl-C; in another terminal, try:")
        say(console, f"  export IMAGEMILL_REDIS_URL={redis.url}")
        say(console, "  imagemill jobs")
        with suppress(KeyboardInterrupt):
            while True:
                worker.check(console, wait=1.0)
        say(console, "stopping everything the demo started")
    return code


def _engines(folder: Path, options: Options, console: Console) -> tuple[Sequence[str], dict[str, str]]:
    """The engines to cut out with, and the variables that point a worker to their weights.

    Raises ConfigurationError if the model is required and can't be had.
    """
    if options.engine == "opencv":
        return ["opencv"], {}
    try:
        variables = _get_model(folder, options, console)
    except ImagemillError as error:
        if options.engine == "rembg":
            raise ConfigurationError(f"the engine rembg needs the model {MODEL}: {error.message}") from error
        say(console, f"cutting out with opencv only, without the model {MODEL}: {error.message}", "yellow")
        return ["opencv"], {}
    return ["rembg"] if options.engine == "rembg" else ["rembg", "opencv"], variables


def _get_model(folder: Path, options: Options, console: Console) -> dict[str, str]:
    weights = load_settings().weights
    if find_spec("onnxruntime") is None:
        raise MissingExtra("onnxruntime is not installed: pip install 'imagemill[demo]'")
    if not options.offline:
        say(console, f"checking for the model {MODEL} (4.6 MB), and downloading it if it is missing")
    with ExitStack() as stack:
        with uninterrupted():
            pull = stack.enter_context(ModelPull(folder, weights, offline=options.offline))
        if reason := pull.wait():
            raise ConfigurationError(f"{reason}; `imagemill models pull {MODEL}` downloads it")
    return weights_variables(weights)


@contextmanager
def _own_folder(out: Path) -> Iterator[Path]:
    """The demo's folder, locked, with the previous demo's files removed. Raises UsageError if it contains other files."""
    folder = out.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / MARK).exists():
            raise UsageError(f"{out} is not empty and does not belong to the demo: choose another folder with --out")
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


def _submit_all(client: Client, folder: Path, site: Site, engines: Sequence[str], count: int | None) -> dict[str, str]:
    """The jobs' ids by use."""
    (folder / "results").mkdir()
    lists = site.lists(count)
    jobs = {}
    for use, (operation, engine, options) in PLANS.items():
        if operation != "remove-background" or engine in engines:
            output = {"url": (folder / "results" / use).as_uri(), "key": "{index:06d}-{name}"}
            spec = job_spec(operation, engine, options, output, {"attempts": 2})
            jobs[use] = client.submit(read_sources([str(lists[use])], s3=client.s3), spec).job
    return jobs


def _watch_all(client: Client, jobs: Collection[str], worker: WorkerProcess, console: Console) -> None:
    """Show the progress of all jobs until the last one has finished."""
    with Board(console) as board:
        while True:
            statuses = [client.status(job) for job in jobs]
            for status in statuses:
                board.show(status)
            if all(status.over for status in statuses):
                return
            worker.check(console, wait=0.2)


def _pages(client: Client, jobs: Mapping[str, str]) -> list[JobPage]:
    """The jobs in the report's order; the model's cut-outs are shown next to opencv's."""
    rows = {use: list(client.results(job)) for use, job in jobs.items()}
    opencvs = {row.source: row.output for row in rows.get("opencv", ()) if row.output}
    pages = []
    for use, job in jobs.items():
        others = opencvs if use == "rembg" else {}
        pages.append(JobPage(client.status(job), client.spec(job), rows[use], outliers(rows[use]), "opencv", others))
    return pages


def _relative(url: str, folder: Path, site: Site) -> str | None:
    """One of the demo's URLs as a path relative to the report, which then works without the server."""
    if url.startswith(site.base):
        return url.removeprefix(site.base).partition("?")[0]
    path = path_of(url)
    return quote(os.fsencode(path.relative_to(folder))) if path.is_relative_to(folder) else None


def _summarize(pages: Sequence[JobPage], site: Site, report: Path, console: Console) -> int:
    """Print the results; 0 if exactly the bad URLs failed."""
    out = make_console(stderr=False)
    failures = Counter[tuple[str, str, str]]()
    surprises = []
    for page in pages:
        for row in page.rows:
            if row.state == "failed":
                failures[row.source.removeprefix(site.base), row.code or "", row.message or ""] += 1
            if (row.state == "done") == (row.source in site.bad):
                surprises.append(f"{page.status.operation} ({page.status.engine}): {row.source} is {row.state}")
    source, reason = Column("failed", overflow="fold"), Column("reason", overflow="fold")
    table = Table(source, "code", reason, Column("jobs", justify="right"), box=box.SIMPLE_HEAD)
    for (url, code, message), count in failures.items():
        table.add_row(plain(url), code, plain(message), str(count))
    out.print(table)
    out.print(summary_table(page.status for page in pages))
    say(out, f"before and after: {report}")
    for surprise in surprises:
        say(console, f"unexpected: {surprise}", "red")
    if not surprises:
        say(console, f"as expected, every photo is done and only the {len(site.bad)} bad URLs in each job failed")
    return 1 if surprises else 0
