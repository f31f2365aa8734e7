"""LoRAs as trainers and users pass them around: what diffusers adds to each weight once they have been added."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from imagemill.shared.errors import ConfigurationError, ModelUnavailable
from imagemill.worker.models import added, loras
from imagemill.worker.models.lora_names import Layers, Place, layers_of
from imagemill.worker.models.own_diffusion import contents_of, layers_here
from tests.checkpoints import unet_names
from tests.pipelines import diffusers, pipeline_folder
from tests.styles import loaded, prepared
from tests.unit.worker.models.test_adding_commands import Run, contents, refused, run, weights
from tests.unit.worker.models.test_adding_tensors import in_this_process

__all__ = ["in_this_process", "run", "weights"]

Tensors = dict[str, Tensor]
RANDOM = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM) * 0.3


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with a checkpoint of each family."""
    return pipeline_folder(pipeline_folder(tmp_path_factory.mktemp("here")), "sdxl", ())


@pytest.fixture(scope="module")
def known(here: Path) -> dict[str, Layers]:
    return {layers.family: layers for layers in layers_here(here)}


SOME = re.compile(
    r"conv_in|conv_out|text_projection|.*embedding\.linear_.|down_blocks\.0\.(down|resnets\.0\.conv2).*|up_blocks\.0\.upsamplers.*"
    r"|down_blocks\.1\.(resnets\.0|attentions\.0\.(proj|transformer_blocks\.0)).*|mid_block\.resnets\.1\.conv1"
    r"|up_blocks\.0\.attentions\.1.*\.attn2.*|up_blocks\.1\.resnets\.1.*|encoder\.layers\.1.*"
)
"""Layers of every kind."""


def some(layers: Layers) -> list[tuple[Place, tuple[int, ...]]]:
    return [(place, shape) for place, shape in layers.shapes.items() if SOME.fullmatch(place.name)]


@pytest.fixture(scope="module")
def pipes(here: Path) -> dict[str, Any]:
    kinds = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
    return {
        name: getattr(diffusers(), kind).from_pretrained(here / "diffusion" / name, local_files_only=True)
        for name, kind in kinds.items()
    }


def changes(pipe: Any, path: Path) -> Tensors:
    """What diffusers adds to each weight for a LoRA, by part and name."""
    found = {}
    for part, name, layer in adapted(pipe, path):
        found[f"{part}.{name}"] = layer.get_delta_weight("a").detach().clone().reshape(layer.weight.shape)
    return found


def adapted(pipe: Any, path: Path) -> Iterator[tuple[str, str, Any]]:
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a", local_files_only=True, use_safetensors=True)
    try:
        for part in ("unet", "text_encoder", "text_encoder_2"):
            model = getattr(pipe, part, None)
            for name, layer in () if model is None else model.named_modules():
                if "a" in getattr(layer, "lora_A", {}):
                    yield part, name.removeprefix("text_model."), layer
    finally:
        pipe.unload_lora_weights()


def full(place: Place) -> str:
    """A layer's name in transformers and diffusers."""
    return f"text_model.{place.name}" if place.part != "unet" and place.name != "text_projection" else place.name


def flat(name: str) -> str:
    return name.replace(".", "_")


Named = Callable[[Place], tuple[str, str] | None]
"""The names of a layer's two tensors; None if such files have no tensors for it."""


def pairs(layers: Layers, named: Named, *, ranks: tuple[int, ...] = (4,), dtype: Any = None) -> tuple[Tensors, Tensors]:
    """A LoRA with ranks in turn, and what it adds to each weight."""
    tensors, added_to = {}, {}
    for number, (place, shape) in enumerate(some(layers)):
        names, rank = named(place), ranks[number % len(ranks)]
        if names is None:
            continue
        ends = (1,) * (len(shape) - 2)
        down, up = (part.to(dtype or torch.float32) for part in (numbers(rank, *shape[1:]), numbers(shape[0], rank, *ends)))
        tensors |= {names[0]: down, names[1]: up}
        added_to[f"{place.part}.{place.name}"] = (up.float().flatten(1) @ down.float().flatten(1)).reshape(shape)
    return tensors, added_to


def peft(place: Place) -> tuple[str, str]:
    return f"{place.part}.{full(place)}.lora_A.weight", f"{place.part}.{full(place)}.lora_B.weight"


def diffusers_021(place: Place) -> tuple[str, str]:
    kind = "lora" if place.part == "unet" else "lora_linear_layer"
    return f"{place.part}.{full(place)}.{kind}.down.weight", f"{place.part}.{full(place)}.{kind}.up.weight"


def diffusers_016(place: Place) -> tuple[str, str] | None:
    """Attention only, under the names of attention processors."""
    if "attn" not in place.name:
        return None
    layer, _, kind = place.name.removesuffix(".0").rpartition(".")
    place_there = f"{layer}.processor.{kind}" if place.part == "unet" else f"text_model.{layer}.to_{kind.removesuffix('_proj')}"
    return f"{place.part}.{place_there}_lora.down.weight", f"{place.part}.{place_there}_lora.up.weight"


def oldest(place: Place) -> tuple[str, str] | None:
    names = diffusers_016(place)
    return (names[0][5:], names[1][5:]) if names and place.part == "unet" else None


def kohya(place: Place) -> tuple[str, str]:
    name = f"lora_unet_{flat(place.name)}" if place.part == "unet" else f"lora_te_{flat(full(place))}"
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def stability(name: str) -> str:
    """Stability's name of a layer of the tests' small UNet."""
    both = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    return both.get(name) or unet_names(f"{name}.weight").removesuffix(".weight")


def kohya_sdxl(place: Place) -> tuple[str, str]:
    te = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    name = f"lora_unet_{flat(stability(place.name))}" if place.part == "unet" else te[place.part] + flat(full(place))
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight"


def comfy(place: Place) -> tuple[str, str] | None:
    name = f"diffusion_model.{stability(place.name)}" if place.part == "unet" else None
    return None if name is None else (f"{name}.lora_A.weight", f"{name}.lora_B.weight")


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


def written(path: Path, tensors: Tensors, known: dict[str, Layers], family: str) -> Path:
    """The LoRA as nodes load it."""
    (save_file if path.suffix == ".safetensors" else lambda *both: torch.save(*both))(tensors, path)
    told = contents_of(path)
    assert (told.kind, told.family in ("", family)) == ("lora", True)
    target = path.with_name("made.safetensors")
    assert loras.from_file(path, target, told.family, list(known.values()))[0] == family
    return target


@pytest.mark.parametrize(
    ("named", "family"),
    [
        *((peft, family) for family in ("sd15", "sdxl")),
        *((diffusers_021, family) for family in ("sd15", "sdxl")),
        *((diffusers_016, family) for family in ("sd15", "sdxl")),
        (oldest, "sd15"),
        (kohya, "sd15"),
        (kohya_sdxl, "sdxl"),
        (comfy, "sdxl"),
    ],
)
def test_each_naming_changes_the_layers_that_it_names(
    named: Named, family: str, known: dict[str, Layers], pipes: dict[str, Any], tmp_path: Path
) -> None:
    tensors, wanted = pairs(known[family], named, ranks=(2, 4, 8))
    assert_equal(changes(pipes[family], written(tmp_path / "a.safetensors", tensors, known, family)), wanted)


@pytest.mark.parametrize("alphas", [(1.0,), (8.0, 3.0, None)], ids=["same", "differing"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_alpha_scales_its_own_layer(
    alphas: tuple[float | None, ...], suffix: str, known: dict[str, Layers], pipes: dict[str, Any], tmp_path: Path
) -> None:
    tensors, wanted = pairs(known["sd15"], kohya, ranks=(2, 4, 8))
    for number, (place, name) in enumerate((place, kohya(place)[0]) for place, _ in some(known["sd15"])):
        alpha = alphas[number % len(alphas)]
        if alpha is not None:
            tensors[name.replace("lora_down.weight", "alpha")] = torch.tensor(alpha)
            wanted[f"{place.part}.{place.name}"] *= alpha / len(tensors[name])
    assert_equal(changes(pipes["sd15"], written(tmp_path / f"a.{suffix}", tensors, known, "sd15")), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_precision_keep_their_values(
    dtype: torch.dtype, known: dict[str, Layers], pipes: dict[str, Any], tmp_path: Path
) -> None:
    tensors, wanted = pairs(known["sd15"], kohya, dtype=dtype)
    made = written(tmp_path / "a.safetensors", tensors, known, "sd15")
    assert_equal(changes(pipes["sd15"], made), wanted)
    kept = dtype if dtype != torch.float64 else torch.float32
    assert {tensor.dtype for tensor in load_file(made).values()} == {kept}


def test_scales_are_read_from_metadata_and_from_pefts_configuration(
    known: dict[str, Layers], pipes: dict[str, Any], tmp_path: Path
) -> None:
    tensors, wanted = pairs(known["sd15"], peft)
    scales = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(scales)})
    loras.from_file(tmp_path / "a.safetensors", tmp_path / "made.safetensors", "", [known["sd15"]])
    half = {name: change * (2 if name.startswith("unet") else 0.5) for name, change in wanted.items()}
    assert_equal(changes(pipes["sd15"], tmp_path / "made.safetensors"), half)

    own = {f"base_model.model.{name[5:]}": tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    save_file(own, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigurationError, match=r"its scale is in adapter_config\.json, which is missing beside it"):
        written(tmp_path / "adapter_model.safetensors", own, known, "sd15")
    config = {"r": 4, "lora_alpha": 16, "alpha_pattern": {"time_embedding.linear_1": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scaled = {name: change * 4 for name, change in wanted.items() if name.startswith("unet")}
    scaled["unet.time_embedding.linear_1"] /= 8
    assert_equal(changes(pipes["sd15"], written(tmp_path / "adapter_model.safetensors", own, known, "sd15")), scaled)


# --- LyCORIS ---------------------------------------------------------------------------------------------------------


def loha(shape: tuple[int, ...], rank: int) -> tuple[Tensors, Tensor]:
    out, into = shape[0], math.prod(shape[1:])
    parts = {
        **{f"hada_w{number}_a": numbers(out, rank) for number in (1, 2)},
        **{f"hada_w{number}_b": numbers(rank, into) for number in (1, 2)},
    }
    change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    return parts, change.reshape(shape) / rank


def tucker_loha(shape: tuple[int, ...], rank: int) -> tuple[Tensors, Tensor]:
    if len(shape) == 2:
        return loha(shape, rank)
    parts, change = {}, torch.ones(shape)
    for number in (1, 2):
        core, a, b = numbers(rank, rank, *shape[2:]), numbers(rank, shape[0]), numbers(rank, shape[1])
        parts |= {f"hada_t{number}": core, f"hada_w{number}_a": a, f"hada_w{number}_b": b}
        change = change * torch.einsum("ijkl,jr,ip->prkl", core, b, a)
    return parts, change / rank


def lokr(shape: tuple[int, ...], rank: int) -> tuple[Tensors, Tensor]:
    """Whole matrices have no rank, so alpha has no effect."""
    del rank
    small, large = numbers(4, 4), numbers(shape[0] // 4, shape[1] // 4, *shape[2:])
    return {"lokr_w1": small, "lokr_w2": large}, torch.kron(small.reshape(4, 4, *(1,) * (len(shape) - 2)), large)


def low_lokr(shape: tuple[int, ...], rank: int) -> tuple[Tensors, Tensor]:
    small, a, b = numbers(4, 4), numbers(shape[0] // 4, rank), numbers(rank, math.prod(shape[1:]) // 4)
    large = (a @ b).reshape(shape[0] // 4, shape[1] // 4, *shape[2:])
    parts = {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b}
    return parts, torch.kron(small.reshape(4, 4, *(1,) * (len(shape) - 2)), large) / rank


def tucker_locon(shape: tuple[int, ...], rank: int) -> tuple[Tensors, Tensor]:
    if len(shape) == 2:
        down, up = numbers(rank, shape[1]), numbers(shape[0], rank)
        return {"lora_down.weight": down, "lora_up.weight": up}, up @ down / rank
    down, mid, up = numbers(rank, shape[1], 1, 1), numbers(rank, rank, *shape[2:]), numbers(shape[0], rank, 1, 1)
    change = torch.einsum("om,mnkl,ni->oikl", up.flatten(1), mid, down.flatten(1)) / rank
    return {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}, change


@pytest.mark.parametrize(
    ("kind", "rank"), [(loha, 2), (loha, 6), (tucker_loha, 3), (lokr, 2), (low_lokr, 1), (low_lokr, 3), (tucker_locon, 3)]
)
def test_lycoris_becomes_the_same_change(
    kind: Callable[..., tuple[Tensors, Tensor]], rank: int, known: dict[str, Layers], pipes: dict[str, Any], tmp_path: Path
) -> None:
    tensors, wanted = {}, {}
    for place, shape in some(known["sdxl"]):
        if place.part != "unet" or min(shape[:2]) < 8:
            continue
        parts, wanted[f"unet.{place.name}"] = kind(shape, rank)
        tensors |= {f"lora_unet_{flat(stability(place.name))}.{role}": part for role, part in parts.items()}
        tensors[f"lora_unet_{flat(stability(place.name))}.alpha"] = torch.tensor(1.0)
    assert_equal(changes(pipes["sdxl"], written(tmp_path / "a.safetensors", tensors, known, "sdxl")), wanted)


def test_dora_gives_each_output_its_length(known: dict[str, Layers], pipes: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipes["sd15"]
    tensors, wanted = pairs(known["sd15"], kohya)
    lengths = {}
    for place, shape in some(known["sd15"]):
        name = kohya(place)[0].replace("lora_down.weight", "dora_scale")
        lengths[f"{place.part}.{place.name}"] = tensors[name] = numbers(shape[0], *(1,) * (len(shape) - 1)).abs() + 0.5
    seen = 0
    for part, name, layer in adapted(pipe, written(tmp_path / "a.safetensors", tensors, known, "sd15")):
        changed = (layer.weight + wanted[f"{part}.{name}"]).flatten(1)
        weight = changed / changed.norm(dim=1, keepdim=True) * lengths[f"{part}.{name}"].flatten(1)
        with torch.no_grad():
            size = (3, layer.weight.shape[1]) if layer.weight.ndim == 2 else (1, layer.weight.shape[1], 6, 6)
            given = numbers(*size)
            with_bias = layer.base_layer
            before, with_bias.weight.data = with_bias.weight.data, weight.reshape(layer.weight.shape)
            expected = with_bias(given)
            with_bias.weight.data = before
            assert torch.allclose(layer(given), expected, atol=1e-4), (part, name)
        seen += 1
    assert seen == len(wanted)


# --- what does not fit -----------------------------------------------------------------------------------------------

TO_K = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
TO_Q = TO_K.replace("attn2_to_k", "attn1_to_q")


def pair(name: str = TO_Q, out: int = 32, into: int = 32, rank: int = 2) -> Tensors:
    return {f"{name}.lora_down.weight": numbers(rank, into), f"{name}.lora_up.weight": numbers(out, rank)}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (pair("lora_unet_motion_modules_0"), "1 of its 1 layers are not in sd15, such as lora_unet_motion_modules_0"),
        (pair(out=48), f"its layer {TO_Q} is for a weight of 48 x 32 numbers, and in sd15 that has 32 x 32"),
        (pair(TO_K, into=64), "is for a weight of 32 x 64 numbers, and in sd15 that has 32 x 32"),
        ({f"{TO_Q}.lora_down.weight": numbers(2, 32)}, f"its layer {TO_Q} has only down; expected a pair"),
        (
            {f"{TO_Q}.lora_down.weight": numbers(2, 32), f"{TO_Q}.lora_up.weight": numbers(32, 3)},
            "has ranks of 2 and 3; expected the same",
        ),
        (
            pair() | pair("lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"),
            "it has two layers for one weight",
        ),
        ({f"{TO_Q}.lora_down.weight": torch.ones(2, 32, dtype=torch.int8)}, "lora_down.weight has no floats"),
        (pair() | {"logit_scale": torch.ones(1)}, "its tensor logit_scale is no part of a LoRA; expected a LoRA, LoCon"),
        (pair() | {f"{TO_Q}.dora_scale": torch.ones(1, 32)}, "has 1 x 32 numbers; expected one for each of 32 outputs"),
        (
            pair() | pair(TO_K) | {f"{TO_Q}.dora_scale": torch.ones(32, 1)},
            "1 of 2 layers of its unet are of a DoRA; expected all or none",
        ),
    ],
    ids=range(10),
)
def test_lora_that_does_not_fit_is_refused(tensors: Tensors, reason: str, known: dict[str, Layers], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ConfigurationError) as caught:
        loras.from_file(tmp_path / "a.safetensors", tmp_path / "made.safetensors", "", [known["sd15"]])
    assert reason in caught.value.message
    assert not (tmp_path / "made.safetensors").exists()


WIDE = TO_K + ".lora_down.weight"


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({f"{TO_Q}.weight": (32,), f"{TO_Q}.on_input": ()}, "it is an (IA)3, which nodes can't use; expected a LoRA, LoCon"),
        ({f"{TO_Q}.oft_blocks": (2, 4, 4)}, "it is an OFT"),
        ({f"{TO_Q}.a1.weight": (2, 4)}, "it is a GLoRA"),
        ({f"{TO_Q}.diff": (32, 32)}, "it is a difference between whole checkpoints"),
        ({f"{TO_Q}.w_norm": (32,)}, "it is a LoRA that also changes norms"),
        ({"lora_controlnet": (0,), "input_hint_block.0.weight": (16, 3)}, "it is a control LoRA"),
        ({WIDE: (4, 1024)}, "it is a LoRA for Stable Diffusion 2, which nodes can't run; expected 1.5 or SDXL"),
        ({"transformer.single_blocks.0.lora_A.weight": (4, 8)}, "it is a LoRA for Flux, Stable Diffusion 3 or another"),
        ({"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": (4, 8)}, "it is a LoRA for Flux"),
        ({"diffusion_model.layers.0.lora_A.weight": (4, 8)}, "it is a LoRA for Flux"),
    ],
    ids=range(10),
)
def test_relatives_and_loras_of_other_models_are_refused_by_name(
    tensors: dict[str, tuple[int, ...]], found: str, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigurationError) as caught:
        contents_of(tmp_path / "a.safetensors")
    assert found in caught.value.message


# --- the command -----------------------------------------------------------------------------------------------------


def test_family_is_found_said_and_compared_with_a_jobs_model(run: Run, weights: Path, tmp_path: Path) -> None:
    pipeline_folder(pipeline_folder(weights), "sdxl", ())
    (layers,) = (layers for layers in layers_here(weights) if layers.family == "sdxl")
    save_file(
        pair(TO_K, into=layers.shapes[layers.found["unet", TO_K.removeprefix("lora_unet_")]][1]), tmp_path / "a.safetensors"
    )
    refused(run, "add", "style", tmp_path / "a.safetensors", "--family", "sd15", reason="and in sd15 that has 32 x 32")
    refused(run, "add", "style", tmp_path / "a.safetensors", "--family", "sd3", reason="there are sd15 and sdxl")
    done = run("add", "style", tmp_path / "a.safetensors")
    assert (done.exit_code, "style: LoRA for sdxl" in done.stdout) == (0, True), done.output
    record = added.find(weights, "style")
    assert record is not None
    assert record.family == "sdxl"
    prepared(loaded(weights), loras="style", model="sdxl", control="none")
    with pytest.raises(ModelUnavailable, match=r"the LoRA style is for SDXL, not for Stable Diffusion 1\.5"):
        loaded(weights).fingerprint(prepared(loaded(weights), loras="style", control="none").samples[0].options)


def test_without_a_checkpoint_a_lora_is_kept_as_it_is(run: Run, weights: Path, tmp_path: Path) -> None:
    save_file(pair() | {f"{TO_Q}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    done = run("add", "style", tmp_path / "a.safetensors")
    assert (done.exit_code, "run `imagemill models pull sd15`, remove this and add it again" in done.stdout) == (0, True), (
        done.output
    )
    kept = load_file(weights / "diffusion" / "loras" / "style.safetensors")
    assert kept.keys() == load_file(tmp_path / "a.safetensors").keys()
    save_file({f"{TO_Q}.{role}": part for role, part in loha((32, 32), 2)[0].items()}, tmp_path / "b.safetensors")
    refused(run, "add", "other", tmp_path / "b.safetensors", reason="run `imagemill models pull sd15` first")
    assert "diffusion/loras/other.safetensors" not in contents(weights)


def test_layers_of_a_checkpoint_are_read_without_its_weights(here: Path) -> None:
    layers = layers_of(here / "diffusion" / "sdxl", "sdxl")
    assert layers.find("lora_unet_output_blocks_1_2_conv") == Place("unet", "up_blocks.0.upsamplers.0.conv")
    assert layers.find("lora_te2_text_projection") == Place("text_encoder_2", "text_projection")
    assert layers.find("lora_unet_output_blocks_9_0_in_layers_2") is None
