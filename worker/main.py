"""The only place that wires a worker's objects together: first the parent's, after the fork a child's."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from billiard import current_process
from celery import Celery, signals
from celery.utils.nodenames import host_format

from imagemill.shared.broker import Publisher, make_app, queues
from imagemill.shared.errors import ConfigurationError, ImagemillError, sentence
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.queues import node_queue, worker_queues
from imagemill.shared.settings import Settings
from imagemill.worker.hardware.device import Device, pin
from imagemill.worker.node import logs
from imagemill.worker.node.offer import lanes, missing, nothing_to_do, shortcomings
from imagemill.worker.node.parent import Children, Housekeeping, Loaded, Parent
from imagemill.worker.node.tasks import not_loaded, register

log = logging.getLogger(__name__)


class Worker:
    """One node, as the Celery application that `celery worker` and `imagemill worker` run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.queues = worker_queues(settings.worker.operations, lanes(settings))
        self.app: Celery = make_app(settings)
        self.app.conf.task_queues = queues(self.queues)
        self._child: Any = None
        register(self.app, lambda: self._child or not_loaded())
        self.app.steps["worker"].add(Loaded)
        self.app.steps["consumer"].add(Housekeeping)
        # Celery keeps weak references to receivers; bound methods of this object live as long as it does.
        signals.setup_logging.connect(self._set_up_logs)
        signals.worker_init.connect(self._prepare_parent)
        signals.worker_process_init.connect(self._load_child)
        signals.worker_shutting_down.connect(self._leave)

    def _set_up_logs(self, **_: Any) -> None:
        logs.set_up(as_json=self.settings.log_json)

    def _prepare_parent(self, sender: Any, **_: Any) -> None:
        """In the parent, before the pool forks: what children share, and the node's own queue."""
        self._set_up_logs()  # Celery asks for that only after this signal
        self._tell_of_models()
        if self.settings.worker.gpu is not None or not isinstance(sender.concurrency, int):
            sender.concurrency = 1  # one child per GPU
        self.name = sender.hostname
        self.device = Device.of(self.settings, sender.concurrency)
        self.children = Children(sender.concurrency)
        (own,) = queues([node_queue(self.name)])
        self.app.amqp.queues.select_add(own)
        self.app.imagemill_parent = Parent(
            self.name,
            self.device,
            self.queues,
            self.children,
            lacks=[f"{reason}: {mend}" for reason, mend in shortcomings(self.settings)],
            ledger=WorkLedger.of(self.settings),
            fleet=Fleet.of(self.settings),
            publisher=Publisher(self.app),
            settings=self.settings.worker,
        )

    def _tell_of_models(self) -> None:
        """Say which queues this node does not listen to, and leave if there is none that it does."""
        idle = nothing_to_do(self.settings)
        if idle:  # without a queue Celery would listen to one of its own
            log.error("nothing to listen to; the node exits", extra={"action": "start", "reason": idle})
            raise SystemExit(ConfigurationError.exit_code)
        for reason, mend in shortcomings(self.settings):
            log.warning("engine not offered", extra={"action": "start", "reason": reason, "mend": mend})
        for engine, models in missing(self.settings).items():
            told = dict(action="start", engine=engine, models=models, mend="imagemill models pull NAME")
            log.info("not listening for models that are missing", extra=told)

    def _load_child(self, **_: Any) -> None:
        """In a child, before its first task. Celery swallows what is raised here, so the process exits instead."""
        try:
            pin(self.device)
            # Only now: these imports may start threads and touch the GPU.
            from imagemill.worker.node.child import Child

            self._child = Child(
                self.settings, self.device, node=self.name, publisher=Publisher(self.app), stopping=self.children.stopping
            )
            self.children.loaded(current_process().index)
        except BaseException as error:
            known = error if isinstance(error, ImagemillError) else None  # whose message tells all
            failures = self.children.failed(known.exit_code if known else 1)
            wait = min(60.0, 2.0 ** (failures - 1))
            reason = known.message if known else f"{type(error).__name__}: {sentence(error)}"
            told = dict(action="load", node=self.name, reason=reason, again_in=wait)
            log.error("engines could not be loaded", exc_info=known is None, extra=told)
            time.sleep(wait)  # not in a tight loop: the pool replaces this process at once
            os._exit(1)

    def _leave(self, **_: Any) -> None:
        self.app.imagemill_parent.leave()

    def run(self, *, name: str, concurrency: int) -> int:
        """Run the node until it is told to stop; its exit status. Raises ConfigurationError where it has nothing to do."""
        idle = nothing_to_do(self.settings)
        if idle:
            raise ConfigurationError(idle)
        node = self.app.Worker(
            pool_cls="prefork",
            concurrency=concurrency,
            hostname=host_format(name),
            task_events=True,
            quiet=True,
            loglevel="INFO",
            # Nodes need not know of each other: the ledger tells, and a fleet's gossip grows with its square.
            without_gossip=True,
            without_mingle=True,
        )
        node.start()
        return int(node.exitcode or 0)
