"""The wall: files whose decoders can't be trusted with time, memory or a pointer are read in helper processes.

A helper (helper.py) reads one file at a time. The kernel ends it when the file's CPU time is used up, and gives it no more
memory than the file may take; it can't open anything, and a crash costs only the file. Files and pixels are passed in shared
memory that this side makes and seals, everything else as JSON, and everything that a helper says is checked.

Helpers are started when they are first needed, as many as there are threads that decode at a time, and die with this process.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar, cast, get_type_hints

import numpy as np
from pydantic import TypeAdapter

from imagemill.shared.errors import ImageError, InternalError, OutOfMemory, TooCostly, Truncated, leaves
from imagemill.worker.imaging import costs
from imagemill.worker.imaging.facts import check_size
from imagemill.worker.imaging.headers import Header
from imagemill.worker.imaging.picture import Picture, Pixels
from imagemill.worker.imaging.png import MAX_PROFILE
from imagemill.worker.imaging.scale import fit
from imagemill.worker.imaging.wall_messages import EXTRA_BYTES, MESSAGE_BYTES, USUAL_BYTES, Packer, Shared, passing, unpack

START = "from imagemill.worker.imaging.helper import main; main()"
IDLE_SECONDS = 10.0
"""A helper that has used no CPU for this long hangs."""
START_SECONDS = 60.0
DYING_SECONDS = 5.0
MOST_TEXT = 500
"""Characters of a helper's error."""

_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}
_LIMITS = (signal.SIGPROF, signal.SIGXCPU)
_CODES = {kind.code: kind for kind in leaves(ImageError)}
T = TypeVar("T")


class _Died(Exception):
    """A helper is gone; `signal` is what ended it, 0 if it is not known."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class _Helper:
    """A helper process. `start` is the Python statement that it runs."""

    def __init__(self, start: str, idle: float) -> None:
        self._idle = idle
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._given, self._wanted = Shared(USUAL_BYTES), Shared(USUAL_BYTES)
        code = f"import sys; sys.path[:] = sys.argv[4:]; {start}"
        with theirs:
            fds = theirs.fileno(), self._given.fd, self._wanted.fd
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-B", "-c", code, *map(str, fds), *map(os.path.abspath, sys.path)],
                env=_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.PIPE,  # closes when this process dies, however it dies; the helper then dies, too
                stdout=subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,  # Ctrl+C is for us
            )
        self._socket.settimeout(START_SECONDS)
        try:
            ready = self._socket.recv(16)
        except OSError:
            ready = b""
        if ready != b"ready":
            self.close()
            raise InternalError("the process that decodes images could not be started; the log shows why")

    def ask(self, action: str, values: dict[str, Any], most: int, limits: tuple[float, int]) -> tuple[dict[str, Any], Any]:
        """The answer, and its fields if there are any; `most` is their size in bytes. Raises _Died."""
        packer = Packer()
        question = {"action": action, "fields": packer.pack(values), "seconds": limits[0], "memory": limits[1]}
        with _enough(self._given, packer.size) as given, _enough(self._wanted, most) as wanted:
            packer.write(given)
            own = {"given": given is not self._given, "wanted": wanted is not self._wanted}
            fds = [memory.fd for name, memory in (("given", given), ("wanted", wanted)) if own[name]]
            try:
                socket.send_fds(self._socket, [json.dumps(question | own).encode()], fds)
                raw = self._answer(limits[0])
            except ConnectionError:
                raw = b""
            if not raw:
                raise _Died(self.close(dying=True))
            try:
                answer = json.loads(raw)
                return answer, unpack(answer.get("fields"), wanted, copy=not own["wanted"])
            except (ValueError, TypeError, AttributeError, RecursionError):
                return {"error": InternalError.code, "message": "unreadable answer"}, None

    def _answer(self, seconds: float) -> bytes:
        """Wait for the answer. The kernel enforces the limits, unless the helper is idle or has lifted them."""
        began = used = self._cpu()
        while True:
            self._socket.settimeout(self._idle)
            try:
                return self._socket.recv(MESSAGE_BYTES)
            except TimeoutError:
                before, used = used, self._cpu()
                if used == before or used - began > 2 * seconds + 1:
                    raise _Died(signal.SIGXCPU) from None

    def _cpu(self) -> float:
        """CPU seconds that it has used."""
        times = Path(f"/proc/{self._process.pid}/stat").read_bytes().rpartition(b")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def close(self, *, dying: bool = False) -> int:
        """End it; the signal that ended it if it was `dying`, or 0 if it has ended by itself."""
        if dying:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(DYING_SECONDS)
        self._process.kill()
        status = self._process.wait()
        self._close()
        return max(0, -status)

    def forget(self) -> None:
        """After a fork: it is the other process's helper."""
        self._process.returncode = 0
        self._close()

    def _close(self) -> None:
        self._socket.close()
        self._given.close()
        self._wanted.close()
        if self._process.stdin is not None:
            self._process.stdin.close()


@contextmanager
def _enough(usual: Shared, size: int) -> Iterator[Shared]:
    """The `usual` memory, or as much as is needed."""
    if size <= usual.size:
        yield usual
        return
    own = Shared(size)
    try:
        yield own
    finally:
        own.close()


class Wall:
    """Reads files in helpers. Thread-safe. `start` is the Python statement that a helper runs."""

    def __init__(self, start: str = START, *, idle: float = IDLE_SECONDS) -> None:
        self._start, self._idle_seconds = start, idle
        self._lock = Lock()
        self._idle: list[_Helper] = []
        self._all: set[_Helper] = set()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def probe(self, data: bytes, kind: str, *, max_pixels: int) -> Header:
        """What `headers.probe` returns and raises; also TooCostly."""
        limits = costs.PROBE_SECONDS, costs.bytes_to_decode(0, len(data))
        header = self._ask(Header, "probe", {"data": data, "max_pixels": max_pixels}, kind, EXTRA_BYTES, limits)
        check_size(header.size, max_pixels)
        if header.format != kind or not 1 <= header.orientation <= 8 or len(header.icc or b"") > MAX_PROFILE:
            raise _unbelievable(kind)
        return header

    def decode(self, data: bytes, header: Header, *, edge: int | None, icc: Literal["srgb", "keep"]) -> Picture:
        """What `codec.decode` returns and raises; also TooCostly."""
        size, stored = fit(header.size, edge), header.size[0] * header.size[1]
        limits = costs.seconds_to_decode(stored), costs.bytes_to_decode(stored, len(data))
        values = {"data": data, "header": header, "edge": edge, "icc": icc}
        picture = self._ask(Picture, "decode", values, header.format, 4 * size[0] * size[1] + EXTRA_BYTES, limits)
        if picture.pixels.ndim != 3 or picture.pixels.shape[2] not in (3, 4) or picture.size != size:
            raise _unbelievable(header.format)
        return picture

    def close(self) -> None:
        """End all helpers."""
        with self._lock:
            helpers, self._all, self._idle = self._all, set(), []
        for helper in helpers:
            helper.close()

    def _ask(self, wanted: type[T], action: str, values: dict[str, Any], kind: str, most: int, limits: tuple[float, int]) -> T:
        """The dataclass that a helper makes of the values; `most` is its size in bytes, `limits` CPU seconds and bytes."""
        answer, values = self._answer(action, values, most, limits, kind)
        if "error" not in answer:
            return _made(wanted, values, kind)
        error = _CODES.get(str(answer["error"]), InternalError)
        if error is OutOfMemory:
            raise TooCostly(f"reading the {kind} file takes more than {limits[1] / 1e6:,.0f} MB of memory")
        raise error(str(answer.get("message"))[:MOST_TEXT])

    def _answer(self, action: str, values: dict[str, Any], most: int, limits: tuple[float, int], kind: str) -> Any:
        """The answer of an idle or a new helper. If something else kills it, another one gets a chance."""
        for _ in range(2):
            helper = self._take()
            try:
                answer, found = helper.ask(action, values, most, limits)
            except _Died as death:
                self._drop(helper)
                if death.signal in _LIMITS:
                    raise TooCostly(f"reading the {kind} file takes more than {limits[0]:.2g} s of CPU time") from death
                if not death.signal:
                    raise _unbelievable(kind) from death
                if death.signal != signal.SIGKILL:
                    name = signal.Signals(death.signal).name
                    raise Truncated(f"the {kind} file is damaged in a way that made its decoder crash ({name})") from death
            except BaseException:
                self._drop(helper)
                raise
            else:
                self._give_back(helper, answer.get("last") is not False)
                return answer, found
        raise OutOfMemory(f"the process that decodes {kind} files was killed twice; the host may be out of memory")

    def _take(self) -> _Helper:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        helper = _Helper(self._start, self._idle_seconds)
        with self._lock:
            self._all.add(helper)
        return helper

    def _give_back(self, helper: _Helper, last: bool) -> None:
        if last:
            self._drop(helper)
        else:
            with self._lock:
                self._idle.append(helper)

    def _drop(self, helper: _Helper) -> None:
        with self._lock:
            self._all.discard(helper)
        helper.close()

    def _forget(self) -> None:
        helpers, self._all, self._idle, self._lock = self._all, set(), [], Lock()
        for helper in helpers:
            helper.forget()


def _made(kind: type[T], values: Any, name: str) -> T:
    """A Header or Picture of these values. Raises InternalError if fields or types are wrong."""
    checks = _checks(cast(Any, kind))
    try:
        if values.keys() != checks.keys():
            raise ValueError("other fields")
        return kind(**{field: check(values[field]) for field, check in checks.items()})
    except (AttributeError, TypeError, ValueError) as error:  # pydantic's is a ValueError
        raise _unbelievable(name) from error


@cache
def _checks(kind: Any) -> dict[str, Callable[[Any], Any]]:
    """What checks each field of a dataclass."""
    hints = get_type_hints(kind)
    return {name: _array if name == "pixels" else TypeAdapter(hints[name]).validate_python for name in passing(kind)}


def _array(value: Any) -> Pixels:
    if not isinstance(value, np.ndarray):
        raise TypeError("no array")
    return value


def _unbelievable(kind: str) -> InternalError:
    return InternalError(f"the process that decodes {kind} files gave an answer that can't be right")


shared_wall = Wall()
"""The wall of this process."""
