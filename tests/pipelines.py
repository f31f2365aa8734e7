"""Small Stable Diffusion models with random weights, saved in the hub's folder layout.

They have the architecture of their family at a fraction of the width, so the same code loads and runs them.
Nothing is downloaded; the tokenizers have letters but no words.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imagemill.shared.diffusion_models import BASES, FAMILIES
from imagemill.worker.models.added import Added, AddedFile, Kind, write
from imagemill.worker.models.catalogue import REPOSITORIES, repository
from imagemill.worker.models.checksums import sha256_of
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
    """Constructor arguments of the UNet, VAE and text encoders, which set their width."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    second_text: dict[str, Any] = field(default_factory=dict)


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
SMALL_SDXL = Scale(
    unet=SMALL.unet
    | dict(
        cross_attention_dim=32 + 48,  # of both text encoders
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,  # six sizes and the pooled prompt
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    ),
    vae=SMALL.vae,
    text=SMALL.text,
    second_text=SMALL.text | dict(hidden_size=48, projection_dim=32),
)
FULL = Scale(
    unet=dict(cross_attention_dim=768),
    vae=dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2),
    text=dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
)
"""Stable Diffusion 1.5 as published: 860, 361, 84 and 123 million parameters of UNet, ControlNet, VAE and text encoder."""


def pipeline_folder(
    weights: Path,
    model: str = "sd15-canny",
    controls: Sequence[str] = ("canny",),
    *,
    seed: int = 0,
    checker: bool = False,
    scale: Scale | None = None,
    device: str = "cpu",
    half: bool = False,
) -> Path:
    """Save a base model and ControlNets where nodes look for them in `weights`, unless they exist; return `weights`.

    Different seeds give different weights. The published files have `half` precision.
    """
    import torch

    family, (base, *others) = BASES[model].family, [folder_of(weights, repository(part)) for part in BASES[model].parts]
    scale = scale or (SMALL_SDXL if family == "sdxl" else SMALL)
    folders = [weights / "diffusion" / FAMILIES[family].controlnets.get(control, control) for control in controls]
    variant = "fp16" if half else None
    missing = not all(folder.is_dir() for folder in (base, *folders))
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
        torch.manual_seed(seed)
        unet = missing and diffusers().UNet2DConditionModel(attention_head_dim=8, sample_size=64, **scale.unet)
        if not base.is_dir():
            pipe = (_sdxl if family == "sdxl" else _sd15)(unet, scale)
            pipe = pipe.to(torch.float16) if half else pipe
            pipe.save_pretrained(base, variant=variant)
            if family == "sdxl":
                pipe.vae.save_pretrained(others[0])  # published without a variant
        for number, folder in enumerate(folders):
            if not folder.is_dir():
                torch.manual_seed(1000 * (number + 1) + seed)
                network = _controlnet(unet)
                (network.half() if half else network).save_pretrained(folder, variant=variant)
                if folder.name not in {entry.name for entry in REPOSITORIES}:
                    added(weights, folder.name, "controlnet", family)
    if checker and not (folder_of(weights, repository("sd15-safety-checker")) / "safety_checker").is_dir():
        _build_checker(folder_of(weights, repository("sd15-safety-checker")))
    return weights


def added(weights: Path, name: str, kind: Kind, family: str, **parameters: str) -> None:
    """Record the files in a model's folder as one that the operator has added."""
    files = sorted(path for path in (weights / "diffusion" / name).rglob("*") if path.is_file())
    record = Added(
        name=name,
        kind=kind,
        family=family,
        parameters=dict(parameters),
        files=tuple(
            AddedFile(path=str(path.relative_to(weights)), size=path.stat().st_size, sha256=sha256_of(path)) for path in files
        ),
        source="a test",
        added=datetime(2026, 1, 1, tzinfo=UTC),
    )
    write(weights, record)


def _controlnet(unet: Any) -> Any:
    """A ControlNet for a UNet that heeds its picture, unlike one before its training."""
    import torch

    control = diffusers().ControlNetModel.from_unet(unet)
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.8 / block.in_channels**0.5)
    for block in control.controlnet_cond_embedding.modules():
        if isinstance(block, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(block.weight)
    return control


def _sd15(unet: Any, scale: Scale) -> Any:
    return diffusers().StableDiffusionPipeline(
        **_shared_parts(unet, scale), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _sdxl(unet: Any, scale: Scale) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(eos_token_id=1, bos_token_id=0, pad_token_id=1, **scale.second_text)
    return diffusers().StableDiffusionXLPipeline(
        **_shared_parts(unet, scale),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=_tokenizer(),
        add_watermarker=False,
    )


def _shared_parts(unet: Any, scale: Scale) -> dict[str, Any]:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    library = diffusers()
    text_encoder = CLIPTextModel(CLIPTextConfig(eos_token_id=1, bos_token_id=0, pad_token_id=1, **scale.text))
    torch.nn.init.normal_(text_encoder.final_layer_norm.bias)  # embeddings with a mean of 0 could not be weighted
    vae = library.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=512,
        **scale.vae,
    )
    return dict(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_tokenizer(),
        scheduler=library.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
    )


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(letters(), [], model_max_length=77)


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


def lora_file(path: Path, weights: Path, model: str = "sd15", *, seed: int = 0, strength: float = 0.5) -> Path:
    """A LoRA for the small model's attention layers, in the file format that trainers write."""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    library = diffusers()
    unet = library.UNet2DConditionModel.from_pretrained(folder_of(weights, repository(model)), subfolder="unet")
    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {name: torch.randn_like(value) * strength for name, value in get_peft_model_state_dict(unet).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    library.StableDiffusionPipeline.save_lora_weights(path.parent, unet_lora_layers=layers, weight_name=path.name)
    return path
