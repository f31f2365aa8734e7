"""U^2-Net in torch, as published (44.0 M parameters), with random weights, and the engine `rembg` running on it.

Qin et al., "U^2-Net: Going Deeper with Nested U-Structure for Salient Object Detection", Pattern Recognition 106, 2020,
with batch normalisation folded into the convolutions, as exporters do. tests/models.py writes the same network as ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from imagemill.shared.options.remove_background import RembgRemoveBackground
from imagemill.worker.hardware.device import Device
from imagemill.worker.hardware.torch_device import torch_device, torch_dtype
from imagemill.worker.imaging.opencv import set_up
from imagemill.worker.operations.remove_background.model_families import FAMILIES
from imagemill.worker.operations.remove_background.rembg import Rembg

FULL_WIDTH, PARAMETERS = 64, 44.0
"""The published width, and millions of parameters at it."""
SIDE = FAMILIES["u2net"].size
SHARES = (0.02, 0.03, 0.05, 0.2, 0.6, 1.0)
"""Weight of each side output in the fused map, from the finest to the coarsest."""
SPREAD = 25.0
"""Standard deviation of the fused map's logits."""


def _pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 2, ceil_mode=True)


def _enlarge(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2:] == size[2:]:
        return x
    return functional.interpolate(x, size=size[2:], mode="bilinear", align_corners=False)


class Conv(nn.Conv2d):
    """A convolution with He initialisation whose kernels have no mean: a flat image must not dominate the output."""

    def __init__(self, into: int, out: int, kernel: int = 3, dilation: int = 1) -> None:
        super().__init__(into, out, kernel, padding=dilation * (kernel // 2), dilation=dilation)
        with torch.no_grad():
            self.weight.normal_().sub_(self.weight.mean((1, 2, 3), keepdim=True)).mul_((2 / (into * kernel**2)) ** 0.5)
            torch.nn.init.normal_(self.bias, std=0.1)  # type: ignore[arg-type]


class Block(Conv):
    """A convolution and ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x))


class Rsu(nn.Module):
    """The paper's residual U-block, RSU-L: a small U-Net of `depth` levels, added to its input layer.

    A `flat` one, RSU-4F, dilates instead of pooling, for maps that are small already.
    """

    def __init__(self, depth: int, into: int, mid: int, out: int, *, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat
        dilations = [2**level if flat else 1 for level in range(depth - 1)]
        self.inlet = Block(into, out)
        self.down = nn.ModuleList(
            Block(out if level == 0 else mid, mid, dilation=dilations[level]) for level in range(depth - 1)
        )
        self.bottom = Block(mid, mid, dilation=2 ** (depth - 1) if flat else 2)
        self.up = nn.ModuleList(
            Block(2 * mid, mid if level else out, dilation=dilations[level]) for level in reversed(range(depth - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        inlet = self.inlet(x)
        levels = [self.down[0](inlet)]
        for block in self.down[1:]:
            levels.append(block(levels[-1] if self.flat else _pool(levels[-1])))
        now = self.bottom(levels[-1])
        for block, level in zip(self.up, reversed(levels), strict=True):
            now = block(torch.cat([_enlarge(now, level.shape), level], 1))
        return torch.as_tensor(now + inlet)


class U2Net(nn.Module):
    """float [b, 3, 320, 320] to the fused map [b, 1, 320, 320], 0 to 1. `width` 64 is the published network."""

    def __init__(self, width: int = FULL_WIDTH) -> None:
        super().__init__()

        def rsu(depth: int, into: int, mid: int, out: int, *, flat: bool = False) -> Rsu:
            into, mid, out = (max(1, channels * width // FULL_WIDTH) for channels in (into, mid, out))
            return Rsu(depth, into, mid, out, flat=flat)

        self.down = nn.ModuleList(
            [
                Rsu(7, 3, max(1, 32 * width // FULL_WIDTH), width),
                rsu(6, 64, 32, 128),
                rsu(5, 128, 64, 256),
                rsu(4, 256, 128, 512),
                rsu(4, 512, 256, 512, flat=True),
            ]
        )
        self.bottom = rsu(4, 512, 256, 512, flat=True)
        self.up = nn.ModuleList(
            [
                rsu(4, 1024, 256, 512, flat=True),
                rsu(4, 1024, 128, 256),
                rsu(5, 512, 64, 128),
                rsu(6, 256, 32, 64),
                rsu(7, 128, 16, 64),
            ]
        )
        self.sides = nn.ModuleList(Conv(max(1, out * width // FULL_WIDTH), 1) for out in (64, 64, 128, 256, 512, 512))
        self.fuse = Conv(6, 1, kernel=1)

    def maps(self, x: Tensor) -> Tensor:
        """Logits of the six side outputs [b, 6, h, w]."""
        skips, now = [], x
        for block in self.down:
            skips.append(block(now))
            now = _pool(skips[-1])
        stages = [self.bottom(now)]
        for block, skip in zip(self.up, reversed(skips), strict=True):
            stages.append(block(torch.cat([_enlarge(stages[-1], skip.shape), skip], 1)))
        sides = zip(self.sides, reversed(stages), strict=True)
        return torch.cat([_enlarge(side(stage), x.shape) for side, stage in sides], 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fuse(self.maps(x)))

    @torch.no_grad()
    def settle(self) -> U2Net:
        """Let the matte look trained, mostly near 0 or 1 and a third of it inside, so that finishing takes as long as usual."""
        down, across = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")
        inside = ((across**2 + (down * 0.8) ** 2) < 0.3).float()
        scene = 1.2 + 0.5 * down + inside * torch.tensor([-2.0, -1.4, -1.0])[:, None, None] + 0.1 * torch.randn(3, SIDE, SIDE)
        maps = self.maps(scene[None])[0]
        gains = torch.tensor(SHARES) / maps.std((1, 2)).clamp(min=1e-6)
        mixed = (maps * gains[:, None, None]).sum(0)
        middle = mixed[SIDE // 16 : -SIDE // 16, SIDE // 16 : -SIDE // 16]
        gains *= SPREAD / mixed.std() * (1 if mixed.mean() < middle.mean() else -1)  # the border is background
        self.fuse.weight.copy_(gains.reshape(1, 6, 1, 1))
        self.fuse.bias.copy_(-(maps * gains[:, None, None]).sum(0).quantile(0.67)[None])
        return self


class TorchU2Net:
    """The network on a device, with the interface of the engine's OnnxModel."""

    batches = True

    def __init__(self, device: Device, width: int = FULL_WIDTH) -> None:
        self._device, self._dtype = torch_device(device, "u2net"), torch_dtype(device, torch.float16)
        torch.manual_seed(0)
        network = U2Net(width).settle().eval()
        count = sum(weights.numel() for weights in network.parameters()) / 1e6
        assert width != FULL_WIDTH or round(count, 1) == PARAMETERS, count
        network.to(self._device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network: Any = torch.compile(network, dynamic=False) if device.compile else network

    @torch.inference_mode()
    def run(self, tensors: Sequence[np.ndarray[Any, np.dtype[np.float32]]], *, together: bool = True) -> list[Any]:
        """A map float32 [1, size, size] for each of the tensors, float32 [3, size, size]."""
        batch = torch.from_numpy(np.stack(tensors)).to(self._device, self._dtype).to(memory_format=torch.channels_last)
        return list(self._network(batch).float().cpu().numpy())


class TorchRembg(Rembg):
    """The engine with everything around the network as it is, and the network in torch."""

    spec = replace(Rembg.spec, runtime="torch")

    def __init__(self, model: TorchU2Net) -> None:
        super().__init__()
        self._torch = model

    def load(self, device: Device) -> None:
        set_up(device)

    def fingerprint(self, options: RembgRemoveBackground) -> str:
        return f"torch {torch.__version__}"

    def together(self, options: RembgRemoveBackground) -> bool:
        return True

    def _open(self, options: RembgRemoveBackground) -> Any:
        return self._torch
