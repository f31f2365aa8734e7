"""`imagemill demo`: every operation on one machine, with everything it needs started and stopped."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from pydantic import SecretStr
from rich import box
from rich.console import Console
from rich.table import Column, Table

from imagemill.producer import terminal
from imagemill.producer.client import Client
from imagemill.producer.demo_photos import gather
from imagemill.producer.demo_processes import MODEL, ModelPull, WorkerProcess, weights_variables
from imagemill.producer.demo_site import Site
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.producer.interrupts import Interrupts
from imagemill.producer.outliers import outliers
from imagemill.producer.report import Comparison, JobPage, Picture, render
from imagemill.producer.sources import read_sources
from imagemill.producer.spec import job_spec
from imagemill.shared.errors import ConfigurationError, ImagemillError, MissingExtra, UsageError
from imagemill.shared.messages import Job, JobStatus, Row
from imagemill.shared.settings import Settings, WeightsSettings, load_settings

MARK = ".imagemill-demo"
"""Marks a folder that belongs to the demo and may be wiped."""
OWN_NAMES = ("photos", "lists", "results", "redis", "model.log", "worker.log", "report.html")
Engine = Literal["auto", "opencv", "rembg"]


@dataclass(frozen=True)
class Plan:
    """A job to submit; `use` names its list, see imagemill.producer.demo_photos.USES."""

    use: str
    operation: str
    engine: str
    options: Mapping[str, str] = field(default_factory=dict)


PLANS = (  # in the report's order: the most impressive first
    Plan("rembg", "remove-background", "rembg", {"model": MODEL}),
    Plan("opencv", "remove-background", "opencv"),
    Plan("inpaint", "inpaint", "opencv", {"mask_feather": "2"}),
    Plan("stylize", "stylize", "opencv", {"style": "stylization"}),
)


@dataclass
class Run:
    """One submitted job."""

    job: str
    plan: Plan
    spec: Job
    status: JobStatus
    rows: list[Row]


@dataclass(frozen=True)
class Options:
    """What the demo is asked for; `images` is a folder of the user's, `count` the photos per job."""

    images: Path | None = None
    count: int | None = None
    keep: bool = False
    engine: Engine = "auto"
    offline: bool = False


def run(out: Path, options: Options, console: Console) -> int:
    """Run the demo in the folder `out`. Exit status 0 if exactly the deliberately bad URLs failed.

    Everything it started has stopped when it returns, also after Ctrl-C (then 130), SIGTERM or an error.
    """
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        folder = stack.enter_context(_own_folder(out))
        try:
            return _run(stack, interrupts, folder, options, console)
        except KeyboardInterrupt:
            terminal.say(console, "stopping everything the demo started")
            return 130


def _run(stack: ExitStack, interrupts: Interrupts, folder: Path, options: Options, console: Console) -> int:
    material = gather(folder, options.images, options.count)
    engines, variables = _engines(interrupts, folder, options, console)
    terminal.say(console, "starting a Redis, a worker with two children and a photo server on this machine")
    with interrupts.held():
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
    runs = _submit_all(client, folder, site, engines, options.count)
    _watch_all(client, runs, worker, console)
    for each in runs:
        each.rows = list(client.results(each.job))
    page = folder / "report.html"
    lead = f"Each job's list also has {len(site.bad)} deliberately bad URLs: each of them fails with its own error code."
    html = render(_pages(runs), picture=_relative(folder, site), title="imagemill demo", lead=lead)
    page.write_text(html, encoding="utf-8")
    code = _summarize(runs, site, page, console)
    if options.keep:
        _keep(redis.url, worker, console)
    return code


def _engines(interrupts: Interrupts, folder: Path, options: Options, console: Console) -> tuple[Sequence[str], dict[str, str]]:
    """The engines to cut out with, and the variables that point a worker to their weights.

    Raises ConfigurationError, or MissingExtra, if the model is required and can't be had.
    """
    if options.engine == "opencv":
        return ["opencv"], {}
    try:
        weights = load_settings().weights
        _get_model(interrupts, folder, weights, options, console)
    except ImagemillError as error:
        if options.engine == "rembg":
            raise ConfigurationError(f"the engine rembg needs the model {MODEL}: {error.message}") from error
        terminal.say(console, f"cutting out with opencv only, without the model {MODEL}: {error.message}", "yellow")
        return ["opencv"], {}
    return ["rembg"] if options.engine == "rembg" else ["rembg", "opencv"], weights_variables(weights)


def _get_model(interrupts: Interrupts, folder: Path, weights: WeightsSettings, options: Options, console: Console) -> None:
    if find_spec("onnxruntime") is None:
        raise MissingExtra("onnxruntime is not installed: pip install 'imagemill[demo]'")
    if not options.offline:
        terminal.say(console, f"checking for the model {MODEL} (4.6 MB), and downloading it if it is missing")
    with ExitStack() as stack:
        with interrupts.held():
            pull = stack.enter_context(ModelPull(folder, weights, offline=options.offline))
        reason = pull.wait()
    if reason is not None:
        raise ConfigurationError(f"{reason}; `imagemill models pull {MODEL}` downloads it")


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


def _submit_all(client: Client, folder: Path, site: Site, engines: Sequence[str], count: int | None) -> list[Run]:
    (folder / "results").mkdir()
    lists = site.lists(count)
    runs = []
    for plan in PLANS:
        if plan.operation == "remove-background" and plan.engine not in engines:
            continue
        output: dict[str, object] = {"url": (folder / "results" / plan.use).as_uri(), "key": "{index:06d}-{name}"}
        spec = job_spec(plan.operation, plan.engine, dict(plan.options), output, {"attempts": 2})
        submission = client.submit(read_sources([str(lists[plan.use])], s3=client.s3), spec)
        runs.append(Run(submission.job, plan, spec, client.status(submission.job), []))
    return runs


def _watch_all(client: Client, runs: list[Run], worker: WorkerProcess, console: Console) -> None:
    """Show the progress of all jobs until the last one has finished."""
    with terminal.Board(console) as board:
        while True:
            for each in runs:
                each.status = client.status(each.job)
                board.show(each.status)
            if all(each.status.over for each in runs):
                return
            worker.check(console, wait=0.2)


def _pages(runs: list[Run]) -> list[JobPage]:
    """The jobs in the report's order; the model's cut-outs have opencv's beside them."""
    pages = []
    cut_outs = {each.plan.use: each for each in runs}
    for each in runs:
        other = cut_outs.get("opencv") if each.plan.use == "rembg" else None
        outputs = {row.source: row.output for row in other.rows if row.output} if other else {}
        comparison = Comparison("opencv", outputs) if outputs else None
        pages.append(JobPage(each.status, each.spec, each.rows, outliers(each.rows), comparison))
    return pages


def _relative(folder: Path, site: Site) -> Picture:
    """Map the demo's URLs to paths relative to the report, which then works without the server."""

    def picture(url: str) -> str | None:
        if url.startswith(site.base):
            return url.removeprefix(site.base).partition("?")[0]
        path = Path(unquote(urlsplit(url).path))
        return quote(path.relative_to(folder).as_posix()) if path.is_relative_to(folder) else None

    return picture


def _summarize(runs: list[Run], site: Site, page: Path, console: Console) -> int:
    """Print the results; 0 if exactly the bad URLs failed."""
    out = terminal.make_console(stderr=False)
    failures: dict[tuple[str, str, str], int] = {}
    surprises = []
    for each in runs:
        for row in each.rows:
            if row.state == "failed":
                key = (row.source.removeprefix(site.base), row.code or "", row.message or "")
                failures[key] = failures.get(key, 0) + 1
            if (row.state == "done") == (row.source in site.bad):
                surprises.append(f"{each.plan.operation} ({each.plan.engine}): {row.source} is {row.state}")
    table = Table(
        Column("failed", overflow="fold"),
        "code",
        Column("reason", overflow="fold"),
        Column("jobs", justify="right"),
        box=box.SIMPLE_HEAD,
    )
    for (source, code, reason), count in failures.items():
        table.add_row(terminal.plain(source), code, terminal.plain(reason), str(count))
    out.print(table)
    out.print(terminal.summary_table(each.status for each in runs))
    terminal.say(out, f"before and after: {page}")
    for surprise in surprises:
        terminal.say(console, f"unexpected: {surprise}", "red")
    if not surprises:
        terminal.say(console, f"as expected, every photo is done and only the {len(site.bad)} bad URLs in each job failed")
    return 1 if surprises else 0


def _keep(redis_url: str, worker: WorkerProcess, console: Console) -> None:
    """Leave everything running until Ctrl-C."""
    terminal.say(console, "everything keeps running until Ctrl-C; in another terminal, try:")
    terminal.say(console, f"  export IMAGEMILL_REDIS_URL={redis_url}")
    terminal.say(console, "  imagemill jobs")
    try:
        while True:
            worker.check(console, wait=1.0)
    except KeyboardInterrupt:
        terminal.say(console, "stopping everything the demo started")
