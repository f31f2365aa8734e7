"""Checkpoints and ControlNets of one's own give the same results as the folders that they were made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagemill.shared.engines import parse_options
from imagemill.worker.models import added, checkpoints
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.repositories import folder_of
from tests.checkpoints import checkpoint_tensors, controlnet_tensors, saved
from tests.pipelines import diffusers, pipeline_folder
from tests.styles import QUICK, loaded, styled
from tests.unit.worker.models.test_adding_commands import Run, contents, refused, run, weights
from tests.unit.worker.models.test_adding_tensors import UNET, in_this_process, same, weights_of

__all__ = ["in_this_process", "run", "weights"]

CONTROLNETS = {"sd15": "controlnet-canny", "sdxl": "controlnet-sdxl-canny"}
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with small models of both families."""
    folder = pipeline_folder(tmp_path_factory.mktemp("published"), "sd15", ("canny",), seed=5)
    return pipeline_folder(folder, "sdxl", ("canny",), seed=5)


@pytest.fixture(scope="module")
def tensors(published: Path) -> Tensors:
    """The published SDXL by the names of a checkpoint in one file."""
    return checkpoint_tensors(published, "sdxl")


@pytest.fixture
def base(published: Path, weights: Path) -> Path:
    """The weights folder with another SDXL, whose VAE is a repository of its own, as the pulled ones are."""
    pipeline_folder(weights, "sdxl", ())
    shutil.rmtree(weights / "diffusion" / "sdxl" / "vae")
    config = weights / "diffusion" / "sdxl-vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    return weights


def done(run: Run, *words: Any) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_sdxl_in_one_file_gives_the_bytes_of_its_folder(
    run: Run, base: Path, tensors: Tensors, published: Path, tmp_path: Path
) -> None:
    text = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    others = {text: torch.arange(77)[None], "alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(())}
    told = done(run, "add", "shop", saved(tmp_path / "shop.safetensors", tensors | others))
    assert "shop: checkpoint for sdxl\nshop: parts: unet, text_encoder, text_encoder_2, vae\n" in told
    assert vae_works_in_single_precision(base / "diffusion" / "shop"), "as it is not the one that was pulled"
    wanted = styled(loaded(published), model="sdxl", control="none")
    assert np.array_equal(styled(loaded(base), model="shop", control="none"), wanted)


def test_file_in_half_precision_with_the_pulled_vae_and_a_unet_in_8_bits(
    run: Run, base: Path, tensors: Tensors, published: Path, tmp_path: Path
) -> None:
    shutil.copy(published / "diffusion" / "sdxl-vae" / "diffusion_pytorch_model.safetensors", base / "diffusion" / "sdxl-vae")
    small = {
        name: tensor.to(torch.float8_e4m3fn if name.startswith(UNET) else torch.float16) for name, tensor in tensors.items()
    }
    done(run, "add", "shop", saved(tmp_path / "shop.safetensors", small))
    assert not vae_works_in_single_precision(base / "diffusion" / "shop")
    unet = load_file(base / "diffusion" / "shop" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    given = weights_of(published / "diffusion" / "sdxl" / "unet", "unet")
    assert same(unet, {name: tensor.to(torch.float8_e4m3fn).half() for name, tensor in given.items()})


def vae_works_in_single_precision(folder: Path) -> bool:
    return bool(json.loads((folder / "vae" / "config.json").read_text())["force_upcast"])


def test_checkpoint_without_a_vae_gets_the_pulled_one_and_without_text_encoders_is_refused(
    run: Run, base: Path, tensors: Tensors, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.safetensors", without("first_stage_model.", tensors))
    assert "parts: unet, text_encoder, text_encoder_2, vae; the VAE is sdxl-vae\n" in done(run, "add", "shop", path)
    vaes = (base / "diffusion" / "shop" / "vae", base / "diffusion" / "sdxl-vae")
    assert same(*(weights_of(folder, "vae") for folder in vaes))
    path = saved(tmp_path / "b.safetensors", without("conditioner.", tensors))
    refused(
        run, "add", "b", path, reason=f"{path}: it has a UNet and no first text encoder; expected a checkpoint that has both"
    )


def without(beginning: str, tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(beginning)}


@pytest.mark.parametrize(
    ("names", "metadata", "beside", "changes"),
    [
        ([], {"modelspec.prediction_type": "epsilon"}, "model:\n  params:\n    parameterization: eps\n", {}),
        ([], {"modelspec.prediction_type": "v"}, "", {"prediction_type": "v_prediction"}),
        ([], None, 'model:\n  params:\n    parameterization: "v"\n    b: 1', {"prediction_type": "v_prediction"}),
        (["v_pred"], None, "", {"prediction_type": "v_prediction"}),
        (["v_pred", "ztsnr"], None, "", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
)
def test_velocity_is_predicted_if_the_file_says_so(
    names: list[str], metadata: Any, beside: str, changes: Any, tmp_path: Path
) -> None:
    tensors, config = dict.fromkeys(names, torch.zeros(0)), tmp_path / "scheduler_config.json"
    save_file(dict(tensors), tmp_path / "a.safetensors", metadata)
    (tmp_path / "a.yaml").write_text(beside)
    config.write_text(json.dumps({"prediction_type": "epsilon", "steps_offset": 1}))
    told = checkpoints._set_prediction(config, tmp_path / "a.safetensors", tensors)
    assert told == ("; it predicts velocity" if changes else "")
    assert json.loads(config.read_text()) == {"prediction_type": "epsilon", "steps_offset": 1} | changes


@pytest.mark.parametrize(("family", "prefix"), [("sd15", "control_model."), ("sdxl", "")])
def test_controlnet_by_its_original_names_gives_the_bytes_of_its_folder(
    family: str, prefix: str, run: Run, weights: Path, published: Path, tmp_path: Path
) -> None:
    shutil.copytree(published, weights)
    folder = published / "diffusion" / CONTROLNETS[family]
    named = {f"{prefix}{name.removeprefix('control_model.')}": value for name, value in controlnet_tensors(folder).items()}
    told = done(run, "add", "mine", saved(tmp_path / "control_canny.safetensors", named))
    assert not json.loads((weights / "diffusion" / "mine" / "config.json").read_text())["global_pool_conditions"]
    assert f"mine: controlnet for {family}\n" in told
    assert "mine: pictures: canny, drawn from each image" in told
    assert f"use it with: --operation stylize --engine diffusion --set model={family} --set control=mine\n" in told
    assert same(weights_of(weights / "diffusion" / "mine", "controlnet"), weights_of(folder, "controlnet"))
    operation = loaded(weights)
    wanted = styled(operation, model=family, control="canny")
    assert np.array_equal(styled(operation, model=family, control="mine"), wanted)
    assert not np.array_equal(styled(operation, model=family, control="none"), wanted)


def test_controlnet_for_shuffled_pictures_is_told_by_its_file(run: Run, weights: Path, published: Path, tmp_path: Path) -> None:
    pipeline_folder(weights, "sd15", ())
    named = controlnet_tensors(published / "diffusion" / CONTROLNETS["sd15"])
    told = done(run, "add", "mine", saved(tmp_path / "control_v11e_sd15_shuffle.safetensors", named))
    assert "mine: pictures: none is drawn for it, so jobs give their own; --control names another kind\n" in told
    assert json.loads((weights / "diffusion" / "mine" / "config.json").read_text())["global_pool_conditions"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("task_embedding", torch.ones(2), "it is a union ControlNet, which nodes can't run"),
        ("gate.weight", torch.ones(2), "it has tensors that no ControlNet of its family has, such as gate.weight"),
        ("conv_in.bias", None, "its ControlNetModel lacks some tensors"),
        (
            "conv_in.bias",
            torch.full((16,), torch.inf),
            "its ControlNet has values that are not finite numbers, in conv_in.bias",
        ),
    ],
)
def test_other_controlnet_in_one_file_is_refused(
    name: str, value: Any, reason: str, run: Run, weights: Path, published: Path, tmp_path: Path
) -> None:
    pipeline_folder(weights, "sd15", ())
    before = contents(weights)
    given = weights_of(published / "diffusion" / CONTROLNETS["sd15"], "controlnet") | {name: value}
    path = saved(tmp_path / "a.safetensors", {name: value for name, value in given.items() if value is not None})
    refused(run, "add", "mine", path, reason=f"{path}: {reason}")
    assert contents(weights) == before


def test_replaced_models_change_the_fingerprint(run: Run, weights: Path, published: Path, tmp_path: Path) -> None:
    sources = {"shop": folder_of(published, repository("sd15")), "mine": published / "diffusion" / CONTROLNETS["sd15"]}
    for name, folder in sources.items():
        done(run, "add", name, folder)
    operation, prints = loaded(weights), []
    options = parse_options("stylize", "diffusion", QUICK | {"model": "shop", "control": "mine"})
    for name in (None, *sources):
        if name is not None:
            changed = shutil.copytree(sources[name], tmp_path / name)
            part, kind = (changed / "vae", "AutoencoderKL") if name == "shop" else (changed, "ControlNetModel")
            model = getattr(diffusers(), kind).from_pretrained(part)
            torch.nn.init.zeros_(model.get_submodule("decoder.conv_in" if name == "shop" else "conv_in").bias)
            model.save_pretrained(part)
            assert f"{name}: replaced:" in done(run, "add", name, changed, "--replace")
        prints.append(operation.fingerprint(options))
    assert len(set(prints)) == 3
    record = added.find(weights, "mine")
    assert record is not None
    assert record.source == str(tmp_path / "mine")
