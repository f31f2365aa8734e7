"""The Celery tasks: parse the message, hand it to this process' child, report progress."""

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
    """Put imagemill's tasks into `app`; `child()` is this process' loaded Child, or raises."""

    def work(task: Task, **payload: Any) -> str:
        try:
            chunk = Chunk.model_validate(payload)
        except ValidationError as error:
            # Nothing of ours: no ledger row stands behind it, so dropping it loses no image.
            log.error("message refused", extra={"action": "parse", "reason": validation_sentence(error)})
            return "refused"
        try:
            return str(child().work(chunk, task=task.request.id, tell=_progress(task, chunk.images)))
        except JobNotFound:
            return "gone"
        except ServiceUnavailable as error:
            # The reaper publishes it again: the ledger is the record, this message only a hint.
            told = dict(action="chunk", job=chunk.job, chunk=chunk.number, reason=error.message)
            log.warning("chunk put off", extra=told)
            return "put off"
        except DeviceLost as error:
            # Whatever it did next would fail as well. As for any child that dies, its chunk is delivered again.
            told = dict(action="device", job=chunk.job, chunk=chunk.number, reason=error.message)
            log.critical("the device is lost; this process ends", extra=told)
            end_process()

    def canary(_task: Task, token: str) -> str:
        child().fleet.answer_canary(token)
        return "alive"

    for name in (*map(task_name, OPERATIONS), MANIFEST_TASK):
        app.task(work, name=name, bind=True, shared=False)
    app.task(canary, name=CANARY_TASK, bind=True, shared=False, send_events=False)  # not in Flower every minute


def not_loaded() -> Any:
    """What `child()` is before the engines are loaded."""
    raise ConfigurationError("this process has no engines loaded")


def _progress(task: Task, images: int) -> Callable[[int, int], None]:
    """Tells Flower how far a running chunk is: state PROGRESS, '12 of 32 images'."""
    # Read here, since Celery keeps the request per thread and another one tells.
    uuid, node = task.request.id, task.request.hostname

    def tell(done: int, failed: int) -> None:
        text = f"{done + failed} of {images} images" + (f", {failed} failed" if failed else "")
        try:
            with task.app.events.default_dispatcher(hostname=node) as dispatcher:
                dispatcher.send("task-progress", uuid=uuid, retry=False, result=text)
        except OperationalError as error:
            log.warning("progress not told", extra={"action": "progress", "reason": sentence(error)})

    return tell
