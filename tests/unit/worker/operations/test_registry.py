from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from imagemill.shared.engines import ENGINES, Engine, find_engine
from imagemill.shared.errors import ConfigurationError, MissingExtra
from imagemill.worker.operations import registry


@pytest.mark.parametrize("row", ENGINES, ids=lambda row: f"{row.operation}-{row.name}")
def test_create_returns_the_engine_that_the_row_names(row: Engine) -> None:
    spec = registry.create(row.operation, row.name).spec
    assert (spec.name, spec.engine) == (row.operation, row.name)


def test_create_gives_a_new_operation_each_time() -> None:
    assert registry.create("stylize", "opencv") is not registry.create("stylize", "opencv")


@pytest.mark.parametrize("pair", [("inpaint", "lamar"), ("impaint", "opencv")])
def test_an_unknown_engine_is_named_with_the_nearest_valid_one(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="/".join(pair)) as caught:
        registry.create(*pair)
    assert "inpaint/opencv" in caught.value.message


def test_importing_the_registry_imports_no_engine() -> None:
    program = (
        "import sys, imagemill.worker.operations.registry\nprint([m for m in ('numpy', 'cv2', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_library_is_answered_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    monkeypatch.setattr(registry.importlib, "import_module", refuse)
    with pytest.raises(MissingExtra, match=r"pip install 'imagemill\[worker\]'"):
        registry.create("inpaint", "opencv")


def test_libraries_that_do_not_fit_each_other_are_told_with_the_usual_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(registry.importlib, "import_module", refuse)
    for installed, told in ((None, "nms does not exist$"), (object(), "pip uninstall torchvision$")):
        monkeypatch.setattr(registry.importlib.util, "find_spec", lambda _, found=installed: found)
        with pytest.raises(ConfigurationError, match=told):
            registry.create("stylize", "diffusion")


def test_a_fault_of_our_own_is_not_taken_for_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    row = find_engine("inpaint", "opencv")
    monkeypatch.setattr(registry, "ENGINES", [replace(row, module="imagemill.worker.operations.nowhere:Nothing")])
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        registry.create("inpaint", "opencv")
