"""One event loop per process for everything that waits on the network: hundreds of transfers, one thread.

While transfers run, the loop looks at their sockets every four milliseconds, and libcurl advances those that are ready.
Waking up for each event instead would cost several times as much CPU time and time in Python's lock.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import resource
import select
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from threading import Lock, Thread
from typing import Any, TypeVar

import pycurl

log = logging.getLogger(__name__)

T = TypeVar("T")
Done = Callable[[concurrent.futures.Future[Any]], None]

SECONDS = 0.004
"""Seconds between looks at the sockets: little compared with the time that any server takes."""
OPEN_FILES = 8192
IDLE_CONNECTIONS = 256
"""Open connections that wait for their next request, per multi handle; the one that has waited longest is closed first."""


def allow_open_files() -> None:
    """Let this process have as many sockets as it may need; the soft limit is often 1,024 files, for select()'s sake."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Multi:
    """Requests that run at the same time and share their connections. All of it in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._running: dict[pycurl.Curl, asyncio.Future[None]] = {}
        self._watched: set[int] = set()
        self._due = math.inf  # when curl wants to be called even if no socket is ready, on the monotonic clock
        self._sockets = select.epoll()
        self._curl = self._open()

    def __bool__(self) -> bool:
        return bool(self._running)

    def _open(self) -> pycurl.CurlMulti:
        curl = pycurl.CurlMulti()
        curl.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        curl.setopt(pycurl.M_TIMERFUNCTION, self._set_alarm)
        curl.setopt(pycurl.M_MAXCONNECTS, IDLE_CONNECTIONS)
        curl.setopt(pycurl.M_PIPELINING, 0)  # one request at a time per connection, with HTTP/2 too
        return curl

    async def perform(self, handle: pycurl.Curl) -> None:
        """Run a prepared handle; raises pycurl.error as its own `perform` would. Cancelling ends the transfer."""
        self._curl.add_handle(handle)
        done = self._running[handle] = self._loop.create_future()
        try:
            await done
        finally:
            if self._running.pop(handle, None) is not None:
                self._curl.remove_handle(handle)

    def look(self) -> None:
        """Advance the transfers whose sockets are ready."""
        try:
            for descriptor, events in self._sockets.poll(0):
                self._curl.socket_action(descriptor, _selected(events))
            if time.monotonic() >= self._due:
                self._due = math.inf
                self._curl.socket_action(pycurl.SOCKET_TIMEOUT, 0)
            self._collect()
        except Exception as error:
            log.exception("all transfers end", extra={"action": "network"})
            self._start_again(error)

    def close(self) -> None:
        """Close all connections. Nothing may be running."""
        self._curl.close()
        self._sockets.close()

    def _watch(self, what: int, descriptor: int, _multi: object, _data: object) -> int:
        """Called by curl: which sockets to watch for what."""
        if what == pycurl.POLL_REMOVE:
            if descriptor in self._watched:
                self._watched.discard(descriptor)
                self._sockets.unregister(descriptor)
            return 0
        events = (select.EPOLLIN if what & pycurl.POLL_IN else 0) | (select.EPOLLOUT if what & pycurl.POLL_OUT else 0)
        if descriptor in self._watched:
            self._sockets.modify(descriptor, events)
        else:
            self._sockets.register(descriptor, events)
            self._watched.add(descriptor)
        return 0

    def _set_alarm(self, milliseconds: int) -> int:
        """Called by curl: when to be called next even if no socket is ready."""
        self._due = time.monotonic() + milliseconds / 1000 if milliseconds >= 0 else math.inf
        return 0

    def _collect(self) -> None:
        """Tell those whose transfers are over."""
        more = 1
        while more:
            more, succeeded, failed = self._curl.info_read()
            for handle in succeeded:
                self._finish(handle, None)
            for handle, number, reason in failed:
                self._finish(handle, pycurl.error(number, reason))

    def _finish(self, handle: pycurl.Curl, error: pycurl.error | None) -> None:
        done = self._running.pop(handle)
        self._curl.remove_handle(handle)
        if done.done():  # cancelled
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def _start_again(self, error: Exception) -> None:
        """Curl won't touch a multi handle again once one of its callbacks has failed."""
        for handle in list(self._running):
            self._finish(handle, pycurl.error(pycurl.E_ABORTED_BY_CALLBACK, f"the transfer was aborted: {error}"))
        self.close()
        self._watched, self._due, self._sockets = set(), math.inf, select.epoll()
        self._curl = self._open()


def _selected(events: int) -> int:
    """Epoll's events as curl calls them."""
    ready = 0
    if events & (select.EPOLLIN | select.EPOLLHUP):
        ready |= pycurl.CSELECT_IN
    if events & select.EPOLLOUT:
        ready |= pycurl.CSELECT_OUT
    if events & select.EPOLLERR:
        ready |= pycurl.CSELECT_ERR
    return ready


class Network:
    """The loop and its thread. Create it after the fork. Any thread may `start` or `call` coroutines; they run in the loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._multi, self._s3 = Multi(self.loop), Multi(self.loop)
        self._idle: list[pycurl.Curl] = []
        self._posted: list[Coroutine[Any, Any, None]] = []
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself would forget them
        self._looking, self._lock = False, Lock()
        self._closing = False
        self._thread = Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    def post(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the loop, which handles its errors itself.

        Cheaper than `start`: there is no future, and often nobody to be woken up.
        """
        if self._closing:
            coroutine.close()
            return
        with self._lock:
            self._posted.append(coroutine)
        self._wake()

    def start(self, coroutine: Coroutine[Any, Any, T], done: Done | None = None) -> concurrent.futures.Future[T]:
        """Run a coroutine in the loop; cancelling the future cancels it. `done` is called in the loop's thread."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        if done is not None:
            future.add_done_callback(done)
        return future

    def _wake(self) -> None:
        """Make sure that the loop looks around soon."""
        with self._lock:
            looking, self._looking = self._looking, True
        if not looking:
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """Begin what was posted, take all transfers further, and come back soon if there are any."""
        with self._lock:
            posted, self._posted = self._posted, []
        for coroutine in posted:
            task = self.loop.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        for multi in (self._multi, self._s3):
            if multi:
                multi.look()
        with self._lock:
            self._looking = bool(self._posted or self._multi or self._s3)
        if self._looking:
            self.loop.call_later(SECONDS, self._look)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for it. Not for the loop's own thread."""
        return self.start(coroutine).result()

    async def perform(self, handle: pycurl.Curl, *, s3: bool = False) -> None:
        """Run a prepared handle; raises pycurl.error as its own `perform` would. Cancelling ends the transfer.

        Requests to the S3 server have connections of their own: a URL in a list that names this server must not get one of
        them, since its address has not been checked.
        """
        self._wake()
        await (self._s3 if s3 else self._multi).perform(handle)

    @contextmanager
    def handle(self) -> Iterator[pycurl.Curl]:
        """A handle without any options, for one request. In the loop's thread."""
        handle = self._idle.pop() if self._idle else pycurl.Curl()
        try:
            yield handle
        finally:
            handle.reset()
            self._idle.append(handle)

    def close(self) -> None:
        """Cancel what is running, and close all connections."""
        if self._closing:
            return
        self._closing = True
        self.call(self._cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    async def _cancel_all(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for coroutine in posted:
            coroutine.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self._closing:
            try:
                self.loop.run_forever()
            except BaseException:  # what asyncio lets pass: SystemExit and KeyboardInterrupt of a task
                log.exception("error in the event loop, which carries on", extra={"action": "network"})
        self._multi.close()
        self._s3.close()
        for handle in self._idle:
            handle.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
