"""`imagemill worker --gpus all` runs and restarts one node per GPU; the opencv engines need no real GPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.engines import split_lane
from imagemill.shared.fleet import Fleet
from tests.conftest import environment_for
from tests.integration.jobs import cli
from tests.workers import ROOT, wait_until

pytestmark = pytest.mark.integration

SMI = '#!/bin/sh\necho "GPU 0: NVIDIA H200 (UUID: GPU-1)"\necho "GPU 1: NVIDIA H200 (UUID: GPU-2)"\n'


@pytest.fixture
def environment(own_redis: EmbeddedRedis, tmp_path: Path) -> dict[str, str]:
    """Has a fake `nvidia-smi` that lists two GPUs."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "nvidia-smi"
    script.write_text(SMI)
    script.chmod(0o755)
    settings = environment_for(own_redis.url, tmp_path, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    settings["IMAGEMILL_WORKER__EXPECT_GPUS"] = "3"
    settings.pop("CUDA_VISIBLE_DEVICES", None)
    return settings


@pytest.fixture
def fleet(own_redis: EmbeddedRedis) -> Iterator[Fleet]:
    fleet = Fleet(own_redis.url)
    yield fleet
    fleet.close()


@pytest.fixture
def supervisor(environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with started(environment, tmp_path) as process:
        yield process


@contextmanager
def started(environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A supervisor, which is killed afterwards with its nodes."""
    command = [sys.executable, "-m", "imagemill.producer.cli", "worker", "--gpus", "all", "--operations", "stylize"]
    with (tmp_path / "log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    yield process
    for member in family(process.pid):
        member.kill()
    process.wait()


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def ready(fleet: Fleet) -> dict[str, int]:
    """Process id of each ready node's parent process, by device."""
    return {node.device: node.pid for node in fleet.nodes() if node.ready}


def test_supervisor_restarts_only_the_killed_node_and_stops_all_nodes_on_sigterm(
    supervisor: subprocess.Popen[bytes], fleet: Fleet, tmp_path: Path
) -> None:
    wait_until(lambda: len(ready(fleet)) == 2, f"both nodes ready; log: {tmp_path / 'log'}")
    first = ready(fleet)
    assert first.keys() == {"gpu0", "gpu1"}
    assert {node.node.partition("@")[0] for node in fleet.nodes()} == {"gpu0", "gpu1"}
    assert {node.children for node in fleet.nodes()} == {1}
    assert {split_lane(lane)[0] for node in fleet.nodes() for lane in node.lanes} == {"stylize"}
    for device, pid in first.items():
        assert f"--gpu {device[-1]} --operations stylize" in " ".join(psutil.Process(pid).cmdline())

    children = family(first["gpu0"])[1:]
    os.kill(first["gpu0"], signal.SIGKILL)
    psutil.wait_procs(children, 30)
    assert not any(child.is_running() for child in children), "a child outlived its parent"
    wait_until(lambda: ready(fleet).get("gpu0", first["gpu0"]) != first["gpu0"], "the killed node restarted")
    again = ready(fleet)
    assert again["gpu1"] == first["gpu1"], "the other node must keep running"
    assert {node.node.partition("@")[0] for node in fleet.nodes()} == {"gpu0", "gpu1"}, "it keeps its name"

    everyone = family(supervisor.pid)
    assert len(everyone) == 5
    supervisor.terminate()
    assert supervisor.wait(60) == 0
    psutil.wait_procs(everyone, 10)
    assert not any(process.is_running() for process in everyone)
    assert fleet.nodes() == [], "nodes must sign off"
    log = (tmp_path / "log").read_text()
    assert "WARNING" not in log.partition("again_in=")[2], "a planned stop is nothing to warn of"


def test_nodes_go_with_a_killed_supervisor_and_the_next_one_has_the_same_names(
    supervisor: subprocess.Popen[bytes], environment: dict[str, str], fleet: Fleet, tmp_path: Path
) -> None:
    wait_until(lambda: len(ready(fleet)) == 2, f"both nodes ready; log: {tmp_path / 'log'}")
    everyone = family(supervisor.pid)
    assert len(everyone) == 5
    everyone[-1].suspend()  # a child that hangs goes as well
    supervisor.kill()
    supervisor.wait()
    psutil.wait_procs(everyone, 30)
    assert [process for process in everyone if process.is_running()] == []
    before = ready(fleet)
    with started(environment, tmp_path):
        wait_until(lambda: len(ready(fleet)) == 2 and not before.items() & ready(fleet).items(), "new nodes are ready")
        assert sorted(node.node.partition("@")[0] for node in fleet.nodes()) == ["gpu0", "gpu1"]


@pytest.mark.usefixtures("supervisor")
def test_missing_gpu_is_unhealthy_and_visible_and_its_node_starts_when_it_comes(
    environment: dict[str, str], fleet: Fleet, tmp_path: Path
) -> None:
    wait_until(lambda: len(ready(fleet)) == 2, f"the nodes of the others are ready; log: {tmp_path / 'log'}")
    assert fleet.gpus() == {socket.gethostname(): (3, 2)}
    assert "2 of 3 expected GPUs" in cli(environment, "fleet").stderr
    assert "2 of 3 expected GPUs are present" in cli(environment, "doctor", "--worker").stdout
    assert cli(environment, "doctor", "--worker", "--node", "gpu1").returncode == 0
    script = tmp_path / "bin" / "nvidia-smi"
    script.write_text(SMI + 'echo "GPU 2: NVIDIA H200 (UUID: GPU-3)"\n')
    wait_until(lambda: len(ready(fleet)) == 3, "the third node is ready")
    assert fleet.gpus() == {socket.gethostname(): (3, 3)}
    assert cli(environment, "doctor", "--worker").returncode == 0


@pytest.mark.parametrize(("listing", "reason"), [(SMI, "nvidia-smi lists 2 GPUs"), ("#!/bin/sh\nexit 9\n", "no NVIDIA driver")])
def test_node_without_its_gpu_says_so_and_stays_visible(
    listing: str, reason: str, environment: dict[str, str], fleet: Fleet, tmp_path: Path
) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_text(listing)
    ended = cli(environment, "worker", "--gpu", "5")
    assert ended.returncode == 2
    assert "GPU 5 does not exist" in ended.stderr
    assert "Traceback" not in ended.stderr
    (node,) = fleet.nodes()
    assert reason in node.problem
    assert fleet.gpus() == {socket.gethostname(): (3, 0)}
    assert "GPU 5 does not exist" in cli(environment, "doctor", "--worker", "--node", "gpu5").stdout
