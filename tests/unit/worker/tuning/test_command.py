"""`imagemill tune` from the command line, with an engine that needs no weights."""

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
from imagemill.worker.tuning import saved_sizes

Run = Callable[..., Result]
QUICK = ("--size", "64x48", "--seconds", "0")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("IMAGEMILL_WEIGHTS__FOLDER", str(tmp_path))
    monkeypatch.setattr(module, "pin", lambda _: None)  # too late for this process
    group = Commands("imagemill")
    group.add_command(module.tune)
    return lambda *words: CliRunner().invoke(group, ["tune", *words])


def test_tune_is_listed_in_the_help() -> None:
    assert "tune" in SHORT_HELP


def test_tune_prints_a_table_and_saves_the_sizes(run: Run, tmp_path: Path) -> None:
    done = run("inpaint", "--engine", "opencv", "--cpu", "--most", "4", *QUICK)
    assert done.exit_code == 0, done.output
    head, *rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert head == ["batch", "images/s", "peak", "memory"]
    assert [row[0] for row in rows if row[0].isdecimal()] == ["1", "2", "4"]
    assert "inpaint (opencv) on cpu: largest batch that fits 4" in done.stdout
    operation = create("inpaint", "opencv")
    operation.load(Device())
    (known,) = saved_sizes.read(tmp_path, "cpu", operation.spec).values()
    assert sorted(known.peaks) == [1, 2, 4]
    assert known.fits == 4


def test_tune_prints_one_json_object(run: Run, tmp_path: Path) -> None:
    done = run("stylize", "--engine", "opencv", "--cpu", "--json", "--set", "style=detail", "--set", "long-edge=64", *QUICK)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result.keys() == {"operation", "engine", "device", "kind", "batch", "fastest", "tries", "path"}
    assert (result["operation"], result["engine"], result["device"], result["batch"]) == ("stylize", "opencv", "cpu", 1)
    assert result["fastest"] == 1
    (trial,) = result["tries"]
    assert trial.keys() == {"batch", "images_per_second", "peak_bytes", "fits"}
    assert trial["images_per_second"] > 0
    assert Path(result["path"]) == tmp_path / "tuned" / "cpu.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cpu",), "choose an operation (remove-background, inpaint"),
        (("stylize", "--engine", "opencv"), "choose a device"),
        (("stylize", "--engine", "opencv", "--cpu", "--gpu", "0"), "choose a device"),
        (("stylize", "--engine", "opencb", "--cpu"), "did you mean"),
        (("stylize", "--engine", "opencv", "--cpu", "--set", "style"), "--set takes KEY=VALUE"),
        (("stylize", "--engine", "opencv", "--cpu", "--set", "stile=detail"), "style"),
        (("stylize", "--engine", "opencv", "--cpu", "--size", "huge"), "--size takes WIDTHxHEIGHT"),
        (("stylize", "--engine", "opencv", "--cpu", "--size", "0x10"), "--size takes WIDTHxHEIGHT"),
    ],
)
def test_tune_refuses_wrong_arguments(words: tuple[str, ...], message: str, run: Run) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_tune_names_the_folder_when_results_cannot_be_saved(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tuned").write_text("in the way")
    done = run("stylize", "--engine", "opencv", "--cpu", *QUICK)
    assert done.exit_code == 2
    assert str(tmp_path) in done.stderr


def test_tune_takes_operation_engine_and_options_from_a_preset(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("sketch-small:\n  description: x\n  operation: stylize\n  engine: opencv\n  options: {long_edge: 32}\n")
    monkeypatch.setenv("IMAGEMILL_PRESETS", str(own))
    done = run("--preset", "sketch-small", "--cpu", "--json", *QUICK)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["operation"], result["engine"]) == ("stylize", "opencv")
    assert run("inpaint", "--preset", "sketch-small", "--cpu", *QUICK).exit_code == 2
