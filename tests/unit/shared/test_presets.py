"""Presets: what ships, inheritance, and errors with file and line."""

from __future__ import annotations

import re
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import InvalidPreset, UsageError
from imagemill.shared.messages import Policy
from imagemill.shared.options.stylize import DiffusionStylize
from imagemill.shared.preset_files import LARGEST_FILE
from imagemill.shared.presets import SHIPPED, Preset, Presets, read
from imagemill.shared.quality import Measures, beyond
from tests.workers import ROOT

OWN = """\
dark:
  extends: product-clean
  description: before a black ground
  options:
    prompt: black background
    loras:
      my-style: 0.8
  output: {format: png}
  policy:
    priority: low

darker:
  extends: dark
  options: {steps: 40, crop: 1x1, loras: [{name: other}]}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def options(preset: Preset) -> DiffusionStylize:
    parsed = parse_options(preset.operation, preset.engine, preset.options)
    assert isinstance(parsed, DiffusionStylize)
    return parsed


def wrong(path: Path, text: str) -> str:
    """The error of a file, or of its first preset that is wrong."""
    path.write_text(text)
    try:
        return next(Presets(path).faults()).message
    except InvalidPreset as error:
        return error.message


def test_seven_presets_ship_and_are_valid() -> None:
    shipped = Presets()
    assert shipped.names() == ["product-clean", "anime", "realistic", "sketch", "turbo", "sdxl", "lightning"]
    assert list(shipped.faults()) == []
    parsed = {name: options(shipped.get(name)) for name in shipped.names()}
    assert len({preset.prompt for preset in parsed.values()}) == 4, "three are product-clean with other models"
    assert all(shipped.get(name).description for name in parsed)


def test_turbo_takes_four_steps_without_guidance() -> None:
    turbo = options(Presets().get("turbo"))
    assert (turbo.steps, turbo.cfg, turbo.scheduler) == (4, 1.0, "lcm")
    assert [lora.name for lora in turbo.loras] == ["lcm-lora-sdv1-5"]


def test_lightning_takes_four_steps_of_sdxl_without_guidance() -> None:
    lightning = options(Presets().get("lightning"))
    assert (lightning.model, lightning.steps, lightning.cfg, lightning.scheduler) == ("sdxl", 4, 1.0, "euler-trailing")
    assert [lora.name for lora in lightning.loras] == ["sdxl-lightning-4step"]


def test_preset_names_models_and_controls(own: Path) -> None:
    own.write_text(
        "soft:\n  extends: anime\n  options:\n    model: sdxl-turbo\n    control: {scribble: 0.5, tile: 0.3}\n"
        "free:\n  extends: product-clean\n  options: {control: none, vae: mine}\n"
    )
    soft, free = (options(Presets(own).get(name)) for name in ("soft", "free"))
    assert [(control.name, control.weight) for control in soft.control] == [("scribble", 0.5), ("tile", 0.3)]
    assert (soft.steps, soft.scheduler, soft.size) == (28, "euler-trailing", 512), "what the preset sets stays"
    assert (free.control, free.vae) == ((), "mine")


def test_each_preset_has_limits_that_fit_it() -> None:
    def flags(name: str, **measures: float) -> set[str]:
        quality = Policy.model_validate(Presets().get(name).policy).quality
        assert quality.mode == "flag"
        return set(beyond(Measures(**measures), quality, "stylize"))

    strict = [name for name in Presets().names() if flags(name, edges=0.3)]
    assert strict == ["product-clean", "sdxl"]
    weak = [name for name in Presets().names() if flags(name, edges=0.22)]
    assert weak == ["product-clean", "realistic", "turbo", "sdxl", "lightning"]
    assert flags("sketch", edges=0.1) == {"unlike"}
    assert flags("sketch", cast=99, entropy=0.3, kept=9) == set(), "grey lines on white"
    assert flags("sketch", entropy=0) == {"blank"}


def test_presets_file_ships_with_the_package() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert SHIPPED.name in data["imagemill.shared"]


def test_preset_overrides_inherited_values_one_by_one(own: Path) -> None:
    known = Presets(own)
    base, dark, darker = (known.get(name) for name in ("product-clean", "dark", "darker"))
    assert dark.options["prompt"] == "black background"
    assert dark.options["negative_prompt"] == base.options["negative_prompt"]
    policy = {**base.policy, "priority": "low"}
    assert (dark.output, dark.policy) == ({"format": "png"}, policy)
    assert darker.options["steps"] == 40
    assert darker.options["prompt"] == "black background"
    assert [lora.name for lora in options(darker).loras] == ["other"], "a list or mapping of an option is one value"
    assert (darker.output, darker.policy, darker.description) == (dark.output, dark.policy, dark.description)
    assert (dark.file, base.file) == (own, SHIPPED)


def test_quality_limits_are_inherited_one_by_one(own: Path) -> None:
    own.write_text("dark:\n  extends: sketch\n  policy: {quality: {mode: repair, least_entropy: 1}}\n")
    quality = {"mode": "repair", "most_cast": 100, "least_entropy": 1}
    assert Presets(own).get("dark").policy == {"quality": quality}
    assert "least_edgess" in wrong(own, "dark:\n  extends: sketch\n  policy:\n    quality:\n      least_edgess: 1\n")


def test_own_preset_replaces_a_shipped_one_and_may_extend_it(own: Path) -> None:
    own.write_text("product-clean:\n  extends: product-clean\n  options: {steps: 9}\nquick:\n  extends: product-clean\n")
    known = Presets(own)
    for name in ("product-clean", "quick"):
        assert known.get(name).options["steps"] == 9
        assert known.get(name).options["prompt"] == Presets().get("product-clean").options["prompt"]
    assert known.get("turbo").options["steps"] == 4
    assert known.names()[:1] == ["product-clean"]
    assert list(known.faults()) == []


def test_resolved_preset_survives_yaml(own: Path, tmp_path: Path) -> None:
    import yaml

    whole = Presets(own).get("darker").resolved()
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump({"again": whole}))
    assert Presets(path).get("again").resolved() == whole
    assert set(whole["options"]) == set(DiffusionStylize.model_fields) - {"engine"}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a:\n  extends: turbo\n  options:\n    stepss: 9\n", 4, "options has no 'stepss'; did you mean 'steps'?"),
        ("a:\n  extends: turbo\n  options:\n    cfg: 2\n    steps: 999\n", 5, "less than or equal to 150, not 999"),
        ("a:\n  extends: turbo\n  options:\n    canny_low: 300\n", 4, "canny_low may not be above canny_high"),
        ("a:\n  extends: turbo\n  options:\n    loras:\n      x: 9\n", 4, "loras.0.weight"),
        ("a:\n  extends: turbo\n  policy:\n    prioritty: low\n", 4, "did you mean 'priority'?"),
        ("a:\n  extends: turbo\n  output:\n    format: gif\n", 4, "'same', 'png', "),
        ("a:\n  extends: turbo\n  output:\n    url: s3://secret/bucket\n", 4, "output has no 'url'"),
        ("a:\n  extends: turbo\n  options: {engine: opencv}\n", 3, "options has no 'engine'"),
        ("a:\n  extends: turbox\n", 2, "did you mean 'turbo'?"),
        ("a:\n  extends: b\nb:\n  extends: a\n", 4, "in a circle"),
        ("a:\n  extends: a\n", 2, "in a circle"),
        ("a:\n  engine: diffusion\n", 2, "operation: field required"),
        ("a:\n  operation: stylise\n  engine: opencv\n", 2, "'inpaint' or 'stylize', not 'stylise'"),
        ("a:\n  operation: stylize\n  engine: opencvv\n", 3, "did you mean 'opencv'?"),
        ("a:\n  extends: turbo\n  engine: opencv\n", 3, "extends turbo, which is for the engine diffusion, not 'opencv'"),
        ("a:\n  extends: turbo\n  options:\n    reference: ftp://x/y?key\n", 4, "s3:// or file://, not 'ftp://x/y?…'"),
        ("a:\n  extends: turbo\n  options:\n    reference: [s3://x]\n", 4, "valid string"),
        ("a:\n  extends: turbo\n  options:\n    prompt: a [cat|dog]\n", 4, "options: prompt: [a|b] would change the prompt"),
        ("a:\n  extends: turbo\n  options:\n    prompt: <lora:x:1>\n", 4, "given as an option, loras=x:1"),
        ("a:\n  extends: turbo\n  description: [x]\n", 3, "description: input should be a valid string"),
        ("a:\n  extends: turbo\n  extends: anime\n", 3, "duplicate key"),
        ("a:\n  extends: turbo\na:\n  extends: anime\n", 3, "duplicate key"),
        ("a:\n  prompt: x\n", 2, "a preset has no 'prompt'"),
        ("a: {}\n", 1, "must map names to values"),
        ("a:\n  extends: [x]\n", 2, "extends an unknown preset"),
        ("a:\n  extends: turbo\n  options: 5\n", 3, "options: input should be a valid dictionary"),
        ("a:\n  extends: turbo\n  name: b\n", 3, "a preset has no 'name'"),
        ("A b:\n  extends: turbo\n", 1, "lowercase letters"),
        ("a:\n  - extends\n", 1, "must map names to values"),
        ("- a\n", 1, "must map names to presets"),
        ("a:\n  ? [x]\n  : y\n", 2, "a key must be text"),
        ("a: [\n", 2, ""),
        ("a:\n\tb: c\n", 2, ""),
        ("a: &x {extends: turbo}\nb: *x\n", 2, "aliases are not supported"),
        ("a:\n  extends: turbo\n  options: {prompt: !!python/name:os.system x}\n", 3, "tags are not supported"),
        ("a:\n  extends: turbo\n  options: {prompt: !!python/object/apply:os.system [ls]}\n", 3, "tags are not supported"),
        ("a: " + "[" * 50 + "\n", 1, "levels deep"),
        ("a: " + "{x: " * 50 + "\n", 1, "levels deep"),
    ],
)  # fmt: skip
def test_error_names_file_and_line(text: str, line: int, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    message = wrong(path, text)
    assert message.startswith(f"{path}:{line}: "), message
    assert reason in message


@pytest.mark.parametrize("data", [b"a: \xff\xfe", b"a: \x00", b"a: " + b"x" * LARGEST_FILE])
def test_binary_and_oversized_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(data)
    with pytest.raises(InvalidPreset, match=re.escape(str(path))):
        Presets(path)


def test_missing_file_is_refused_and_an_empty_one_has_no_presets(tmp_path: Path) -> None:
    with pytest.raises(InvalidPreset, match=r"none\.yaml: can't be read"):
        Presets(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").touch()
    assert Presets(tmp_path / "empty.yaml").names() == Presets().names()


def test_unknown_preset_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'anime'"):
        Presets().get("animee")


def test_error_in_one_preset_leaves_the_others_usable(own: Path) -> None:
    own.write_text(OWN + "broken:\n  extends: dark\n  options: {steps: 0}\n")
    known = Presets(own)
    assert known.get("dark").options["prompt"] == "black background"
    (fault,) = known.faults()
    assert fault.message.startswith(f"{own}:17: ")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1:1", "1:1"), ("off", "off"), ("yes", "yes"), ("2026-11-25", "2026-11-25"), ("0o17", "0o17"), ("1_000", "1_000"),
        ("true", True), ("null", None), ("~", None), ("", None), ("7", 7), ("010", 10), ("-7", -7), ("0.5", 0.5), (".5", 0.5),
        ("1e3", 1e3), ("'7'", "7"), ('"true"', "true"), ("[1, x]", [1, "x"]), ("{a: 1}", {"a": 1}),
        (">\n    two\n    lines\n", "two lines"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(written: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"a:\n  options:\n   prompt: {written}\n")
    assert read(path)["a"]["options"]["prompt"] == value


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.yaml")
        path.write_bytes(text.encode(errors="surrogatepass"))
        with suppress(InvalidPreset):
            assert all(read(path).values())
