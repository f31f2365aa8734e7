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
}
"""Beginnings of names in diffusers, of the small UNet with two levels of one layer, and in Stability's checkpoints."""
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


def checkpoint_tensors(weights: Path) -> dict[str, Any]:
    """All weights of the small `sd15` in the weights folder, by the names that a checkpoint in one file has."""
    from transformers import CLIPTextModel

    base = folder_of(weights, repository("sd15"))
    unet = diffusers().UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()
    text = CLIPTextModel.from_pretrained(base / "text_encoder").state_dict()
    return {
        **{f"model.diffusion_model.{unet_names(name)}": tensor for name, tensor in unet.items()},
        **{f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(base / "vae").items()},
        **{
            f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in text.items()
        },
    }


def saved(path: Path, tensors: dict[str, Any]) -> Path:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)
    return path
