"""The tests' small Stable Diffusion as one file in Stability's own naming, as checkpoints are passed around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imagemill.worker.models.catalogue import repository
from imagemill.worker.models.repositories import folder_of
from tests.pipelines import diffusers

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""Beginnings of names in diffusers, of the small UNet with two levels of one layer, and in Stability's checkpoints."""
OPENCLIP = {
    "self_attn.": "attn.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of names in transformers and in OpenCLIP."""
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_names(name: str) -> str:
    """Stability's name of a UNet's weight."""
    for theirs, ours in UNET.items():
        if name.startswith(f"{theirs}."):
            rest = name.removeprefix(f"{theirs}.")
            layer, _, end = rest.partition(".")
            return f"{ours}.{RESNET[layer]}.{end}" if ".resnets." in theirs else f"{ours}.{rest}"
    raise KeyError(name)


def vae_name(name: str) -> str:
    """Stability's name of a VAE's weight."""
    side, _, rest = name.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return name
    parts = rest.split(".")
    match parts:
        case ["mid_block", "resnets", number, *end]:
            made = f"mid.block_{int(number) + 1}.{'.'.join(end)}"
        case ["mid_block", "attentions", _, *end]:
            layer, _, kind = ".".join(end).rpartition(".")
            made = f"mid.attn_1.{ATTENTION[layer]}.{kind}"
        case ["down_blocks", level, "resnets", number, *end]:
            made = f"down.{level}.block.{number}.{'.'.join(end)}"
        case ["down_blocks", level, _, _, *end]:
            made = f"down.{level}.downsample.{'.'.join(end)}"
        case ["up_blocks", level, "resnets", number, *end]:
            made = f"up.{3 - int(level)}.block.{number}.{'.'.join(end)}"
        case ["up_blocks", level, _, _, *end]:
            made = f"up.{3 - int(level)}.upsample.{'.'.join(end)}"
        case _:
            made = rest.replace("conv_norm_out", "norm_out")
    return f"{side}.{made.replace('conv_shortcut', 'nin_shortcut')}"


def vae_tensors(folder: Path) -> dict[str, Any]:
    """A VAE's weights by Stability's names, with attention as convolutions."""
    vae = diffusers().AutoencoderKL.from_pretrained(folder)
    tensors = {vae_name(name): tensor for name, tensor in vae.state_dict().items()}
    linear = [name for name, tensor in tensors.items() if ".attn_1." in name and tensor.ndim == 2]
    return {**tensors, **{name: tensors[name][:, :, None, None] for name in linear}}


def checkpoint_tensors(weights: Path, model: str = "sd15") -> dict[str, Any]:
    """All weights of the small `sd15` or `sdxl` in the weights folder, by the names that a checkpoint in one file has."""
    from transformers import CLIPTextModel

    base = folder_of(weights, repository(model))
    unet = diffusers().UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()
    text = CLIPTextModel.from_pretrained(base / "text_encoder").state_dict()
    encoder = "cond_stage_model" if model == "sd15" else "conditioner.embedders.0"
    return {
        **{f"model.diffusion_model.{unet_names(name)}": tensor for name, tensor in unet.items()},
        **{f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(base / "vae").items()},
        **{f"{encoder}.transformer.text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()},
        **(_second_text_tensors(base / "text_encoder_2") if model == "sdxl" else {}),
    }


def _second_text_tensors(folder: Path) -> dict[str, Any]:
    """The weights of SDXL's second text encoder by the names of OpenCLIP, which has queries, keys and values in one."""
    import torch
    from transformers import CLIPTextModelWithProjection

    state = CLIPTextModelWithProjection.from_pretrained(folder).state_dict()
    found = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    for name, tensor in state.items():
        if name.startswith("text_model.encoder.layers."):
            layer, _, part = name.removeprefix("text_model.encoder.layers.").partition(".")
            for theirs, ours in OPENCLIP.items():
                part = part.replace(theirs, ours)
            found[f"transformer.resblocks.{layer}.{part}"] = tensor
    for name in [name for name in found if ".q_proj." in name]:
        merged = torch.cat([found.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"])
        found[name.replace(".q_proj.", ".in_proj_")] = merged
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in found.items()}


def controlnet_tensors(folder: Path) -> dict[str, Any]:
    """A small ControlNet's weights by the names of the web UI's files."""
    state = diffusers().ControlNetModel.from_pretrained(folder).state_dict()
    return {f"control_model.{_controlnet_name(name)}": tensor for name, tensor in state.items()}


def _controlnet_name(name: str) -> str:
    part, _, rest = name.partition(".")
    match part, rest.split("."):
        case "controlnet_down_blocks", [number, end]:
            return f"zero_convs.{number}.0.{end}"
        case "controlnet_mid_block", [end]:
            return f"middle_block_out.0.{end}"
        case "controlnet_cond_embedding", ["blocks", number, end]:
            return f"input_hint_block.{2 * int(number) + 2}.{end}"
        case "controlnet_cond_embedding", [place, end]:
            return f"input_hint_block.{ {'conv_in': 0, 'conv_out': 14}[place] }.{end}"
        case _:
            return unet_names(name)


def saved(path: Path, tensors: dict[str, Any]) -> Path:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)
    return path
