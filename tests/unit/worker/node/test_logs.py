"""Logs as text for people and as JSON lines for programs."""

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


def test_a_line_of_json_has_the_message_and_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=True)
    logging.getLogger("imagemill.node").info("chunk %s", "done", extra={"action": "chunk", "done": 3, "path": Ellipsis})
    (line,) = lines(capsys)
    assert line.pop("time").endswith("+00:00")
    assert isinstance(line.pop("pid"), int)
    assert line == {
        "level": "INFO", "logger": "imagemill.node", "message": "chunk done", "action": "chunk", "done": 3, "path": "Ellipsis",
    }  # fmt: skip


def test_a_traceback_stays_in_its_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=True)
    fail()
    (line,) = lines(capsys)
    assert line["item"] == "000001"
    assert line["trace"].startswith("Traceback")
    assert "RuntimeError: two\nlines" in line["trace"]


def test_text_is_one_line_with_its_fields_and_the_traceback_below(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=False)
    logging.getLogger("imagemill.node").warning("chunk put off", extra={"action": "chunk", "job": "a-b", "chunk": 3})
    fail()
    first, second, *trace = capsys.readouterr().err.splitlines()
    assert " WARNING " in first
    assert first.endswith(" chunk put off action=chunk job=a-b chunk=3")
    assert second.endswith(" image failed item=000001")
    assert trace[0].startswith("Traceback")
    assert trace[-2:] == ["RuntimeError: two", "lines"]


def test_what_others_tell_in_passing_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=True)
    logging.getLogger("botocore.hooks").info("an event")
    logging.getLogger("worker").debug("a detail")
    logging.getLogger("botocore.hooks").warning("a problem")
    assert [line["message"] for line in lines(capsys)] == ["a problem"]


def test_setting_up_twice_does_not_log_twice(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=False)
    logs.set_up(as_json=True)
    logging.getLogger("worker").info("once")
    assert [line["message"] for line in lines(capsys)] == ["once"]
