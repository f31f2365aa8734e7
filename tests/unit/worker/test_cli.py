"""`imagemill worker`: the node that it runs, and its errors."""

from __future__ import annotations

import os
import socket
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from imagemill.producer.cli import main
from imagemill.shared.options.base import OPERATIONS
from imagemill.shared.settings import Settings
from imagemill.worker import cli
from imagemill.worker.node import logs


class Node:
    """Replaces a node, which would run until it is stopped."""

    started: ClassVar[list[tuple[Settings, dict[str, Any]]]] = []

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def run(self, **arguments: Any) -> int:
        self.started.append((self.settings, arguments))
        return 7


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IMAGEMILL_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Node, "started", [])
    monkeypatch.setattr(cli, "Worker", Node)


def imagemill_worker(*flags: str, **settings: str) -> Result:
    return CliRunner(env={f"IMAGEMILL_{name}": value for name, value in settings.items()}).invoke(main, ["worker", *flags])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "choose a device: --gpu N, --gpus all or --cpu"),
        (["--gpu", "0", "--cpu"], "choose a device"),
        (["--gpus", "all", "--cpu"], "choose a device"),
        (["--gpu", "0", "--gpus", "all"], "choose a device"),
        (["--gpus", "all", "--name", "big"], "--name requires a single node"),
        (["--cpu", "--operations", "stylise"], "unknown operation 'stylise'; did you mean 'stylize'?"),
        (["--cpu", "--operations", " , "], "--operations is empty (valid: remove-background, inpaint, stylize)"),
        (["--cpu", "--operations", ""], "--operations is empty"),
        (["--gpu", "-1"], "'--gpu'"),
        (["--gpu", "first"], "'--gpu'"),
        (["--gpus", "2"], "'--gpus'"),
        (["--cpu", "--concurrency", "0"], "'--concurrency'"),
        (["--cpus"], "No such option"),
    ],
)
def test_worker_refuses_wrong_flags_with_a_sentence(flags: list[str], sentence: str) -> None:
    result = imagemill_worker(*flags)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert Node.started == []


def test_gpus_all_fails_when_the_host_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(logs, "set_up", lambda **_: None)  # pytest configures the logs of this process
    result = imagemill_worker("--gpus", "all")
    assert result.exit_code == 2
    assert "no GPU found; check the driver" in result.stderr


@pytest.mark.parametrize("mask", ["", "4"])
def test_worker_refuses_a_hidden_gpu(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    result = imagemill_worker("--gpu", "1")
    assert result.exit_code == 2
    assert "GPU 1 does not exist" in result.stderr
    assert Node.started == []


def test_worker_names_an_invalid_setting() -> None:
    result = imagemill_worker("--cpu", WORKER__LEASE_SECONDS="soon")
    assert result.exit_code == 2
    assert "IMAGEMILL_WORKER__LEASE_SECONDS" in result.stderr


@pytest.mark.parametrize(
    ("flags", "gpu", "name", "concurrency"),
    [
        (["--gpu", "3"], 3, "gpu3@HOST", 1),
        (["--cpu", "--concurrency", "5"], None, "cpu@HOST", 5),
        (["--cpu"], None, "cpu@HOST", len(os.sched_getaffinity(0))),
        (["--gpu", "0", "--name", "first"], 0, "first@HOST", 1),
        (["--gpu", "0", "--concurrency", "3"], 0, "gpu0@HOST", 3),
        (["--cpu", "--concurrency", "1", "--name", "cpu@here"], None, "cpu@here", 1),
    ],
)
def test_flags_choose_gpu_name_and_concurrency(flags: list[str], gpu: int | None, name: str, concurrency: int) -> None:
    result = imagemill_worker(*flags, WORKER__GPU="6", WORKER__OPERATIONS='["stylize"]')
    assert result.exit_code == 7, "the exit status of the node"
    ((settings, arguments),) = Node.started
    assert settings.worker.gpu == gpu, "the flag overrides the environment"
    assert settings.worker.operations == ("stylize",)
    assert arguments == {"name": name.replace("HOST", socket.gethostname()), "concurrency": concurrency}


@pytest.mark.parametrize(
    ("flags", "operations"),
    [
        ([], OPERATIONS),
        (["--operations", "inpaint"], ("inpaint",)),
        (["--operations", "stylize, inpaint,"], ("stylize", "inpaint")),
    ],
)
def test_operations_flag_chooses_the_operations(flags: list[str], operations: tuple[str, ...]) -> None:
    imagemill_worker("--cpu", *flags)
    ((settings, _),) = Node.started
    assert settings.worker.operations == operations
