"""A process that reads images behind the wall (wall.py): it takes one file at a time, and can do nothing else.

It runs with an empty environment. Once it has loaded its libraries, it can't open files or sockets, start programs, or signal
others (seccomp.py), and the kernel ends it when a file's CPU time is used up or when its parent is gone.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
from PIL import AvifImagePlugin

from imagemill.shared.errors import ImageError, InternalError, OutOfMemory, sentence
from imagemill.worker.imaging import codec, headers, seccomp
from imagemill.worker.imaging.headers import Header
from imagemill.worker.imaging.picture import Picture
from imagemill.worker.imaging.wall_messages import MESSAGE_BYTES, USUAL_BYTES, Packer, Shared, unpack

GROWN = 128 * 2**20
"""Bytes: a helper that has grown by more is replaced."""

LATE = ("pillow_heif.as_plugin", "pillow_jxl", "encodings.utf_16_be", "encodings.latin_1")
"""Modules that are loaded when they are needed: those of the extra `formats`, and what text in profiles is written in."""

_PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Serve the socket whose number is the first argument, and share the memory of the next two with the other side."""
    _die_with_parent()
    cv2.setNumThreads(1)
    cv2.ocl.setUseOpenCL(False)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # otherwise as many as there are cores, for each image
    for module in LATE:  # now, since nothing can be opened later
        with suppress(ImportError):
            importlib.import_module(module)
    number, given, wanted = map(int, sys.argv[1:4])
    with socket.socket(fileno=number) as parent:
        sizes = os.open("/proc/self/statm", os.O_RDONLY)
        with suppress(OSError):  # if memory runs out, the kernel should end us and not the worker
            Path("/proc/self/oom_score_adj").write_text("1000")
        parent.send(b"ready")
        _confine()
        _serve(parent, Shared(USUAL_BYTES, given), Shared(USUAL_BYTES, wanted), sizes)


def _die_with_parent() -> None:
    """Let the kernel end this process when its standard input closes, and no other signal of the parent's terminal."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGIO, signal.SIGPROF, signal.SIGXCPU, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)


def _confine() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)
    for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 16)):
        resource.setrlimit(kind, (most, most))
    seccomp.confine()


def _serve(parent: socket.socket, usual_given: Shared, usual_wanted: Shared, sizes: int) -> None:
    idle, (_, most) = _size(sizes), resource.getrlimit(resource.RLIMIT_AS)
    while True:
        message, fds, _, _ = socket.recv_fds(parent, MESSAGE_BYTES, 2)
        if not message:
            return
        question = json.loads(message)
        resource.setrlimit(resource.RLIMIT_AS, (_least(_size(sizes) + question["memory"], most), most))
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
        own = [Shared(os.fstat(fd).st_size, fd) for fd in fds]
        given = own.pop(0) if question["given"] else usual_given
        wanted = own.pop(0) if question["wanted"] else usual_wanted
        answer = _answer(question, given, wanted)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        for memory in {given, wanted} - {usual_given, usual_wanted}:
            memory.close()
        last = answer.get("error") == OutOfMemory.code or _size(sizes) > idle + GROWN
        parent.send(json.dumps({**answer, "last": last}).encode())


def _answer(question: dict[str, Any], given: Shared, wanted: Shared) -> dict[str, Any]:
    """What came of a question: packed fields, or an error."""
    try:
        packer = Packer()
        found = packer.pack(ACTIONS[question["action"]](**unpack(question["fields"], given, copy=True)))
        packer.write(wanted)
        return {"fields": found}
    except ImageError as error:
        return {"error": error.code, "message": error.message}
    except MemoryError:
        return {"error": OutOfMemory.code, "message": ""}
    except Exception as error:  # noqa: BLE001  # the parent logs it
        return {"error": InternalError.code, "message": f"{type(error).__name__}: {sentence(error)}"}


def _size(sizes: int) -> int:
    """Bytes of this process's address space."""
    return int(os.pread(sizes, 100, 0).split()[0]) * _PAGE


def _least(wanted: int, limit: int) -> int:
    return wanted if limit == resource.RLIM_INFINITY else min(wanted, limit)


def _probe(data: bytes, max_pixels: int) -> Header:
    return headers.probe(data, max_pixels=max_pixels)


def _decode(data: bytes, header: dict[str, Any], edge: int | None, icc: Any) -> Picture:
    return codec.decode_here(data, Header(**header), edge=edge, icc=icc)


ACTIONS: dict[str, Callable[..., Any]] = {"probe": _probe, "decode": _decode}
