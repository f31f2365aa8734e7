"""Rules, dashboard and documentation agree with each other and with the metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from imagemill.shared.errors import ImageError, leaves
from tests.workers import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "imagemill.json"
PAGE = ROOT / "docs" / "deployment" / "watching.md"
REFERENCE = ROOT / "docs" / "reference" / "metrics.md"
SUFFIXES = re.compile(r"_(bucket|sum|count)$")

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def rules(kind: str) -> list[dict[str, Any]]:
    """The rules of a kind, `alert` or `record`."""
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"] if kind in rule]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def defined() -> set[str]:
    """The metrics that the exporter and nodes have."""
    written = [(ROOT / name).read_text(encoding="utf-8") for name in ("producer/exporter.py", "worker/node/metrics_server.py")]
    names = {name for text in written for name in re.findall(r'"(imagemill_\w+)"', text)}
    own = (ROOT / "worker" / "node" / "metrics_server.py").read_text(encoding="utf-8")
    names |= {f"imagemill_{name}" for name in re.findall(r'\("((?:device|gpu)_\w+)", "', own)}
    counted = (ROOT / "worker" / "node" / "metrics.py").read_text(encoding="utf-8")
    names |= {f"imagemill_{name}" for name in re.findall(r'(?:gauge|histogram)\("(\w+)"', counted)}
    names |= {f"imagemill_{name}_total" for name in re.findall(r'counter\("(\w+)"', counted)}
    parents = {"imagemill_wake_ups_republished_total", "imagemill_model_info"}
    return (names - {"imagemill_gpu_ecc_errors"}) | {"imagemill_gpu_ecc_errors_total"} | parents


def named(expression: str) -> set[str]:
    """The metrics of ours that an expression names; not those that rules record, which have colons."""
    words = re.findall(r"[\w:]+", re.sub(r'"[^"]*"', "", expression))
    return {SUFFIXES.sub("", word) for word in words if word.startswith("imagemill_")}


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in (*rules("alert"), *rules("record")))
    yield from (target["expr"] for panel in panels() for target in panel["targets"])
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


def test_rules_and_dashboard_use_metrics_that_exist() -> None:
    assert {name for expression in expressions() for name in named(expression)} <= defined()


def test_rules_and_dashboard_use_records_that_exist() -> None:
    used = {word for text in expressions() for word in re.findall(r"\w+:\w+(?::\w+)?", re.sub(r'"[^"]*"', "", text))}
    assert used <= {rule["record"] for rule in rules("record")}


def test_causes_name_error_codes_that_exist() -> None:
    (expression,) = (rule["expr"] for rule in rules("record") if "cause" in rule["expr"] and "label_replace" in rule["expr"])
    (codes,) = re.findall(r'"code",\s*"([^"]+)"', expression)
    assert set(codes.split("|")) <= {error.code for error in leaves(ImageError)}


def test_reference_lists_every_metric() -> None:
    assert set(re.findall(r"`(imagemill_\w+)`", REFERENCE.read_text(encoding="utf-8"))) == defined()


def test_every_alert_is_explained_and_tested() -> None:
    headings = re.findall(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    anchors = [heading.lower().replace(" ", "-") for heading in headings]
    tests = "".join(path.read_text(encoding="utf-8") for path in (PROMETHEUS / "tests").glob("*.yml"))
    assert anchors == [rule["annotations"]["runbook"].rpartition("#")[2] for rule in in_order_of(anchors)]
    for rule in rules("alert"):
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"].endswith((".", "end }}."))
        assert f'alertname="{rule["alert"]}"' in tests


def in_order_of(anchors: list[str]) -> list[dict[str, Any]]:
    return sorted(rules("alert"), key=lambda rule: anchors.index(rule["annotations"]["runbook"].rpartition("#")[2]))


def test_panels_have_a_title_a_unit_and_an_explanation_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


def test_first_row_answers_the_three_questions() -> None:
    first = [panel["title"] for panel in panels() if panel["gridPos"]["y"] == 1]
    assert first == ["Which GPU is slow?", "How long is the queue?", "What failed, and why?"]


@needs_promtool
def test_promtool_accepts_configuration_and_rules() -> None:
    checked = subprocess.run(
        ["promtool", "check", "config", str(PROMETHEUS / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
@pytest.mark.parametrize("path", sorted((PROMETHEUS / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(path: Path) -> None:
    tested = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr
