from __future__ import annotations

from typing import Literal

import pytest
import torch

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.torch_device import torch_device, torch_dtype


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [("auto", torch.float16), ("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_a_gpu_calculates_in_what_was_asked_for_and_a_cpu_in_fp32(
    asked: Literal["auto", "fp32", "bf16", "fp16"], dtype: torch.dtype
) -> None:
    assert torch_dtype(Device(gpu=0, dtype=asked), torch.float16) is dtype
    assert torch_dtype(Device(dtype=asked), torch.float16) is torch.float32


def test_a_pinned_process_has_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device(Device(gpu=3), "lama") == torch.device("cuda", 0)
    assert torch_device(Device(), "lama") == torch.device("cpu")


@pytest.mark.parametrize(("built", "said"), [(None, "without CUDA"), ("13.0", "for CUDA 13.0, which the driver must fit")])
def test_a_gpu_that_torch_cant_use_is_never_a_silent_cpu(built: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(ConfigurationError, match=f"the model lama was to run on gpu3, but .* can't: it is built {said}"):
        torch_device(Device(gpu=3), "lama")
