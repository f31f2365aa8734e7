"""The Kubernetes files are valid, agree with imagemill, and keep to what a cluster's owner expects."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from imagemill.shared.engines import ENGINES, split_lane
from tests.workers import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
LANES = sorted(path.parent.name for path in FOLDER.glob("lanes/*/kustomization.yaml"))
CUSTOM = {"ScaledObject", "Kustomization"}  # kinds whose schema is not Kubernetes' own

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

Resource = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> list[Resource]:
    """What `kubectl apply -k` would send to the cluster."""
    command = ["kubectl", "kustomize", str(FOLDER)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, timeout=60, check=True).stdout))


def of_kind(resources: list[Resource], kind: str) -> list[Resource]:
    return [resource for resource in resources if resource["kind"] == kind]


def pods(resources: list[Resource]) -> list[Resource]:
    return [deployment["spec"]["template"]["spec"] for deployment in of_kind(resources, "Deployment")]


def sources() -> list[Resource]:
    files = sorted(FOLDER.glob("base/*.yaml")) + sorted(FOLDER.glob("lane/*.yaml"))
    resources = [resource for file in files for resource in yaml.safe_load_all(file.read_text(encoding="utf-8"))]
    return [resource for resource in resources if resource.get("kind", "Kustomization") not in CUSTOM]


@pytest.mark.parametrize("resource", sources(), ids=lambda resource: f"{resource['kind']}-{resource['metadata']['name']}")
def test_files_match_the_schema_of_kubernetes(resource: Resource) -> None:
    kubernetes_validate.validate(resource, "1.37", strict=True)


@needs_kubectl
def test_what_is_sent_to_the_cluster_matches_the_schema_of_kubernetes(rendered: list[Resource]) -> None:
    for resource in rendered:
        if resource["kind"] not in CUSTOM:
            kubernetes_validate.validate(resource, "1.37", strict=True)


@needs_kubectl
def test_each_lane_has_a_deployment_that_scales_from_zero_on_its_own_images(rendered: list[Resource]) -> None:
    deployments = {deployment["metadata"]["name"]: deployment for deployment in of_kind(rendered, "Deployment")}
    scaled = of_kind(rendered, "ScaledObject")
    assert len(scaled) == len(LANES) == len(deployments) - 1  # the exporter is not scaled
    known = {f"{engine.operation}.{engine.name}.{model}" for engine in ENGINES for model in engine.models}
    for scaling in scaled:
        lane = scaling["metadata"]["labels"]["imagemill/lane"]
        assert lane in known
        (trigger,) = scaling["spec"]["triggers"]
        assert set(re.findall(r'lane="([^"]+)"', trigger["metadata"]["query"])) == {lane}
        assert scaling["spec"]["minReplicaCount"] == 0
        deployment = deployments[scaling["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in deployment["spec"]
        assert deployment["spec"]["selector"]["matchLabels"]["imagemill/lane"] == lane
        check_worker(deployment["spec"]["template"]["spec"], lane)


def check_worker(pod: Resource, lane: str) -> None:
    """The pod pulls the lane's model, works in its operation and engine, has a GPU, and may drain."""
    operation, engine, model = split_lane(lane)
    (pull,), (worker,) = pod["initContainers"], pod["containers"]
    assert pull["args"] == ["models", "pull", model]
    assert worker["args"][-2:] == ["--operations", operation]
    assert {"name": "IMAGEMILL_WORKER__ENGINES", "value": f'["{engine}"]'} in worker["env"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["terminationGracePeriodSeconds"] > 90


@needs_kubectl
def test_a_lane_s_disruption_budget_covers_its_own_pods(rendered: list[Resource]) -> None:
    deployments = {deployment["metadata"]["name"]: deployment for deployment in of_kind(rendered, "Deployment")}
    budgets = of_kind(rendered, "PodDisruptionBudget")
    assert len(budgets) == len(LANES)
    for budget in budgets:
        assert budget["spec"]["selector"] == deployments[budget["metadata"]["name"]]["spec"]["selector"]


@needs_kubectl
def test_no_pod_runs_as_root_or_may_gain_rights(rendered: list[Resource]) -> None:
    assert pods(rendered)
    for pod in pods(rendered):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@needs_kubectl
def test_every_container_has_limits(rendered: list[Resource]) -> None:
    for pod in pods(rendered):
        for container in pod["containers"] + pod.get("initContainers", []):
            assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"]["limits"].keys()


@needs_kubectl
def test_workers_reach_no_private_network_but_redis_and_the_store(rendered: list[Resource]) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(rendered, "NetworkPolicy")}
    private = {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "127.0.0.0/8"}
    assert private <= set(policies["imagemill-downloads"]["egress"][0]["to"][0]["ipBlock"]["except"])
    own = [block for rule in policies["imagemill"]["egress"] for block in rule["to"] if "ipBlock" in block]
    assert own
    assert all(block["ipBlock"]["cidr"].endswith("/32") for block in own)
