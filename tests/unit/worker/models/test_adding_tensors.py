"""Stable Diffusion, LoRAs and LaMa of one's own: what is recognised, converted and refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models import added, own_diffusion
from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.diffusion_models import base_of
from imagemill.worker.models.repositories import folder_of, models_here
from imagemill.worker.models.sources import header_of
from imagemill.worker.models.tensor_names import Contents, recognise
from tests.checkpoints import checkpoint_tensors, saved, vae_tensors
from tests.generators import lama_checkpoint, lama_file, lama_script, lama_weights
from tests.pipelines import diffusers, lora_file, pipeline_folder
from tests.styles import loaded, styled
from tests.unit.worker.models.test_adding_commands import Run, contents, listed, refused, run, weights

__all__ = ["run", "weights"]

UNET, INPUT = "model.diffusion_model.", "model.diffusion_model.input_blocks.0.0.weight"
XL_TEXT, HINT = "conditioner.embedders.0.transformer.a", "controlnet_cond_embedding.conv_in.weight"


@pytest.mark.parametrize(
    ("names", "kind", "family"),
    [
        ([INPUT, "cond_stage_model.transformer.text_model.a"], "checkpoint", "sd15"),
        ([INPUT, "cond_stage_model.transformer.embeddings.a"], "checkpoint", "sd15"),
        ([INPUT, "conditioner.embedders.0.transformer.a", "conditioner.embedders.1.model.a"], "checkpoint", "sdxl"),
        (["control_model.time_embed.0.weight"], "controlnet", "sd15"),
        (["time_embed.0.weight", "input_hint_block.0.weight"], "controlnet", "sd15"),
        (["control_model.input_hint_block.0.weight", "control_model.label_emb.0.0.weight"], "controlnet", "sdxl"),
        (["controlnet_cond_embedding.conv_in.weight"], "controlnet", "sd15"),
        (["controlnet_cond_embedding.conv_in.weight", "add_embedding.linear_1.weight"], "controlnet", "sdxl"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "vae", ""),
        (["lora_unet_down_blocks_0_attentions_0_attn2_to_k.lora_down.weight"], "lora", "sd15"),
        (["unet.down_blocks.0.attn1.to_k.lora_A.weight"], "lora", ""),
        (["generator.model.1.ffc.convl2l.weight"], "inpainting", "lama"),
    ],
)
def test_kind_and_family_are_recognised_by_the_tensors_names(names: list[str], kind: Any, family: str) -> None:
    assert recognise(dict.fromkeys(names, (320, 4) if names[0] == INPUT else (8, 768))) == Contents(kind, family)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({INPUT: (320, 9, 3, 3)}, "its UNet is one for inpainting, with 9 input channels; expected 4"),
        ({INPUT: (320, 8, 3, 3)}, "its UNet is one for editing by instructions, with 8 input channels; expected 4"),
        ({INPUT: (320, 4), "cond_stage_model.model.a": (1,)}, "it is Stable Diffusion 2, which nodes can't run; expected"),
        ({"conditioner.embedders.0.model.a": (1,)}, "it is the refiner of SDXL, which nodes can't run"),
        ({INPUT: (320, 4)}, "it has a UNet and no text encoder; expected a checkpoint that has both"),
        ({INPUT: (320, 4), XL_TEXT: (1,)}, "it has a UNet and no second text encoder; expected a checkpoint that has both"),
        ({INPUT: (320, 4), f"{UNET}label_emb.0.0.weight": (1,)}, "it has a UNet and no first text encoder"),
        ({INPUT: (320, 4), f"{UNET}middle_block.1.a.attn2.to_k.weight": (1, 1024)}, "it is for Stable Diffusion 2, which"),
        ({INPUT: (384, 4), f"{UNET}middle_block.1.a.attn2.to_k.weight": (1, 1280)}, "it is for the refiner of SDXL, which"),
        ({INPUT: (320, 4), XL_TEXT: (1,), "edm_mean": (4,)}, "it is Playground 2.5, which nodes can't run"),
        ({"double_blocks.0.a": (1,)}, "it is Flux, which nodes can't run; expected a checkpoint of Stable Diffusion 1.5"),
        ({f"{UNET}joint_blocks.0.a": (1,), "first_stage_model.a": (1,)}, "it is Stable Diffusion 3, which nodes can't run"),
        ({f"{UNET}cap_embedder.0.weight": (1,)}, "it is Lumina, which nodes can't run"),
        ({f"{UNET}blocks.0.a": (1,)}, "it is a diffusion model without a UNet, which nodes can't run; expected"),
        ({"lora_controlnet": (0,), "input_hint_block.0.weight": (1,)}, "it is a control LoRA, which nodes can't run"),
        ({"body.0.block1.weight": (1,), "conv_in.weight": (1,)}, "it is a T2I adapter, which nodes can't run"),
        ({"task_embedding": (1,), HINT: (1,)}, "it is a union ControlNet, which nodes can't run"),
        ({HINT: (1,), "mid_block.a.attn2.to_k.weight": (1, 1024)}, "it is for Stable Diffusion 2, which nodes can't run"),
        ({"control_model.a.attn2.to_k.weight": (1, 1024)}, "it is for Stable Diffusion 2, which nodes can't run"),
        ({"down_blocks.0.a": (1,)}, "it is a UNet without text encoder and VAE"),
        ({"bert.encoder.a": (1,)}, "its tensors (bert.encoder.a, ...) are of no known model"),
        ({}, "it has no tensors with names, like a hypernetwork, which nodes can't run; expected a checkpoint"),
        ({"string_to_param.*": (2, 768)}, "it is a textual inversion, which nodes can't run; expected"),
        ({"<cat-toy>": (768,)}, "it is a textual inversion"),
        ({"clip_g": (8, 1280), "clip_l": (8, 768)}, "it is a textual inversion"),
        ({"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (8, 16, 3, 3)}, "it is a VAE with 16 channels, as"),
        ({"encoder.layers.0.weight": (8, 3), "decoder.layers.1.weight": (8, 4)}, "it is TAESD, a VAE for previews"),
        ({"0.weight": (8, 3), "1.conv.0.weight": (8, 8)}, "it is TAESD, a VAE for previews"),
        ({"encoder.conv_in.weight": (8, 3), "decoder.condition_encoder.layers.0.weight": (8, 4)}, "it is an asymmetric VAE"),
        ({"synthesis.first_stage.conv_first.conv.weight": (8, 4)}, "it is MAT"),
        ({"encoder.b512.fromrgb.weight": (8, 4), "synthesis.b4.conv.weight": (8, 4)}, "it is MI-GAN"),
        (
            {"gen_state_dict.model.1.ffc.convl2l.weight": (64, 4), "str_state_dict.rel_pos_emb.weight": (8, 8)},
            "it is a LaMa that also wants to know where the mask is",
        ),
        (
            {"stage1.rebnconvin.conv_s1.weight": (64, 3)},
            "a network that cuts out subjects, but not its graph; expected an ONNX",
        ),
        ({"bb.layers.0.weight": (8,), "squeeze_module.0.conv_in.weight": (8, 8)}, "expected an ONNX file: export it"),
    ],
)
def test_other_models_are_refused_with_what_was_expected(tensors: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        recognise(tensors)
    assert reason in caught.value.message


@pytest.mark.parametrize("cut", [4, 40, -1])
def test_incomplete_safetensors_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"a": torch.zeros(8)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigurationError, match=r"is not a safetensors file, or it is damaged|but its header says"):
        header_of(path)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process with diffusers for each model would take seconds; the tests of ONNX files do that."""
    monkeypatch.setattr(own_diffusion, "apart", lambda function, *arguments: function(*arguments))


def weights_of(folder: Path, part: str) -> dict[str, Any]:
    kind = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "controlnet": "ControlNetModel"}[part]
    return dict(getattr(diffusers(), kind).from_pretrained(folder).state_dict())


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_checkpoint_in_one_file_becomes_what_its_folder_was(run: Run, weights: Path, tmp_path: Path) -> None:
    other = pipeline_folder(tmp_path / "other", seed=5)
    source = saved(tmp_path / "photo.safetensors", checkpoint_tensors(other))
    refused(run, "add", "photo", source, reason="of sd15: run `imagemill models pull sd15` first")
    assert contents(weights) == set()
    pipeline_folder(weights)
    done = run("add", "photo", source)
    assert done.exit_code == 0, done.output
    assert "photo: checkpoint for sd15" in done.stdout
    assert "use it with: --operation stylize --engine diffusion --set model=photo" in done.stdout
    base = base_of(weights, "photo")
    for part in ("unet", "vae"):
        assert same(weights_of(base.folder / part, part), weights_of(folder_of(other, repository("sd15")) / part, part))
    assert (base.family, models_here(weights, "diffusion")) == ("sd15", ["sd15-canny", "sd15", "photo"])
    wanted = styled(loaded(other), model="sd15", control="none")
    assert np.array_equal(styled(loaded(weights), model="photo", control="none"), wanted)
    assert not np.array_equal(styled(loaded(weights), model="sd15", control="none"), wanted)
    assert listed(run)["photo"]["state"] == "there"
    assert run("verify", "photo").exit_code == 0
    assert run("remove", "photo").exit_code == 0
    assert not base.folder.exists()
    assert models_here(weights, "diffusion") == ["sd15-canny", "sd15"]


def test_checkpoint_without_some_weights_is_refused(run: Run, weights: Path, tmp_path: Path) -> None:
    tensors = checkpoint_tensors(pipeline_folder(weights))
    before = contents(weights)
    del tensors["model.diffusion_model.middle_block.0.in_layers.0.weight"]
    path = saved(tmp_path / "cut.safetensors", tensors)
    refused(run, "add", "cut", path, reason=f"{path}: its UNet2DConditionModel lacks some tensors")
    assert contents(weights) == before


def test_folder_is_taken_without_files_that_nodes_do_not_load(run: Run, weights: Path, tmp_path: Path) -> None:
    source = folder_of(pipeline_folder(tmp_path / "other", seed=5), repository("sd15"))
    (source / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02 pickled")
    (source / "setup.py").write_text("print('no')")
    (source / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}))
    done = run("add", "house", source)
    assert done.exit_code == 0, done.output
    taken = contents(weights)
    assert "diffusion/house/unet/diffusion_pytorch_model.safetensors" in taken
    assert not {name for name in taken if name.endswith((".bin", ".py"))}
    index = json.loads((weights / "diffusion" / "house" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_vae_is_added_and_put_into_a_checkpoint(run: Run, weights: Path, tmp_path: Path) -> None:
    other = pipeline_folder(tmp_path / "other", seed=5)
    theirs = folder_of(other, repository("sd15")) / "vae"
    base = folder_of(pipeline_folder(weights), repository("sd15"))
    assert run("add", "soft", saved(tmp_path / "vae.safetensors", vae_tensors(theirs))).exit_code == 0
    assert same(weights_of(weights / "diffusion" / "soft", "vae"), weights_of(theirs, "vae"))
    assert run("add", "photo", base, "--vae", "soft").exit_code == 0
    assert same(weights_of(weights / "diffusion" / "photo" / "vae", "vae"), weights_of(theirs, "vae"))
    refused(run, "add", "other", base, "--vae", "hard", reason="there is no VAE called hard: add it first")


VAE_FILES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "original names": lambda tensors: tensors,
    "of a checkpoint": lambda tensors: {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()},
    "with a loss": lambda tensors: (
        tensors | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(3)}
    ),
    "with averages": lambda tensors: tensors | {f"model_ema.{name.replace('.', '')}": part for name, part in tensors.items()},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint to add in `other`, and those of both families in `here`."""
    folder = tmp_path_factory.mktemp("published")
    pipeline_folder(folder / "other", seed=5)
    pipeline_folder(pipeline_folder(folder / "here"), "sdxl", ())
    return folder


@pytest.mark.parametrize("kind", [*VAE_FILES, "diffusers' names"])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_vae_in_one_file_becomes_what_its_folder_was(
    kind: str, suffix: str, run: Run, weights: Path, published: Path, tmp_path: Path
) -> None:
    theirs = folder_of(published / "other", repository("sd15")) / "vae"
    shutil.copytree(published / "here", weights)
    tensors = VAE_FILES[kind](vae_tensors(theirs)) if kind in VAE_FILES else weights_of(theirs, "vae")
    path = tmp_path / f"soft.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    done = run("add", "soft", path if suffix == "ckpt" else saved(path, tensors))
    assert done.exit_code == 0, done.output
    assert same(weights_of(weights / "diffusion" / "soft", "vae"), weights_of(theirs, "vae"))


def test_family_of_a_vae_is_said_or_told_by_its_name_and_its_factor_follows(
    run: Run, weights: Path, published: Path, tmp_path: Path
) -> None:
    shutil.copytree(published / "here", weights)
    base = weights / "diffusion" / "sdxl" / "vae"
    config = json.loads((base / "config.json").read_text()) | {"scaling_factor": 0.13025}
    (base / "config.json").write_text(json.dumps(config))
    path = saved(tmp_path / "soft.safetensors", vae_tensors(base))
    shutil.copy(path, tmp_path / "sdxl_soft.safetensors")
    for name, words, family in (
        ("a", [path], "sd15"),
        ("b", [path, "--family", "sdxl"], "sdxl"),
        ("c", [tmp_path / "sdxl_soft.safetensors"], "sdxl"),
        ("d", [tmp_path / "sdxl_soft.safetensors", "--family", "sd15"], "sd15"),
        ("e", [base], "sdxl"),
    ):
        done = run("add", name, *words)
        assert (done.exit_code, f"{name}: VAE for {family}" in done.stdout) == (0, True), done.output
        factor = json.loads((weights / "diffusion" / name / "config.json").read_text())["scaling_factor"]
        assert factor == {"sd15": 0.18215, "sdxl": 0.13025}[family]
    refused(run, "add", "f", base, "--family", "sd15", reason="is a VAE of the family sdxl, not sd15")
    photo = folder_of(weights, repository("sd15"))
    refused(run, "add", "photo", photo, "--vae", "b", reason="the VAE b is for sdxl, and the checkpoint is sd15")
    refused(run, "add", "a", path, "--family", "sdxl", reason="choose another name, or add --replace")
    assert run("verify", *"abcde").exit_code == 0
    (weights / "diffusion" / "a" / "config.json").write_text("{}")
    refused(run, "verify", "a", reason="config.json has changed since it was added", status=1)
    assert run("remove", *"abcde").exit_code == 0
    assert contents(weights) == {str(file.relative_to(published / "here")) for file in (published / "here").rglob("*.*[jt]*")}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"latent_channels": 16}, "it is a VAE with 16 channels, as Flux and Stable Diffusion 3 have; expected 4"),
        ({"_class_name": "AutoencoderTiny"}, "it is TAESD, a VAE for previews; expected a checkpoint, a ControlNet or a VAE"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "it is an asymmetric VAE; expected"),
        ({"_class_name": "ConsistencyDecoderVAE"}, "it is a consistency decoder; expected"),
    ],
    ids=str,
)
def test_folder_with_another_vae_is_refused(config: dict[str, Any], reason: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | config))
    refused(run, "add", "soft", tmp_path / "vae", reason=reason)


def test_controlnet_in_one_file_becomes_what_its_folder_was(run: Run, weights: Path, tmp_path: Path) -> None:
    source = folder_of(pipeline_folder(tmp_path / "other", seed=5), repository("controlnet-canny"))
    path = saved(tmp_path / "my_canny.safetensors", weights_of(source, "controlnet"))
    refused(run, "add", "edges", path, reason="run `imagemill models pull sd15` first")
    pipeline_folder(weights)
    done = run("add", "edges", path)
    assert done.exit_code == 0, done.output
    record = added.find(weights, "edges")
    assert record is not None
    assert (record.kind, record.family, record.parameters) == ("controlnet", "sd15", {"control": "canny"})
    assert same(weights_of(weights / "diffusion" / "edges", "controlnet"), weights_of(source, "controlnet"))
    wanted = styled(loaded(tmp_path / "other"), model="sd15", control="canny")
    assert not np.array_equal(styled(loaded(weights), model="sd15", control="canny"), wanted)


def test_controlnet_is_added_with_the_kind_of_pictures_that_it_takes(run: Run, weights: Path, tmp_path: Path) -> None:
    source = folder_of(pipeline_folder(tmp_path / "other", seed=5), repository("controlnet-canny"))
    assert run("add", "edges", source).exit_code == 0
    record = added.find(weights, "edges")
    assert record is not None
    assert (record.kind, record.family, record.parameters) == ("controlnet", "sd15", {"control": "canny"})
    assert same(weights_of(weights / "diffusion" / "edges", "controlnet"), weights_of(source, "controlnet"))


def test_lora_and_lama_are_added_to_where_their_engines_look(run: Run, weights: Path, tmp_path: Path) -> None:
    pipeline_folder(tmp_path / "other")
    lora = lora_file(tmp_path / "style.safetensors", tmp_path / "other")
    refused(run, "add", "house.style", lora, reason="a LoRA's name has up to 64 letters, digits and _-")
    assert run("add", "house-style", lora).exit_code == 0
    assert run("add", "fill", lama_checkpoint(tmp_path / "best.ckpt")).exit_code == 0
    assert contents(weights) == {
        *("added/house-style.json", "diffusion/loras/house-style.safetensors"),
        *("added/fill.json", "lama/fill.safetensors"),
    }
    assert models_here(weights, "lama") == ["fill"]
    refused(run, "add", "other", lama_file(tmp_path / "lama.safetensors"), "--mean", "0.5", reason="--mean is not for a file")


def lama_in_a_dictionary(path: Path) -> Path:
    """A pickle in which the generator has another name, as other tools train it."""
    tensors = {name.removeprefix("generator."): tensor for name, tensor in lama_weights().items()}
    torch.save({"gen_state_dict": tensors, "dis_state_dict": {"0.weight": torch.ones(3)}}, path)
    return path


def zipped_lama(path: Path) -> Path:
    """An archive with the checkpoint in a folder, as it is published."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(lama_checkpoint(path.with_name("best.ckpt")), "big-lama/models/best.ckpt")
    return path


@pytest.mark.parametrize("written", [lama_checkpoint, lama_script, lama_file, lama_in_a_dictionary, zipped_lama])
def test_lama_is_added_in_each_format_that_it_is_passed_around_in(
    written: Any, run: Run, weights: Path, tmp_path: Path
) -> None:
    suffix = ".safetensors" if written is lama_file else ".pt"
    done = run("add", "fill", written(tmp_path / f"big-lama{suffix}"))
    assert (done.exit_code, "fill: LaMa with" in done.stdout) == (0, True), done.output
    made = load_file(weights / "lama" / "fill.safetensors")
    assert same(made, {name: tensor for name, tensor in lama_weights().items() if name in made})
    assert {name for name in lama_weights() if "num_batches" not in name} <= made.keys()
    assert listed(run)["fill"]["kind"] == "inpainting"
    assert run("verify", "fill").exit_code == 0
    assert run("remove", "fill").exit_code == 0
    assert contents(weights) == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_lora_with_values_that_are_not_finite_is_refused(value: float, run: Run, weights: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"unet.attn1.to_k.lora_A.weight": torch.full((2, 2), value)})
    refused(run, "add", "style", path, reason="it has values that are not finite numbers")
    assert contents(weights) == set()


def test_pickled_checkpoint_is_read_as_data(run: Run, weights: Path, tmp_path: Path) -> None:
    named = checkpoint_tensors(pipeline_folder(weights))
    tensors = {name.replace(".text_model.", "."): tensor for name, tensor in named.items()}  # as in the first checkpoints
    positions = {"cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None]}
    torch.save({"state_dict": tensors | positions, "epoch": 3, "where": Path("a")}, tmp_path / "photo.ckpt")
    done = run("add", "photo", tmp_path / "photo.ckpt")
    assert done.exit_code == 0, done.output
    own = base_of(weights, "photo").folder
    assert same(weights_of(own / "unet", "unet"), weights_of(folder_of(weights, repository("sd15")) / "unet", "unet"))
