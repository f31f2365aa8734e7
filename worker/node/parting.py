"""Processes that end when the one that started them does, for whatever reason."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # sys/prctl.h
STARTER = "IMAGEMILL_STARTED_BY"
"""The variable in which a supervisor tells its nodes its process ID."""


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which must have started it, ends; end now if it already has.

    Nothing gentler would do: a process hanging in its driver would not notice, and two nodes would share a GPU. No work is
    lost.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_supervisor() -> None:
    """Called by a node as it starts; does nothing if no supervisor started it."""
    starter = os.environ.pop(STARTER, "")
    if starter.isdecimal():
        die_with(int(starter))
