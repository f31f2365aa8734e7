"""Reads LaMa's weights from the formats that they are published in, as data: code in them never runs."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from imagemill.shared.errors import ConfigurationError, sentence
from imagemill.worker.models.inert_pickle import Unreadable
from imagemill.worker.models.tensor_names import LAMA
from imagemill.worker.models.torch_archive import DAMAGED, tensors_of
from imagemill.worker.operations.inpaint.lama_generator import PREFIX, Generator
from imagemill.worker.transfer.files import replacing

LARGEST = 2**30
"""Maximum bytes of a generator's weights: five times the published one."""


def read(path: Path) -> dict[str, Tensor]:
    """Read the generator's weights from a safetensors file, checkpoint, TorchScript archive or zip file with a checkpoint.

    Names are upstream's, `generator.model...`, even if they have another prefix in the file. Raises ConfigurationError for
    a damaged file, or one without a LaMa generator.
    """
    try:
        with path.open("rb") as file:
            return tensors_of(file, _generator, LARGEST) if zipfile.is_zipfile(file) else _of_safetensors(path)
    except DAMAGED as error:
        raise ConfigurationError(f"{path} has no LaMa weights or is damaged: {sentence(error)}") from error


def convert(source: Path, target: Path) -> int:
    """Write a file's weights to a safetensors file, after a test run; return the number of parameters.

    Raises ConfigurationError, also if `target` can't be written.
    """
    weights = read(source)
    try:
        with torch.inference_mode():
            output = Generator(weights)(torch.zeros(1, 4, 16, 16))
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{source} has no working LaMa generator: {sentence(error)}") from error
    if not output.isfinite().all():
        raise ConfigurationError(f"{source} has weights that are not finite numbers")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            part.write_bytes(save(weights))  # safetensors' own way of writing a file wants to rename it
            part.chmod(0o644)  # workers may run as another user
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{target} can't be written: {sentence(error)}") from error
    return sum(tensor.numel() for tensor in weights.values())


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    if path.stat().st_size > LARGEST:
        raise Unreadable("it is larger than any LaMa generator")
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":  # 8 bytes with a length, then a JSON object
            raise Unreadable("it is neither a torch zip archive nor a safetensors file")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(key) for name, key in _generator(file.keys()).items()}


def _generator(names: Iterable[str]) -> dict[str, str]:
    """Map upstream's names of the generator's weights to the file's names. Raises Unreadable without a generator."""
    names = list(names)
    prefixes = [name.removesuffix(LAMA) for name in names if name.endswith(LAMA)]
    if not prefixes:
        raise Unreadable("it has no generator")
    prefix = min(prefixes, key=lambda prefix: (not prefix.endswith("generator."), len(prefix))) + "model."
    return {PREFIX + name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
