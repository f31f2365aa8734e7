"""The files in deploy/requirements, from which images install, agree with pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.workers import ROOT

FOLDER = ROOT / "deploy" / "requirements"
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
ELSEWHERE = {"demo", "dev", "docs", "metrics", "release", "rembg-gpu"}  # developers' own, and parts of others
FILES = {
    **{extra: [extra] for extra in sorted(EXTRAS.keys() - ELSEWHERE)},
    "gpu": ["formats", "rembg-gpu", "lama", "diffusion"],
}
STALE = "run `make locks`"


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return match[0].lower().replace("_", "-")


def direct(extras: list[str]) -> set[str]:
    """The names that these extras and the project itself require."""
    names = {name_of(requirement) for requirement in PYPROJECT["project"]["dependencies"]}
    for extra in extras:
        for requirement in EXTRAS[extra]:
            own = re.fullmatch(r"imagemill\[([\w,-]+)\]", requirement)
            names |= direct(own[1].split(",")) if own else {name_of(requirement)}
    return names


def pins(path: Path) -> dict[str, set[str]]:
    """The versions of each package, of which markers choose one."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        found.setdefault(name_of(name), set()).add(version)
    return found


CONSTRAINTS = pins(ROOT / "constraints.txt")


def test_each_extra_that_an_image_may_install_has_a_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {*FILES, "build"}, STALE


@pytest.mark.parametrize("file", FILES)
def test_files_have_what_pyproject_requires_in_the_versions_of_the_constraints(file: str) -> None:
    locked = pins(FOLDER / f"{file}.txt")
    assert direct(FILES[file]) <= locked.keys(), STALE
    assert {name: versions for name, versions in locked.items() if CONSTRAINTS.get(name, versions) != versions} == {}, STALE


@pytest.mark.parametrize("file", ["build", *FILES])
def test_every_package_has_hashes(file: str) -> None:
    text = (FOLDER / f"{file}.txt").read_text(encoding="utf-8")
    for requirement in text.replace("\\\n", " ").splitlines():
        assert re.fullmatch(r"[\w.-]+==[^\s;]+( ; [^#]+?)?\s+(--hash=sha256:[0-9a-f]{64}\s*)+", requirement), requirement


def test_files_that_are_installed_together_agree() -> None:
    found: dict[str, set[frozenset[str]]] = {}
    for file in FILES.keys() - {"gpu"}:
        for name, versions in pins(FOLDER / f"{file}.txt").items():
            found.setdefault(name, set()).add(frozenset(versions))
    assert {name: versions for name, versions in found.items() if len(versions) > 1} == {}


def test_images_install_only_wheels_with_known_hashes() -> None:
    text = (ROOT / "Dockerfile.worker").read_text(encoding="utf-8")
    assert "PIP_REQUIRE_HASHES=1" in text
    assert "PIP_ONLY_BINARY=:all:" in text
    installs = re.findall(r"^RUN (.*\binstall\b.*)$", text.replace("\\\n", " "), re.MULTILINE)
    packages = [line for line in installs if "pip" in line]
    assert len(packages) == 5
    assert [line for line in packages if "requirements/" not in line] == [
        "PIP_REQUIRE_HASHES=0 pip --python /opt/imagemill install --no-deps --no-build-isolation --target /app ."
    ]
