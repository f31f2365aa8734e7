"""Structured logs: a constant message followed by key=value fields, or one JSON object per line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_STANDARD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "data", "taskName"}


class Formatter(logging.Formatter):
    """Formats records as text or JSON, with the fields passed as `extra`."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        timestamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        if self._as_json:
            line = {"time": timestamp, "level": record.levelname, "logger": record.name, "pid": record.process}
            return json.dumps({**line, "message": record.getMessage(), **fields, **trace}, default=str)
        pairs = "".join(f" {name}={value}" for name, value in fields.items())
        line_of_text = f"{timestamp} {record.levelname:<7} {record.process} {record.getMessage()}{pairs}"
        return "\n".join([line_of_text, *trace.values()])


def set_up(*, as_json: bool, level: str = "INFO") -> None:
    """Log to stderr, in this process and in children forked later."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(as_json=as_json))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for noisy in ("PIL", "botocore", "boto3", "urllib3", "celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
