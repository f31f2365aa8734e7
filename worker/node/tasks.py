"""The Celery tasks: parse the message, pass it to this process's child, report progress."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery, Task
from kombu.exceptions import OperationalError
from pydantic import ValidationError

from imagemill.shared.errors import ConfigurationError, DeviceLost, JobNotFound, ServiceUnavailable, sentence
from imagemill.shared.messages import Chunk
from imagemill.shared.options.base import OPERATIONS, validation_sentence
from imagemill.shared.queues import CANARY_TASK, MANIFEST_TASK, task_name
from imagemill.worker.hardware.device import end_process

log = logging.getLogger(__name__)


def register(app: Celery, child: Callable[[], Any]) -> None:
    """Register imagemill's tasks with `app`; `child()` returns the Child loaded in this process, or raises."""

    def work(task: Task, **payload: Any) -> str:
        try:
            chunk = Chunk.model_validate(payload)
        except ValidationError as error:
            # Not published by imagemill: it has no ledger entry, so dropping it loses no image.
            log.error("message refused", extra={"action": "parse", "reason": validation_sentence(error)})
            return "refused"
        try:
            return str(child().work(chunk, task=task.request.id, tell=_progress(task, chunk.images)))
        except JobNotFound:
            return "gone"
        except ServiceUnavailable as error:
            # The ledger still has the chunk, and the reaper will republish it.
            fields = dict(action="chunk", job=chunk.job, chunk=chunk.number, reason=error.message)
            log.warning("chunk postponed", extra=fields)
            return "postponed"
        except DeviceLost as error:
            # Every further chunk would fail too. As for any child that dies, Celery redelivers this chunk.
            fields = dict(action="device", job=chunk.job, chunk=chunk.number, reason=error.message)
            log.critical("the device is lost; this process ends", extra=fields)
            end_process()

    def canary(_task: Task, token: str) -> str:
        child().fleet.answer_canary(token)
        return "alive"

    for name in (*map(task_name, OPERATIONS), MANIFEST_TASK):
        app.task(work, name=name, bind=True, shared=False)
    app.task(canary, name=CANARY_TASK, bind=True, shared=False, send_events=False)  # keeps the health check out of Flower


def not_loaded() -> Any:
    """Stands in for `child()` until the engines are loaded."""
    raise ConfigurationError("this process has no engines loaded")


def _progress(task: Task, images: int) -> Callable[[int, int], None]:
    """A function that reports a chunk's progress to Flower: state PROGRESS, '12 of 32 images'."""
    # Read now: Celery keeps the request per thread, and progress is reported from another thread.
    uuid, node = task.request.id, task.request.hostname

    def report(done: int, failed: int) -> None:
        text = f"{done + failed} of {images} images" + (f", {failed} failed" if failed else "")
        try:
            with task.app.events.default_dispatcher(hostname=node) as dispatcher:
                dispatcher.send("task-progress", uuid=uuid, retry=False, result=text)
        except OperationalError as error:
            log.warning("progress not reported", extra={"action": "progress", "reason": sentence(error)})

    return report
