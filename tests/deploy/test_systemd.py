"""The systemd units are valid, sandboxed, and let a node drain."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.workers import ROOT

UNITS = ROOT / "deploy" / "systemd"
INSTANCES = ["imagemill-worker@0", "imagemill-worker-cpu", "imagemill-exporter", "imagemill-flower"]

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or not Path("/lib/systemd/system").is_dir(), reason="systemd is not installed"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a host on which imagemill and its units are installed."""
    units = tmp_path / "etc" / "systemd" / "system"
    shutil.copytree(UNITS, units)
    shutil.copytree("/lib/systemd/system", tmp_path / "lib" / "systemd" / "system", symlinks=True)
    programs = tmp_path / "opt" / "imagemill" / "bin"
    programs.mkdir(parents=True)
    program = programs / "imagemill"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def analyze(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", f"--root={root}", "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "LC_ALL": "C"})


@needs_systemd
def test_systemd_finds_no_fault_in_the_units(root: Path) -> None:
    verified = analyze(root, "verify", "--man=no", *(f"{name}.service" for name in INSTANCES))
    assert (verified.returncode, verified.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("name", INSTANCES)
def test_units_are_exposed_below_3_of_10(name: str, root: Path) -> None:
    rated = analyze(root, "security", "--offline=true", "--threshold=30", f"{name}.service")
    assert rated.returncode == 0, rated.stdout + rated.stderr


@pytest.mark.parametrize("name", ["imagemill-worker@", "imagemill-worker-cpu"])
def test_a_stopping_node_may_finish_its_images_and_outlives_a_child_that_ran_out_of_memory(name: str) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNITS / f"{name}.service")
    service = unit["Service"]
    assert service["KillMode"] == "mixed"  # SIGTERM for the parent alone
    assert float(service["TimeoutStopSec"]) > 90
    assert service["OOMPolicy"] == "continue"


def test_every_unit_is_tested() -> None:
    assert {path.name for path in UNITS.glob("*.service")} == {f"{name.replace('@0', '@')}.service" for name in INSTANCES}
