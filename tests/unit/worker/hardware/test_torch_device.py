from __future__ import annotations

from typing import Literal

import pytest
import torch

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.torch_device import torch_device, torch_dtype


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [("auto", torch.float16), ("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_dtype_is_the_configured_one_on_a_gpu_and_fp32_on_a_cpu(
    setting: Literal["auto", "fp32", "bf16", "fp16"], dtype: torch.dtype
) -> None:
    assert torch_dtype(Device(gpu=0, dtype=setting), torch.float16) is dtype
    assert torch_dtype(Device(dtype=setting), torch.float16) is torch.float32


def test_pinned_gpu_is_cuda_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device(Device(gpu=3), "lama") == torch.device("cuda", 0)
    assert torch_device(Device(), "lama") == torch.device("cpu")


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "without CUDA"), ("13.0", "for CUDA 13.0, which the driver must support")]
)
def test_torch_never_falls_back_to_the_cpu_when_it_cannot_use_the_gpu(
    version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(ConfigurationError, match=f"the model lama should run on gpu3, but .* can't: it was built {reason}"):
        torch_device(Device(gpu=3), "lama")
