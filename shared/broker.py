"""Celery as imagemill uses it: every option that differs from Celery's default, with its reason."""

from __future__ import annotations

from collections.abc import Iterable

from celery import Celery
from kombu import Queue
from kombu.exceptions import BatchPublishError, OperationalError

from imagemill.shared.errors import BrokerUnavailable, sentence
from imagemill.shared.messages import MANIFEST, Chunk, Job
from imagemill.shared.queues import MANIFEST_TASK, manifest_queue, queue_name, task_name
from imagemill.shared.settings import Settings

KILL_MARGIN = 60.0
"""Seconds between the soft and the hard time limit of a chunk."""


def make_app(settings: Settings) -> Celery:
    """The Celery application of a producer or a worker. Connects to nothing yet."""
    url = settings.redis_url.get_secret_value()
    hard = settings.worker.time_limit + KILL_MARGIN
    # Above every time that a message can rightly stay unacknowledged, or Redis would hand it out twice.
    transport = {
        "visibility_timeout": int(2 * hard),
        "unacked_restore_interval": 5,  # seconds between looks for messages past that; the default makes it 100
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 30,  # a worker killed while it looked must not stop the others for 5 minutes
        "priority_steps": [0],  # priorities are queues of their own (Redis' steps are approximate): fewer keys to poll
        "queue_order_strategy": "imagemill.shared.queues:PriorityRoundRobin",
        "health_check_interval": 25,  # 0 would leave a consumer stuck on a half-open connection
        "socket_timeout": 10,  # the default of 120 s is how long a dead Redis goes unnoticed
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
    }
    app = Celery("imagemill", broker=url, set_as_current=False)
    app.conf.update(
        # Only JSON: a message from a stranger can't run code here.
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        # The ledger has the results; a second copy in Redis would have to expire separately.
        task_ignore_result=True,
        # A message is acknowledged when its chunk is recorded, so a dead worker's message comes back ...
        task_acks_late=True,
        # ... also when a child dies under it; the ledger counts attempts, as Redis counts no deliveries.
        task_reject_on_worker_lost=True,
        # On a time-out: acknowledge; the ledger gives the chunk out again and counts. False would requeue without end.
        task_acks_on_failure_or_timeout=True,
        # One message per child: what a node holds in reserve, another can't work on.
        worker_prefetch_multiplier=1,
        # True loses the task: terminated, marked revoked and acknowledged when Redis is gone for a moment.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # The default of 4 s kills each replacement child that is still loading its models, for ever.
        worker_proc_alive_timeout=settings.worker.load_timeout,
        # The default in this Celery, said aloud: recycling by memory looks at a peak and would reload models after each chunk.
        worker_max_memory_per_child=None,
        # On TERM our children finish their current images and give the rest back; QUIT waits this long and ends them.
        worker_soft_shutdown_timeout=settings.worker.soft_shutdown,
        worker_enable_soft_shutdown_on_idle=True,
        task_time_limit=hard,
        task_soft_time_limit=settings.worker.time_limit,
        # Redis may come up after us, or go away for as long as it likes.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=transport,
        visibility_timeout=int(2 * hard),
        redis_socket_timeout=10.0,
        redis_socket_keepalive=True,
        # A producer hears within about 3 s that Redis is gone; what stands in the ledger is published later.
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0.2, "interval_step": 0.5, "interval_max": 1.0},
        # Flower shows tasks by their events.
        worker_send_task_events=True,
        task_track_started=True,
        # Logs are set up in imagemill.worker.main; Celery must not replace them.
        worker_hijack_root_logger=False,
        task_default_queue="imagemill.default",
        task_create_missing_queues=True,
        timezone="UTC",
    )
    return app


def queues(names: Iterable[str]) -> list[Queue]:
    """Celery's queue objects for these names, in this order."""
    return [Queue(name, routing_key=name) for name in names]


class Publisher:
    """Publishes chunks over one connection. Not thread-safe."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def publish(self, chunks: Iterable[tuple[Chunk, Job]]) -> int:
        """Publish chunks, each with its job's spec; how many. Raises BrokerUnavailable."""
        count = 0
        try:
            with (
                self._app.connection_for_write() as connection,
                self._app.amqp.Producer(connection) as producer,
                producer.batch(),  # one round trip per thousand messages
            ):
                for chunk, spec in chunks:
                    manifest = chunk.number == MANIFEST
                    self._app.send_task(
                        MANIFEST_TASK if manifest else task_name(spec.operation),
                        kwargs=chunk.model_dump(),
                        kwargsrepr=_shown(chunk),
                        queue=manifest_queue(spec.operation, spec.lane)
                        if manifest
                        else queue_name(spec.operation, spec.lane, spec.policy.priority),
                        producer=producer,
                    )
                    count += 1
        except (OperationalError, BatchPublishError) as error:
            raise BrokerUnavailable(f"Redis: {sentence(error)}") from error
        return count


def _shown(chunk: Chunk) -> str:
    """The arguments as Flower shows them: never a wall of addresses."""
    if chunk.number == MANIFEST:
        return f"job={chunk.job}"
    return f"job={chunk.job}, chunk={chunk.number}, images={chunk.images}"
