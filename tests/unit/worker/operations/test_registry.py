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
    columns = row.options().columns
    assert (spec.needs_mask, spec.takes_control) == ("mask" in columns, "control_image" in columns)


def test_create_returns_a_new_instance_each_time() -> None:
    assert registry.create("stylize", "opencv") is not registry.create("stylize", "opencv")


@pytest.mark.parametrize("pair", [("inpaint", "lamar"), ("impaint", "opencv")])
def test_create_suggests_the_nearest_engine_for_an_unknown_one(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="/".join(pair)) as caught:
        registry.create(*pair)
    assert "inpaint/opencv" in caught.value.message


def test_importing_the_registry_imports_no_engine() -> None:
    program = (
        "import sys, imagemill.worker.operations.registry\nprint([m for m in ('numpy', 'cv2', 'torch') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_create_names_the_install_command_when_a_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    monkeypatch.setattr(registry.importlib, "import_module", refuse)
    with pytest.raises(MissingExtra, match=r"pip install 'imagemill\[worker\]'"):
        registry.create("inpaint", "opencv")


def test_create_names_the_usual_cause_when_libraries_are_incompatible(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(registry.importlib, "import_module", refuse)
    for torchvision, message in ((None, "nms does not exist$"), (object(), "pip uninstall torchvision$")):
        monkeypatch.setattr(registry.importlib.util, "find_spec", lambda _, spec=torchvision: spec)
        with pytest.raises(ConfigurationError, match=message):
            registry.create("stylize", "diffusion")


def test_create_passes_on_an_import_error_inside_imagemill(monkeypatch: pytest.MonkeyPatch) -> None:
    row = find_engine("inpaint", "opencv")
    monkeypatch.setattr(registry, "ENGINES", [replace(row, module="imagemill.worker.operations.nowhere:Nothing")])
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        registry.create("inpaint", "opencv")
