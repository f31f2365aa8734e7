"""Stable Diffusion checkpoints, ControlNets and VAEs of the operator's own, in the layout that nodes load.

Single files are converted with diffusers' own tables; configurations and tokenizers are those of the pulled base model. All of
it runs in a process of its own (own_process.py), and nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    convert_controlnet_checkpoint,
    create_diffusers_clip_model_from_ldm,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from imagemill.shared.errors import ConfigurationError, sentence
from imagemill.worker.models.sources import metadata_of
from imagemill.worker.models.tensor_names import UNET, VAE
from imagemill.worker.models.torch_archive import DAMAGED, read

LONGEST_YAML = 100_000
"""Maximum bytes of a configuration beside a checkpoint."""
CONFIG, INDEX = "config.json", "model_index.json"
UNCONVERTED = (*DAMAGED, SingleFileComponentError, AttributeError, KeyError, NotImplementedError, TypeError)
"""Exceptions that converting and loading a file with other tensors can raise."""


@dataclass(frozen=True)
class Family:
    """Diffusers' pipeline of a family, and its text encoders by their folders' names."""

    pipeline: str
    encoders: Mapping[str, type]


FAMILIES: dict[str, Family] = {
    "sd15": Family("StableDiffusionPipeline", {"text_encoder": CLIPTextModel}),
    "sdxl": Family("StableDiffusionXLPipeline", {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}),
}


Base = tuple[Path, Path]
"""Where configurations come from: the folder of a pulled checkpoint, and that of its family's VAE, which may be another."""


def checkpoint_from_file(source: Path, family: str, base: Base, vae: Path | None, folder: Path) -> str:
    """Convert a checkpoint in one file; `vae` is the folder of another VAE to use. Returns a sentence about its parts."""
    _quiet()
    with _translated("is not a complete checkpoint"):
        tensors = {_present_name(name): _in_16_bits(tensor) for name, tensor in read(source).items()}
        dtype = _dtype({name: tensor for name, tensor in tensors.items() if name.startswith(UNET)})
        for name, part in _parts(tensors, family, base, vae, dtype):
            _save(_complete(part, name), folder / name, dtype)
        encoders = [*FAMILIES[family].encoders]
        for name in ("scheduler", *(encoder.replace("text_encoder", "tokenizer") for encoder in encoders)):
            shutil.copytree(base[0] / name, folder / name)
        found = f"parts: {', '.join(['unet', *encoders, 'vae'])}"
        if vae is not None or not any(name.startswith(VAE) for name in tensors):
            found += f"; the VAE is {_name_of(vae or base[1])}"
        found += _set_prediction(folder / "scheduler" / "scheduler_config.json", source, tensors)
        del tensors  # the trial needs the memory
        _write_index(folder, family)
        _try_out(folder, family)
    return found


def _parts(
    tensors: Mapping[str, Tensor], family: str, base: Base, vae: Path | None, dtype: torch.dtype
) -> Iterator[tuple[str, Any]]:
    """The models in a checkpoint by their folders' names, one at a time, as they are large. Its weights may be incomplete."""
    yield "unet", _converted(UNet2DConditionModel, tensors, base[0] / "unet", dtype)
    for name, kind in FAMILIES[family].encoders.items():
        yield (
            name,
            create_diffusers_clip_model_from_ldm(
                kind, tensors, subfolder=name, config=str(base[0]), torch_dtype=dtype, local_files_only=True
            ),
        )
    own = _below(tensors, VAE) if vae is None else {}
    yield "vae", _own_vae(own, base, dtype) if own else AutoencoderKL.from_pretrained(vae or base[1], **_stored(vae or base[1]))


def _present_name(name: str) -> str:
    """The present name of a tensor: the first checkpoints of Stable Diffusion 1 have other names in their text encoder."""
    encoder = "cond_stage_model.transformer."
    if name.startswith(tuple(f"{encoder}{part}." for part in ("embeddings", "encoder", "final_layer_norm"))):
        return f"{encoder}text_model.{name.removeprefix(encoder)}"
    return name


def _in_16_bits(tensor: Tensor) -> Tensor:
    """The same values in a type that torch can compute with, if they have 8 bits."""
    return tensor.half() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _own_vae(tensors: Mapping[str, Tensor], base: Base, dtype: torch.dtype) -> Any:
    """An own VAE. It works in single precision if its family's was pulled from elsewhere and is another one."""
    model = _complete(_converted(AutoencoderKL, tensors, base[1], dtype), "VAE")
    if base[1].parent != base[0]:
        pulled = AutoencoderKL.from_pretrained(base[1], **_stored(base[1])).state_dict()
        same = all(torch.equal(tensor, pulled[name].to(dtype)) for name, tensor in model.state_dict().items())
        model.register_to_config(force_upcast=not same)
    return model


def _name_of(vae: Path) -> str:
    return vae.name if vae.name != "vae" else f"that of {vae.parent.name}"


def _set_prediction(config: Path, source: Path, tensors: Mapping[str, Tensor]) -> str:
    """Note in a scheduler's configuration that a model predicts velocity, if its file or the web UI's configuration beside it
    says so; also returns what to print.
    """
    said, beside = "", source.with_suffix(".yaml")
    if beside.is_file() and beside.stat().st_size <= LONGEST_YAML:
        said = beside.read_text(errors="replace")
    if (
        "v_pred" not in tensors
        and metadata_of(source).get("modelspec.prediction_type") != "v"
        and not re.search(r"""^\s*parameterization: *["']?v["']?\s*$""", said, re.MULTILINE)
    ):
        return ""
    changes = {"prediction_type": "v_prediction", **({"rescale_betas_zero_snr": True} if "ztsnr" in tensors else {})}
    config.write_text(json.dumps(json.loads(config.read_text()) | changes, indent=2))
    return "; it predicts velocity"


def controlnet_from_file(source: Path, base: Base, folder: Path) -> str:
    """Convert a ControlNet in one file, whose configuration follows from that of the base model's UNet."""
    _quiet()
    with _translated("is not a ControlNet for this family"):
        tensors, family_config = read(source), json.loads((base[0] / "unet" / CONFIG).read_text())
        tensors = _controlnet_tensors(tensors, family_config)
        known = signature(ControlNetModel.__init__).parameters
        folder.mkdir()
        wanted = {name: value for name, value in family_config.items() if name in known} | {"_class_name": "ControlNetModel"}
        wanted |= _hint_channels(tensors)
        wanted["global_pool_conditions"] = "shuffle" in source.name.lower()  # as the web UI tells it: the tensors don't
        (folder / CONFIG).write_text(json.dumps(wanted))
        model = _complete(_converted(ControlNetModel, tensors, folder), "ControlNet")
        more = sorted(tensors.keys() - model.state_dict().keys())
        if more:
            raise ConfigurationError(f"it has tensors that no ControlNet of its family has, such as {more[0]}")
        _try_controlnet(model)
        _save(model, folder, _dtype(tensors))
    return f"parts: ControlNet of {len(tensors)} tensors"


def _controlnet_tensors(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """A ControlNet's tensors by diffusers' names. Its own conversion leaves out what only SDXL has."""
    found = {
        name: tensor for name, tensor in convert_controlnet_checkpoint(dict(tensors), config).items() if tensor is not None
    }
    own = _below(tensors, "control_model.") or tensors
    for ours, theirs in {"linear_1": "label_emb.0.0", "linear_2": "label_emb.0.2"}.items():
        found |= {f"add_embedding.{ours}.{end}": tensor for end, tensor in _below(own, f"{theirs}.").items()}
    return found


def _hint_channels(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The one part of a ControlNet's configuration that its base doesn't tell, by diffusers' names of its tensors."""
    place = "controlnet_cond_embedding"
    layers = [f"{place}.conv_in.weight", *(f"{place}.blocks.{number}.weight" for number in range(1, 20, 2))]
    channels = [tensors[layer].shape[0] for layer in layers if layer in tensors]
    return {"conditioning_embedding_out_channels": channels} if channels else {}


def vae_from_file(source: Path, base: Base, folder: Path) -> str:
    """Convert a VAE in one file."""
    _quiet()
    with _translated("is not a VAE for this family"):
        tensors = read(source)
        tensors = _below(tensors, VAE) or tensors
        dtype = _dtype(tensors)
        model = _own_vae(tensors, base, dtype)
        _save(model, folder, dtype)
        _try_vae(model.float())  # SDXL's overflows in half precision
    return f"parts: VAE of {len(tensors)} tensors"


def unpickled(folder: Path) -> None:
    """Replace the pickled weights in a folder, which are read as data, by safetensors files."""
    with _translated("has weights that can't be read"):
        for path in folder.rglob("*.bin"):
            name = path.name.removeprefix("pytorch_") if path.name.startswith("pytorch_model") else path.name
            save_file(read(path), path.with_name(name).with_suffix(".safetensors"), {"format": "pt"})
            path.unlink()


def checkpoint_from_folder(folder: Path, family: str, vae: Path | None) -> str:
    """Try out a checkpoint that was copied to `folder`; `vae` is the folder of another VAE to put into it."""
    _quiet()
    with _translated("is not a complete checkpoint"):
        if vae is not None:
            half = _in_half(folder / "unet")
            other = AutoencoderKL.from_pretrained(vae, **_stored(vae))
            shutil.rmtree(folder / "vae")
            _save(other, folder / "vae", torch.float16 if half else torch.float32)
        _write_index(folder, family)
        _try_out(folder, family)
    return "parts: as in the folder"


def part_from_folder(folder: Path, kind: str) -> str:
    """Try out a ControlNet or VAE that was copied to `folder`."""
    _quiet()
    with _translated(f"is not a complete {kind}"):
        model = {"controlnet": ControlNetModel, "vae": AutoencoderKL}[kind].from_pretrained(folder, **_stored(folder))
        _complete(model, kind)
        (_try_vae if kind == "vae" else _try_controlnet)(model)
    return "parts: as in the folder"


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _converted(kind: Any, tensors: Mapping[str, Tensor], config: Path, dtype: torch.dtype = torch.float32) -> Any:
    try:
        return kind.from_single_file(dict(tensors), config=str(config), torch_dtype=dtype, local_files_only=True)
    except NotImplementedError as error:  # tensors that the file doesn't have can't be moved
        raise ConfigurationError(f"its {kind.__name__} lacks some tensors") from error


def _complete(model: Any, name: str) -> Any:
    """The model, if the file had all of its weights and all are finite numbers. Raises ConfigurationError."""
    state = model.state_dict()
    missing = [key for key, tensor in state.items() if tensor.is_meta]
    if missing:
        raise ConfigurationError(f"its {name} lacks {len(missing)} of {len(state)} tensors, such as {missing[0]}")
    wrong = next((key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()), None)
    if wrong is not None:
        raise ConfigurationError(f"its {name} has values that are not finite numbers, in {wrong}")
    return model


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return torch.float16 if all(tensor.dtype == torch.float16 for tensor in tensors.values()) else torch.float32


def _save(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a part in half precision if the file had it, as nodes find out by the files' names."""
    variant = "fp16" if dtype == torch.float16 else None
    model.to(dtype).save_pretrained(folder, safe_serialization=True, variant=variant)


def _in_half(folder: Path) -> bool:
    """Whether weights are stored in half precision, in one file or in several."""
    return any(folder.rglob("*.fp16*.safetensors"))


def _stored(folder: Path) -> dict[str, Any]:
    return {
        "variant": "fp16" if _in_half(folder) else None,
        "use_safetensors": True,
        "local_files_only": True,
        "torch_dtype": torch.float32,
    }


def _write_index(folder: Path, family: str) -> None:
    """The list of a checkpoint's parts. It is never the source's own, which could name any class of any library."""
    known = FAMILIES[family]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()).get("_class_name", "")
    if not (isinstance(scheduler, str) and scheduler.endswith("Scheduler") and hasattr(diffusers, scheduler)):
        raise ConfigurationError(f"its scheduler is {str(scheduler)[:100]!r}; expected one of diffusers")
    parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **known.encoders}
    index: dict[str, Any] = {
        "_class_name": known.pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", scheduler],
        **{name: [kind.__module__.partition(".")[0], kind.__name__] for name, kind in parts.items()},
        **{name.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for name in known.encoders},
    }
    if family == "sd15":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def _try_out(folder: Path, family: str) -> None:
    """Load a checkpoint as nodes do, and run its parts once. Raises ConfigurationError."""
    half = _in_half(folder)
    dtype = torch.bfloat16 if half else torch.float32  # which takes no more memory than the file and has the range of floats
    arguments = {"dtype": dtype, "variant": "fp16" if half else None, "use_safetensors": True, "local_files_only": True}
    encoders = {name: _encoder(kind, folder / name, arguments) for name, kind in FAMILIES[family].encoders.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about schedulers' settings, and nodes use schedulers of their own
        pipe = getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(folder, **encoders, **arguments)
    for name in ("unet", "vae", *FAMILIES[family].encoders):
        _complete(getattr(pipe, name), name)
    if pipe.vae.config.latent_channels != 4:
        raise ConfigurationError(f"its VAE has {pipe.vae.config.latent_channels} channels; expected 4")
    with torch.inference_mode():
        tokens = pipe.tokenizer("a photo", padding="max_length", max_length=77, return_tensors="pt").input_ids
        hidden = [getattr(pipe, name)(tokens, output_hidden_states=True) for name in FAMILIES[family].encoders]
        if family == "sdxl":
            text = torch.cat([output.hidden_states[-2] for output in hidden], dim=-1)
            more = {"text_embeds": hidden[1].text_embeds, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=dtype)}
        else:
            text, more = hidden[0].last_hidden_state, {}
        noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
        denoised = pipe.unet(noise, 500, encoder_hidden_states=text, added_cond_kwargs=more).sample
        _check(denoised, "UNet")
    _try_vae(pipe.vae)


def _encoder(kind: Any, folder: Path, arguments: Mapping[str, Any]) -> Any:
    """A text encoder. transformers makes up weights that are missing, and only says so. Raises ConfigurationError."""
    variant = arguments["variant"] if _in_half(folder) else None
    model, about = kind.from_pretrained(folder, **{**arguments, "variant": variant}, output_loading_info=True)
    if missing := sorted(about["missing_keys"]):
        raise ConfigurationError(f"its {folder.name} lacks tensors, such as {missing[0]}")
    return model


def _try_vae(vae: Any) -> None:
    with torch.inference_mode():
        latents = torch.randn((1, vae.config.latent_channels, 8, 8), generator=torch.Generator().manual_seed(0))
        _check(vae.decode(latents.to(vae.dtype)).sample, "VAE")


def _try_controlnet(model: Any) -> None:
    config, more = model.config, {}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more = {"text_embeds": torch.ones((1, width)), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64.0]])}
    picture = torch.ones((1, config.conditioning_channels, 64, 64))
    noise, text = torch.ones((1, config.in_channels, 8, 8)), torch.ones((1, 77, config.cross_attention_dim))
    with torch.inference_mode():
        results, last = model.float()(noise, 500, text, picture, added_cond_kwargs=more, return_dict=False)
    if not all(result.isfinite().all() for result in (*results, last)):
        raise ConfigurationError("its ControlNet returns values that are not finite numbers")


def _check(output: Tensor, name: str) -> None:
    if not output.isfinite().all():
        raise ConfigurationError(f"its {name} returns values that are not finite numbers")
    if not output.std() > 0:
        raise ConfigurationError(f"its {name} returns the same value everywhere")


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError:
        raise
    except UNCONVERTED as error:
        raise ConfigurationError(f"it {what}: {sentence(error)}") from error


def _quiet() -> None:
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
