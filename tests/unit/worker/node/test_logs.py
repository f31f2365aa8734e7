"""Logs as text and as JSON lines."""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from typing import Any

import pytest

from imagemill.shared import log_fields
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


def test_lines_say_which_job_a_thread_works_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_fields, "PROCESS", {})
    logs.set_up(as_json=True)
    log_fields.describe_process(node="gpu3@host", gpu=3)
    with log_fields.working_on(job="a", owner="shop", share="12"):
        logging.getLogger("worker").info("inside")
    logging.getLogger("worker").info("outside", extra={"owner": None})
    inside, outside = lines(capsys)
    about = {"node": "gpu3@host", "gpu": 3, "job": "a", "owner": "shop", "share": "12", "trace_id": log_fields.trace_id("a")}
    assert about.items() <= inside.items()
    assert about.keys() & outside.keys() == {"node", "gpu"}


def test_secrets_in_urls_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    word = "hunter2"
    for as_json in (True, False):
        logs.set_up(as_json=as_json)
        try:
            raise RuntimeError(f"GET https://u:{word}@h/a.png?X-Amz-Signature={word} failed")
        except RuntimeError:
            logging.getLogger("worker").exception(
                "redis://:%s@h", word, extra={"url": f"http://h/a?token={word}", "line": "1\n2"}
            )
    text = capsys.readouterr().err
    assert word not in text
    assert "redis://***@h" in text
    assert "line=1\\n2\n" in text


def test_json_covers_prints_warnings_and_uncaught_exceptions(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(as_json=True)
    print("printed\nby a library")  # noqa: T201
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("outdated", stacklevel=1)
    logging.getLogger("worker").info("wrong %d", "argument")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    sys.excepthook(ValueError, ValueError("at the end"), None)
    found = [line["message"] for line in lines(capsys)]
    assert found[:2] == ["printed", "by a library"]
    assert "UserWarning: outdated" in found[2]
    assert found[3:] == ["wrong %d ('argument',)", "uncaught exception in a thread", "uncaught exception"]


def test_untrusted_text_can_not_steer_a_terminal_and_is_raw_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\u202etxt.\u2028END\rok"
    logs.set_up(as_json=False)
    logging.getLogger("worker").warning("no %s", evil, extra={"item": evil})
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.endswith("no \ufffd[2J\ufffdtxt.\ufffdEND\\rok item=\ufffd[2J\ufffdtxt.\ufffdEND\\rok")
    logs.set_up(as_json=True)
    logging.getLogger("worker").warning("no %s", evil, extra={"item": evil})
    (told,) = lines(capsys)
    assert (told["message"], told["item"]) == (f"no {evil}", evil)


@pytest.mark.parametrize(
    "url", ["https://h/a.png#access_token=", "https://h/a.png?x=1#", "s3://b/a.png?X-Amz-Signature=", "http://h?"]
)
def test_fragments_and_queries_are_left_out(capsys: pytest.CaptureFixture[str], url: str) -> None:
    logs.set_up(as_json=True)
    logging.getLogger("worker").warning("no answer", extra={"url": f"{url}hunter2"})
    assert "hunter2" not in capsys.readouterr().err
