"""Models of the operator's own that are folders in diffusers' layout: which of their files are taken, and a trial of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagemill.shared.errors import ConfigurationError, sentence
from imagemill.worker.models.added import Kind
from imagemill.worker.models.sources import TENSORS
from imagemill.worker.models.tensor_names import check_unet

CONFIG, INDEX = "config.json", "model_index.json"
KINDS: dict[str, Kind] = {"ControlNetModel": "controlnet", "AutoencoderKL": "vae"}
"""The kind of a folder that is one part alone, by the class in its configuration."""
OTHERS = {
    "T2IAdapter": "a T2I adapter",
    "ControlNetUnionModel": "a union ControlNet",
    "ControlNetModel_Union": "a union ControlNet",
    "UNet2DConditionModel": "a UNet without text encoder and VAE",
}
"""What other folders are, by that class."""
ENCODERS = {"sd15": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
LARGEST_JSON = 10_000_000
"""Maximum bytes of a configuration; tokenizers have a few millions."""


def recognise(files: Sequence[str], read: Any) -> tuple[Kind, str]:
    """The kind and family of a folder with these files, whose configurations `read` returns by name.

    Raises ConfigurationError, which says what was expected.
    """
    if f"unet/{CONFIG}" in files:
        return "checkpoint", _family(read(f"unet/{CONFIG}"), "UNet2DConditionModel")
    if INDEX in files:
        raise ConfigurationError(f"it is a {_class(read(INDEX))} without a UNet; expected Stable Diffusion 1.5 or SDXL")
    if CONFIG not in files:
        single = next((name for name in files if name.endswith(TENSORS)), None)
        hint = f", or one of its files, such as {single}" if single is not None else ""
        raise ConfigurationError(f"it has neither {INDEX} nor {CONFIG}; expected a folder in diffusers' layout{hint}")
    config = read(CONFIG)
    kind = KINDS.get(str(config.get("_class_name")))
    if kind is None:
        what = OTHERS.get(_class(config)) or _class(config) if "_class_name" in config else "of another library"
        raise ConfigurationError(f"it is {what}; expected a checkpoint, a ControlNet or a VAE")
    return kind, _family(config, "ControlNetModel") if kind == "controlnet" else ""


def _family(config: dict[str, Any], expected: str) -> str:
    if config.get("_class_name") != expected:
        raise ConfigurationError(f"it has a {_class(config)}; expected {expected}")
    channels, width = config.get("in_channels", 4), config.get("cross_attention_dim")
    check_unet(channels, width if isinstance(width, int) else None)
    if config.get("encoder_hid_dim_type") is not None:
        raise ConfigurationError("its prompts are not read by CLIP alone; expected Stable Diffusion 1.5 or SDXL")
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"


def _class(config: dict[str, Any]) -> str:
    return str(config.get("_class_name"))[:100]


def wanted(files: Sequence[str], kind: Kind, family: str) -> list[str]:
    """The files of a folder that nodes need: configurations, tokenizers, and each part's weights in half precision if all
    have that, else in full if it has that; pickled ones where there are no others. Raises ConfigurationError if something is
    missing.
    """
    if kind != "checkpoint":
        parts = [""]
        chosen = []
    else:
        parts = [f"{name}/" for name in ("unet", "vae", *ENCODERS[family])]
        tokenizers = tuple(f"{name.replace('text_encoder', 'tokenizer')}/" for name in ENCODERS[family])
        chosen = [name for name in files if name.startswith(("scheduler/", *tokenizers)) and name.endswith((".json", ".txt"))]
        for folder in ("scheduler/", *tokenizers):
            if not any(name.startswith(folder) for name in chosen):
                raise ConfigurationError(f"it has no {folder.rstrip('/')}")
    half = all(_weights(files, part, half=True) for part in parts)
    for part in parts:
        weights = _weights(files, part, half=half) or _weights(files, part, half=not half) or _pickled(files, part)
        for what, some in (("configuration", f"{part}{CONFIG}" in files), ("weights", weights)):
            if not some:
                raise ConfigurationError(f"it has no {what}{f' of its {part[:-1]}' if part else ''}")
        chosen += [f"{part}{CONFIG}", *weights]
    return sorted(set(chosen))


def _weights(files: Sequence[str], part: str, *, half: bool) -> list[str]:
    """The weights of a part in half or in full precision, whole or in shards with their index."""
    own = [name for name in files if name.startswith(part) and "/" not in name[len(part) :]]
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    mark = ".fp16" if half else ""
    whole = [f"{part}{stem}{mark}.safetensors" for stem in stems if f"{part}{stem}{mark}.safetensors" in own]
    if whole:
        return whole[:1]
    index = [name for name in own if name.endswith(f".safetensors.index{mark}.json")]
    shards = [name for name in own if "-of-" in name and name.endswith(".safetensors") and (".fp16" in name) == half]
    return [*index, *shards] if index and shards else []


def _pickled(files: Sequence[str], part: str) -> list[str]:
    """The pickled weights of a part in one file, in half precision if there are such."""
    names = (f"{part}{stem}{mark}.bin" for mark in (".fp16", "") for stem in ("diffusion_pytorch_model", "pytorch_model"))
    return [name for name in names if name in files][:1]


def listing(source: Path) -> list[str]:
    """The files below a folder, three levels deep at most, with `/` between the parts of their names."""
    found = [path for depth in ("*", "*/*") for path in source.glob(depth) if path.is_file()]
    return sorted(str(path.relative_to(source)) for path in found)


def reader(source: Path) -> Any:
    """A function that reads a folder's configurations by name."""

    def read(name: str) -> dict[str, Any]:
        path = source / name
        try:
            if path.stat().st_size > LARGEST_JSON:
                raise ValueError("it is too large")
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path} can't be read: {sentence(error)}") from error
        if not isinstance(content, dict):
            raise ConfigurationError(f"{path} is not a configuration")
        return content

    return read


def taken(source: Path, files: Sequence[str], target: Path, *, move: bool) -> None:
    """Copy or move the wanted files of a folder. Links are followed, as the hub's own cache has them. Raises OSError."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if move:
            (source / name).rename(target / name)
        else:
            shutil.copyfile(source / name, target / name)
