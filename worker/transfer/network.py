"""One event loop per process for everything that waits on the network: hundreds of transfers, one thread.

The loop watches the sockets of libcurl's multi interface, which takes each request further as soon as its socket is ready.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, TypeVar

import pycurl

log = logging.getLogger(__name__)

T = TypeVar("T")
Done = Callable[[concurrent.futures.Future[Any]], None]

IDLE_CONNECTIONS = 256
"""Open connections that wait for their next request, per multi handle; the one that has waited longest is closed first."""


class Multi:
    """Requests that run at the same time and share their connections. All of it in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._running: dict[pycurl.Curl, asyncio.Future[None]] = {}
        self._watched: dict[int, int] = {}
        self._alarm: asyncio.Handle | None = None
        self._curl = self._open()

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

    def close(self) -> None:
        """Close all connections. Nothing may be running."""
        self._set_alarm(-1)
        for descriptor in list(self._watched):
            self._watch(pycurl.POLL_REMOVE, descriptor, None, None)
        self._curl.close()

    def _watch(self, what: int, descriptor: int, _multi: object, _data: object) -> int:
        """Called by curl: which sockets to watch for what."""
        before = self._watched.pop(descriptor, 0)
        wanted = what if what in (pycurl.POLL_IN, pycurl.POLL_OUT, pycurl.POLL_INOUT) else 0
        for event, ready, add, remove in (
            (pycurl.POLL_IN, pycurl.CSELECT_IN, self._loop.add_reader, self._loop.remove_reader),
            (pycurl.POLL_OUT, pycurl.CSELECT_OUT, self._loop.add_writer, self._loop.remove_writer),
        ):
            if wanted & event and not before & event:
                add(descriptor, self._act, descriptor, ready)
            elif before & event and not wanted & event:
                remove(descriptor)
        if wanted:
            self._watched[descriptor] = wanted
        return 0

    def _set_alarm(self, milliseconds: int) -> int:
        """Called by curl: when to be called next if no socket is ready before."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if milliseconds >= 0:
            self._alarm = self._loop.call_later(milliseconds / 1000, self._ring)
        return 0

    def _ring(self) -> None:
        self._alarm = None
        self._act(pycurl.SOCKET_TIMEOUT, 0)

    def _act(self, descriptor: int, ready: int) -> None:
        try:
            _, running = self._curl.socket_action(descriptor, ready)
            if running < len(self._running):
                self._collect()
        except Exception as error:
            log.exception("all transfers end", extra={"action": "network"})
            self._start_again(error)

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
        """Curl won't touch a multi handle again of which a callback has failed."""
        for handle in list(self._running):
            self._finish(handle, pycurl.error(pycurl.E_ABORTED_BY_CALLBACK, f"the transfer was aborted: {error}"))
        self.close()
        self._curl = self._open()


class Network:
    """The loop and its thread. Create it after the fork. Any thread may `start` or `call` coroutines; they run in the loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._multi, self._s3 = Multi(self.loop), Multi(self.loop)
        self._idle: list[pycurl.Curl] = []
        self._closing = False
        self._thread = Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T], done: Done | None = None) -> concurrent.futures.Future[T]:
        """Run a coroutine in the loop; cancelling the future cancels it. `done` is called in the loop's thread."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        if done is not None:
            future.add_done_callback(done)
        return future

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for it. Not for the loop's own thread."""
        return self.start(coroutine).result()

    async def perform(self, handle: pycurl.Curl, *, s3: bool = False) -> None:
        """Run a prepared handle; raises pycurl.error as its own `perform` would. Cancelling ends the transfer.

        Requests to the S3 server have connections of their own: a URL in a list that names this server must not get one of
        them, since its address has not been checked.
        """
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
                log.exception("the event loop goes on", extra={"action": "network"})
        self._multi.close()
        self._s3.close()
        for handle in self._idle:
            handle.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
