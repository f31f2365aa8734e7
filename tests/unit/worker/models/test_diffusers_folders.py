"""Folders in diffusers' layout: what they are, which of their files are taken, and which folders are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.diffusers_folders import recognise, wanted
from imagemill.worker.models.repositories import folder_of
from tests.pipelines import pipeline_folder
from tests.unit.worker.models.test_adding_commands import Run, refused, run, weights
from tests.unit.worker.models.test_adding_tensors import in_this_process

__all__ = ["in_this_process", "run", "weights"]

UNET = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "in_channels": 4}
XL = {**UNET, "cross_attention_dim": 2048, "addition_embed_type": "text_time"}
NET = {"_class_name": "ControlNetModel", "cross_attention_dim": 768, "in_channels": 4}
SMALL = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/a.json", "tokenizer/a.json"]
WHOLE = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]


def names(*weights: str) -> list[str]:
    return [*SMALL, *(f"{name}.safetensors" for name in weights)]


@pytest.mark.parametrize(
    ("configurations", "expected"),
    [
        ({"model_index.json": {}, "unet/config.json": UNET}, ("checkpoint", "sd15")),
        ({"unet/config.json": XL}, ("checkpoint", "sdxl")),
        ({"config.json": NET}, ("controlnet", "sd15")),
        ({"config.json": {**XL, **NET, "cross_attention_dim": 2048}}, ("controlnet", "sdxl")),
        ({"config.json": {"_class_name": "AutoencoderKL"}}, ("vae", "")),
    ],
)
def test_kind_and_family_are_told_by_the_configurations(configurations: dict[str, Any], expected: tuple[str, str]) -> None:
    assert recognise([*configurations], configurations.__getitem__) == expected


@pytest.mark.parametrize(
    ("configurations", "reason"),
    [
        ({"unet/config.json": {**UNET, "in_channels": 9}}, "its UNet is one for inpainting, with 9 input channels; expected 4"),
        ({"unet/config.json": {**UNET, "in_channels": 7}}, "its UNet is one for upscaling, with 7 input channels; expected 4"),
        ({"unet/config.json": {**UNET, "cross_attention_dim": 1024}}, "it is for Stable Diffusion 2, which nodes can't run"),
        ({"unet/config.json": {**XL, "cross_attention_dim": 1280}}, "it is for the refiner of SDXL, which nodes can't run"),
        ({"unet/config.json": {**XL, "encoder_hid_dim_type": "text_proj"}}, "its prompts are not read by CLIP alone"),
        ({"unet/config.json": {**UNET, "_class_name": "UNetMotionModel"}}, "it has a UNetMotionModel; expected UNet2D"),
        ({"model_index.json": {"_class_name": "FluxPipeline"}}, "it is a FluxPipeline without a UNet; expected Stable"),
        ({"config.json": {**NET, "cross_attention_dim": 1024}}, "it is for Stable Diffusion 2, which nodes can't run"),
        ({"config.json": {**NET, "_class_name": "ControlNetModel_Union"}}, "it is a union ControlNet; expected a checkpoint"),
        ({"config.json": {"_class_name": "T2IAdapter"}}, "it is a T2I adapter; expected a checkpoint, a ControlNet or a VAE"),
        ({"config.json": UNET}, "it is a UNet without text encoder and VAE; expected a checkpoint, a ControlNet or a VAE"),
        ({"config.json": {"architectures": ["Bert"]}}, "it is of another library; expected a checkpoint"),
        (
            {"adapter.safetensors": {}},
            "expected a folder in diffusers' layout, or one of its files, such as adapter.safetensors",
        ),
    ],
)
def test_other_folders_are_refused_with_what_was_expected(configurations: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        recognise([*configurations], configurations.__getitem__)
    assert reason in caught.value.message


SHARDS = [f"unet/diffusion_pytorch_model{half}-0000{number}-of-00002" for half in ("", ".fp16") for number in (1, 2)]
INDEX = ["unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.safetensors.index.fp16.json"]


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (names(*WHOLE), names(*WHOLE)),
        (names(*WHOLE, *(f"{name}.fp16" for name in WHOLE)), names(*(f"{name}.fp16" for name in WHOLE))),
        (names(*WHOLE, f"{WHOLE[0]}.fp16"), names(*WHOLE)),
        (names(*WHOLE[1:], f"{WHOLE[0]}.fp16"), names(*WHOLE[1:], f"{WHOLE[0]}.fp16")),
        ([*names(*WHOLE[1:], *SHARDS), *INDEX], [*names(*WHOLE[1:], *SHARDS[:2]), INDEX[0]]),
        (
            [*names(*(f"{name}.fp16" for name in WHOLE[1:]), *SHARDS), *INDEX],
            [*names(*(f"{name}.fp16" for name in WHOLE[1:]), *SHARDS[2:]), INDEX[1]],
        ),
        ([*names(*WHOLE[:2]), "text_encoder/pytorch_model.bin"], [*names(*WHOLE[:2]), "text_encoder/pytorch_model.bin"]),
    ],
    ids=["full", "half", "half in part", "mixed", "shards", "shards in half", "pickled in part"],
)
def test_each_part_is_taken_once_in_half_precision_if_all_have_it(files: list[str], taken: list[str]) -> None:
    more = ["README.md", "unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors", "photo.safetensors"]
    assert wanted([*files, *more], "checkpoint", "sd15") == sorted(taken)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("scheduler/a.json", "it has no scheduler"),
        ("tokenizer/a.json", "it has no tokenizer"),
        ("vae/config.json", "it has no configuration of its vae"),
        ("unet/diffusion_pytorch_model.safetensors", "it has no weights of its unet"),
    ],
)
def test_missing_file_is_named(missing: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        wanted([name for name in names(*WHOLE) if name != missing], "checkpoint", "sd15")
    assert caught.value.message == reason


@pytest.mark.parametrize("part", ["text_encoder/model", "vae/diffusion_pytorch_model"])
def test_folder_whose_part_lacks_weights_is_refused(part: str, run: Run, weights: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder_of(pipeline_folder(tmp_path, "sd15", ()), repository("sd15")), tmp_path / "cut")
    path = source / f"{part}.safetensors"
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path, {"format": "pt"})
    refused(run, "add", "cut", source, reason=f"{source}: its {path.parent.name} lacks ")
