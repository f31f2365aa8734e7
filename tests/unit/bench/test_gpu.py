"""The parts of `python3 -m bench.gpu` that decide what is run and what is kept; the measurements need a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from bench.figures import Figure, figure
from bench.gpu.report import Report
from bench.gpu.sections import NotHere, Section, run_sections

MACHINE = {"date": "2026-11-29", "card": "a card"}


def measuring() -> Iterator[Figure]:
    yield figure("speed", 12.34567, "images/s", 10.0)


def failing() -> Iterator[Figure]:
    yield figure("before", 1.0)
    raise RuntimeError("no kernel image is available")


def waiting() -> Iterator[Figure]:
    yield figure("before", 1.0)
    Event().wait()


def run(folder: Path, *sections: tuple[str, Callable[[], Iterator[Figure]]], **limits: float) -> Report:
    """Run the sections, each with the same `least` and `most`, within a minute."""
    report = Report(folder, MACHINE)
    least, most = limits.get("least", 0.0), limits.get("most", 30.0)
    run_sections([Section(name, least, most, section) for name, section in sections], report, 60.0, lambda: None)
    return report


def results(folder: Path) -> list[dict[str, Any]]:
    sections: list[dict[str, Any]] = json.loads((folder / "results-gpu.json").read_text())["sections"]
    return sections


def test_failed_section_is_reported_and_stops_no_other(tmp_path: Path) -> None:
    report = run(tmp_path, ("bad", failing), ("good", measuring))
    bad, good = results(tmp_path)
    assert (bad["state"], [row["name"] for row in bad["figures"]]) == ("failed", ["before"])
    assert "RuntimeError: no kernel image is available" in bad["why"]
    assert (good["state"], good["figures"][0]["value"]) == ("done", 12.35)
    assert report.status() == 1
    assert "- bad: failed (RuntimeError: no kernel image is available)" in report.rows.read_text()


def test_section_that_takes_too_long_is_stopped_and_keeps_its_figures(tmp_path: Path) -> None:
    run(tmp_path, ("slow", waiting), ("next", measuring), most=0.05)
    slow, after = results(tmp_path)
    assert (slow["state"], len(slow["figures"])) == ("stopped", 1)
    assert after["state"] == "done"


def test_section_for_which_no_time_is_left_is_skipped_and_named(tmp_path: Path) -> None:
    report = run(tmp_path, ("long", measuring), least=61.0)
    assert results(tmp_path)[0]["state"] == "skipped"
    assert "- long: skipped (it takes 61 s or more, and 60 s were left)" in report.rows.read_text()
    assert report.status() == 0


def test_section_whose_library_is_missing_is_skipped(tmp_path: Path) -> None:
    def needy() -> Iterator[Figure]:
        raise NotHere("it needs onnx")
        yield

    assert run(tmp_path, ("onnx", needy)).status() == 0
    assert (results(tmp_path)[0]["state"], results(tmp_path)[0]["why"]) == ("skipped", "it needs onnx")


def test_rows_replace_those_of_the_last_run_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\nbefore\n")
    run(tmp_path, ("previous", measuring))
    path.write_text(path.read_text() + "\nafter\n")
    run(tmp_path, ("new", measuring))
    text = path.read_text()
    assert text.startswith("# Results\n\nbefore\n")
    assert text.endswith("\n\nafter\n")
    assert "| new: speed | 12.35 images/s | 10 images/s | yes |" in text
    assert "previous" not in text


def test_figures_are_kept_when_the_run_is_cut_off(tmp_path: Path) -> None:
    def cut_off() -> Iterator[Figure]:
        yield figure("before", 1.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ("first", measuring), ("second", cut_off))
    assert [(part["state"], len(part["figures"])) for part in results(tmp_path)] == [("done", 1), ("running", 1)]
