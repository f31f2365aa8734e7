"""`imagemill tune` as its user sees it, with an engine that needs no weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from imagemill.producer.lazy_commands import SHORT_HELP, Commands
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations.registry import create
from imagemill.worker.tuning import command as module
from imagemill.worker.tuning import saved_sizes as tuned

Run = Callable[..., Result]
QUICK = ("--size", "64x48", "--seconds", "0")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("IMAGEMILL_WEIGHTS__FOLDER", str(tmp_path))
    monkeypatch.setattr(module, "pin", lambda _: None)  # this process has begun already
    group = Commands("imagemill")
    group.add_command(module.tune)
    return lambda *words: CliRunner().invoke(group, ["tune", *words])


def test_the_command_has_its_line_of_help() -> None:
    assert "tune" in SHORT_HELP


def test_it_prints_a_table_and_remembers(run: Run, tmp_path: Path) -> None:
    done = run("inpaint", "--engine", "opencv", "--cpu", "--most", "4", *QUICK)
    assert done.exit_code == 0, done.output
    head, *rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert head == ["batch", "images/s", "peak", "memory"]
    assert [row[0] for row in rows if row[0].isdecimal()] == ["1", "2", "4"]
    assert "inpaint (opencv) on cpu: batches of up to 4 fit" in done.stdout
    operation = create("inpaint", "opencv")
    operation.load(Device())
    (known,) = tuned.read(tmp_path, "cpu", operation.spec).values()
    assert sorted(known.peaks) == [1, 2, 4]
    assert known.fits == 4


def test_json_is_for_programs(run: Run, tmp_path: Path) -> None:
    done = run("stylize", "--engine", "opencv", "--cpu", "--json", "--set", "style=detail", "--set", "long-edge=64", *QUICK)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found.keys() == {"operation", "engine", "device", "kind", "batch", "fastest", "tries", "path"}
    assert (found["operation"], found["engine"], found["device"], found["batch"]) == ("stylize", "opencv", "cpu", 1)
    assert found["fastest"] == 1
    (only,) = found["tries"]
    assert only.keys() == {"batch", "images_per_second", "peak_bytes", "fits"}
    assert only["images_per_second"] > 0
    assert Path(found["path"]) == tmp_path / "tuned" / "cpu.json"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cpu",), "say what to try: remove-background, inpaint"),
        (("stylize", "--engine", "opencv"), "say where to try"),
        (("stylize", "--engine", "opencv", "--cpu", "--gpu", "0"), "say where to try"),
        (("stylize", "--engine", "opencb", "--cpu"), "did you mean"),
        (("stylize", "--engine", "opencv", "--cpu", "--set", "style"), "--set takes KEY=VALUE"),
        (("stylize", "--engine", "opencv", "--cpu", "--set", "stile=detail"), "style"),
        (("stylize", "--engine", "opencv", "--cpu", "--size", "huge"), "--size takes WIDTHxHEIGHT"),
        (("stylize", "--engine", "opencv", "--cpu", "--size", "0x10"), "--size takes WIDTHxHEIGHT"),
    ],
)
def test_what_is_wrong_is_said(words: tuple[str, ...], said: str, run: Run) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_folder_that_can_not_be_written_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tuned").write_text("in the way")
    done = run("stylize", "--engine", "opencv", "--cpu", *QUICK)
    assert done.exit_code == 2
    assert str(tmp_path) in done.stderr


def test_a_preset_names_the_operation_its_engine_and_its_options(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("sketch-small:\n  description: x\n  operation: stylize\n  engine: opencv\n  options: {long_edge: 32}\n")
    monkeypatch.setenv("IMAGEMILL_PRESETS", str(own))
    done = run("--preset", "sketch-small", "--cpu", "--json", *QUICK)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["operation"], found["engine"]) == ("stylize", "opencv")
    assert run("inpaint", "--preset", "sketch-small", "--cpu", *QUICK).exit_code == 2
