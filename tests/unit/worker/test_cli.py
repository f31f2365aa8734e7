"""`imagemill worker`: what it runs, and what it says to wrong flags."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from imagemill.producer.cli import main
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.settings import Settings
from imagemill.worker import cli
from imagemill.worker.node import logs


class Node:
    """Stands for a node, which would run until it is told to stop."""

    started: ClassVar[list[tuple[Settings, dict[str, Any]]]] = []

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def run(self, **given: Any) -> int:
        self.started.append((self.settings, given))
        return 7


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IMAGEMILL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(Node, "started", [])
    monkeypatch.setattr(cli, "Worker", Node)


def imagemill_worker(*flags: str, **settings: str) -> Result:
    return CliRunner(env={f"IMAGEMILL_{name}": value for name, value in settings.items()}).invoke(main, ["worker", *flags])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "say where to run: --gpu N, --gpus all or --cpu"),
        (["--gpu", "0", "--cpu"], "say where to run"),
        (["--gpus", "all", "--cpu"], "say where to run"),
        (["--gpu", "0", "--gpus", "all"], "say where to run"),
        (["--gpu", "0", "--concurrency", "2"], "--concurrency goes with --cpu"),
        (["--gpus", "all", "--concurrency", "2"], "--concurrency goes with --cpu"),
        (["--gpus", "all", "--name", "big"], "--name goes with one node"),
        (["--cpu", "--operations", "stylise"], "no operation 'stylise'; did you mean 'stylize'?"),
        (["--cpu", "--operations", " , "], "--operations names none (valid: remove-background, inpaint, stylize)"),
        (["--cpu", "--operations", ""], "--operations names none"),
        (["--gpu", "-1"], "'--gpu'"),
        (["--gpu", "first"], "'--gpu'"),
        (["--gpus", "2"], "'--gpus'"),
        (["--cpu", "--concurrency", "0"], "'--concurrency'"),
        (["--cpus"], "No such option"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence_and_start_nothing(flags: list[str], sentence: str) -> None:
    result = imagemill_worker(*flags)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert Node.started == []


def test_all_gpus_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(logs, "set_up", lambda **_: None)  # the logs of this process are pytest's
    result = imagemill_worker("--gpus", "all")
    assert result.exit_code == 2
    assert "no GPU was found: is the driver installed?" in result.stderr


def test_a_wrong_setting_is_named() -> None:
    result = imagemill_worker("--cpu", WORKER__LEASE_SECONDS="soon")
    assert result.exit_code == 2
    assert "IMAGEMILL_WORKER__LEASE_SECONDS" in result.stderr


@pytest.mark.parametrize(
    ("flags", "gpu", "name", "concurrency"),
    [
        (["--gpu", "3"], 3, "gpu3@%h", 1),
        (["--cpu", "--concurrency", "5"], None, "cpu@%h", 5),
        (["--cpu"], None, "cpu@%h", len(os.sched_getaffinity(0))),
        (["--gpu", "0", "--name", "first"], 0, "first@%h", 1),
        (["--cpu", "--concurrency", "1", "--name", "cpu@here"], None, "cpu@here", 1),
    ],
)
def test_what_the_flags_start(flags: list[str], gpu: int | None, name: str, concurrency: int) -> None:
    result = imagemill_worker(*flags, WORKER__GPU="6", WORKER__OPERATIONS='["stylize"]')
    assert result.exit_code == 7, "the node's own status"
    ((settings, given),) = Node.started
    assert settings.worker.gpu == gpu, "the flag says where, whatever the environment does"
    assert settings.worker.operations == ("stylize",)
    assert given == {"name": name, "concurrency": concurrency}


@pytest.mark.parametrize(
    ("flags", "operations"),
    [
        ([], OPERATIONS),
        (["--operations", "inpaint"], ("inpaint",)),
        (["--operations", "stylize, inpaint,"], ("stylize", "inpaint")),
    ],
)
def test_which_operations_a_node_offers(flags: list[str], operations: tuple[str, ...]) -> None:
    imagemill_worker("--cpu", *flags)
    ((settings, _),) = Node.started
    assert settings.worker.operations == operations
