"""Makes models of the operator's own from files, folders and hub ids: for Stable Diffusion, and LaMa's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from imagemill.shared.errors import ConfigurationError, UsageError
from imagemill.worker.models import added, diffusers_folders
from imagemill.worker.models.adding import Made
from imagemill.worker.models.catalogue import REPOSITORIES, repository
from imagemill.worker.models.diffusion_models import added_folder
from imagemill.worker.models.download import LARGEST, check_space
from imagemill.worker.models.own_process import apart
from imagemill.worker.models.repositories import folder_of, state
from imagemill.worker.models.sources import format_of, header_of
from imagemill.worker.models.tensor_names import Contents
from imagemill.worker.models.tensor_names import recognise as recognise_tensors

CONTROLS = ("canny", "scribble", "lineart", "tile")
"""Kinds of pictures that can be drawn for a ControlNet."""
LORA_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"


def contents_of(source: Path, called: str | None = None) -> Contents:
    """What a file with tensors holds; `called` is what the operator calls it if not by its path. Raises ConfigurationError."""
    try:
        if format_of(source) == "safetensors":
            return recognise_tensors({name: shape for name, (_, shape) in header_of(source).items()})
        from imagemill.worker.models.torch_archive import shapes_of

        return recognise_tensors(apart(shapes_of, source))
    except ConfigurationError as error:
        raise ConfigurationError(
            error.message if str(source) in error.message else f"{called or source}: {error.message}"
        ) from error


def from_file(
    name: str,
    source: Path,
    contents: Contents,
    weights: Path,
    vae: str | None,
    control: str | None,
    work: Path,
    called: str | None = None,
) -> Made:
    """A model from a file with tensors, made in the folder `work`. Raises ConfigurationError."""
    kind, family = contents.kind, contents.family
    check_space(work, name, source.stat().st_size, most=LARGEST)
    parameters = {}
    try:
        if kind == "inpainting":
            from imagemill.worker.models.conversion import convert

            target = work / f"{name}.safetensors"
            count = apart(convert, source, target)
            return Made(kind, family, target, f"lama/{target.name}", {}, (f"LaMa with {count / 1e6:.1f} million parameters",))
        from imagemill.worker.models import checkpoints

        if kind == "lora":
            target = work / f"{name}.safetensors"
            found = apart(checkpoints.lora_from_file, source, target)
            return Made(kind, family, target, f"diffusion/loras/{target.name}", {}, _told(kind, family, found))
        folder = work / name
        base = base_for(weights, family or "sd15")
        if kind == "checkpoint":
            parameters = {"vae": vae} if vae is not None else {}
            found = apart(checkpoints.checkpoint_from_file, source, family, base, vae_folder(weights, vae), folder)
        elif kind == "controlnet":
            parameters = {"control": control or control_in(name, source.name) or control_in(Path(called or source).parent.name)}
            found = apart(checkpoints.controlnet_from_file, source, base, folder)
        else:
            found = apart(checkpoints.vae_from_file, source, base, folder)
    except ConfigurationError as error:
        raise ConfigurationError(f"{called or source}: {error.message}") from error
    return Made(kind, family, folder, f"diffusion/{name}", parameters, _told(kind, family, found, parameters))


def from_folder(
    name: str,
    source: Path,
    contents: Contents,
    weights: Path,
    vae: str | None,
    control: str | None,
    work: Path,
    called: str | None = None,
) -> Made:
    """A model from a folder in diffusers' layout, made in the folder `work`. Raises ConfigurationError.

    `called` is what the operator calls the source, unless that is the folder itself: then its files are moved, not copied.
    """
    from imagemill.worker.models import checkpoints

    kind, family, folder, parameters = contents.kind, contents.family, work / name, {}
    size = sum((source / file).stat().st_size for file in contents.files)
    check_space(work, name, size, present=0 if called is None else size, most=LARGEST)
    try:
        for file in contents.files:
            if file.endswith(".safetensors"):
                header_of(source / file)
            elif file.endswith(".bin"):
                format_of(source / file)  # refuses pickles that are no archives
        diffusers_folders.taken(source, contents.files, folder, move=called is not None)
        if any(file.endswith(".bin") for file in contents.files):
            apart(checkpoints.unpickled, folder)
        if kind == "checkpoint":
            parameters = {"vae": vae} if vae is not None else {}
            found = apart(checkpoints.checkpoint_from_folder, folder, family, vae_folder(weights, vae))
        else:
            parameters = {"control": control or control_in(name, called or source.name)} if kind == "controlnet" else {}
            found = apart(checkpoints.part_from_folder, folder, kind)
    except ConfigurationError as error:
        message = error.message.replace(f"{source}/", "").replace(f"{folder}/", "")
        raise ConfigurationError(f"{called or source}: {message}") from error
    return Made(kind, family, folder, f"diffusion/{name}", parameters, _told(kind, family, found, parameters))


def contents_of_folder(source: Path, files: Sequence[str] | None = None, called: str | None = None) -> Contents:
    """What a folder holds that has, or is to have, these files; `called` as for `from_folder`. Raises ConfigurationError."""
    try:
        files = diffusers_folders.listing(source) if files is None else files
        kind, family = diffusers_folders.recognise(files, diffusers_folders.reader(source))
        return Contents(kind, family, tuple(diffusers_folders.wanted(files, kind, family)))
    except ConfigurationError as error:
        raise ConfigurationError(
            error.message if str(source) in error.message else f"{called or source}: {error.message}"
        ) from error


def base_for(weights: Path, family: str) -> tuple[Path, Path]:
    """The folders of a family's pulled checkpoint and of its VAE, for their configurations.

    Raises UsageError if they have to be pulled first, and ConfigurationError if there is no such family.
    """
    names = {entry.name for entry in REPOSITORIES}
    if family not in names:
        raise ConfigurationError(f"it is a model of the family {family}, which nodes of this version can't run")
    needed = [family, *[f"{family}-vae"] * (f"{family}-vae" in names)]
    if any(state(weights, repository(name)) == "missing" for name in needed):
        raise UsageError(
            f"converting it takes the configuration and the tokenizer of {family}: "
            f"run `imagemill models pull {' '.join(needed)}` first"
        )
    folder = folder_of(weights, repository(family))
    own = folder / "vae"
    return folder, own if own.is_dir() else folder_of(weights, repository(needed[-1]))


def vae_folder(weights: Path, name: str | None) -> Path | None:
    """The folder of a VAE that was added, by its name. Raises UsageError."""
    if name is None:
        return None
    record = added.find(weights, name)
    if record is None or record.kind != "vae":
        raise UsageError(f"there is no VAE called {name}: add it first, with `imagemill models add {name} FILE`")
    return added_folder(weights, name)


def control_in(*names: str) -> str:
    """The kind of pictures that a ControlNet takes, by its names; empty if they don't say."""
    text = re.sub(r"[-_ ]", "", " ".join(names).lower())
    return next((kind for kind in CONTROLS if kind in text), "")


def check_lora_name(name: str) -> None:
    """Raise UsageError for a name that no LoRA can have."""
    if not re.fullmatch(LORA_NAME, name):
        raise UsageError(f"{name!r}: a LoRA's name has up to 64 letters, digits and _-")


def _told(kind: str, family: str, found: str, parameters: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Sentences about what was recognised. For a ControlNet, the last says which pictures it takes."""
    lines = (f"{kind}{f' for {family}' if family else ''}", found)
    if kind != "controlnet":
        return lines
    control = (parameters or {}).get("control")
    drawn = f"{control}, drawn from each image" if control else "none is drawn for it, so jobs give their own"
    return (*lines, f"pictures: {drawn}; --control names another kind")
