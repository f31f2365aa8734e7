"""Ends a benchmark together with what it has started."""

from __future__ import annotations

import signal
import sys


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: nodes and Redis are stopped, and temporary folders deleted.

    Nodes also end if this process is killed, see tests/workers.py.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
