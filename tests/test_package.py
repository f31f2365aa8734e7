"""The public API, and the wheel as a user installs it: into an environment without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import click
import pytest

import imagemill
from tests.test_layers import loaded_by
from tests.workers import ROOT, clean_environment

PROJECT = ("LICENSE", "README.md", "pyproject.toml", "src", "shared", "producer", "worker")
DATA = (
    *("py.typed", "shared/ledger/lua/take.lua", "shared/ledger/lua/common.lua", "shared/presets.yaml"),
    "producer/report.html.j2",
)
HEAVY = ("boto3", "celery", "numpy", "PIL", "pydantic", "redis", "torch", "imagemill.shared", "imagemill.producer")


def run(*command: str | Path, cwd: Path) -> str:
    """The stdout of a command that must succeed, run without this checkout on its path."""
    environment = clean_environment()
    del environment["PYTHONPATH"]
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("project")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(project: Path, kind: str, target: Path) -> Path:
    """Build a `wheel` or an `sdist` without downloading anything."""
    target.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    run(sys.executable, "-W", "ignore", "-c", code, cwd=project)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(project, "wheel", tmp_path_factory.mktemp("built") / "wheel")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel; its dependencies come from this one's folder."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    install = ("install", "--disable-pip-version-check", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{Path(click.__file__).parents[1]}{os.linesep}")
    return python


def test_wheel_installs_one_package_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"imagemill", f"imagemill-{wheel.name.split('-')[1]}.dist-info"}


def test_wheel_contains_every_source_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for room in ("shared", "producer", "worker") for path in (ROOT / room).rglob("*.py")}
    assert {f"imagemill/{name}" for name in (*sources, *DATA)} <= names


def test_sdist_contains_what_the_wheel_contains(project: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(project, "sdist", tmp_path / "sdist")) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.name != "sdist")
    again = build(unpacked, "wheel", tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_installed_package_leaves_the_names_of_its_folders_free(python: Path, tmp_path: Path) -> None:
    find = "from importlib.util import find_spec; print([find_spec(n) for n in ('shared', 'producer', 'worker')])"
    assert run(python, "-c", find, cwd=tmp_path).strip() == "[None, None, None]"


def test_installed_command_runs(python: Path, tmp_path: Path) -> None:
    assert run(python.with_name("imagemill"), "--version", cwd=tmp_path).startswith("imagemill, version")
    assert "--gpu" in run(python.with_name("imagemill"), "worker", "--help", cwd=tmp_path)


def test_celery_finds_the_installed_application(python: Path, tmp_path: Path) -> None:
    assert "redis" in run(python, "-m", "celery", "-A", "imagemill.worker.app", "report", cwd=tmp_path)


def test_import_loads_nothing_but_the_package() -> None:
    assert loaded_by("import imagemill\ndir(imagemill)", *HEAVY) == set()


@pytest.mark.parametrize("name", imagemill.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(imagemill, name) is not None
    assert name in dir(imagemill)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Cleint"):
        _ = imagemill.Cleint
