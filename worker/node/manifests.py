"""The manifests that a child is writing, each in one of its line's threads."""

from __future__ import annotations

import logging
from collections.abc import Callable

from imagemill.shared.errors import ImagemillError, JobNewer, JobUnreadable
from imagemill.shared.ledger.leasing import ManifestDue, WorkLedger
from imagemill.worker.line.line import Line
from imagemill.worker.node.shares import Jobs

log = logging.getLogger(__name__)

SKIP_SECONDS = 60.0
"""How long this child leaves a job of a newer version to other nodes."""


class Manifests:
    """Writes manifests. The feeder renews their leases. `avoid` is called with a job to be left to others, and for how long."""

    def __init__(self, ledger: WorkLedger, jobs: Jobs, line: Line, *, avoid: Callable[[str, float], None]) -> None:
        self._ledger, self._jobs, self._line, self._avoid = ledger, jobs, line, avoid
        self._due: dict[str, ManifestDue] = {}

    def __bool__(self) -> bool:
        return bool(self._due)

    def due(self) -> list[ManifestDue]:
        """Those that are being written."""
        return list(self._due.values())

    def begin(self, due: ManifestDue, over: Callable[[], None]) -> None:
        """Write a manifest; `over` is called when that has ended, however it ended."""
        if due.job in self._due:  # its lease expired while Redis was away
            self._due[due.job].stop.set()
        self._due[due.job] = due
        self._line.after.submit(self._write, due, over)

    def stop(self) -> None:
        """Leave them to others."""
        for due in self.due():
            due.stop.set()

    def _write(self, due: ManifestDue, over: Callable[[], None]) -> None:
        try:
            self._jobs.write_manifest(due)
        except JobNewer as error:
            log.warning("manifest left to newer nodes", extra={"action": "manifest", "job": due.job, "reason": error.message})
            self._avoid(due.job, SKIP_SECONDS)
        except JobUnreadable as error:
            self._ledger.condemn(due.job, error.message)
        except ImagemillError as error:  # its lease expires, and it is handed out again
            log.warning("manifest postponed", extra={"action": "manifest", "job": due.job, "reason": error.message})
        except Exception:  # a bug
            log.exception("manifest postponed", extra={"action": "manifest", "job": due.job})
        finally:
            if self._due.get(due.job) is due:
                del self._due[due.job]
            over()
