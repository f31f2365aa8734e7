"""Runs code on files of unknown origin in a separate process, because it may crash or use a lot of memory or time."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
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

    Raises TrialDied if that process dies. The kernel kills it first if memory runs out.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_limited) as pool:
        try:
            return pool.submit(function, *arguments, **named).result()
        except BrokenProcessPool as error:
            raise TrialDied(
                f"its test run crashed, ran out of memory, or took more than {MINUTES} minutes of CPU time"
            ) from error


def _limited() -> None:
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.nice(5)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (MINUTES * 60, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
