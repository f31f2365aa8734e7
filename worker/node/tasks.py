"""The Celery tasks: parse the message, start a shift of this process's child, report progress."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery, Task
from kombu.exceptions import OperationalError
from pydantic import ValidationError

from imagemill.shared.errors import ConfigurationError, DeviceLost, ServiceUnavailable, sentence
from imagemill.shared.messages import WakeUp
from imagemill.shared.options.base import OPERATIONS, validation_sentence
from imagemill.shared.queues import CANARY_TASK, task_name
from imagemill.worker.hardware.device import end_process

log = logging.getLogger(__name__)


def register(app: Celery, child: Callable[[], Any]) -> None:
    """Register imagemill's tasks with `app`; `child()` returns the Child loaded in this process, or raises."""

    def work(task: Task, **payload: Any) -> str:
        try:
            lane = WakeUp.model_validate(payload).lane
        except ValidationError as error:
            # Not published by imagemill. The work is in the ledger, so dropping a message loses nothing.
            log.error("message refused", extra={"action": "parse", "reason": validation_sentence(error)})
            return "refused"
        try:
            return str(child().work(lane, _progress(task)))
        except ServiceUnavailable as error:
            log.warning("shift ended early", extra={"action": "shift", "reason": error.message})
            return "postponed"
        except DeviceLost as error:
            # Every further image would fail too.
            log.critical("the device is lost; this process ends", extra={"action": "device", "reason": error.message})
            end_process()

    def canary(_task: Task, token: str) -> str:
        child().fleet.answer_canary(token)
        return "alive"

    for operation in OPERATIONS:
        app.task(work, name=task_name(operation), bind=True, shared=False)
    app.task(canary, name=CANARY_TASK, bind=True, shared=False, send_events=False)  # keeps the health check out of Flower


def not_loaded() -> Any:
    """Stands in for `child()` until the engines are loaded."""
    raise ConfigurationError("this process has no engines loaded")


def _progress(task: Task) -> Callable[..., None]:
    """A function that reports a shift's progress to Flower: the state PROGRESS, with a text and figures."""
    # Read now: Celery keeps the request per thread, and progress is reported from another thread.
    uuid, node = task.request.id, task.request.hostname

    def report(text: str, **figures: Any) -> None:
        try:
            with task.app.events.default_dispatcher(hostname=node) as dispatcher:
                dispatcher.send("task-progress", uuid=uuid, retry=False, result=text, **figures)
        except OperationalError as error:
            log.warning("progress not reported", extra={"action": "progress", "reason": sentence(error)})

    return report
