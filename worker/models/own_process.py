"""Runs code on files of unknown origin in a separate process, because it may crash or use a lot of memory or time."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import ParamSpec, TypeVar

from imagemill.shared.errors import ConfigurationError

MINUTES = 60
"""CPU time that a trial may take."""


class TrialDied(ConfigurationError, code=ConfigurationError.code):
    """The process of a trial has died: it crashed, or was killed for taking too much."""


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def apart(function: Callable[Arguments, Result], /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
    """What a module's function returns or raises, called in a new process.

    Raises TrialDied if that process dies. The kernel kills it first if memory runs out. It ends when this one does, and at
    Ctrl-C.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_limited) as pool:
        with _deaf_to_ctrl_c():
            outcome = pool.submit(function, *arguments, **named)
        try:
            return outcome.result()
        except BrokenProcessPool as error:
            raise TrialDied(
                f"its test run crashed, ran out of memory, or took more than {MINUTES} minutes of CPU time"
            ) from error
        except (KeyboardInterrupt, SystemExit):
            for process in list(pool._processes.values()):  # or the pool would wait for the end of the trial
                process.kill()
            raise


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started here never get Ctrl-C, which is for the one that started them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _limited() -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.nice(5)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (MINUTES * 60, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
