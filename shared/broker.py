"""Celery's configuration: every option that differs from the default, with the reason."""

from __future__ import annotations

from collections.abc import Iterable

from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError

from imagemill.shared.connection import explain, sentinel_options
from imagemill.shared.errors import BrokerUnavailable
from imagemill.shared.messages import WakeUp
from imagemill.shared.queues import node_queue, queue_name, task_name
from imagemill.shared.redis_url import RedisUrl
from imagemill.shared.settings import Settings

KILL_MARGIN = 60.0
"""Seconds between a task's soft and hard time limits."""


def make_app(settings: Settings) -> Celery:
    """The Celery application of a producer or worker, not yet connected."""
    where = RedisUrl.parse(settings.redis_url.get_secret_value())
    hard = settings.worker.time_limit + KILL_MARGIN
    # Longer than a message can legitimately stay unacknowledged, or it would be delivered twice.
    transport = {
        "visibility_timeout": int(2 * hard),
        "unacked_restore_interval": 5,  # seconds between checks for messages past that; by default 100
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 30,  # a worker killed during its check must not block the others' for 5 minutes
        "priority_steps": [0],  # the ledger orders the work: fewer keys to poll
        "queue_order_strategy": "sorted",  # a node's own queue comes first, see queues.py; which lane wakes it doesn't matter
        "health_check_interval": 25,  # 0 leaves a consumer stuck on a half-open connection
        "socket_timeout": 10,  # with the default, a dead Redis goes unnoticed for 120 s
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
    }
    if where.primary is not None:
        transport |= {"master_name": where.primary, "sentinel_kwargs": sentinel_options(where)}
    app = Celery("imagemill", broker=where.for_celery, set_as_current=False)
    app.conf.update(
        # Only JSON: a forged message can't run code.
        accept_content=["json"],
        # The ledger holds the results; a second copy would have to expire separately.
        task_ignore_result=True,
        # A message is acknowledged at the end of the shift, so it is redelivered if its worker dies ...
        task_acks_late=True,
        # ... or only its child process: somebody else then continues at once.
        task_reject_on_worker_lost=True,
        # Acknowledge after a timeout: the ledger hands the images out again. False would requeue forever.
        task_acks_on_failure_or_timeout=True,
        # One message per child process: other nodes can't work on prefetched messages.
        worker_prefetch_multiplier=1,
        # True loses tasks: when Redis disappears briefly, it terminates, revokes and acknowledges them.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # The default of 4 s kills every replacement child while it loads its models.
        worker_proc_alive_timeout=settings.worker.load_timeout,
        # On TERM, children finish their current images and give back the rest; on QUIT they are ended after this time.
        worker_soft_shutdown_timeout=settings.worker.soft_shutdown,
        worker_enable_soft_shutdown_on_idle=True,
        task_time_limit=hard,
        task_soft_time_limit=settings.worker.time_limit,
        # Redis may start after us, or disappear for any length of time.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # whatever its keys hold
        broker_transport_options=transport,
        broker_use_ssl=where.tls or False,
        visibility_timeout=int(2 * hard),
        redis_socket_timeout=10.0,
        redis_socket_keepalive=True,
        # A producer learns within about 3 s that Redis is down; a node wakes the others later.
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0.2, "interval_step": 0.5, "interval_max": 1.0},
        # Flower shows tasks from their events.
        worker_send_task_events=True,
        task_track_started=True,
        # imagemill.worker.main configures logging; Celery must not replace it.
        worker_hijack_root_logger=False,
        task_default_queue="imagemill.default",
    )
    return app


def queues(names: Iterable[str]) -> list[Queue]:
    """Celery's queues with these names, in this order."""
    return [Queue(name, routing_key=name) for name in names]


class Publisher:
    """Publishes wake-ups. Not thread-safe."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def wake(self, lane: str, count: int = 1, *, node: str | None = None) -> None:
        """Wake up `count` children that work in this lane, or those of one node. Raises BrokerUnavailable."""
        message = WakeUp(lane=lane)
        try:
            with self._app.connection_for_write() as connection, self._app.amqp.Producer(connection) as producer:
                for _ in range(count):
                    self._app.send_task(
                        task_name(lane),
                        kwargs=message.model_dump(),
                        kwargsrepr=lane,
                        queue=node_queue(node) if node else queue_name(lane),
                        producer=producer,
                    )
        except OperationalError as error:
            raise BrokerUnavailable(f"Redis: {explain(error.__cause__ or error)}") from error
