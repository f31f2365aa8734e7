"""What happens to a list whose writing to the ledger breaks off."""

from __future__ import annotations

import logging
from typing import Self

from imagemill.shared.errors import BrokerUnavailable, InvalidSource
from imagemill.shared.ledger.submitting import SUBMITTING_SECONDS, SubmitLedger

log = logging.getLogger("imagemill.client")


class Writing:
    """Around the writing of a job. If it fails, the job is discarded, or kept for the next attempt (`keep`).

    `images` is how many are written; `sealing` is set when all are. A failure of Redis says so.
    """

    def __init__(self, ledger: SubmitLedger, job: str, *, keep: bool) -> None:
        self._ledger, self._job, self._keep = ledger, job, keep
        self.images, self.sealing = 0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            return
        if not self._keep or isinstance(error, InvalidSource):  # the list will be a different one once it is valid
            self._discard(after=error)
        if isinstance(error, BrokerUnavailable):
            raise BrokerUnavailable(f"{error.message.rstrip('.')}; {self._outcome()}") from error

    def _outcome(self) -> str:
        """What is queued."""
        if self.sealing and not self._keep:  # its last answer may be lost
            return f"`imagemill status {self._job}` says whether the job is queued"
        if not self._keep:
            return "nothing was queued"
        hour = f"within {SUBMITTING_SECONDS // 60} minutes"
        return (
            f"at least {self.images:,} images of job {self._job} are in Redis, and none is handed out before all are; "
            f"submit the same list with the same name {hour} to continue"
        )

    def _discard(self, after: BaseException) -> None:
        try:
            self._ledger.discard(self._job)
        except BrokerUnavailable as error:
            extra = {"action": "discard", "job": self._job, "error": str(error)}
            level = logging.INFO if isinstance(after, BrokerUnavailable) else logging.WARNING  # an outage is reported anyway
            log.log(level, "unfinished list not discarded; it will expire", extra=extra)
