from __future__ import annotations

import subprocess
import sys

import pytest

from imagemill.shared.engines import ENGINES
from imagemill.shared.errors import ConfigurationError, MissingExtra
from imagemill.worker.operations import registry


def test_every_engine_that_jobs_can_name_is_registered() -> None:
    assert set(registry.ENGINES) == {(operation, engine) for operation, engines in ENGINES.items() for engine in engines}


@pytest.mark.parametrize(("operation", "engine"), list(registry.ENGINES))
def test_create_gives_what_was_asked_for(operation: str, engine: str) -> None:
    spec = registry.create(operation, engine).spec
    assert (spec.name, spec.engine) == (operation, engine)


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
    monkeypatch.setitem(registry.ENGINES, ("inpaint", "opencv"), "imagemill.worker.operations.nowhere:Nothing")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        registry.create("inpaint", "opencv")
