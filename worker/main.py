"""Wires a worker's objects together: the parent's at start-up, a child's after the fork. Nothing else does."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import Thread
from typing import Any

from billiard import current_process, util
from celery import Celery, signals
from celery.utils.nodenames import host_format

from imagemill.shared.broker import Publisher, make_app, queues
from imagemill.shared.errors import ConfigurationError, ImagemillError, sentence
from imagemill.shared.fleet import Fleet
from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.log_fields import describe_process
from imagemill.shared.messages import Node
from imagemill.shared.queues import node_queue, queue_name
from imagemill.shared.settings import Settings
from imagemill.worker.hardware.device import Device, pin
from imagemill.worker.hardware.gpus import gpu_of, no_such_gpu
from imagemill.worker.node import intake, logs, metrics
from imagemill.worker.node.lookout import Lookout
from imagemill.worker.node.naming import take_name, this_process
from imagemill.worker.node.offer import children_per_gpu, missing, nothing_to_do, shortcomings
from imagemill.worker.node.parent import Children, Housekeeping, Loaded, Parent, child_name
from imagemill.worker.node.parting import die_with
from imagemill.worker.node.supervisor import find_gpus
from imagemill.worker.node.tasks import not_loaded, register

log = logging.getLogger(__name__)


class Worker:
    """One node, as the Celery application that `celery worker` and `imagemill worker` run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lookout = Lookout(settings)
        self.lanes = self.lookout.lanes
        intake.install()
        self.app: Celery = make_app(settings)
        self.app.conf.worker_consumer = "imagemill.worker.node.intake:Consumer"
        self.app.conf.task_queues = queues(map(queue_name, self.lanes.open()))
        self._child: Any = None
        register(self.app, lambda: self._child or not_loaded())
        self.app.steps["worker"].add(Loaded)
        self.app.steps["consumer"].add(Housekeeping)
        # Celery holds weak references to these, so they last as long as this object.
        signals.setup_logging.connect(self._set_up_logs)
        signals.celeryd_init.connect(self._begin_logs)
        signals.worker_init.connect(self._prepare_parent)
        signals.worker_process_init.connect(self._load_child)
        signals.worker_process_shutdown.connect(self._close_child)
        signals.worker_shutting_down.connect(self._leave)

    def _begin_logs(self, sender: str, **_: Any) -> None:
        """Before Celery says anything."""
        describe_process(node=sender, gpu=self.settings.worker.gpu)
        self._set_up_logs()

    def _set_up_logs(self, **_: Any) -> None:
        logs.set_up(as_json=self.settings.log_json, level=self.settings.log_level)

    def _prepare_parent(self, sender: Any, **_: Any) -> None:
        """Runs in the parent before the pool forks: takes a name, sets up the shared memory and the node's own queue."""
        self._log_engines()
        if self.settings.worker.gpu is not None:
            sender.concurrency = children_per_gpu(self.settings)
        elif not isinstance(sender.concurrency, int):
            sender.concurrency = 1
        seen = 1 if self.settings.worker.gpu is None else len(find_gpus())
        self.device = Device.of(self.settings, sender.concurrency, gpus=seen)
        self.children = Children(sender.concurrency)
        node = Node(
            node=sender.hostname,
            host=socket.gethostname(),
            pid=os.getpid(),
            process=this_process(),
            device=self.device.name,
            lanes=tuple(self.lanes.open()),
            children=sender.concurrency,
            ready=False,
            parts=tuple(self.lookout.parts.open()),
            lacks=self.lookout.lacks,
        )
        gpu = self.settings.worker.gpu
        missing_gpu = None if gpu is None else no_such_gpu(gpu)
        if gpu is not None:
            gpus = {"gpu": gpu_of(gpu) or node.node, "expected_gpus": self.settings.worker.expect_gpus}
            node = node.model_copy(update=gpus)
        with closing(Fleet.of(self.settings)) as before_the_fork, _ending_on_signals():
            self.node = take_name(before_the_fork, node)
        describe_process(node=self.node.node, gpu=self.settings.worker.gpu)
        sender.hostname = self.node.node  # before Celery passes it on
        # Billiard makes a folder for its shared memory, whose files have no names; a killed node would leave it, always empty.
        util.get_temp_dir = tempfile.gettempdir
        self._metrics_server = metrics.start_counting(self.settings, self.node.node)
        own = node_queue(self.node.node)
        for queue in queues([own]):
            self.app.amqp.queues.add(queue)
        self.app.amqp.queues.select([own, *map(queue_name, self.lanes.open())])  # or Celery might consume its default queue
        ledger, fleet, publisher = WorkLedger.of(self.settings), Fleet.of(self.settings), Publisher(self.app)
        self.app.imagemill_parent = Parent(
            self.node, self.children, self.lookout, ledger, fleet, publisher, self.settings.worker, self.settings.owner_weights
        )
        if missing_gpu:  # only now, so that the fleet shows it
            log.error("no such GPU; the node exits", extra={"action": "start", "node": self.node.node, "reason": missing_gpu})
            self.app.imagemill_parent.fail(missing_gpu)
            raise SystemExit(ConfigurationError.exit_code)

    def _log_engines(self) -> None:
        """Log the engines and models that this node can't offer yet; exit if it never could offer any."""
        idle = nothing_to_do(self.settings)
        if idle:
            log.error("nothing to do; the node exits", extra={"action": "start", "reason": idle})
            raise SystemExit(ConfigurationError.exit_code)
        for reason, fix in shortcomings(self.settings):
            log.warning("engine not offered", extra={"action": "start", "reason": reason, "fix": fix})
        for engine, models in missing(self.settings).items():
            fields = dict(action="start", engine=engine, models=models, fix="imagemill models pull NAME")
            log.info("models not offered", extra=fields)

    def _load_child(self, **_: Any) -> None:
        """Runs in a child before its first task. On errors the process exits, because Celery would swallow the exception."""
        try:
            die_with(self.node.pid)
            pin(self.device)
            # Only now: these imports may start threads and touch the GPU.
            from imagemill.worker.node.child import Child

            node, index = self.node.node, current_process().index
            self._child = Child(
                self.settings,
                self.device,
                node=node,
                seat=f"{node}/{index}",
                name=child_name(node, index, os.getppid(), os.getpid()),
                lanes=self.lanes,
                parts=self.lookout.parts,
                publisher=Publisher(self.app),
                stopping=self.children.stopping,
                moved=lambda working: self.children.moved(index, working=working),
            )
            self.children.loaded(index)
            Thread(target=self._beat, args=[index], name="beat", daemon=True).start()
        except BaseException as error:
            known = error if isinstance(error, ImagemillError) else None  # needs no traceback
            reason = known.message if known else f"{type(error).__name__}: {sentence(error)}"
            failures = self.children.failed(known.exit_code if known else 1, reason)
            wait = min(60.0, 2.0 ** (failures - 1))
            fields = dict(action="load", node=self.node.node, reason=reason, again_in=wait)
            log.error("engines not loaded", exc_info=known is None, extra=fields)
            time.sleep(wait)  # the pool replaces this process at once, which must not become a tight loop
            os._exit(1)

    def _beat(self, index: int) -> None:
        while True:
            self.children.beat(index)
            time.sleep(1.0)

    def _close_child(self, exitcode: int, **_: Any) -> None:
        if self._child is not None:
            self._child.close()
        os._exit(exitcode)  # as Celery does a second later, in case its parent still reads; ours learns it from the kernel

    def _leave(self, **_: Any) -> None:
        self.app.imagemill_parent.leave()

    def run(self, *, name: str, concurrency: int) -> int:
        """Run the node until it stops, and return its exit status. Raises ConfigurationError if it could never do any work."""
        idle = nothing_to_do(self.settings)
        if idle:
            raise ConfigurationError(idle)
        node = self.app.Worker(
            pool_cls="prefork",
            concurrency=concurrency,
            hostname=host_format(name),
            task_events=True,
            quiet=True,
            loglevel=self.settings.log_level,
            # Nodes coordinate through Redis; gossip traffic grows with the square of the fleet.
            without_gossip=True,
            without_mingle=True,
        )
        node.start()
        return int(node.exitcode or 0)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """End the process on SIGTERM and Ctrl-C: Celery handles them only later, and a container's first process ignores them."""
    earlier = {number: signal.signal(number, lambda *_: sys.exit(0)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
