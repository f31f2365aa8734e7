"""A TCP proxy on loopback that disturbs the connections through it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Literal

Mode = Literal["pass", "refuse", "stall"]
BLOCK = 64 * 1024
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections from a port of 127.0.0.1 to another, in a thread of its own.

    mode: pass; refuse: reset what is open and refuse new connections; stall: forward nothing, as when a cable is pulled -
    what has been sent meanwhile arrives after the next change to pass.
    `target`, the port to connect to, may change; open connections stay where they are.
    `delay` seconds pass before each block is forwarded.
    `cut_up` and `cut_down`: how many bytes a connection may carry to and from the target until it is reset.
    `connections` counts those that were accepted, `cuts` those that were reset for their length.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay = 0.0
        self.cut_up: int | None = None
        self.cut_down: int | None = None
        self.connections = self.cuts = 0
        self.port = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listener: socket.socket | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def url(self, scheme: str = "http", path: str = "") -> str:
        """A URL that leads through the proxy."""
        return f"{scheme}://127.0.0.1:{self.port}{path}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- for tests ------------------------------------------------------------------------------

    def set(self, mode: Mode) -> None:
        """Change the mode; it holds when this returns."""
        self._call(self._set(mode))

    def reset(self) -> int:
        """Reset all open connections, and return how many."""
        count: int = self._call(self._reset())
        return count

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._open) // 2

    # --- in the loop ----------------------------------------------------------------------------

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        # Not an asyncio.Server: closed while it accepts, it leaves sockets open.
        self._listener = listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self.port = listener.getsockname()[1]
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept, listener)

    def _refuse(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def _set(self, mode: Mode) -> None:
        if mode == "stall":
            self._flowing.clear()
        else:
            self._flowing.set()
        if mode == "refuse":
            self._refuse()
            await self._reset()
        elif self._listener is None:
            await self._listen()

    async def _reset(self) -> int:
        count = self.open
        for writer in list(self._open):
            _abort(writer)
        return count

    async def _close(self) -> None:
        self._refuse()
        await _turns()  # the tasks of those who have just been accepted begin
        await self._reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await _turns()  # connections are closed

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # the client has left
            return
        self.connections += 1
        connection.setblocking(False)
        task = self._loop.create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=connection)
        except BaseException:
            connection.close()
            raise
        try:
            await self._forward(reader, writer)
        except OSError:  # the target refuses, or one of the two has gone
            _abort(writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            await self._flowing.wait()
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target)
            self._open.add(target_writer)
            try:
                up = self._pump(reader, target_writer, "cut_up", writer)
                down = self._pump(target_reader, writer, "cut_down", target_writer)
                await asyncio.gather(up, down)
            finally:
                self._open.discard(target_writer)
                target_writer.close()
        finally:
            self._open.discard(writer)
            writer.close()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, cut: str, back: asyncio.StreamWriter
    ) -> None:
        carried = 0
        try:
            while block := await source.read(BLOCK):
                await self._flowing.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                most = getattr(self, cut)
                if most is not None and carried + len(block) > most:
                    sink.write(block[: max(0, most - carried)])
                    await sink.drain()
                    self.cuts += 1
                    _abort(sink)
                    _abort(back)
                    return
                carried += len(block)
                sink.write(block)
                await sink.drain()
            await self._flowing.wait()
            if not sink.is_closing():
                sink.write_eof()
        except OSError:  # one side is gone, so the other goes
            _abort(sink)
            _abort(back)


async def _turns() -> None:
    """Let the loop do what it has put off."""
    for _ in range(5):
        await asyncio.sleep(0)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Reset a connection."""
    connection = writer.get_extra_info("socket")
    with suppress(OSError, AttributeError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.transport.abort()
