"""LoRAs, ControlNets and VAEs: how many stay loaded, and files that are missing, damaged, changed or don't fit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from safetensors.torch import load_file, save_file

from imagemill.shared.engines import parse_options
from imagemill.shared.errors import BadReference, ModelUnavailable
from imagemill.worker.hardware.torch_device import bytes_of
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
    memory, one = operation._pipeline.memory, operation._pipeline.memory.taken
    both = styled(operation, control="canny;tile")
    assert pipeline.controlnets.loaded == ["controlnet-canny", "controlnet-tile"], "one job may need more than the limit"
    assert memory.taken == one + bytes_of(pipeline.controlnets.networks[0])
    styled(operation, control="canny;tile", loras="red")
    assert memory.taken == pipeline.bytes > one + bytes_of(pipeline.controlnets.networks[0]), "LoRAs count, too"
    assert np.array_equal(styled(operation, control="none"), styled(loaded(weights), control="none"))
    assert np.array_equal(styled(operation, control="tile"), tile)
    assert pipeline.controlnets.loaded == ["controlnet-tile"]
    assert one < memory.taken < one + bytes_of(pipeline.controlnets.networks[0]), "one ControlNet, and a LoRA that is idle"
    assert np.array_equal(styled(operation), canny), "dropped and reloaded"
    assert np.array_equal(styled(operation, control="canny;tile"), both)
    assert operation._pipeline.current is pipeline


def test_idle_controlnets_make_room_for_one_that_finds_no_memory(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = loaded(weights)
    styled(operation)
    pipeline = operation._pipeline.current
    assert pipeline is not None
    load = diffusers.ControlNetModel.from_pretrained

    def short(*arguments: Any, **more: Any) -> Any:
        if pipeline.controlnets.loaded:
            raise MemoryError
        return load(*arguments, **more)

    monkeypatch.setattr(diffusers.ControlNetModel, "from_pretrained", short)
    styled(operation, control="tile")
    assert pipeline.controlnets.loaded == ["controlnet-tile"]
    with pytest.raises(ModelUnavailable, match="the ControlNet controlnet-canny does not fit into memory"):
        styled(operation, control="tile;canny")


def test_missing_damaged_or_unsuitable_controlnet_is_named(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    operation = loaded(folder)
    plain = styled(operation)
    shutil.copytree(folder / "diffusion" / "controlnet-sdxl-canny", folder / "diffusion" / "liar")
    added(folder, "liar", "controlnet", "sd15", control="canny")
    shutil.copytree(folder / "diffusion" / "controlnet-canny", folder / "diffusion" / "depth")
    added(folder, "depth", "controlnet", "sd15")
    shutil.copytree(folder / "diffusion" / "controlnet-sdxl-canny", folder / "diffusion" / "large")
    added(folder, "large", "controlnet", "sdxl", control="canny")
    absent = "the ControlNet {} is not on this node: run `imagemill models {}`"
    for control, part, reason in (
        ("lineart", "controlnet-lineart", absent.format("controlnet-lineart", "pull controlnet-lineart")),
        ("scribble", "controlnet-scribble", absent.format("controlnet-scribble", "add controlnet-scribble SOURCE")),
        ("mine", "mine", absent.format("mine", "add mine SOURCE")),
        ("large", "large", "the ControlNet large is for SDXL, not for Stable Diffusion 1.5"),
        ("liar", "liar", "the ControlNet liar does not fit the model sd15-canny: another cross_attention_dim"),
    ):
        with pytest.raises(ModelUnavailable, match=re.escape(reason)) as caught:
            styled(operation, control=f"canny;{control}")
        assert (caught.value.part, caught.value.misfit) == (part, part in ("large", "liar"))
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
        with pytest.raises(ModelUnavailable, match=reason) as caught:
            styled(operation, vae=name)
        assert (caught.value.part, caught.value.misfit) == (name, name == "large")
    assert np.array_equal(styled(operation), plain)


@pytest.mark.filterwarnings("ignore:Adapter xl was active")
def test_missing_or_unsuitable_lora_is_named(weights: Path) -> None:
    operation = loaded(weights)
    plain, red = styled(operation), styled(operation, loras="red")
    for name, reason in {"none": "the LoRA none is not on this node", "xl": "the LoRA xl can't be used"}.items():
        with pytest.raises(ModelUnavailable, match=reason) as caught:
            styled(operation, loras=f"red;{name}")
        assert (caught.value.part, caught.value.misfit) == (name, name == "xl")
        assert np.array_equal(styled(operation), plain), "the previous style is not left active"
    assert np.array_equal(styled(operation, loras="red"), red)


def spoil(file: Path) -> None:
    """One weight is not a number."""
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("chosen", "part", "place"),
    [
        ({"loras": "red"}, "red", "loras/red.safetensors"),
        ({"control": "tile"}, "controlnet-tile", "controlnet-tile/diffusion_pytorch_model.safetensors"),
        ({"vae": "bright"}, "bright", "bright/diffusion_pytorch_model.safetensors"),
    ],
    ids=["LoRA", "ControlNet", "VAE"],
)
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("<html>not found</html>"),
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        spoil,
        lambda file: file.unlink(),
    ],
    ids=["text", "cut off", "not a number", "file missing"],
)
def test_damaged_part_is_to_blame_and_not_the_model(
    damage: Callable[[Path], object], chosen: dict[str, str], part: str, place: str, weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    (folder / "diffusion" / "loras").mkdir(parents=True)
    (folder / "added").mkdir()
    for name in ("sd15", "controlnet-canny", "controlnet-tile"):
        shutil.copytree(weights / "diffusion" / name, folder / "diffusion" / name)
    shutil.copytree(weights / "diffusion" / "sdxl-vae", folder / "diffusion" / "bright")
    shutil.copy(weights / "diffusion" / "loras" / "red.safetensors", folder / "diffusion" / "loras")
    for name, kind in (("bright", "vae"), ("controlnet-tile", "controlnet")):
        added(folder, name, kind, "sd15", control="tile")  # type: ignore[arg-type]
    operation = loaded(folder)
    damage(folder / "diffusion" / place)
    work = prepared(operation, **chosen)
    with pytest.raises(ModelUnavailable, match=part) as caught:
        operation.run(work.samples)
    assert (caught.value.part, caught.value.misfit) == (part, False)
    styled(operation, control="none")


def test_damaged_record_of_a_part_is_not_the_models_fault(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    (folder / "added").mkdir(exist_ok=True)
    for name, chosen in {"broken-net": {"control": "broken-net"}, "broken-vae": {"vae": "broken-vae"}}.items():
        (folder / "added" / f"{name}.json").write_text("{")
        with pytest.raises(ModelUnavailable, match="is damaged") as caught:
            styled(loaded(folder), **chosen)
        assert caught.value.part == name


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
