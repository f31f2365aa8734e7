from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from imagemill.producer.cli import main
from imagemill.producer.spec import job_spec, quality_values
from imagemill.shared.errors import InvalidOption, UsageError
from imagemill.shared.messages import Job
from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.shared.presets import Presets

OUTPUT: dict[str, object] = {"url": "s3://results/shop", "format": None}
OWN = """\
shop:
  extends: product-clean
  options: {strength: 0.3, reference: colours.png}
  output: {format: png, quality: 80}
  policy: {priority: low}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    monkeypatch.setenv("IMAGEMILL_PRESETS", str(path))
    return path


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["presets", *words])


def test_list_prints_built_in_and_own_presets(own: Path) -> None:
    rows = [json.loads(line) for line in run("list", "--json").stdout.splitlines()]
    assert [row["name"] for row in rows] == [*Presets().names(), "shop"]
    assert rows[-1]["file"] == str(own)
    assert {row["engine"] for row in rows} == {"diffusion"}
    shown = run("list").stdout
    assert all(row["name"] in shown for row in rows)


def test_show_prints_a_preset_in_the_file_format(own: Path) -> None:
    shown = yaml.safe_load(run("show", "shop").stdout)
    assert shown["shop"]["options"]["strength"] == 0.3
    assert shown["shop"]["options"]["seed_policy"] == "fixed"
    assert shown["shop"]["policy"] == {"batch": "quality", "priority": "low", "quality": {"least_edges": 0.35}}
    assert shown["shop"] == {
        key: value for key, value in json.loads(run("show", "shop", "--json").stdout).items() if key != "name"
    }
    assert run("show", "shopp").exit_code == 2


def test_check_reports_faults_and_exits_with_2(own: Path, tmp_path: Path) -> None:
    fine = run("check")
    assert (fine.exit_code, fine.stdout) == (0, "8 presets, all valid\n")
    other = tmp_path / "other.yaml"
    other.write_text("a:\n  extends: turbo\n  options: {steps: 0}\nb:\n  extends: nothing\n")
    done = run("check", str(other))
    assert done.exit_code == 2
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == [f"{other}:3", f"{other}:5"]
    other.write_text("a: [")
    done = run("check", str(other))
    assert done.exit_code == 2
    assert "error (invalid_preset): " in done.stderr


def test_job_contains_all_values_of_its_preset(own: Path) -> None:
    preset = Presets(own).get("shop")
    spec = job_spec(None, None, {}, dict(OUTPUT), {"priority": None}, preset)
    assert isinstance(spec.options, DiffusionStylize)
    assert spec.lane == "stylize.diffusion.sd15-canny"
    assert (spec.options.strength, spec.options.prompt) == (0.3, preset.options["prompt"])
    assert (spec.output.format, spec.output.quality, spec.policy.priority) == ("png", 80, "low")
    assert (spec.options.reference or "").startswith("file:///"), "a path becomes a file URL, as with --set"
    own.unlink()
    assert Job.model_validate_json(spec.model_dump_json()) == spec


def test_flags_override_the_preset(own: Path) -> None:
    preset = Presets(own).get("shop")
    given = {"strength": "0.6", "reference": "none", "loras": "red:0.5"}
    spec = job_spec("stylize", "diffusion", given, {**OUTPUT, "format": "webp"}, {"priority": "high"}, preset)
    options: Any = spec.options
    assert (options.strength, options.reference, options.loras[0].weight) == (0.6, None, 0.5)
    assert (spec.output.format, spec.output.quality, spec.policy.priority) == ("webp", 80, "high")


def test_limits_are_merged_with_the_presets_limits(own: Path) -> None:
    preset = Presets(own).get("sketch")
    plain = job_spec(None, None, {}, dict(OUTPUT), {"quality": None}, preset).policy.quality
    assert (plain.mode, plain.most_cast, plain.least_entropy, plain.least_edges) == ("flag", 100, 0.2, None)
    given = {"quality": quality_values("repair", ["least_edges=0.5", "most_cast=9"])}
    over = job_spec(None, None, {}, dict(OUTPUT), given, preset).policy.quality
    assert (over.mode, over.most_cast, over.least_entropy, over.least_edges) == ("repair", 9, 0.2, 0.5)


def test_operation_or_engine_that_contradicts_the_preset_is_refused(own: Path) -> None:
    preset = Presets(own).get("shop")
    for operation, engine in (("inpaint", None), (None, "opencv")):
        with pytest.raises(InvalidOption, match="the preset shop is for the"):
            job_spec(operation, engine, {}, dict(OUTPUT), {}, preset)


def test_operation_is_required_without_a_preset_and_engine_defaults_to_opencv() -> None:
    with pytest.raises(UsageError, match="--operation"):
        job_spec(None, None, {}, dict(OUTPUT), {})
    assert job_spec("stylize", None, {}, dict(OUTPUT), {}).engine == "opencv"


def test_unknown_preset_is_refused_with_the_nearest_name() -> None:
    done = CliRunner().invoke(main, ["submit", "a.txt", "--preset", "turboo", "--output", "s3://results/x"])
    assert done.exit_code == 2
    assert "did you mean 'turbo'?" in done.stderr
