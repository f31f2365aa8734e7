"""Which models the engine `rembg` opens, keeps open and closes, and what happens without them."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import ConfigurationError, ModelUnavailable
from imagemill.worker.hardware.device import Device
from imagemill.worker.operations.remove_background import sessions
from imagemill.worker.operations.remove_background.model_families import Family
from tests.models import u2net_onnx, weights_folder
from tests.unit.worker.models.test_added import record
from tests.unit.worker.operations.remove_background.cutting import PICTURES, cut, loaded, prepared


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_folder(tmp_path_factory.getbasetemp() / "weights", "u2net", "isnet-anime")


def test_open_model_is_dropped_before_another_one_is_opened(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    alive: WeakSet[Any] = WeakSet()

    class Watched(sessions.OnnxModel):
        def __init__(self, path: Path, name: str, device: Device, size: int, output: str | None = None) -> None:
            assert not alive, "two models are open"
            super().__init__(path, name, device, size, output)
            alive.add(self)
            opened.append(name)

    monkeypatch.setattr(sessions, "OnnxModel", Watched)
    operation, pixels = loaded(weights), PICTURES["landscape"]
    assert opened == [], "loading opens no model"
    first = cut(operation, pixels, model="u2net")
    cut(operation, pixels, model="u2net", exact=True)
    other = cut(operation, pixels, model="isnet-anime")
    assert np.array_equal(cut(operation, pixels, model="u2net"), first)
    assert not np.array_equal(other, first)
    assert opened == ["u2net", "isnet-anime", "u2net"]


def test_added_model_is_used_as_its_record_says(tmp_path: Path) -> None:
    """The same file under another name, with other parameters, is another model."""
    u2net_onnx(tmp_path / "rembg" / "u2net.onnx", size=64)
    u2net_onnx(tmp_path / "rembg" / "shop.onnx", size=64)
    parameters = {"size": 64, "mean": [0.5, 0.5, 0.5], "deviation": [1, 1, 1], "logits": False}
    family, options = (
        Family(64, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
        parse_options("remove-background", "rembg", {"model": "shop"}),
    )

    record(tmp_path, "shop", parameters=parameters)
    operation, pixels = loaded(tmp_path), PICTURES["landscape"]
    work = prepared(operation, pixels, model="shop")
    assert np.array_equal(work.samples[0].data, family.tensor(pixels))
    fused = operation.run(work.samples)[0]
    first = operation.fingerprint(options)
    assert operation.finish(work, [fused]).pixels.shape == (*pixels.shape[:2], 4)

    record(tmp_path, "shop", parameters={**parameters, "output": "1961"})
    work = prepared(operation, pixels, model="shop")
    assert not np.array_equal(operation.run(work.samples)[0], fused), "it reads another output"
    assert operation.fingerprint(options) != first


@pytest.mark.parametrize("content", [None, "no JSON", {"kind": "vae"}, {"parameters": {"size": "large"}}], ids=str)
def test_model_without_a_usable_record_fails_the_image_alone(tmp_path: Path, content: Any) -> None:
    u2net_onnx(tmp_path / "rembg" / "u2net.onnx", size=64)
    operation = loaded(tmp_path)
    if isinstance(content, dict):
        record(tmp_path, "shop", **content)
    elif content is not None:
        (tmp_path / "added").mkdir()
        (tmp_path / "added" / "shop.json").write_text(content)
    with pytest.raises(ModelUnavailable, match="shop"):
        prepared(operation, PICTURES["small"], model="shop")


def test_model_is_reopened_when_its_file_changes(tmp_path: Path) -> None:
    """Otherwise results of the old file would be cached under the fingerprint of the new one."""
    path = u2net_onnx(tmp_path / "rembg" / "u2net.onnx")
    operation, pixels = loaded(tmp_path), PICTURES["landscape"]
    before = cut(operation, pixels)
    u2net_onnx(tmp_path / "new.onnx", seed=1).replace(path)
    after = cut(operation, pixels)
    assert not np.array_equal(after, before)
    assert np.array_equal(after, cut(loaded(tmp_path), pixels))


def test_models_stay_open_while_there_is_memory_and_leave_nothing_behind(tmp_path: Path) -> None:
    for model in ("u2net", "u2netp", "silueta"):
        size = u2net_onnx(tmp_path / "rembg" / f"{model}.onnx", width=1).stat().st_size
    operation, pixels = loaded(tmp_path), PICTURES["small"]
    operation._model.memory.limit = int(2.5 * size)
    opened = {}
    for model in ("u2net", "u2netp", "u2net", "silueta", "u2net"):
        cut(operation, pixels, model=model)
        opened[model] = weakref.ref(operation._model.current)
    assert operation._model.memory.loads == 3
    assert {model: model_is() is not None for model, model_is in opened.items()} == {
        "u2net": True,
        "u2netp": False,
        "silueta": True,
    }


def test_load_without_models_names_the_pull_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="imagemill models pull u2net"):
        loaded(tmp_path)


def test_missing_model_is_unavailable_and_others_go_on(weights: Path) -> None:
    operation = loaded(weights)
    with pytest.raises(ModelUnavailable, match="imagemill models pull silueta"):
        cut(operation, PICTURES["small"], model="silueta")
    cut(operation, PICTURES["small"])


def test_damaged_model_is_unavailable_and_others_go_on(weights: Path, tmp_path: Path) -> None:
    folder = weights_folder(tmp_path, "u2net")
    (folder / "rembg" / "silueta.onnx").write_bytes(b"<html>")
    operation = loaded(folder)
    with pytest.raises(ModelUnavailable, match="silueta can't be opened"):
        cut(operation, PICTURES["small"], model="silueta")
    cut(operation, PICTURES["small"])
