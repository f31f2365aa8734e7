"""Runs sections, most important first, until the time is up. One that fails or takes too long does not stop the others."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.figures import Figure
from bench.gpu.report import Report

AGAIN = 5.0
"""Seconds after which a section that has ignored its end is told again."""


class OutOfTime(BaseException):
    """The section's time is up. Not an Exception, as the measured code handles those."""


class NotHere(Exception):
    """What a section needs is missing, so it is skipped."""


@dataclass(frozen=True)
class Section:
    """Yields figures. It is skipped if less than `least` seconds are left, and stopped after `most`."""

    name: str
    least: float
    most: float
    run: Callable[[], Iterable[Figure]]


def run_sections(sections: Iterable[Section], report: Report, seconds: float, between: Callable[[], None]) -> None:
    """Run the sections within so many seconds; `between` is called after each of them, to free memory."""
    ends = time.monotonic() + seconds
    for section in sections:
        left = ends - time.monotonic()
        report.begin(section.name)
        if left < section.least:
            report.end("skipped", f"it takes {section.least:.0f} s or more, and {max(0.0, left):.0f} s were left")
            continue
        _run(section, report, min(left, section.most))
        between()


def _run(section: Section, report: Report, seconds: float) -> None:
    try:
        with _ending_after(seconds):
            for figure in section.run():
                report.add(figure)
    except OutOfTime:
        report.end("stopped", f"after {seconds:.0f} s")
    except NotHere as reason:
        report.end("skipped", str(reason))
    except Exception:  # noqa: BLE001
        report.end("failed", traceback.format_exc())
    else:
        report.end("done")


@contextmanager
def _ending_after(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
