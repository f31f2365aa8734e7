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
    """A model published as one file, of a release on GitHub or, with `hub`, of a repository on the Hugging Face Hub.

    `source` is the repository, `revision` the release's tag or the commit, and `checksum` is the publisher's `md5:...` or
    `sha256:...`. `about_bytes` is the size to three digits, for progress bars and the check for free space. Unless
    `commercial`, the licence forbids commercial use: pulling the model takes its name and an accepted licence, and without
    that no node offers it.
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
    hub: bool = False

    @property
    def kind(self) -> str:
        """What it is for, as of an added model."""
        return "inpainting" if self.engine == "lama" else "matting"

    @property
    def url(self) -> str:
        if self.hub:
            return f"https://huggingface.co/{self.source}/resolve/{self.revision}/{self.file}"
        return f"https://github.com/{self.source}/releases/download/{self.revision}/{self.file}"


def _rembg(name: str, checksum: str, licence: str, size: int, file: str | None = None, *, commercial: bool = True) -> Weights:
    """A file of the release that rembg downloads from, with rembg's checksum."""
    file = file or f"{name}.onnx"
    return Weights(name, "rembg", file, "danielgatis/rembg", "v0.0.0", checksum, licence, size, commercial)


def _birefnet(name: str, checksum: str, file: str, size: int = 973 * MB) -> Weights:
    return _rembg(f"birefnet-{name}", checksum, "MIT", size, f"BiRefNet-{file}.onnx")


def _sam(name: str, file: str, encoder: str, size: int, decoder: str, decoder_size: int = 16_500_000) -> tuple[Weights, ...]:
    """Segment Anything's two files in one of its sizes, with 8 bits if the name says so."""
    end = ".quant.onnx" if name.endswith("-quant") else ".onnx"
    return (
        _rembg(f"{name}.encoder", f"md5:{encoder}", "Apache-2.0", size, f"{file}.encoder{end}"),
        _rembg(f"{name}.decoder", f"md5:{decoder}", "Apache-2.0", decoder_size, f"{file}.decoder{end}"),
    )


VIT_B, VIT_L, VIT_H = "sam_vit_b_01ec64", "sam_vit_l_0b3195", "sam_vit_h_4b8939"

WEIGHTS: tuple[Weights, ...] = (
    _rembg("u2net", "md5:60024c5c889badc19c04ad937298a77b", "Apache-2.0", 176 * MB),
    _rembg("u2netp", "md5:8e83ca70e441ab06c318d82300c84806", "Apache-2.0", 4_570_000),
    _rembg("u2net_human_seg", "md5:c09ddc2e0104f800e3e1bb4652583d1f", "Apache-2.0", 176 * MB),
    _rembg("silueta", "md5:55e59e0d8062d2f5d013f4725ee84782", "Apache-2.0", 44_200_000),
    _rembg("isnet-general-use", "md5:fc16ebd8b0c10d971d3513d564d01e29", "Apache-2.0", 179 * MB),
    _rembg("isnet-anime", "md5:6f184e756bb3bd901c8849220a83e38e", "Apache-2.0", 176 * MB),
    _rembg("u2net_cloth_seg", "md5:2434d1f3cb744e0e49386c906e5a08bb", "MIT", 176 * MB),
    _birefnet("general", "md5:7a35a0141cbbc80de11d9c9a28f52697", "general-epoch_244"),
    _birefnet("general-lite", "md5:4fab47adc4ff364be1713e97b7e66334", "general-bb_swin_v1_tiny-epoch_232", 224 * MB),
    _birefnet("portrait", "md5:c3a64a6abf20250d090cd055f12a3b67", "portrait-epoch_150"),
    _birefnet("dis", "md5:2d4d44102b446f33a4ebb2e56c051f2b", "DIS-epoch_590"),
    _birefnet("hrsod", "md5:c017ade5de8a50ff0fd74d790d268dda", "HRSOD_DHU-epoch_115"),
    _birefnet("cod", "md5:f6d0d21ca89d287f17e7afe9f5fd3b45", "COD-epoch_125"),
    _birefnet("massive", "md5:33e726a2136a3d59eb0fdf613e31e3e9", "massive-TR_DIS5K_TR_TEs-epoch_420"),
    *_sam("sam", VIT_B, "a780f8ba09bceceaa1435724ed354848", 359 * MB, "c4218b16ec1cb09889fcd6eb7a42a7c9"),
    *_sam("sam-quant", VIT_B, "26fc0e01d2fa34ed2d3f91259118482d", 109 * MB, "45391530307d1aee79b2a1507769e6c7", 8_760_000),
    *_sam("sam-vit-l", VIT_L, "6e7c5e3e97b50a9e833e55062ae35182", 1230 * MB, "dc760a2912862c05ec3ac2658162a1b5"),
    *_sam(
        "sam-vit-l-quant", VIT_L, "83f7fe08c2f8b94b6d08c3e44cf1de0e", 332 * MB, "e78ca201f5ae92288945623f48088b7c", 8_760_000
    ),
    *_sam(
        "sam-vit-h-quant", VIT_H, "391503beb5e5d7d1ae6f55d0cecabd50", 680 * MB, "4c86ebeecbe2e6325203b641b8702a5b", 8_760_000
    ),
    Weights(
        name="ben2",
        engine="rembg",
        file="BEN2_Base.onnx",
        source="PramaLLC/BEN2",
        revision="e48a20765fb421d19dcdb0bf3cc61e802ca5ec8f",
        checksum="sha256:22cea62108ff53b7ccc20f7a008bf30494228d84b1687f29ecbe76936a998101",
        licence="MIT",
        about_bytes=223 * MB,
        hub=True,
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

LICENSED: dict[str, Weights] = {weights.name: weights for weights in WEIGHTS if not weights.commercial}
"""The models that jobs can select only where the operator has accepted their licence, by name."""

MODELS: dict[str, tuple[str, ...]] = {model: parts for engine in ENGINES for model, parts in engine.models.items()}
"""The catalogue entries that each model a job can select is loaded from, by name."""


def is_part(name: str) -> bool:
    """Whether the catalogue entry is one of several that a model consists of, such as an encoder."""
    return any(name in parts for parts in MODELS.values() if len(parts) > 1)


def repository(name: str) -> Repository:
    """The repository called `name`."""
    return next(entry for entry in REPOSITORIES if entry.name == name)
