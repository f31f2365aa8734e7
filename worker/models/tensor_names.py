"""Recognises the model in a file by the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models.added import Kind
from imagemill.worker.models.lora_names import is_lora

Shapes = Mapping[str, tuple[int, ...]]

UNET, INPUT = "model.diffusion_model.", "model.diffusion_model.input_blocks.0.0.weight"
VAE = "first_stage_model."
LAMA = "model.1.ffc.convl2l.weight"
"""A weight of every LaMa generator, which identifies it among other networks."""

OTHERS: dict[str, tuple[str, ...]] = {
    "Stable Diffusion 2": ("cond_stage_model.model.",),
    "the refiner of SDXL": ("conditioner.embedders.0.model.",),
    "Playground 2.5": ("edm_mean",),
    "Stable Diffusion 3": ("joint_blocks.",),
    "Chroma": ("distilled_guidance_layer.",),
    "Flux": ("double_blocks.",),
    "AuraFlow": ("double_layers.",),
    "Lumina": ("cap_embedder.",),
    "Stable Cascade": ("clip_txt_mapper.", "clip_txt_pooled_mapper."),
    "a textual inversion": ("emb_params", "clip_l", "clip_g", "string_to_param."),
    "an upscaler": ("conv_first.",),
    "a T2I adapter": ("adapter.", "body."),
    "an IP adapter": ("ip_adapter.", "image_proj."),
    "TAESD, a VAE for previews": ("decoder.layers.", "1.conv.0.", "3.conv.0."),
    "an asymmetric VAE": ("decoder.condition_encoder.",),
    "a consistency decoder": ("decoder_unet.",),
    "MAT": ("synthesis.first_stage.",),
    "MI-GAN": ("synthesis.b",),
    "a LaMa that also wants to know where the mask is": ("str_state_dict.",),
    "a motion module": ("down_blocks.0.motion_modules.",),
    "a control LoRA": ("lora_controlnet",),
    "a ControlNet-LLLite": ("lllite_",),
    "a union ControlNet": ("task_embedding", "control_type_proj.", "control_add_embedding.", "spatial_ch_projs."),
    "the difference of a ControlNet from a checkpoint": ("difference",),
}
"""Models that nodes can't run, by the beginnings of names in them, after `model.diffusion_model.` if there is that."""
MATTING = ("rebnconv", "squeeze_module.", "lr_branch.", "multifieldcrossatt.", "image_encoder.blocks.")
"""Parts of names in the weights of networks that cut out subjects."""
EXPECTED = "expected a checkpoint of Stable Diffusion 1.5 or SDXL, a ControlNet, a VAE, a LoRA or LaMa"

ENCODERS: dict[str, dict[str, str]] = {
    "sd15": {"text encoder": "cond_stage_model.transformer."},
    "sdxl": {
        "first text encoder": "conditioner.embedders.0.transformer.",
        "second text encoder": "conditioner.embedders.1.model.",
    },
}
"""The text encoders of a checkpoint in one file, by the beginnings of their names."""
UNFIT_WIDTHS = {1024: "Stable Diffusion 2", 1280: "the refiner of SDXL"}
"""Models that nodes can't run, by the width of their text embeddings."""
WIDTHS = {768: "sd15", 2048: "sdxl"}
"""The family by the width of the text embeddings that a LoRA was made for."""
TRANSFORMER = (
    *("transformer.", "lora_transformer_", "lora_unet_double_blocks_", "lora_unet_single_blocks_", "lora_unet_joint_blocks_"),
    *("diffusion_model.double_blocks.", "diffusion_model.joint_blocks.", "diffusion_model.layers.", "diffusion_model.blocks."),
)
"""Beginnings of names in LoRAs for other models."""


@dataclass(frozen=True)
class Contents:
    """What a file or folder holds: the kind of model, its family, which is empty if unseen, and a folder's needed files."""

    kind: Kind
    family: str
    files: tuple[str, ...] = ()


def recognise(tensors: Shapes) -> Contents:
    """What a file with these tensors is. Raises ConfigurationError, which says what was found and what was expected."""
    for other, beginnings in OTHERS.items():
        if any(name.removeprefix(UNET).startswith(beginnings) for name in tensors):
            raise ConfigurationError(f"it is {other}, which nodes can't run; {EXPECTED}")
    if any(name.endswith(LAMA) for name in tensors):
        return Contents("inpainting", "lama")
    if is_lora(tensors):
        return Contents("lora", _lora_family(tensors))
    if any(name.startswith("control_model.") or name.startswith("input_hint_block.") for name in tensors):
        check_width(_width(tensors))
        return Contents("controlnet", _family(tensors))
    if "controlnet_cond_embedding.conv_in.weight" in tensors:
        check_width(_width(tensors))
        return Contents("controlnet", "sdxl" if any(name.startswith("add_embedding.") for name in tensors) else "sd15")
    if any(name.startswith(UNET) for name in tensors):
        return Contents("checkpoint", _whole(tensors))
    if any(name.startswith((VAE, "encoder.")) for name in tensors) and any("decoder." in name for name in tensors):
        inputs = [shape for name, shape in tensors.items() if name.endswith("decoder.conv_in.weight") and len(shape) == 4]
        check_vae(inputs[0][1] if inputs else 4)
        return Contents("vae", "")
    if any(part in name for name in tensors for part in MATTING):
        raise ConfigurationError(
            "it has the weights of a network that cuts out subjects, but not its graph; expected an ONNX file: export it"
        )
    if tensors and all("." not in name and shape[-1:] in ((768,), (1024,), (1280,)) for name, shape in tensors.items()):
        raise ConfigurationError(f"it is a textual inversion, which nodes can't run; {EXPECTED}")
    if not tensors:
        raise ConfigurationError(f"it has no tensors with names, like a hypernetwork, which nodes can't run; {EXPECTED}")
    if any(name.startswith("down_blocks.") for name in tensors):
        raise ConfigurationError(f"it is a UNet without text encoder and VAE; {EXPECTED}")
    some = ", ".join(sorted(tensors)[:3])
    raise ConfigurationError(f"its tensors ({some}, ...) are of no known model; {EXPECTED}")


def check_unet(channels: int, width: int | None) -> None:
    """Raise ConfigurationError for the UNet of another model, by its input channels and the width of the text embeddings."""
    if channels != 4:
        use = {7: "for upscaling", 8: "for editing by instructions", 9: "for inpainting"}.get(channels, "of another kind")
        raise ConfigurationError(f"its UNet is one {use}, with {channels} input channels; expected 4")
    check_width(width)


def check_width(width: int | None) -> None:
    """Raise ConfigurationError for text embeddings of another model, by their width."""
    if width in UNFIT_WIDTHS:
        raise ConfigurationError(
            f"it is for {UNFIT_WIDTHS[width]}, which nodes can't run; expected Stable Diffusion 1.5 or SDXL"
        )


def check_vae(channels: int) -> None:
    """Raise ConfigurationError for the VAE of another model, by the channels of its latents."""
    if channels != 4:
        raise ConfigurationError(
            f"it is a VAE with {channels} channels, as Flux and Stable Diffusion 3 have; expected 4, as for 1.5 and SDXL"
        )


def _whole(tensors: Shapes) -> str:
    """The family of a checkpoint. Raises ConfigurationError if it is of another model, or if text encoders are missing."""
    if INPUT not in tensors:
        raise ConfigurationError(f"it is a diffusion model without a UNet, which nodes can't run; {EXPECTED}")
    check_unet(tensors[INPUT][1], _width(tensors))
    family = _family(tensors)
    for encoder, beginning in ENCODERS[family].items():
        if not any(name.startswith(beginning) for name in tensors):
            raise ConfigurationError(f"it has a UNet and no {encoder}; expected a checkpoint that has both")
    return family


def _width(tensors: Shapes) -> int | None:
    """The width of the text embeddings that a network takes, if that can be told."""
    return next((shape[1] for name, shape in tensors.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2), None)


def _family(tensors: Shapes) -> str:
    """The family of a network in Stability's own naming: SDXL also takes the picture's size, and has two text encoders."""
    marks = ("conditioner.", f"{UNET}label_emb.", "control_model.label_emb.", "label_emb.")
    return "sdxl" if any(name.startswith(marks) for name in tensors) else "sd15"


def _lora_family(tensors: Shapes) -> str:
    """The family that a LoRA was made for, by its names, or the width of what its layers for text take; empty if unseen.

    Raises ConfigurationError if it is another than those that nodes can run.
    """
    if any(name.startswith(TRANSFORMER) for name in tensors):
        raise ConfigurationError(
            "it is a LoRA for Flux, Stable Diffusion 3 or another transformer, which nodes can't run; "
            "expected one for Stable Diffusion 1.5 or SDXL"
        )
    if any(name.startswith(("text_encoder_2.", "lora_te2_")) or "add_embedding" in name for name in tensors):
        return "sdxl"
    for name, shape in tensors.items():
        if re.search(r"attn2.*to_[kv]", name) and name.endswith(("down.weight", "lora_A.weight", "hada_w1_b")):
            width = math.prod(shape[1:])
            if width == 1024:
                raise ConfigurationError("it is a LoRA for Stable Diffusion 2, which nodes can't run; expected 1.5 or SDXL")
            if width in WIDTHS:
                return WIDTHS[width]
    return ""
