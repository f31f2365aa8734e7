"""LoRAs, ControlNets and VAEs: how many stay loaded, and files that are missing, damaged, changed or don't fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import BadReference, OperationFailed
from tests.pipelines import added, lora_file
from tests.styles import PHOTO, QUICK, difference, loaded, prepared, styled


def test_least_recently_used_lora_is_dropped(weights: Path) -> None:
    operation = loaded(weights, loras=2)
    plain = styled(operation)
    pipeline = operation._pipeline.current
    assert pipeline is not None
    red = styled(operation, loras="red:0.5")
    green = styled(operation, loras="green:0.5")
    assert difference(red, green) > 0.2
    assert pipeline.loras.loaded == ["red", "green"]
    styled(operation, loras="red:0.5")
    blue = styled(operation, loras="blue:0.5")
    assert pipeline.loras.loaded == ["red", "blue"]
    assert set(pipeline._text.get_list_adapters()["unet"]) == {"red", "blue"}
    assert np.array_equal(styled(operation, loras="green:0.5"), green), "dropped and reloaded"
    assert np.array_equal(styled(operation, loras="blue:0.5"), blue)
    both = styled(operation, loras="red:0.5;green:0.5;blue:-1")
    assert pipeline.loras.loaded == ["red", "green", "blue"], "one style may need more than the limit"
    assert difference(both, red) > 0.2
    assert np.array_equal(styled(operation), plain), "without adapters, the result is the original one"
    assert operation._pipeline.current is pipeline


def test_least_recently_used_controlnet_is_dropped(weights: Path) -> None:
    operation = loaded(weights, controlnets=1)
    canny = styled(operation)
    pipeline = operation._pipeline.current
    assert pipeline is not None
    assert pipeline.controlnets.loaded == ["controlnet-canny"]
    tile = styled(operation, control="tile")
    assert pipeline.controlnets.loaded == ["controlnet-tile"]
    both = styled(operation, control="canny;tile")
    assert pipeline.controlnets.loaded == ["controlnet-canny", "controlnet-tile"], "one job may need more than the limit"
    assert np.array_equal(styled(operation, control="none"), styled(loaded(weights), control="none"))
    assert np.array_equal(styled(operation, control="tile"), tile)
    assert pipeline.controlnets.loaded == ["controlnet-tile"]
    assert np.array_equal(styled(operation), canny), "dropped and reloaded"
    assert np.array_equal(styled(operation, control="canny;tile"), both)
    assert operation._pipeline.current is pipeline


def test_missing_damaged_or_unsuitable_controlnet_fails_only_its_images(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    operation = loaded(folder)
    plain = styled(operation)
    shutil.copytree(folder / "diffusion" / "controlnet-sdxl-canny", folder / "diffusion" / "liar")
    added(folder, "liar", "controlnet", "sd15", control="canny")
    shutil.copytree(folder / "diffusion" / "controlnet-canny", folder / "diffusion" / "depth")
    added(folder, "depth", "controlnet", "sd15")
    shutil.copytree(folder / "diffusion" / "controlnet-sdxl-canny", folder / "diffusion" / "large")
    added(folder, "large", "controlnet", "sdxl", control="canny")
    (folder / "diffusion" / "controlnet-tile" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80\x04pickle")
    absent = "the ControlNet {} is not on this node: run `imagemill models {}`"
    for control, reason in {
        "lineart": absent.format("controlnet-lineart", "pull controlnet-lineart"),
        "scribble": absent.format("controlnet-scribble", "add controlnet-scribble SOURCE"),
        "mine": absent.format("mine", "add mine SOURCE"),
        "large": "the ControlNet large is for SDXL, not for Stable Diffusion 1.5",
        "liar": "the ControlNet liar does not fit the model sd15-canny",
        "tile": "the ControlNet controlnet-tile can't be used from",
    }.items():
        with pytest.raises(OperationFailed, match=re.escape(reason)):
            styled(operation, control=f"canny;{control}")
    with pytest.raises(BadReference, match="depth needs a control image"):
        styled(operation, control="depth")
    (own,) = operation.run(prepared(operation, own=PHOTO, control="depth").samples)
    (tile,) = operation.run(prepared(operation, own=PHOTO, control="controlnet-canny").samples)
    assert np.array_equal(own.pixels, tile.pixels), "the same network under another name"
    assert np.array_equal(styled(operation), plain)


def test_other_vae_is_used_and_must_fit(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    for name, family in (("bright", ""), ("large", "sdxl")):
        shutil.copytree(folder / "diffusion" / "sdxl-vae", folder / "diffusion" / name)
        added(folder, name, "vae", family)
    operation = loaded(folder)
    plain, fingerprint = styled(operation), operation.fingerprint(parse_options("stylize", "diffusion", QUICK))
    assert difference(styled(operation, vae="bright"), plain) > 0.2
    assert operation.fingerprint(parse_options("stylize", "diffusion", QUICK | {"vae": "bright"})) != fingerprint
    for name, reason in {"large": "the VAE large is for SDXL", "none-such": "the VAE none-such is not on this node"}.items():
        with pytest.raises(OperationFailed, match=reason):
            styled(operation, vae=name)
    assert np.array_equal(styled(operation), plain)


def test_missing_or_damaged_lora_fails_only_its_images(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    operation = loaded(folder)
    plain, red = styled(operation), styled(operation, loras="red")
    with pytest.raises(OperationFailed, match="the LoRA none is not on this node"):
        styled(operation, loras="red;none")
    (folder / "diffusion" / "loras" / "bad.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(OperationFailed, match="the LoRA bad can't be used"):
        styled(operation, loras="red;bad")
    assert np.array_equal(styled(operation), plain), "the previous style is not left active"
    assert np.array_equal(styled(operation, loras="red"), red)


def test_soft_time_limit_is_not_reported_as_a_lora_error(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise SoftTimeLimitExceeded

    operation = loaded(weights)
    styled(operation)
    with monkeypatch.context() as patched:
        patched.setattr(operation._pipeline.current._text, "load_lora_weights", late)  # type: ignore[union-attr]
        with pytest.raises(SoftTimeLimitExceeded):
            styled(operation, loras="red")
    assert np.array_equal(styled(operation, loras="red"), styled(loaded(weights), loras="red"))


def test_changed_lora_file_is_reloaded_and_changes_the_fingerprint(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    operation = loaded(folder)
    options = parse_options("stylize", "diffusion", QUICK | {"loras": "red"})
    before, fingerprint = styled(operation, loras="red"), operation.fingerprint(options)
    assert operation.fingerprint(options) == fingerprint
    lora_file(folder / "diffusion" / "loras" / "red.safetensors", folder, seed=9)
    assert operation.fingerprint(options) != fingerprint
    assert difference(styled(operation, loras="red"), before) > 0.2
