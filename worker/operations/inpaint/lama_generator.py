"""LaMa's generator: fast Fourier convolutions, through which each layer sees the whole picture.

Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions", WACV 2022 (arXiv 2109.07161), and
Chi, Jiang, Mu, "Fast Fourier Convolution", NeurIPS 2020. Modules are named as in the published weights, such as
`generator.model.1.ffc.convl2l.weight`; width and depth follow from the names and shapes of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from imagemill.shared.errors import sentence

PREFIX = "generator.model."

Weights = Mapping[str, Tensor]
Parts = Sequence[Tensor]
"""Local channels, and within the network also global ones, which are processed through their Fourier transform."""


class Generator(nn.Module):
    """Maps [b, 4, h, w] to [b, 3, h, w] in 0..1; h and w are multiples of 8, at least 16. In fp32, for inference only.

    The input is cat(image * (1 - mask), mask), with the image in 0..1 and a mask of 1 where it has to be filled, else 0.
    `band` is the number of pixels that the first and last layers process at once (None: all): they take most of the
    memory and only see the neighbourhood of each pixel. Raises ValueError for the weights of another model.
    """

    def __init__(self, weights: Weights, band: int | None = None) -> None:
        super().__init__()
        self.band = band
        try:
            with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
                self._build(_below(weights, PREFIX))
            self.load_state_dict({name.removeprefix("generator."): weights[name] for name in weights}, assign=True)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"these are not the weights of LaMa's generator: {sentence(error)}") from error
        self.float().eval().requires_grad_(False)

    def _build(self, weights: Weights) -> None:
        kinds = sorted({(int(number), kind) for number, kind, *_ in (name.split(".") for name in weights)})
        self.down = [str(number) for number, kind in kinds if kind == "ffc"]
        self.blocks = [str(number) for number, kind in kinds if kind == "conv1"]
        *up, self.last = [str(number) for number, kind in kinds if kind == "weight" and weights[f"{number}.weight"].ndim == 4]
        self.up = [(name, str(int(name) + 1)) for name in up]
        self.scale = 2 ** len(self.up)
        self.model = nn.ModuleDict()
        for name in self.down:
            self.model[name] = Layer(_below(weights, f"{name}."), stride=1 if name == self.down[0] else 2)
        self.local = len(weights[f"{self.down[-1]}.ffc.convl2l.weight"])
        for name in self.blocks:
            self.model[name] = Block(_below(weights, f"{name}."))
        for name, norm in self.up:
            self.model[name] = _upward(weights[f"{name}.weight"])
            self.model[norm] = _norm(weights, norm)
        self.model[self.last] = _conv(weights[f"{self.last}.weight"], bias=True)
        self.side = weights[f"{self.last}.weight"].shape[-1] // 2

    def forward(self, x: Tensor) -> Tensor:
        x = self._in_bands(self._encoded, x, 1, self.scale)
        parts: Parts = (x[:, : self.local], x[:, self.local :])
        del x
        for name in self.blocks:
            parts = self.model[name](parts)
        return self._in_bands(self._decoded, _joined(parts), self.scale, 1)

    def fold(self) -> Generator:
        """Merge each batch norm into the convolution before it, which changes the output by less than 1e-4."""
        for module in self.model.values():
            if isinstance(module, Layer | Block):
                module.fold()
        for name, norm in self.up:
            self.model[norm] = _folded(self.model[norm], self.model[name])
        return self

    def _encoded(self, x: Tensor) -> Tensor:
        parts: Parts = (x,)
        for name in self.down:
            parts = self.model[name](parts)
        return _joined(parts)

    def _decoded(self, x: Tensor) -> Tensor:
        for name, norm in self.up:
            x = torch.relu_(self.model[norm](self.model[name](x)))
        return torch.sigmoid_(self.model[self.last](_padded(x, self.side)))

    def _in_bands(self, run: Callable[[Tensor], Tensor], x: Tensor, before: int, after: int) -> Tensor:
        """`run(x)` in bands; a row of `x` covers `before` rows of the picture, a row of the result `after` rows."""
        if self.band is None:
            return run(x)
        height, width = x.shape[-2] * before, x.shape[-1] * before
        rows = max(1, self.band // width // self.scale) * self.scale
        if rows >= height:
            return run(x)
        bands = []
        margin = 2 * self.scale  # no row of the result depends on rows further away
        for top in range(0, height, rows):
            start, end = max(0, top - margin), min(height, top + rows + margin)
            band = run(x[..., start // before : end // before, :])
            bands.append(band[..., (top - start) // after : (min(height, top + rows) - start) // after, :].clone())
            del band
        return torch.cat(bands, dim=-2)


class Layer(nn.Module):
    """A fast Fourier convolution, then batch norm and ReLU."""

    def __init__(self, weights: Weights, stride: int = 1) -> None:
        super().__init__()
        self.ffc = FastFourierConvolution(_below(weights, "ffc."), stride)
        self.bn_l = _norm(weights, "bn_l")
        self.bn_g = _norm(weights, "bn_g") if self.ffc.to_global else nn.Identity()

    def forward(self, x: Parts) -> Parts:
        return [torch.relu_(norm(part)) for norm, part in zip((self.bn_l, self.bn_g), self.ffc(x), strict=False)]

    def fold(self) -> None:
        ffc = self.ffc
        self.bn_l = _folded(self.bn_l, ffc.convl2l, *([ffc.convg2l] if ffc.from_global else []))
        if ffc.to_global:
            self.bn_g = _folded(self.bn_g, ffc.convl2g, *([ffc.convg2g.conv2] if ffc.from_global else []))
        if ffc.from_global:
            ffc.convg2g.fold()


class Block(nn.Module):
    """Two layers with a residual connection."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.conv1, self.conv2 = Layer(_below(weights, "conv1.")), Layer(_below(weights, "conv2."))

    def forward(self, x: Parts) -> Parts:
        return [residual.add_(part) for residual, part in zip(self.conv2(self.conv1(x)), x, strict=True)]

    def fold(self) -> None:
        self.conv1.fold()
        self.conv2.fold()


class FastFourierConvolution(nn.Module):
    """Convolutions from local and global channels to both; global to global goes through the Fourier transform."""

    def __init__(self, weights: Weights, stride: int) -> None:
        super().__init__()
        self.to_global, self.from_global = "convl2g.weight" in weights, "convg2l.weight" in weights
        self.side = weights["convl2l.weight"].shape[-1] // 2
        self.convl2l = _conv(weights["convl2l.weight"], stride)
        if self.to_global:
            self.convl2g = _conv(weights["convl2g.weight"], stride)
        if self.from_global:
            self.convg2l = _conv(weights["convg2l.weight"], stride)
            self.convg2g = Spectral(_below(weights, "convg2g."))

    def forward(self, x: Parts) -> Parts:
        local, *rest = x
        padded = _padded(local, self.side)
        result = [self.convl2l(padded)]
        if self.to_global:
            result.append(self.convl2g(padded))
        del padded
        for part in rest:  # the global channels, if there are any
            result[0].add_(self.convg2l(_padded(part, self.side)))
            result[1].add_(self.convg2g(part))
        return result


class Spectral(nn.Module):
    """The FFC paper's spectral transform, without the local Fourier unit, which LaMa does not use."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(_conv(weights["conv1.0.weight"]), _norm(weights, "conv1.1"))
        self.fu = Fourier(_below(weights, "fu."))
        self.conv2 = _conv(weights["conv2.weight"])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.conv1(x))
        result: Tensor = self.conv2(x.add_(self.fu(x)))
        return result

    def fold(self) -> None:
        self.conv1[1] = _folded(self.conv1[1], self.conv1[0])
        self.fu.bn = _folded(self.fu.bn, self.fu.conv_layer)


class Fourier(nn.Module):
    """A 1x1 convolution, batch norm and ReLU on the Fourier transform over height and width.

    Its channels are the real and imaginary parts, alternating.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.conv_layer = _conv(weights["conv_layer.weight"])
        self.bn = _norm(weights, "bn")

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # Always in fp32: cuFFT supports half precision only for powers of two, and a large tile's sum may overflow it.
        waves = torch.view_as_real(torch.fft.rfft2(x.float(), norm="ortho"))
        parts = waves.permute(0, 1, 4, 2, 3).reshape(batch, 2 * channels, height, -1).to(x.dtype)
        parts = torch.relu_(self.bn(self.conv_layer(parts))).float()
        waves = parts.reshape(batch, channels, 2, height, -1).permute(0, 1, 3, 4, 2).contiguous()
        result: Tensor = torch.fft.irfft2(torch.view_as_complex(waves), s=(height, width), norm="ortho")
        return result.to(x.dtype)


def _below(weights: Weights, prefix: str) -> Weights:
    """The weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _conv(weight: Tensor, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, bias=bias)


def _upward(weight: Tensor) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(weight.shape[0], weight.shape[1], weight.shape[2], 2, padding=1, output_padding=1)


def _norm(weights: Weights, name: str) -> nn.Module:
    return nn.BatchNorm2d(len(weights[f"{name}.weight"]))


def _padded(x: Tensor, side: int) -> Tensor:
    return pad(x, (side, side, side, side), mode="reflect")


def _joined(parts: Parts) -> Tensor:
    return torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]


def _folded(norm: nn.Module, *convs: Any) -> nn.Module:
    """Merge a batch norm into the convolutions whose sum it normalises; returns the module that replaces it.

    With s = weight / sqrt(var + eps), it maps a + b to s (a + b - mean) + bias: all are scaled, only the first is shifted.
    """
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return norm
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if convs[0].bias is not None:
        shift += convs[0].bias.double() * scale
    convs[0].bias = nn.Parameter(shift.float(), requires_grad=False)
    for conv in convs:
        out = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
        conv.weight = nn.Parameter((conv.weight.double() * scale.reshape(out)).float(), requires_grad=False)
    return nn.Identity()
