"""The parent notices models that come, change and go while the node runs."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from imagemill.shared.settings import Settings
from imagemill.worker.node import lookout as module
from imagemill.worker.node.lookout import Lookout
from tests.pipelines import added
from tests.unit.worker.models.test_added import record
from tests.workers import wait_until

U2NET, U2NETP = (f"remove-background.rembg.{model}" for model in ("u2net", "u2netp"))


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)


def lookout_for(folder: Path, engine: str = "rembg", **worker: Any) -> Lookout:
    groups: dict[str, Any] = dict(weights={"folder": folder}, worker={"engines": [engine], **worker})
    return Lookout(Settings(_env_file=None, **groups))  # type: ignore[call-arg]


def put(folder: Path, model: str, content: bytes = b"1") -> Path:
    path = folder / "rembg" / f"{model}.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_model_is_offered_once_its_file_stays_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lookout = lookout_for(tmp_path)
    assert lookout.lanes.open() == []
    assert lookout.lacks == (f"no model of the engine rembg is in {tmp_path / 'rembg'}: imagemill models pull u2net",)
    for size in (1, 2, 3):  # it is still being copied
        put(tmp_path, "u2net", b"1" * size)
        lookout.look()
        assert lookout.lanes.open() == []
    lookout.look()
    assert lookout.changed()
    assert (lookout.lanes.open(), lookout.lacks) == ([U2NET], ())
    assert [record.message for record in caplog.records] == ["model found"]
    lookout.look()
    assert not lookout.changed()
    assert len(caplog.records) == 1


def test_model_that_is_removed_is_withdrawn_and_others_stay(tmp_path: Path) -> None:
    path, _ = put(tmp_path, "u2net"), put(tmp_path, "u2netp")
    lookout = lookout_for(tmp_path)
    assert lookout.lanes.open() == [U2NET, U2NETP]
    path.unlink()
    lookout.look()
    assert (lookout.lanes.open(), lookout.lanes.closed()) == ([U2NETP], {})
    put(tmp_path, "u2net")
    lookout.look(), lookout.look()
    assert sorted(lookout.lanes.open()) == [U2NET, U2NETP]


def test_lane_out_of_service_is_back_when_its_file_has_changed_and_not_before(tmp_path: Path) -> None:
    put(tmp_path, "u2net", b"damaged"), put(tmp_path, "u2netp")
    lookout = lookout_for(tmp_path)
    lookout.lanes.close(U2NET, "damaged", time.monotonic())
    assert lookout.changed()
    lookout.look(), lookout.look()
    assert lookout.lanes.open() == [U2NETP]
    put(tmp_path, "u2netp", b"another model")
    lookout.look(), lookout.look()
    assert lookout.lanes.open() == [U2NETP], "that was another file"
    put(tmp_path, "u2net", b"good as new")
    lookout.look(), lookout.look()
    assert lookout.lanes.open() == [U2NET, U2NETP]


def test_checksums_that_nodes_remember_do_not_count_as_a_change(tmp_path: Path) -> None:
    put(tmp_path, "u2net")
    lookout = lookout_for(tmp_path)
    lookout.lanes.close(U2NET, "damaged", time.monotonic())
    (tmp_path / "rembg" / "u2net.onnx.sums.json").write_text("{}")
    lookout.look(), lookout.look()
    assert lookout.lanes.open() == []


def test_lane_closed_for_lack_of_memory_is_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "u2net")
    lookout = lookout_for(tmp_path)
    lookout.lanes.close(U2NET, "no memory", time.monotonic(), passing=True)
    lookout.look()
    assert lookout.lanes.open() == []
    later = time.monotonic() + 3600
    monkeypatch.setattr(module.time, "monotonic", lambda: later)
    lookout.look()
    assert lookout.lanes.open() == [U2NET]


def test_added_model_is_offered_until_its_file_changes(tmp_path: Path) -> None:
    lookout = lookout_for(tmp_path)
    record(tmp_path, "ours.1")
    lookout.look(), lookout.look()
    assert lookout.lanes.open() == ["remove-background.rembg.ours.1"]
    put(tmp_path, "ours.1", b"cut")
    lookout.look(), lookout.look()
    assert lookout.lanes.open() == []
    fix = "imagemill models add ours.1 SOURCE --replace"
    assert f"files of ours.1 are missing or have changed since it was added: {fix}" in lookout.lacks
    (tmp_path / "added" / "ours.1.json").write_text("{")
    lookout.look()
    assert any("ours.1.json is damaged" in lack for lack in lookout.lacks)


def test_operations_that_the_node_does_not_do_are_not_offered(tmp_path: Path) -> None:
    lookout = lookout_for(tmp_path, operations=["inpaint"])
    put(tmp_path, "u2net")
    lookout.look(), lookout.look()
    assert lookout.lanes.open() == []


def lora(folder: Path, name: str, content: bytes = b"1") -> Path:
    path = folder / "diffusion" / "loras" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_parts_come_change_and_go_as_models_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lookout = lookout_for(tmp_path, "diffusion")
    path = lora(tmp_path, "red")
    lora(tmp_path, "no name that a job can give")
    lookout.look()
    assert lookout.parts.open() == [], "it may still be being copied"
    lookout.look()
    assert lookout.changed()
    assert lookout.parts.open() == ["red"]
    lookout.parts.close("red", "it is damaged", time.monotonic())
    lookout.look(), lookout.look()
    assert (lookout.parts.open(), lookout.parts.closed()["red"].reason) == ([], "it is damaged")
    lora(tmp_path, "red", b"good")
    lookout.look(), lookout.look()
    assert lookout.parts.open() == ["red"]
    path.unlink()
    lookout.look()
    assert lookout.parts.open() == []
    assert [record.getMessage() for record in caplog.records] == ["part found", "part replaced", "part gone"]


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_any_file_of_an_added_controlnet_counts(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "diffusion" / "mine"
    folder.mkdir(parents=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / name).write_bytes(b"12")
    added(tmp_path, "mine", "controlnet", "sd15")
    lookout = lookout_for(tmp_path, "diffusion")
    lookout.parts.close("mine", "it is damaged", time.monotonic())
    (folder / file).write_bytes(b"21")
    lookout.look(), lookout.look()
    assert lookout.parts.open() == ["mine"]
    (folder / file).unlink()
    lookout.look()
    assert lookout.parts.open() == []


def test_drive_that_hangs_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The parent goes on, looks once at a time, and says what is wrong until the drive is back."""
    lookout = lookout_for(tmp_path)
    put(tmp_path, "u2net")
    hangs, looks, genuine = threading.Event(), list[int](), module.lanes

    def slowly(settings: Settings) -> list[str]:
        looks.append(len(looks))
        assert hangs.wait(60)
        return genuine(settings)

    monkeypatch.setattr(module, "lanes", slowly)
    monkeypatch.setattr(module, "HUNG_SECONDS", 0.0)
    lookout.tick()
    wait_until(lambda: looks, "a look has begun")
    lookout.tick(), lookout.tick()
    assert looks == [0]
    assert lookout.changed()
    assert lookout.lacks[-1] == f"the folder {tmp_path} does not respond, so changes in it go unnoticed"
    assert [record.message for record in caplog.records] == ["weights folder does not respond"]
    hangs.set()

    def offered() -> bool:
        lookout.tick()
        return lookout.lanes.open() == [U2NET]

    wait_until(offered, "the model is offered")
    assert lookout.lacks == ()
