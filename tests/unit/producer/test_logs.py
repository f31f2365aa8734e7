"""`imagemill logs`: a job's story from log files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from imagemill.producer.cli import main


def line(second: float, message: str, **fields: object) -> str:
    return json.dumps({"time": f"2026-11-29T08:00:{second:06.3f}+00:00", "level": "INFO", "message": message, **fields}) + "\n"


def told(*arguments: str, text: str = "") -> str:
    done = CliRunner().invoke(main, ["logs", *arguments], input=text, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def messages(output: str) -> list[str]:
    return [json.loads(each)["message"] for each in output.splitlines()]


def test_files_of_several_nodes_are_merged_by_time(tmp_path: Path) -> None:
    """Also gzipped ones, lines in a slightly wrong order, lines of a group of jobs, and other jobs left out."""
    (tmp_path / "one.log").write_text(
        line(1, "job begun", job="a") + line(5, "late", job="a") + line(4, "early", job="a") + line(4.5, "other", job="b")
    )
    with gzip.open(tmp_path / "two.log.1.gz", "wt") as file:
        file.write("not JSON\n{\n" + line(3, "child died", jobs=["a", "c"]) + line(2, "nobody", node="two"))
    for places in ([str(tmp_path)], [str(tmp_path / "*.log*")], [str(tmp_path / "one.log"), str(tmp_path / "two.log.1.gz")]):
        assert messages(told("--json", "a", *places)) == ["job begun", "child died", "early", "late"]


def test_lines_are_found_inside_those_of_log_drivers() -> None:
    text = (
        json.dumps({"log": line(1, "docker", job="a"), "stream": "stderr", "time": "2026"}) + "\n"
        + json.dumps({"MESSAGE": line(2, "journald", job="a").strip(), "PRIORITY": "6"}) + "\n"
        + "gpu0-1  | " + line(3, "compose", job="a")
    )  # fmt: skip
    assert messages(told("--json", "a", "-", text=text)) == ["docker", "journald", "compose"]


def test_story_shows_time_node_message_and_fields_but_no_control_characters() -> None:
    text = line(
        1, "image failed", job="a", node="gpu0@one", trace_id="12", action="record", code="x\x1b[2J", traceback="T\n  E"
    )
    first, *trace = told("a", "-", text=text).splitlines()
    assert first.split() == ["2026-11-29T08:00:01.000", "gpu0@one", "image", "failed", "code=x�[2J"]
    assert trace == ["    T", "      E"]


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [("plain text\n", 2, "IMAGEMILL_LOG_JSON=true"), (line(1, "begun", job="b"), 2, "nothing about job a in these files")],
)
def test_error_says_what_is_missing(text: str, code: int, reason: str) -> None:
    done = CliRunner().invoke(main, ["logs", "a", "-"], input=text)
    assert (done.exit_code, done.stdout) == (code, "")
    assert reason in done.stderr


def test_missing_file_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["logs", "a", str(tmp_path / "none.log")])
    assert done.exit_code == 2
    assert f"no log files at {tmp_path / 'none.log'}" in done.stderr
