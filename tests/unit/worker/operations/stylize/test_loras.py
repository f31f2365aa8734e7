"""LoRAs: how many stay loaded, and files that are missing, damaged or changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import OperationFailed
from tests.pipelines import lora_file
from tests.styles import QUICK, difference, loaded, styled


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
