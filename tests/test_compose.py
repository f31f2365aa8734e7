"""The compose files: what operators and the documentation rely on, and whether the Compose that is installed accepts them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.workers import ROOT

FILES = ("docker-compose.yml", "deploy/compose.8gpu.yml")
MORE = {"deploy/try/8gpu.yml": FILES[:2], "deploy/try/gpus.yml": FILES[:1], "examples/docker-compose.gpus.yml": FILES[:2]}
EXAMPLE = ROOT / "deploy" / ".env.example"
EIGHT = [f"gpu{number}" for number in range(8)]
OURS = {"imagemill-worker", "imagemill-tools", "${GPU_IMAGE:-imagemill-worker:gpu}"}


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")))


ONE, MANY = (read(name)["services"] for name in FILES)
GPUS = {name: service for name, service in MANY.items() if name in EIGHT}
NODES = {"worker": ONE["worker"], "gpus": ONE["gpus"], **GPUS}
ALL = {**ONE, **GPUS}


def devices(service: dict[str, Any]) -> list[dict[str, Any]]:
    return list(service["deploy"]["resources"]["reservations"]["devices"])


# --- what the files say ---------------------------------------------------------------------------------------------


def test_eight_containers_have_a_gpu_each_and_names_that_last() -> None:
    assert list(GPUS) == EIGHT
    for number, service in enumerate(GPUS.values()):
        assert devices(service) == [{"driver": "nvidia", "device_ids": [str(number)], "capabilities": ["gpu"]}]
        assert service["command"] == f"worker --gpu 0 --name gpu{number}@${{NODE_HOST:-server}}"
        assert service["hostname"] == "${NODE_HOST:-server}"
        assert service["healthcheck"] == {"test": ["CMD", "imagemill", "doctor", "--node", f"gpu{number}"]}


def test_one_container_has_all_gpus_unless_there_is_a_container_for_each() -> None:
    assert devices(ONE["gpus"]) == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert ONE["gpus"]["command"] == "worker --gpus all"
    assert ONE["gpus"]["hostname"] == "${NODE_HOST:-server}"
    assert MANY["gpus"] == {"scale": 0}


def test_profiles_say_what_starts() -> None:
    found: dict[str, set[str]] = {}
    for name, service in ALL.items():
        for profile in service.get("profiles", [""]):
            found.setdefault(profile, set()).add(name)
    assert found == {
        "": {"redis", "minio", "bucket", "flower"},
        "cpu": {"worker"},
        "gpu": {"gpus", *EIGHT},
        "watch": {"exporter", "prometheus", "grafana"},
        "tools": {"imagemill"},
    }


@pytest.mark.parametrize("name", NODES)
def test_nodes_drain_share_the_models_and_reach_the_same_services(name: str) -> None:
    service = NODES[name]
    assert service["volumes"] == ["weights:/var/lib/imagemill/weights"]
    assert service["stop_grace_period"] == "90s"
    assert service["depends_on"] == ONE["worker"]["depends_on"]
    assert service["networks"] == ["data", "metrics", "internet"]
    own = {"IMAGEMILL_WORKER__ENGINES", "IMAGEMILL_WORKER__EXPECT_GPUS"}
    common = {key: value for key, value in ONE["worker"]["environment"].items() if key not in own}
    assert common.items() <= service["environment"].items()
    if name != "worker":
        assert service["environment"] == ONE["gpus"]["environment"]
        assert {"shm_size", "mem_limit", "pids_limit"} <= set(service)


@pytest.mark.parametrize("name", ALL)
def test_containers_are_confined_restart_and_rotate_their_logs(name: str) -> None:
    service = ALL[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["pids_limit"]
    assert service["logging"]["options"] == {"max-size": "20m", "max-file": "5"}
    assert service["restart"] == ("no" if name in ("bucket", "imagemill") else "unless-stopped")
    # NVIDIA's container toolkit writes into the container.
    assert service.get("read_only", False) == (name not in GPUS and name != "gpus")
    assert service["tmpfs"]
    assert "network_mode" not in service


@pytest.mark.parametrize("name", ALL)
def test_containers_have_limits_that_can_be_changed(name: str) -> None:
    assert re.fullmatch(r"\$\{\w+_MEMORY:-\d+g\}", ALL[name]["mem_limit"])
    assert re.fullmatch(r"\$\{\w+_CPUS:-\d+\}", ALL[name]["cpus"])


# --- networks -------------------------------------------------------------------------------------------------------

NETWORKS = read(FILES[0])["networks"]


def members(network: str) -> set[str]:
    return {name for name, service in ALL.items() if network in service["networks"]}


def test_redis_and_the_store_are_reached_only_by_those_who_use_them_and_have_no_way_out() -> None:
    nodes = {"worker", "gpus", *EIGHT}
    assert members("data") == {"redis", "minio", "bucket", "flower", "exporter", "imagemill", *nodes}
    assert members("metrics") == {"exporter", "prometheus", *nodes}
    assert members("ports") == {"redis", "minio", "flower"}
    assert members("watch") == {"prometheus", "grafana"}
    assert members("internet") == nodes
    assert {name for name, network in NETWORKS.items() if network.get("internal")} == {"data", "metrics"}
    assert NETWORKS["ports"]["driver_opts"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    assert NETWORKS["internet"]["driver_opts"]["com.docker.network.bridge.enable_icc"] == "false"


def test_ports_are_published_from_networks_that_docker_publishes_from_and_only_on_this_machine() -> None:
    for service in ALL.values():
        if service.get("ports"):
            (outer,) = [name for name in service["networks"] if not NETWORKS[name].get("internal")]
            assert NETWORKS[outer]["driver_opts"]["com.docker.network.bridge.host_binding_ipv4"] == "127.0.0.1"


# Docker may resolve a name to the address in any network that two containers share, and in `internet` they can't connect.
@pytest.mark.parametrize(("client", "server"), [(name, other) for name in ALL for other in ALL[name].get("depends_on", ())])
def test_containers_never_share_only_networks_in_which_they_cannot_connect(client: str, server: str) -> None:
    shared = {*ALL[client]["networks"]} & {*ALL[server]["networks"]}
    assert shared
    assert "internet" not in shared


def test_published_ports_are_on_this_machine_only() -> None:
    ports = [port for service in ALL.values() for port in service.get("ports", [])]
    assert len(ports) == 6
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_images_of_others_have_versions_and_can_be_replaced_by_digests() -> None:
    others = {service["image"] for service in ALL.values()} - OURS
    assert len(others) == 5
    assert [image for image in others if not re.fullmatch(r"\$\{[A-Z]+_IMAGE:-[a-z/]+:[^:/]*\d[^:/]*\}", image)] == []
    builds = {name: service["build"]["args"]["PYTHON_IMAGE"] for name, service in ALL.items() if "build" in service}
    assert set(builds.values()) == {"${PYTHON_IMAGE:-python:3.11-slim}"}
    assert "ARG PYTHON_IMAGE=python:3.11-slim\n" in (ROOT / "Dockerfile.worker").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ALL)
def test_only_minio_and_who_makes_the_bucket_have_the_administrator_s_keys(name: str) -> None:
    knows = "MINIO_ROOT" in str(ALL[name].get("environment", ""))
    assert knows == (name in ("minio", "bucket"))


def test_env_example_names_every_variable() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in FILES)
    example = EXAMPLE.read_text(encoding="utf-8")
    required = set(re.findall(r"\$\{(\w+):\?", text))
    variables = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    assert required <= set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    assert variables == set(re.findall(r"^#?(\w+)=", example, re.MULTILINE)) - {"COMPOSE_FILE", "COMPOSE_PROFILES"}
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    shown = dict(re.findall(r"^#(\w+)=(.*)$", example, re.MULTILINE))
    differ = {"IMAGEMILL_FETCH__ALLOW_HOSTS", "WORKER_EXTRAS", "WORKER_ENGINES", "TORCH_INDEX"}
    assert {name: shown[name] for name in shown.keys() & defaults.keys() - differ} == {
        name: defaults[name] for name in shown.keys() & defaults.keys() - differ
    }


def test_reservations_of_devices_are_lines_that_the_trial_can_leave_out() -> None:
    for name in FILES:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert all(line.startswith("    deploy: {resources") for line in lines if "driver: nvidia" in line)


# --- what Compose makes of them -------------------------------------------------------------------------------------


def composes() -> list[list[str]]:
    """The versions of Compose on this machine: the plugin of `docker`, and the older `docker-compose`."""
    plugin = ["docker", "compose"]
    there = shutil.which("docker") and subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode == 0
    return [*([plugin] if there else []), *([["docker-compose"]] if shutil.which("docker-compose") else [])]


def config(compose: list[str], folder: Path, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """`config` with a filled-in .env.example, or with another `text`."""
    env = folder / "env"
    filled = re.sub(r"^(\w+)=$", r"\1=secret", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    env.write_text(filled if text is None else text, encoding="utf-8")
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_CONFIG") if name in os.environ}
    command = [*compose, "--project-directory", str(ROOT), "--env-file", str(env), *arguments, "config"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(params=["docker compose", "docker-compose"])
def compose(request: pytest.FixtureRequest) -> list[str]:
    command = str(request.param).split()
    if command not in composes():
        pytest.skip(f"needs `{request.param}`")
    return command


COMBINATIONS = [
    (FILES[:1], ()),
    (FILES[:1], ("cpu",)),
    (FILES[:1], ("gpu",)),
    (FILES[:1], ("cpu", "watch")),
    (FILES, ("gpu",)),
    (FILES, ("cpu", "gpu", "watch")),
    *(((*files, name), ("gpu",)) for name, files in MORE.items()),
]


@pytest.mark.parametrize(("files", "profiles"), COMBINATIONS, ids="+".join)
def test_compose_accepts_all_combinations(
    files: tuple[str, ...], profiles: tuple[str, ...], compose: list[str], tmp_path: Path
) -> None:
    arguments = [word for name in files for word in ("-f", name)] + [word for name in profiles for word in ("--profile", name)]
    done = config(compose, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    known = ALL if FILES[1] in files else ONE
    active = {name for name, each in known.items() if {*each.get("profiles", [""])} & {"", *profiles}}
    assert active <= set(yaml.safe_load(done.stdout)["services"])


def test_compose_names_a_missing_password(compose: list[str], tmp_path: Path) -> None:
    done = config(compose, tmp_path, text="")
    assert done.returncode != 0
    assert "copy deploy/.env.example to .env" in done.stderr
