"""The torch device and dtype that every torch model uses."""

from __future__ import annotations

import torch

from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.errors import DeviceUnusable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_device(device: Device, model: str) -> torch.device:
    """The device for a model. Raises DeviceUnusable, and never falls back to the CPU, if torch can't use the GPU."""
    if device.gpu is None:
        return torch.device("cpu")
    require_cuda(f"the model {model}", device.name)
    return torch.device("cuda", 0)  # the process is pinned to one GPU


def require_cuda(user: str, device: str) -> None:
    """Raise DeviceUnusable if torch can't use a GPU; `user` and `device` name what should run where."""
    if not torch.cuda.is_available():
        version = torch.version.cuda
        built = f"for CUDA {version}, which the driver must support" if version else "without CUDA"
        raise DeviceUnusable(
            f"{user} should run on {device}, but the installed torch can't: it was built {built}; fix this or use --cpu"
        )


def torch_dtype(device: Device, preferred: torch.dtype) -> torch.dtype:
    """The precision of a model: fp32 on a CPU; on a GPU the configured one, or `preferred` if that is `auto`."""
    if device.gpu is None:
        return torch.float32
    return preferred if device.dtype == "auto" else DTYPES[device.dtype]


def bytes_of(network: torch.nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
