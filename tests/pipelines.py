"""A small Stable Diffusion pipeline with a ControlNet and random weights, saved in the hub's folder layout.

It has Stable Diffusion's architecture at a fraction of the width, so the same code loads and runs it.
Nothing is downloaded; the tokenizer has letters but no words.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagemill.worker.models.catalogue import MODELS, repository
from imagemill.worker.models.repositories import folder_of

LORA_RANK = 2


def diffusers() -> Any:
    """The diffusers library, imported without its warnings about optional features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    return diffusers


@dataclass(frozen=True)
class Scale:
    """Constructor arguments of the UNet, VAE and text encoder, which set their width."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]


SMALL = Scale(
    unet=dict(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
    ),
    vae=dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8),
    text=dict(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
)
FULL = Scale(
    unet=dict(cross_attention_dim=768),
    vae=dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2),
    text=dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
)
"""Stable Diffusion 1.5 as published: 860, 361, 84 and 123 million parameters of UNet, ControlNet, VAE and text encoder."""


def pipeline_folder(
    weights: Path, *, seed: int = 0, checker: bool = False, scale: Scale = SMALL, device: str = "cpu", half: bool = False
) -> Path:
    """Save an `sd15-canny` where nodes look for it in `weights`, unless it exists; return `weights`.

    Different seeds give different weights. The published files have `half` precision.
    """
    base, controlnet = (folder_of(weights, repository(name)) for name in MODELS["sd15-canny"])
    if not (base / "model_index.json").is_file():
        _build(base, controlnet, seed, scale, device, half)
    if checker and not (folder_of(weights, repository("sd15-safety-checker")) / "safety_checker").is_dir():
        _build_checker(folder_of(weights, repository("sd15-safety-checker")))
    return weights


def _build(base: Path, controlnet: Path, seed: int, scale: Scale, device: str, half: bool) -> None:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    library = diffusers()
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
        torch.manual_seed(seed)
        unet = library.UNet2DConditionModel(attention_head_dim=8, sample_size=64, **scale.unet)
        control = library.ControlNetModel.from_unet(unet)
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.8 / block.in_channels**0.5)  # initially 0, which ignores edges
        for block in control.controlnet_cond_embedding.modules():
            if isinstance(block, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(block.weight)
        vae = library.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=512,
            **scale.vae,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(eos_token_id=1, bos_token_id=0, pad_token_id=1, **scale.text))
    pipe = library.StableDiffusionControlNetPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer(letters(), [], model_max_length=77),
        unet=unet,
        controlnet=control,
        scheduler=library.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16 if half else torch.float32)
    variant = "fp16" if half else None
    pipe.save_pretrained(base, variant=variant)
    control.save_pretrained(controlnet, variant=variant)


def letters() -> dict[str, int]:
    """A vocabulary of single bytes, within and at the end of words, as CLIP's tokenizer encodes them."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{letter}</w>" for letter in alphabet)]
    return {token: number for number, token in enumerate(tokens)}


def _build_checker(folder: Path) -> None:
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(projection_dim=16, text_config=small, vision_config=dict(small, image_size=224, patch_size=32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")


def lora_file(path: Path, weights: Path, *, seed: int = 0, strength: float = 0.5) -> Path:
    """A LoRA for the small pipeline's attention layers, in the file format that trainers write."""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    library = diffusers()
    unet = library.UNet2DConditionModel.from_pretrained(folder_of(weights, repository("sd15")), subfolder="unet")
    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {name: torch.randn_like(value) * strength for name, value in get_peft_model_state_dict(unet).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    library.StableDiffusionPipeline.save_lora_weights(path.parent, unet_lora_layers=layers, weight_name=path.name)
    return path
