"""Who may import whom, and what a process must not load: seconds of start-up and a GPU's memory hang on it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers import ROOT, clean_environment

HEAVY = {"torch", "onnxruntime", "numpy", "PIL", "cv2"}
PARENT = ["main.py", "node.py", "cli.py", "tasks.py", "app.py", "supervisor.py"]
"""Modules of the worker that its parent process loads, before it forks."""


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            yield node.module


def uses(folder: str, *packages: str) -> dict[str, set[str]]:
    """Which files below a folder import which of these packages."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = {str(path.relative_to(ROOT)): {name.partition(".")[0] for name in imported(path)} & set(packages) for path in paths}
    return {path: names for path, names in found.items() if names}


def test_shared_knows_neither_side_and_touches_no_pixels() -> None:
    assert uses("shared", "producer", "worker", *HEAVY) == {}


def test_a_producer_needs_nothing_of_a_worker() -> None:
    assert uses("producer", "worker", "torch", "onnxruntime") == {}


def test_a_worker_needs_nothing_of_a_producer() -> None:
    assert uses("worker", "producer") == {}


def test_the_benchmarks_and_the_tests_are_needed_by_nobody() -> None:
    for folder in ("shared", "producer", "worker"):
        assert uses(folder, "bench", "tests", "conftest") == {}


def loaded_by(statement: str, *watched: str) -> set[str]:
    """Which of the `watched` packages a fresh process has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted(set({watched!r}) & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_what_the_watch_over_imports_sees() -> None:
    assert loaded_by("import numpy.linalg", *HEAVY) == {"numpy"}


@pytest.mark.parametrize("module", [f"worker.{name.removesuffix('.py')}" for name in PARENT])
def test_the_parent_of_the_children_loads_no_runtime_that_they_would_inherit(module: str) -> None:
    assert loaded_by(f"import {module}", *HEAVY) == set()


def test_a_command_starts_without_what_only_some_commands_need() -> None:
    heavy = (*HEAVY, "celery", "kombu", "boto3", "botocore")
    assert loaded_by("import imagemill.producer.cli", *heavy) == set()
    assert loaded_by("import imagemill.producer.client", *heavy) == set()


@pytest.mark.parametrize(
    ("operation", "engine", "others"),
    [
        ("stylize", "diffusion", ("onnxruntime", "rembg", "torchvision")),
        ("remove-background", "rembg", ("torch", "diffusers", "transformers")),
        ("stylize", "opencv", ("torch", "diffusers", "onnxruntime", "rembg")),
    ],
)
def test_an_engine_loads_no_other_engine_s_libraries(operation: str, engine: str, others: tuple[str, ...]) -> None:
    creating = f"from imagemill.worker.operations.registry import create\ncreate({operation!r}, {engine!r})"
    assert loaded_by(f"import imagemill.worker.node.child\n{creating}", *others) == set()


def test_a_program_that_submits_loads_no_pixels() -> None:
    submitting = "import imagemill.producer.client, imagemill.shared.broker, imagemill.shared.s3, imagemill.producer.sources"
    assert loaded_by(submitting, *HEAVY) == set()


def read_at_import(path: Path) -> bool:
    """Whether a file's own statements, outside its functions and classes, ask for the environment."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    texts = [ast.unparse(node) for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    code = [text for text in texts if text[0] not in "\"'"]  # docstrings show how to use it
    return any(word in text for text in code for word in ("load_settings()", "os.environ", "os.getenv"))


def test_nothing_reads_the_environment_when_it_is_imported_but_the_module_that_must() -> None:
    paths = [path for folder in ("shared", "producer", "worker") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in paths if read_at_import(path)] == ["worker/app.py"]
