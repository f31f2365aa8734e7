"""Logs as text and as JSON lines."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from imagemill.worker.node import logs

pytestmark = pytest.mark.usefixtures("logging_as_before")


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def fail() -> None:
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        logging.getLogger("imagemill.worker.line.line").exception("image failed", extra={"item": "000001"})


def test_json_line_has_message_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=True)
    logging.getLogger("imagemill.node").info("chunk %s", "done", extra={"action": "chunk", "done": 3, "path": Ellipsis})
    (line,) = lines(capsys)
    assert line.pop("time").endswith("+00:00")
    assert isinstance(line.pop("pid"), int)
    assert line == {
        "level": "INFO", "logger": "imagemill.node", "message": "chunk done", "action": "chunk", "done": 3, "path": "Ellipsis",
    }  # fmt: skip


def test_json_line_contains_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=True)
    fail()
    (line,) = lines(capsys)
    assert line["item"] == "000001"
    assert line["traceback"].startswith("Traceback")
    assert "RuntimeError: two\nlines" in line["traceback"]


def test_text_has_fields_on_one_line_and_the_traceback_below(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=False)
    logging.getLogger("imagemill.node").warning("chunk postponed", extra={"action": "chunk", "job": "a-b", "chunk": 3})
    fail()
    first, second, *trace = capsys.readouterr().err.splitlines()
    assert " WARNING " in first
    assert first.endswith(" chunk postponed action=chunk job=a-b chunk=3")
    assert second.endswith(" image failed item=000001")
    assert trace[0].startswith("Traceback")
    assert trace[-2:] == ["RuntimeError: two", "lines"]


def test_libraries_log_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=True)
    logging.getLogger("botocore.hooks").info("an event")
    logging.getLogger("worker").debug("a detail")
    logging.getLogger("botocore.hooks").warning("a problem")
    assert [line["message"] for line in lines(capsys)] == ["a problem"]


def test_second_set_up_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=False)
    logs.set_up(as_json=True)
    logging.getLogger("worker").info("once")
    assert [line["message"] for line in lines(capsys)] == ["once"]
