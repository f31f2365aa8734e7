"""Recognises the model in a file by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models.added import Kind

Shapes = Mapping[str, tuple[int, ...]]

UNET, INPUT = "model.diffusion_model.", "model.diffusion_model.input_blocks.0.0.weight"
VAE = "first_stage_model."
LAMA = "model.1.ffc.convl2l.weight"
"""A weight of every LaMa generator, which identifies it among other networks."""

OTHERS: dict[str, tuple[str, ...]] = {
    "Stable Diffusion 2": ("cond_stage_model.model.",),
    "the refiner of SDXL": ("conditioner.embedders.0.model.",),
    "Stable Diffusion 3": ("joint_blocks.", "model.diffusion_model.joint_blocks."),
    "Flux": ("double_blocks.", "model.diffusion_model.double_blocks."),
    "a textual inversion": ("emb_params", "clip_l", "clip_g"),
    "a T2I adapter": ("adapter.", "body.0.resnets."),
    "an IP adapter": ("ip_adapter.", "image_proj."),
}
"""Models that nodes can't run, by the beginnings of names in them."""
EXPECTED = "expected a checkpoint of Stable Diffusion 1.5 or SDXL, a ControlNet, a VAE, a LoRA or LaMa"

WIDTHS = {768: "sd15", 2048: "sdxl"}
"""The family by the width of the text embeddings that a LoRA was made for."""


@dataclass(frozen=True)
class Contents:
    """What a file or folder holds: the kind of model, its family, which is empty if unseen, and a folder's needed files."""

    kind: Kind
    family: str
    files: tuple[str, ...] = ()


def recognise(tensors: Shapes) -> Contents:
    """What a file with these tensors is. Raises ConfigurationError, which says what was found and what was expected."""
    for other, beginnings in OTHERS.items():
        if any(name.startswith(beginnings) for name in tensors):
            raise ConfigurationError(f"it is {other}, which nodes can't run; {EXPECTED}")
    if any(name.endswith(LAMA) for name in tensors):
        return Contents("inpainting", "lama")
    if any(".lora_" in name or name.endswith((".alpha", ".dora_scale")) for name in tensors):
        return Contents("lora", _lora_family(tensors))
    if any(name.startswith("control_model.") or name.startswith("input_hint_block.") for name in tensors):
        return Contents("controlnet", _family(tensors))
    if "controlnet_cond_embedding.conv_in.weight" in tensors:
        return Contents("controlnet", "sdxl" if any(name.startswith("add_embedding.") for name in tensors) else "sd15")
    if any(name.startswith(UNET) for name in tensors):
        channels = tensors.get(INPUT, (0, 4))[1]
        if channels != 4:
            use = {9: "for inpainting", 8: "for editing by instructions"}.get(channels, "of another kind")
            raise ConfigurationError(f"its UNet is one {use}, with {channels} input channels; expected 4")
        return Contents("checkpoint", _family(tensors))
    if any(name.startswith((VAE, "encoder.")) for name in tensors) and any("decoder." in name for name in tensors):
        return Contents("vae", "")
    if any(name.startswith("down_blocks.") for name in tensors):
        raise ConfigurationError(f"it is a UNet without text encoder and VAE; {EXPECTED}")
    some = ", ".join(sorted(tensors)[:3]) or "none"
    raise ConfigurationError(f"its tensors ({some}, ...) are of no known model; {EXPECTED}")


def _family(tensors: Shapes) -> str:
    """The family of a network in Stability's own naming: SDXL also takes the picture's size, and has two text encoders."""
    marks = ("conditioner.", f"{UNET}label_emb.", "control_model.label_emb.", "label_emb.")
    return "sdxl" if any(name.startswith(marks) for name in tensors) else "sd15"


def _lora_family(tensors: Shapes) -> str:
    """The family that a LoRA was made for, by the width of what its layers for text take."""
    for name, shape in tensors.items():
        is_for_text = ("attn2" in name) and ("to_k" in name) and ("lora_down" in name or "lora_A" in name)
        if is_for_text and len(shape) == 2 and shape[1] in WIDTHS:
            return WIDTHS[shape[1]]
    return ""
