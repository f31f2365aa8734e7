"""Structured logs: a constant message followed by key=value fields, or one JSON object per line."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

import celery.apps.worker

from imagemill.shared.log_fields import current, trace_id
from imagemill.shared.plain_text import harmless

_STANDARD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "data", "taskName"}
MOST_CHARACTERS = 8000
"""Of a message, field or traceback. Docker splits lines longer than 16 kB, and longer writes of several processes may
mix."""
_PASSWORD = re.compile(r"(\w://)[^/\s@'\"]+@")
_QUERY = re.compile(r"((?:https?|s3)://[^\s?#'\"<>]+)([?#])[^\s'\"<>]+")


class Formatter(logging.Formatter):
    """Formats records as text or JSON, with the fields passed as `extra` and those of `imagemill.shared.log_fields`."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        own = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        fields = {**current(), **{name: _safe(value) for name, value in own.items() if value is not None}}
        if self._as_json and "job" in fields:
            fields["trace_id"] = trace_id(f"{fields['job']}")
        timestamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = _safe(_message(record))
        trace = {"traceback": _safe(self.formatException(record.exc_info))} if record.exc_info else {}
        if self._as_json:
            line = {"time": timestamp, "level": record.levelname, "logger": record.name, "pid": record.process}
            return json.dumps({**line, "message": message, **fields, **trace}, default=str)
        pairs = "".join(f" {name}={value}" for name, value in fields.items())
        line_of_text = f"{timestamp} {record.levelname:<7} {record.process} {message}{pairs}"
        one_line = harmless(line_of_text.replace("\r", "\\r").replace("\n", "\\n"))
        return "\n".join([one_line, *(harmless(line) for text in trace.values() for line in text.split("\n"))])


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  # a library's arguments don't match its message, which is no reason to lose either
        return f"{record.msg} {record.args}"


def _safe(value: Any) -> Any:
    """Without passwords in URLs and what follows ? or #, which may be a signature or a token; not too long."""
    if not isinstance(value, str):
        return value if isinstance(value, int | float | list | tuple | dict | None) else _safe(str(value))
    text = _QUERY.sub(r"\1\2...", _PASSWORD.sub(r"\1***@", value))
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS // 2]} ... {text[-MOST_CHARACTERS // 2 :]}"


class _Handler(logging.StreamHandler[TextIO]):
    """Writes each line at once, because the processes of a node share the file."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.stream.write(self.format(record) + "\n")
            self.stream.flush()
        except Exception:  # noqa: BLE001  # a full disk; logging's own report of it would not be JSON
            return


class _Lines:
    """Stands in for stdout or stderr: logs each line that somebody prints."""

    encoding = "utf-8"

    def __init__(self, name: str, target: TextIO) -> None:
        self.target, self._name, self._local = target, name, threading.local()

    def write(self, text: str) -> int:
        """Log the lines that are complete."""
        *lines, self._local.rest = (getattr(self._local, "rest", "") + text).split("\n")
        for line in lines:
            if line.strip():
                logging.getLogger(self._name).warning("%s", line.rstrip())
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Log lines."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Only the beginning of a line is held back."""

    def fileno(self) -> int:
        """The file's own, for those that pass it on."""
        return self.target.fileno()

    def isatty(self) -> bool:
        """No colours."""
        return False


def set_up(*, as_json: bool, level: str = "INFO") -> None:
    """Log to stderr, in this process and in children forked later. As JSON, whatever Python prints becomes such a line too."""
    stream = sys.stderr.target if isinstance(sys.stderr, _Lines) else sys.stderr
    handler = _Handler(stream)
    handler.setFormatter(Formatter(as_json=as_json))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for noisy in ("PIL", "botocore", "boto3", "urllib3", "celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level)))
    if as_json:
        _catch_everything()


def _catch_everything() -> None:
    """Log what would otherwise be printed: warnings, uncaught exceptions, and the words of Celery's signal handlers."""
    logging.captureWarnings(True)
    log = logging.getLogger("python")
    sys.excepthook = lambda *error: log.critical("uncaught exception", exc_info=error)
    sys.unraisablehook = lambda found: log.error("exception ignored", extra={"where": repr(found.object)}, exc_info=_of(found))
    threading.excepthook = lambda found: log.critical("uncaught exception in a thread", exc_info=_of(found))
    celery.apps.worker.safe_say = lambda text, *_: logging.getLogger("celery").warning("%s", text.strip())
    for name in ("stdout", "stderr"):
        for attribute in (name, f"__{name}__"):
            stream = getattr(sys, attribute)
            if stream is not None and not isinstance(stream, _Lines):
                setattr(sys, attribute, _Lines(name, stream))


def _of(found: Any) -> Any:
    """The exception that a hook was given."""
    return found.exc_type, found.exc_value, found.exc_traceback


def early() -> None:
    """Set up logs as the environment says, before the settings can be read; they may be what is wrong."""
    set_up(as_json=os.environ.get("IMAGEMILL_LOG_JSON", "").strip().lower() in ("1", "true", "yes", "on", "t", "y"))


def as_json() -> bool:
    """Whether this process logs JSON lines."""
    return isinstance(sys.stderr, _Lines)
