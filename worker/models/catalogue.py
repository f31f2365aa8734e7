"""The models imagemill knows: where each is published, pinned and with checksums."""

from __future__ import annotations

from dataclasses import dataclass

from imagemill.shared.engines import ENGINES

REMBG = "https://github.com/danielgatis/rembg/releases/download"
SANSTER = "https://github.com/Sanster/models/releases/download"
MB = 1_000_000

CONVERTED = ("lama",)
"""Engines whose models are published in a format that may hold code: nodes load the safetensors file made of it, alone."""


@dataclass(frozen=True)
class Weights:
    """One file. `checksum` is `md5:...` or `sha256:...`, as its publisher gives it.

    `revision` is the tag or commit that `url` is pinned to. `about_bytes` is its size to three
    digits, to show and to look for room on the disk; None where it isn't known. What isn't
    `commercial` may not be used commercially: it is pulled only by its name and with its licence
    accepted, and no option selects it.
    """

    name: str
    engine: str
    file: str
    source: str
    revision: str
    url: str
    checksum: str
    licence: str
    about_bytes: int | None = None
    commercial: bool = True


def _rembg(
    name: str, checksum: str, licence: str, about_bytes: int, *, file: str | None = None, commercial: bool = True
) -> Weights:
    """A file of the release that rembg itself downloads from, with the checksum that rembg has for it."""
    file, tag = file or f"{name}.onnx", "v0.0.0"
    url = f"{REMBG}/{tag}/{file}"
    return Weights(name, "rembg", file, "danielgatis/rembg", tag, url, checksum, licence, about_bytes, commercial)


WEIGHTS: tuple[Weights, ...] = (
    _rembg("u2net", "md5:60024c5c889badc19c04ad937298a77b", "Apache-2.0", 176 * MB),
    _rembg("u2netp", "md5:8e83ca70e441ab06c318d82300c84806", "Apache-2.0", 4_570_000),
    _rembg("u2net_human_seg", "md5:c09ddc2e0104f800e3e1bb4652583d1f", "Apache-2.0", 176 * MB),
    _rembg("silueta", "md5:55e59e0d8062d2f5d013f4725ee84782", "Apache-2.0", 44_200_000),
    _rembg("isnet-general-use", "md5:fc16ebd8b0c10d971d3513d564d01e29", "Apache-2.0", 179 * MB),
    _rembg("isnet-anime", "md5:6f184e756bb3bd901c8849220a83e38e", "Apache-2.0", 176 * MB),
    _rembg("birefnet-general", "md5:7a35a0141cbbc80de11d9c9a28f52697", "MIT", 973 * MB, file="BiRefNet-general-epoch_244.onnx"),
    _rembg(
        "birefnet-general-lite",
        "md5:4fab47adc4ff364be1713e97b7e66334",
        "MIT",
        224 * MB,
        file="BiRefNet-general-bb_swin_v1_tiny-epoch_232.onnx",
    ),
    _rembg(
        "bria-rmbg",
        "sha256:5b486f08200f513f460da46dd701db5fbb47d79b4be4b708a19444bcd4e79958",
        "BRIA RMBG-2.0, non-commercial",
        1020 * MB,
        file="bria-rmbg-2.0.onnx",
        commercial=False,
    ),
    Weights(
        "lama",
        "lama",
        "big-lama.pt",
        "Sanster/models",
        "add_big_lama",
        f"{SANSTER}/add_big_lama/big-lama.pt",
        "md5:e3aa4aaa15225a33ec84f9f4bc47e500",
        "Apache-2.0",
        205 * MB,
    ),
)


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, or a part of it; `files` are patterns of what is loaded: safetensors, and small JSON and text.

    `revision` is the commit it is pinned to. `about_bytes` is what is downloaded, to two digits.
    """

    name: str
    engine: str
    source: str
    revision: str
    licence: str
    files: tuple[str, ...]
    about_bytes: int


_SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", "CreativeML OpenRAIL-M")

REPOSITORIES: tuple[Repository, ...] = (
    Repository(
        "sd15",
        "diffusion",
        *_SD15,
        files=(
            "model_index.json",
            "scheduler/*.json",
            "tokenizer/*.json",
            "tokenizer/*.txt",
            *(f"{part}/{name}" for part in ("text_encoder", "unet", "vae") for name in ("config.json", "*.fp16.safetensors")),
        ),
        about_bytes=2130 * MB,
    ),
    Repository(
        "controlnet-canny",
        "diffusion",
        "lllyasviel/control_v11p_sd15_canny",
        "115a470d547982438f70198e353a921996e2e819",
        "CreativeML OpenRAIL-M",
        files=("config.json", "diffusion_pytorch_model.fp16.safetensors"),
        about_bytes=720 * MB,
    ),
    Repository(
        "lcm-lora-sdv1-5",
        "diffusion",
        "latent-consistency/lcm-lora-sdv1-5",
        "cf2fced511dbe7e26c8d1d397e728fbab875db4b",
        "OpenRAIL++",
        files=("pytorch_lora_weights.safetensors",),
        about_bytes=130 * MB,
    ),
    Repository(
        "sd15-safety-checker",
        "diffusion",
        *_SD15,
        files=("safety_checker/config.json", "safety_checker/*.fp16.safetensors", "feature_extractor/*.json"),
        about_bytes=610 * MB,
    ),
)

MODELS: dict[str, tuple[str, ...]] = {model: parts for engine in ENGINES for model, parts in engine.models.items()}
"""What each model that a job can select is loaded from: names of entries above."""


def repository(name: str) -> Repository:
    """The row of this name."""
    return next(one for one in REPOSITORIES if one.name == name)
