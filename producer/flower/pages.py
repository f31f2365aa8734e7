"""Pages that differ from Flower's, and the report of a job."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import flower
from flower.views import BaseHandler
from flower.views.broker import BrokerView
from flower.views.monitor import Metrics
from flower.views.tasks import TaskView
from tornado.template import DictLoader
from tornado.web import HTTPError, authenticated

from imagemill.producer.client import Client
from imagemill.producer.outliers import outliers
from imagemill.producer.report import JobPage, render
from imagemill.producer.results import picture_links
from imagemill.shared.errors import JobNotFound, JobUnreadable, ServiceUnavailable
from imagemill.shared.queues import node_queue, queue_name
from imagemill.shared.settings import Settings, load_settings

TEMPLATES = (Path(flower.__file__).with_name("templates"), Path(__file__).parent)
POLICY = "default-src 'none'; img-src http: https:; style-src 'unsafe-inline'"
"""What a browser may load for a report, which shows images and names from strangers."""


def plain(task: Any) -> Any:
    """Flower's copy of a task, as it is shown: Celery quotes results."""
    if isinstance(task.result, str) and len(task.result) > 1 and task.result[0] == task.result[-1] == "'":
        task.result = task.result[1:-1]
    return task


class PrivateMetrics(Metrics):  # type: ignore[misc]
    """Flower's metrics, which are open to everyone in Flower itself."""

    @authenticated
    async def get(self) -> None:
        """Answer with the metrics."""
        await super().get()


class LiveQueues(BrokerView):  # type: ignore[misc]
    """The queues of live nodes; Flower itself shows those of every node that it has ever asked."""

    def get_active_queue_names(self) -> list[str]:
        """The names of the queues."""
        nodes = self.application.nodes
        return sorted({queue_name(lane) for node in nodes for lane in node.lanes} | {node_queue(node.node) for node in nodes})


class TaskWithJobs(TaskView):  # type: ignore[misc]
    """Flower's page of a task, with links to the jobs of the shift."""

    def get_template_path(self) -> str:
        """Names the loader below, so that Flower's other pages keep their own."""
        return "imagemill"

    def create_template_loader(self, _: str) -> DictLoader:
        """A loader of Flower's templates and ours."""
        return DictLoader({path.name: path.read_text("utf-8") for folder in TEMPLATES for path in folder.glob("*.html")})

    def render(self, template_name: str, **values: Any) -> None:
        """Render our template instead of Flower's, which it extends."""
        task = self.application.events.state.tasks.get(getattr(values.get("task"), "uuid", None))  # Flower's copy lacks them
        jobs = getattr(task, "jobs", None)
        known = [job for job in jobs if isinstance(job, str)] if isinstance(jobs, list) else []
        super().render("task_with_jobs.html" if template_name == "task.html" else template_name, jobs=known, **values)


class Report(BaseHandler):  # type: ignore[misc]
    """`/job/NAME`: the job's report, as `imagemill report` writes it, made now."""

    @authenticated
    async def get(self, job: str) -> None:
        """Answer with the report."""
        try:
            page = await self.application.io_loop.run_in_executor(None, partial(report, load_settings(), job))
        except (JobNotFound, JobUnreadable) as error:
            raise HTTPError(404, error.message.replace("%", "%%")) from error
        except ServiceUnavailable as error:
            raise HTTPError(503, error.message.replace("%", "%%")) from error
        self.set_header("Content-Security-Policy", POLICY)
        self.finish(page)


def report(settings: Settings, job: str) -> str:
    """The report of a job, as HTML. Pictures that can't be linked to are left out."""
    with Client(settings) as client:
        page = JobPage(client.status(job), client.spec(job), client.results(job), outliers(client.results(job)))
        return render([page], picture=picture_links(settings.s3, []), title=f"imagemill {job}")


HANDLERS = [
    (r"/metrics", PrivateMetrics),
    (r"/broker", LiveQueues),
    (r"/task/(.+)", TaskWithJobs),
    (r"/job/([^/]+)", Report),
]
