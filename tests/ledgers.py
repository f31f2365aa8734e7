"""Both sides of the ledger in one object, for tests that play the producer and a worker."""

from __future__ import annotations

from imagemill.shared.ledger.leasing import WorkLedger
from imagemill.shared.ledger.submitting import SubmitLedger


class Ledger(SubmitLedger, WorkLedger):
    """Submits jobs, and works on them."""

    scripts = (*SubmitLedger.scripts, *WorkLedger.scripts)
