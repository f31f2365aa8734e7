"""Which package may import which, and which heavy libraries a process must not load: they cost start-up time and GPU memory."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.workers import ROOT, clean_environment

HEAVY = {"torch", "onnxruntime", "numpy", "PIL", "cv2"}

ROOMS = ("hardware", "imaging", "transfer", "models", "operations", "checking", "line", "tuning", "node")
"""The worker's rooms, lowest first: each may import only those before it."""

UPWARD = {
    # A checkpoint is converted and verified with the network that will run it.
    ("models.conversion", "operations.inpaint.lama_generator"),
    # Calibration needs the engine's own preprocessing, and so does trying out a model of one's own.
    ("models.matting", "operations.remove_background.model_families"),
    ("models.eight_bit_search", "operations.remove_background.garments"),
    ("models.eight_bit_search", "operations.remove_background.model_families"),
}
"""The only imports of a module in a higher room."""

PARENT = ("app", "cli", "main", "node.intake", "node.logs", "node.offer", "node.parent", "node.supervisor", "node.tasks")
"""Modules that a node's parent process loads before it forks."""


@cache
def sources(*folders: str) -> tuple[Path, ...]:
    paths = tuple(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    assert paths
    return paths


def module_name(path: Path) -> str:
    """`imagemill.worker.imaging.codec` for worker/imaging/codec.py."""
    return ".".join(("imagemill", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


PRODUCT = {module_name(path): path for path in sources("shared", "producer", "worker")}


@cache
def imports(path: Path) -> frozenset[str]:
    """Names of the modules that a file imports, including those imported inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            submodules = (f"{node.module}.{name.name}" for name in node.names)
            names |= {submodule if submodule in PRODUCT else str(node.module) for submodule in submodules}
    return frozenset(names)


def package(module: str) -> str:
    """`imagemill.shared` of imagemill.shared.s3, `PIL` of PIL.Image."""
    return ".".join(module.split(".")[: 2 if module.startswith("imagemill.") else 1])


def importers(folder: str, *packages: str) -> dict[str, set[str]]:
    """The files below a folder that import one of these packages, with the packages."""
    imported = {str(path.relative_to(ROOT)): {package(name) for name in imports(path)} for path in sources(folder)}
    return {path: names & set(packages) for path, names in imported.items() if names & set(packages)}


def test_shared_imports_neither_side_nor_image_libraries() -> None:
    assert importers("shared", "imagemill.producer", "imagemill.worker", *HEAVY) == {}


def test_producer_imports_neither_worker_nor_neural_runtimes() -> None:
    assert importers("producer", "imagemill.worker", "torch", "onnxruntime") == {}


def test_worker_does_not_import_producer() -> None:
    assert importers("worker", "imagemill.producer") == {}


@pytest.mark.parametrize("folder", ["shared", "producer", "worker"])
def test_product_imports_neither_tests_nor_benchmarks(folder: str) -> None:
    assert importers(folder, "bench", "tests", "conftest") == {}


@pytest.mark.parametrize("folder", ["shared", "producer", "worker", "tests", "bench"])
def test_product_is_imported_as_imagemill(folder: str) -> None:
    """The folders are importable by their own names too, which would load a second copy of each module."""
    assert importers(folder, "shared", "producer", "worker") == {}


def test_every_folder_of_the_worker_is_a_room() -> None:
    assert {path.parent.name for path in (ROOT / "worker").glob("*/__init__.py")} == set(ROOMS)


def test_rooms_import_only_rooms_below_them() -> None:
    upward = set()
    for rank, room in enumerate(ROOMS):
        for path in sources(f"worker/{room}"):
            for name in imports(path):
                imported = name.removeprefix("imagemill.worker.")
                if imported != name and imported.partition(".")[0] not in ROOMS[: rank + 1]:
                    upward.add((module_name(path).removeprefix("imagemill.worker."), imported))
    assert upward == UPWARD


def test_modules_do_not_import_each_other_in_a_cycle() -> None:
    TopologicalSorter({module: imports(path) & PRODUCT.keys() for module, path in PRODUCT.items()}).prepare()


def loaded_by(statement: str, *watched: str) -> set[str]:
    """Which of the `watched` packages a new process has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted(set({watched!r}) & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_loaded_by_reports_a_heavy_library() -> None:
    assert loaded_by("import numpy.linalg", *HEAVY) == {"numpy"}


@pytest.mark.parametrize("module", PARENT)
def test_parent_process_loads_no_library_that_its_children_would_inherit(module: str) -> None:
    assert loaded_by(f"import imagemill.worker.{module}", *HEAVY) == set()


@pytest.mark.parametrize("module", ["cli", "client"])
def test_command_line_and_client_start_without_heavy_libraries(module: str) -> None:
    assert loaded_by(f"import imagemill.producer.{module}", *HEAVY, "celery", "kombu", "boto3", "botocore") == set()


def test_submitting_loads_no_image_libraries() -> None:
    submitting = "import imagemill.producer.client, imagemill.shared.broker, imagemill.shared.s3, imagemill.producer.sources"
    assert loaded_by(submitting, *HEAVY, "opentelemetry.exporter") == set()


@pytest.mark.parametrize(
    ("operation", "engine", "others"),
    [
        ("stylize", "diffusion", ("onnxruntime", "rembg", "torchvision")),
        ("remove-background", "rembg", ("torch", "diffusers", "transformers")),
        ("stylize", "opencv", ("torch", "diffusers", "onnxruntime", "rembg")),
    ],
)
def test_engine_does_not_load_another_engines_libraries(operation: str, engine: str, others: tuple[str, ...]) -> None:
    creating = f"from imagemill.worker.operations.registry import create\ncreate({operation!r}, {engine!r})"
    assert loaded_by(f"import imagemill.worker.node.child\n{creating}", *others) == set()


def reads_environment_when_imported(path: Path) -> bool:
    """Whether a module's statements, outside functions and classes, read the environment."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    texts = [ast.unparse(node) for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    code = [text for text in texts if text[0] not in "\"'"]  # docstrings may show how to use it
    return any(word in text for text in code for word in ("load_settings()", "os.environ", "os.getenv"))


def test_only_the_celery_app_reads_the_environment_when_imported() -> None:
    assert [module for module, path in PRODUCT.items() if reads_environment_when_imported(path)] == ["imagemill.worker.app"]
