"""The `imagemill flower` command."""

from __future__ import annotations

import atexit
import logging
import signal
import time
from typing import Any

import click
from flower.app import Flower, rewrite_handler
from flower.command import apply_env_options, extract_settings, setup_logging, sigterm_handler
from flower.options import options
from flower.urls import settings as web_settings
from tornado.ioloop import IOLoop, PeriodicCallback
from tornado.options import parse_command_line

from imagemill.producer.flower.pages import HANDLERS, plain
from imagemill.producer.flower.state import History
from imagemill.shared.broker import make_app
from imagemill.shared.errors import ConfigurationError, ServiceUnavailable
from imagemill.shared.fleet import FORGET_SECONDS, Fleet
from imagemill.shared.messages import Node
from imagemill.shared.settings import Settings, load_settings

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
DEAF_SECONDS = 10.0
"""Nodes send a heartbeat every two seconds. If none arrives for this long while there are nodes, Flower hears nothing."""
SAVE_SECONDS = 30

DEFAULTS: dict[str, Any] = {
    "address": "127.0.0.1",
    "db": "",
    "format_task": plain,
    "max_tasks": 10_000,
    "purge_offline_workers": FORGET_SECONDS,
    "read_only": True,  # cancel jobs with `imagemill cancel`; the ledger would undo what Flower does
    "state_save_interval": SAVE_SECONDS * 1000,
    "tasks_columns": "uuid,kwargs,state,result,received,runtime,worker",
}


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("flower_options", nargs=-1, type=click.UNPROCESSED)
def flower(flower_options: tuple[str, ...]) -> None:
    """Run Flower, the web page that shows nodes and their shifts.

    Takes Flower's own options, as FLOWER_... variables or as --name=value. FLOWER_BASIC_AUTH=user:password is required;
    FLOWER_DB names the file that keeps the history.
    """
    for name, value in DEFAULTS.items():
        setattr(options, name, value)
    apply_env_options()
    parse_command_line(["flower", *flower_options])
    if not (options.basic_auth or options.auth):
        raise ConfigurationError("Flower has no password: set FLOWER_BASIC_AUTH=user:password")
    extract_settings()
    setup_logging()
    web = Web(load_settings())
    atexit.register(web.stop)
    signal.signal(signal.SIGTERM, sigterm_handler)
    port = web.start_http_server()
    click.echo(f"Flower listens at {options.address or 'all addresses'}, port {port}", err=True)
    try:
        web.start()
    except (KeyboardInterrupt, SystemExit):
        web.stop()


class Web(Flower):  # type: ignore[misc]
    """Flower's web server with our state and pages. `nodes` are the live nodes."""

    def __init__(self, settings: Settings) -> None:
        loop, app = IOLoop.current(), make_app(settings)
        history = History(
            app,
            loop,
            db=options.db,
            persistent=True,
            state_save_interval=options.state_save_interval,
            enable_events=options.enable_events,
            max_tasks_in_memory=options.max_tasks,
        )
        super().__init__(capp=app, options=options, events=history, io_loop=loop, **web_settings)
        prefix = options.url_prefix
        self.add_handlers(".*", [rewrite_handler(page, prefix) for page in HANDLERS] if prefix else HANDLERS)
        self.nodes: list[Node] = []
        self._fleet = Fleet.of(settings)
        self._looks = PeriodicCallback(self.look, LOOK_SECONDS * 1000)

    def start(self) -> None:
        """Run until `stop`."""
        self._looks.start()
        super().start()

    async def look(self) -> None:
        """Ask Redis who is alive, and end lost shifts, unless it was Flower that heard nothing."""
        state = self.events.state
        try:
            self.nodes = await self.io_loop.run_in_executor(None, self._fleet.nodes)
        except ServiceUnavailable as error:
            log.warning("Redis does not respond: %s", error.message)
            state.listen()
            return
        if self.nodes and time.monotonic() - state.latest > DEAF_SECONDS:
            state.listen()
        else:
            state.bury()
