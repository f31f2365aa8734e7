"""What a node says if it cannot load its model, and images that fail alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from imagemill.shared.errors import ConfigurationError, ModelUnavailable, OperationFailed, OutOfMemory, UnsafeContent
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.torch_device import bytes_of
from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.repositories import folder_of
from imagemill.worker.operations.stylize.diffusion import Diffusion
from imagemill.worker.operations.stylize.latents import Latents
from tests.devices import SHORT
from tests.pipelines import added
from tests.styles import loaded, prepared, styled


def test_load_without_the_model_names_the_pull_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="imagemill models pull sd15-canny"):
        loaded(tmp_path)


def only_sd15(weights: Path, tmp_path: Path) -> Path:
    """A copy of the weights without the models of another family."""
    return shutil.copytree(weights, tmp_path / "weights", ignore=shutil.ignore_patterns("*sdxl*"))


@pytest.mark.parametrize("part", ["tokenizer", "scheduler", "text_encoder", "model_index.json"])
def test_load_with_an_incomplete_model_names_the_pull_command(part: str, weights: Path, tmp_path: Path) -> None:
    folder = only_sd15(weights, tmp_path)
    path = folder_of(folder, repository("sd15")) / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ConfigurationError, match="imagemill models pull sd15-canny"):
        loaded(folder)


def test_damaged_model_is_unavailable(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    next((folder_of(folder, repository("sd15")) / "unet").glob("*.safetensors")).write_bytes(b"<html>")
    with pytest.raises(ModelUnavailable, match="the model sd15-canny can't be loaded"):
        loaded(folder).run(prepared(loaded(folder)).samples)


@pytest.mark.parametrize("part", ["unet", "scheduler", "model_index.json"])
@pytest.mark.parametrize("content", [None, b"<html>", b"[1]"])
def test_model_that_is_lost_or_damaged_later_is_unavailable(
    content: bytes | None, part: str, weights: Path, tmp_path: Path
) -> None:
    operation = loaded(shutil.copytree(weights, tmp_path / "weights"))
    work = prepared(operation)
    operation.run(work.samples)
    operation._pipeline.close()  # as for another model
    path = folder_of(operation._device.weights, repository("sd15")) / part
    for file in [path] if path.is_file() else list(path.iterdir()):
        file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ModelUnavailable, match="imagemill models pull sd15-canny"):
        operation.run(work.samples)


def test_added_model_whose_record_is_lost_later_only_fails_images(weights: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    shutil.copytree(folder / "diffusion" / "sdxl", folder / "diffusion" / "shop")
    shutil.copytree(folder / "diffusion" / "sdxl-vae", folder / "diffusion" / "shop" / "vae", dirs_exist_ok=True)
    added(folder, "shop", "checkpoint", "sdxl")
    operation = loaded(folder)
    assert np.array_equal(styled(operation, model="shop"), styled(operation, model="sdxl")), "of the record's family"
    (folder / "added" / "shop.json").unlink()
    with pytest.raises(ModelUnavailable, match="imagemill models add shop"):
        styled(operation, model="shop")
    styled(operation)


def test_pickle_is_never_loaded(weights: Path, tmp_path: Path) -> None:
    folder = only_sd15(weights, tmp_path)
    unet = folder_of(folder, repository("sd15")) / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_suffix(".bin"))
    with pytest.raises(ConfigurationError):
        loaded(folder).run([])


def test_gpu_that_torch_can_not_use_is_a_configuration_error(weights: Path) -> None:
    operation = Diffusion()
    operation.load(Device(gpu=0, weights=weights))
    assert operation.spec.max_batch == 16
    with pytest.raises(ConfigurationError, match=r"should run on gpu0, but .* can't"):
        operation.run(prepared(operation).samples)


def test_non_finite_output_fails_only_its_image(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = loaded(weights)
    styled(operation)
    decode = operation._pipeline.current._text.vae.decode  # type: ignore[union-attr]
    spoilt = iter([True, False])

    def broken(latents: torch.Tensor, **more: Any) -> Any:
        (images,) = decode(latents, **more)
        return (images * float("nan") if next(spoilt) else images,)

    monkeypatch.setattr(operation._pipeline.current._text.vae, "decode", broken)  # type: ignore[union-attr]
    bad, good = operation.run(prepared(operation).samples * 2)
    assert isinstance(bad, OperationFailed)
    assert np.array_equal(good.pixels, operation_pixels(loaded(operation._device.weights)))


@pytest.mark.parametrize(
    ("chosen", "causes"),
    [
        ({}, "cfg may be too high"),
        ({"loras": "red;blue:2"}, "the weight of red or blue may be too high, or cfg may be too high"),
        ({"loras": "red", "cfg": 1}, "the weight of red may be too high"),
        ({"vae": "bright", "cfg": 1}, "bright may be damaged"),
        ({"vae": "bright", "control": "mine;canny"}, "cfg may be too high, or mine or bright may be damaged"),
        ({"cfg": 1}, "the prompt's weights may be too high"),
    ],
)
def test_output_that_is_not_finite_names_what_the_job_uses(
    chosen: dict[str, Any], causes: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(weights, tmp_path / "weights")
    for name, source, kind in (("bright", "sdxl-vae", "vae"), ("mine", "controlnet-tile", "controlnet")):
        shutil.copytree(folder / "diffusion" / source, folder / "diffusion" / name)
        added(folder, name, kind, "sd15", control="tile")  # type: ignore[arg-type]
    operation = loaded(folder)
    monkeypatch.setattr(Latents, "decoded", lambda _, latents: latents[:, :3] * float("nan"))
    (bad,) = operation.run(prepared(operation, **chosen).samples)
    assert str(bad) == f"the model's output is not finite: {causes}"


def operation_pixels(operation: Diffusion) -> Pixels:
    result: Pixels = operation.run(prepared(operation).samples)[0].pixels
    return result


@pytest.mark.parametrize("error", [error for name, error in SHORT.items() if not name.startswith("onnxruntime")])
def test_memory_errors_of_torch_become_out_of_memory(
    error: Callable[[], Exception], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = loaded(weights)

    def short(*_: Any, **__: Any) -> Any:
        raise error()

    with monkeypatch.context() as patched:
        patched.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", short)
        with pytest.raises(ModelUnavailable, match="does not fit") as caught:
            operation.run(prepared(operation).samples)
        assert caught.value.passing
    with monkeypatch.context() as patched:
        patched.setattr(diffusers.ControlNetModel, "from_pretrained", short)
        with pytest.raises(ModelUnavailable, match="does not fit") as caught:
            operation.run(prepared(operation).samples)
        assert (caught.value.part, caught.value.passing) == ("controlnet-canny", True)
    styled(operation)
    monkeypatch.setattr(operation._pipeline.current._text.unet, "forward", short)  # type: ignore[union-attr]
    with pytest.raises(OutOfMemory):
        operation.run(prepared(operation).samples)


@pytest.mark.parametrize("model", ["sd15-canny", "sdxl"])
def test_safety_checker_rejects_unsafe_images_and_must_be_installed(model: str, weights: Path, tmp_path: Path) -> None:
    operation = loaded(weights, safety_checker=True)
    outputs = operation.run(prepared(operation, model=model).samples)
    checker = operation._pipeline.current.checker.network  # type: ignore[union-attr]
    plain = loaded(weights)
    plain.run(prepared(plain, model=model).samples)
    assert operation._pipeline.memory.taken == plain._pipeline.memory.taken + bytes_of(checker)
    checker.concept_embeds_weights.data.fill_(-2.0)
    (refused,) = operation.run(prepared(operation, model=model).samples)
    checker.concept_embeds_weights.data.fill_(2.0)
    (passed,) = operation.run(prepared(operation, model=model).samples)
    assert isinstance(refused, UnsafeContent)
    assert not isinstance(passed, Exception)
    assert len(outputs) == 1
    folder = shutil.copytree(weights, tmp_path / "weights")
    shutil.rmtree(folder_of(folder, repository("sd15-safety-checker")))
    with pytest.raises(ConfigurationError, match="imagemill models pull sd15-safety-checker"):
        loaded(folder, safety_checker=True)
