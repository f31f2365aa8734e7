"""Every model that imagemill can use: where it is published, pinned to a version, with its checksum and licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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


@dataclass(frozen=True)
class Repository:
    """A model published as a repository on the Hugging Face Hub.

    `revision` is the pinned commit. `files` are patterns for the files that nodes load: safetensors, small JSON and text.
    `about_bytes` is their total size to two digits. `family` is the Stable Diffusion that it is, or was trained for.
    """

    name: str
    source: str
    revision: str
    licence: str
    files: tuple[str, ...]
    about_bytes: int
    engine: str = "diffusion"
    family: str = "sd15"
    commercial: ClassVar[bool] = True


SD15 = dict(
    source="stable-diffusion-v1-5/stable-diffusion-v1-5",
    revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    licence="CreativeML OpenRAIL-M",
)

REPOSITORIES: tuple[Repository, ...] = (
    Repository(
        name="sd15",
        **SD15,
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
        name="controlnet-canny",
        source="lllyasviel/control_v11p_sd15_canny",
        revision="115a470d547982438f70198e353a921996e2e819",
        licence="CreativeML OpenRAIL-M",
        files=("config.json", "diffusion_pytorch_model.fp16.safetensors"),
        about_bytes=720 * MB,
    ),
    Repository(
        name="lcm-lora-sdv1-5",
        source="latent-consistency/lcm-lora-sdv1-5",
        revision="cf2fced511dbe7e26c8d1d397e728fbab875db4b",
        licence="OpenRAIL++",
        files=("pytorch_lora_weights.safetensors",),
        about_bytes=130 * MB,
    ),
    Repository(
        name="sd15-safety-checker",
        **SD15,
        files=("safety_checker/config.json", "safety_checker/*.fp16.safetensors", "feature_extractor/*.json"),
        about_bytes=610 * MB,
    ),
)

CONTROLNETS = {"sd15": "controlnet-canny"}
"""The ControlNet that draws by edges, for each family."""

MODELS: dict[str, tuple[str, ...]] = {model: parts for engine in ENGINES for model, parts in engine.models.items()}
"""The catalogue entries that each model a job can select is loaded from, by name."""


def repository(name: str) -> Repository:
    """The repository called `name`."""
    return next(entry for entry in REPOSITORIES if entry.name == name)
