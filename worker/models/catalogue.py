"""Every model that imagemill can use: where it is published, pinned to a version, with its checksum and licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from imagemill.shared.engines import ENGINES

MB = 1_000_000

CONVERTED = ("lama",)
"""Engines whose models are published in a format that can contain code: nodes only load the safetensors file made from it."""


@dataclass(frozen=True)
class Weights:
    """A model published as one file of a release on GitHub.

    `source` is the repository, `revision` the release's tag, and `checksum` is the publisher's `md5:...` or `sha256:...`.
    `about_bytes` is the size to three digits, for progress bars and the check for free space. Unless `commercial`, the
    licence forbids commercial use: pulling the model takes its name and an accepted licence, and no option selects it.
    """

    name: str
    engine: str
    file: str
    source: str
    revision: str
    checksum: str
    licence: str
    about_bytes: int
    commercial: bool = True

    @property
    def url(self) -> str:
        return f"https://github.com/{self.source}/releases/download/{self.revision}/{self.file}"


def _rembg(name: str, checksum: str, licence: str, size: int, file: str | None = None, *, commercial: bool = True) -> Weights:
    """A file of the release that rembg downloads from, with rembg's checksum."""
    file = file or f"{name}.onnx"
    return Weights(name, "rembg", file, "danielgatis/rembg", "v0.0.0", checksum, licence, size, commercial)


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
        name="lama",
        engine="lama",
        file="big-lama.pt",
        source="Sanster/models",
        revision="add_big_lama",
        checksum="md5:e3aa4aaa15225a33ec84f9f4bc47e500",
        licence="Apache-2.0",
        about_bytes=205 * MB,
    ),
)


RepositoryKind = Literal["checkpoint", "controlnet", "vae", "lora", "checker"]


@dataclass(frozen=True)
class Repository:
    """A model published as a repository on the Hugging Face Hub.

    `revision` is the pinned commit. `files` are patterns for the files that nodes load: safetensors, small JSON and text.
    `about_bytes` is their total size to two digits. `kind` is what it is, and `family` the Stable Diffusion that it is or was
    trained for. Unless `commercial`, the licence forbids commercial use.
    """

    name: str
    source: str
    revision: str
    licence: str
    files: tuple[str, ...]
    about_bytes: int
    kind: RepositoryKind = "controlnet"
    family: str = "sd15"
    commercial: bool = True
    engine: str = "diffusion"


def _diffusers(*encoders: str, vae: bool) -> tuple[str, ...]:
    """The files of a checkpoint in diffusers' layout that are loaded, in half precision; `encoders` are its text encoders."""
    small = ["model_index.json", "scheduler/*.json"]
    for encoder in encoders:
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        small += [f"{tokenizer}/*.json", f"{tokenizer}/*.txt"]
    parts = [*encoders, "unet", *["vae"] * vae]
    return (*small, *(f"{part}/{name}" for part in parts for name in ("config.json", "*.fp16.safetensors")))


SD15: dict[str, Any] = dict(
    source="stable-diffusion-v1-5/stable-diffusion-v1-5",
    revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    licence="CreativeML OpenRAIL-M",
)

REPOSITORIES: tuple[Repository, ...] = (
    Repository(
        name="sd15",
        **SD15,
        files=_diffusers("text_encoder", vae=True),
        about_bytes=2130 * MB,
        kind="checkpoint",
    ),
    Repository(
        name="controlnet-canny",
        source="lllyasviel/control_v11p_sd15_canny",
        revision="115a470d547982438f70198e353a921996e2e819",
        licence="CreativeML OpenRAIL-M",
        files=("config.json", "diffusion_pytorch_model.fp16.safetensors"),
        about_bytes=720 * MB,
    ),
    Repository(
        name="controlnet-lineart",
        source="lllyasviel/control_v11p_sd15_lineart",
        revision="8a158f547e031c5b8fbca19ead09a74767ff4db0",
        licence="CreativeML OpenRAIL-M",
        files=("config.json", "diffusion_pytorch_model.fp16.safetensors"),
        about_bytes=720 * MB,
    ),
    Repository(
        name="sdxl",
        source="stabilityai/stable-diffusion-xl-base-1.0",
        revision="462165984030d82259a11f4367a4eed129e94a7b",
        licence="CreativeML OpenRAIL++-M",
        files=_diffusers("text_encoder", "text_encoder_2", vae=False),
        about_bytes=6770 * MB,
        kind="checkpoint",
        family="sdxl",
    ),
    Repository(
        name="sdxl-turbo",
        source="stabilityai/sdxl-turbo",
        revision="71153311d3dbb46851df1931d3ca6e939de83304",
        licence="Stability AI, non-commercial",
        files=_diffusers("text_encoder", "text_encoder_2", vae=False),
        about_bytes=6770 * MB,
        kind="checkpoint",
        family="sdxl",
        commercial=False,
    ),
    Repository(
        name="sdxl-vae",  # SDXL's own overflows in half precision
        source="madebyollin/sdxl-vae-fp16-fix",
        revision="207b116dae70ace3637169f1ddd2434b91b3a8cd",
        licence="MIT",
        files=("config.json", "diffusion_pytorch_model.safetensors"),
        about_bytes=335 * MB,
        kind="vae",
        family="sdxl",
    ),
    Repository(
        name="controlnet-sdxl-canny",
        source="xinsir/controlnet-canny-sdxl-1.0",
        revision="1271357eda52d54b857c650cacb5b51144643ccb",
        licence="Apache-2.0",
        files=("config.json", "diffusion_pytorch_model.safetensors"),
        about_bytes=2500 * MB,
        family="sdxl",
    ),
    Repository(
        name="controlnet-sdxl-scribble",
        source="xinsir/controlnet-scribble-sdxl-1.0",
        revision="af8f42dfa5429c2c7a97d5f52a172d637e918969",
        licence="Apache-2.0",
        files=("config.json", "diffusion_pytorch_model.safetensors"),
        about_bytes=2500 * MB,
        family="sdxl",
    ),
    Repository(
        name="controlnet-sdxl-tile",
        source="xinsir/controlnet-tile-sdxl-1.0",
        revision="1ae8d9529efe58f7362a987363ff86a7904dc84f",
        licence="Apache-2.0",
        files=("config.json", "diffusion_pytorch_model.safetensors"),
        about_bytes=2500 * MB,
        family="sdxl",
    ),
    Repository(
        name="lcm-lora-sdv1-5",
        source="latent-consistency/lcm-lora-sdv1-5",
        revision="cf2fced511dbe7e26c8d1d397e728fbab875db4b",
        licence="OpenRAIL++",
        files=("pytorch_lora_weights.safetensors",),
        about_bytes=130 * MB,
        kind="lora",
    ),
    Repository(
        name="lcm-lora-sdxl",
        source="latent-consistency/lcm-lora-sdxl",
        revision="a18548dd4956b174ec5b0d78d340c8dae0a129cd",
        licence="OpenRAIL++",
        files=("pytorch_lora_weights.safetensors",),
        about_bytes=390 * MB,
        kind="lora",
        family="sdxl",
    ),
    Repository(
        name="sdxl-lightning-4step",
        source="ByteDance/SDXL-Lightning",
        revision="c9a24f48e1c025556787b0c58dd67a091ece2e44",
        licence="OpenRAIL++",
        files=("sdxl_lightning_4step_lora.safetensors",),
        about_bytes=390 * MB,
        kind="lora",
        family="sdxl",
    ),
    Repository(
        name="sd15-safety-checker",
        **SD15,
        files=("safety_checker/config.json", "safety_checker/*.fp16.safetensors", "feature_extractor/*.json"),
        about_bytes=610 * MB,
        kind="checker",
    ),
)

MODELS: dict[str, tuple[str, ...]] = {model: parts for engine in ENGINES for model, parts in engine.models.items()}
"""The catalogue entries that each model a job can select is loaded from, by name."""


def repository(name: str) -> Repository:
    """The repository called `name`."""
    return next(entry for entry in REPOSITORIES if entry.name == name)
