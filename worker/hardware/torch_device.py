"""What all users of torch share: the device, and what models calculate in."""

from __future__ import annotations

import torch

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.hardware.device import Device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_device(device: Device, model: str) -> torch.device:
    """Where a model runs. Raises ConfigurationError where a GPU was asked for and torch can't use it: never the CPU instead."""
    if device.gpu is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}, which the driver must fit" if torch.version.cuda else "without CUDA"
        raise ConfigurationError(
            f"the model {model} was to run on {device.name}, but the torch that is installed can't: it is built {built}"
        )
    return torch.device("cuda", 0)  # the process is pinned to one GPU


def torch_dtype(device: Device, preferred: torch.dtype) -> torch.dtype:
    """What a model calculates in; on a GPU `preferred` where the settings leave it open."""
    if device.gpu is None:
        return torch.float32
    return preferred if device.dtype == "auto" else DTYPES[device.dtype]
