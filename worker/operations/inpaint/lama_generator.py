"""LaMa's generator: fast Fourier convolutions, by which each layer sees the whole picture.

Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions", WACV 2022 (arXiv 2109.07161), and
Chi, Jiang, Mu, "Fast Fourier Convolution", NeurIPS 2020. Parts are named as in the published weights, from
`generator.model.1.ffc.convl2l.weight` on; how wide and how deep it is, is read off their shapes.
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
"""Local channels, which convolutions see, and, within the network, global ones, seen through their Fourier transform."""


class Generator(nn.Module):
    """[b, 4, h, w] to [b, 3, h, w] in 0..1; h and w are multiples of 8 and at least 16. In fp32, for inference only.

    The input is cat(image * (1 - mask), mask), with the image in 0..1, and a mask that is 1 where it is filled, else 0.
    `band` is how many pixels the first and the last layers take at a time, all where it is None: they hold most of the
    memory, and look at their neighbourhood only. Raises ValueError for weights of something else.
    """

    def __init__(self, weights: Weights, band: int | None = None) -> None:
        super().__init__()
        self.band = band
        try:
            with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
                self._build(_below(weights, PREFIX))
            self.load_state_dict({name.removeprefix("generator."): weights[name] for name in weights}, assign=True)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"these are not the weights of LaMa's generator: {sentence(error)}") from error
        self.float().eval().requires_grad_(False)

    def _build(self, found: Weights) -> None:
        kinds = sorted({(int(number), kind) for number, kind, *_ in (name.split(".") for name in found)})
        self.down = [str(number) for number, kind in kinds if kind == "ffc"]
        self.blocks = [str(number) for number, kind in kinds if kind == "conv1"]
        *up, self.last = [str(number) for number, kind in kinds if kind == "weight" and found[f"{number}.weight"].ndim == 4]
        self.up = [(name, str(int(name) + 1)) for name in up]
        self.scale = 2 ** len(self.up)
        self.model = nn.ModuleDict()
        for name in self.down:
            self.model[name] = Layer(_below(found, f"{name}."), stride=1 if name == self.down[0] else 2)
        self.near = len(found[f"{self.down[-1]}.ffc.convl2l.weight"])
        for name in self.blocks:
            self.model[name] = Block(_below(found, f"{name}."))
        for name, norm in self.up:
            self.model[name] = _upward(found[f"{name}.weight"])
            self.model[norm] = _norm(found, norm)
        self.model[self.last] = _conv(found[f"{self.last}.weight"], bias=True)
        self.side = found[f"{self.last}.weight"].shape[-1] // 2

    def forward(self, x: Tensor) -> Tensor:
        x = self._in_bands(self._encoded, x, 1, self.scale)
        now: Parts = (x[:, : self.near], x[:, self.near :])
        del x
        for name in self.blocks:
            now = self.model[name](now)
        return self._in_bands(self._decoded, _joined(now), self.scale, 1)

    def fold(self) -> Generator:
        """Put the batch norms into the convolutions before them, which changes the output by less than 1e-4."""
        for part in self.model.values():
            if isinstance(part, Layer | Block):
                part.fold()
        for name, norm in self.up:
            self.model[norm] = _folded(self.model[norm], self.model[name])
        return self

    def _encoded(self, x: Tensor) -> Tensor:
        now: Parts = (x,)
        for name in self.down:
            now = self.model[name](now)
        return _joined(now)

    def _decoded(self, x: Tensor) -> Tensor:
        for name, norm in self.up:
            x = torch.relu_(self.model[norm](self.model[name](x)))
        return torch.sigmoid_(self.model[self.last](_padded(x, self.side)))

    def _in_bands(self, run: Callable[[Tensor], Tensor], x: Tensor, before: int, after: int) -> Tensor:
        """`run(x)`, where a row of `x` is `before` rows of the picture and one of the result `after` rows."""
        if self.band is None:
            return run(x)
        height, width = x.shape[-2] * before, x.shape[-1] * before
        rows = max(1, self.band // width // self.scale) * self.scale
        if rows >= height:
            return run(x)
        made = []
        margin = 2 * self.scale  # no row of the result depends on what lies further away
        for top in range(0, height, rows):
            start, end = max(0, top - margin), min(height, top + rows + margin)
            part = run(x[..., start // before : end // before, :])
            made.append(part[..., (top - start) // after : (min(height, top + rows) - start) // after, :].clone())
            del part
        return torch.cat(made, dim=-2)


class Layer(nn.Module):
    """A fast Fourier convolution, batch norms and ReLU."""

    def __init__(self, weights: Weights, stride: int = 1) -> None:
        super().__init__()
        self.ffc = Fast(_below(weights, "ffc."), stride)
        self.bn_l = _norm(weights, "bn_l")
        self.bn_g = _norm(weights, "bn_g") if self.ffc.to_wide else nn.Identity()

    def forward(self, x: Parts) -> Parts:
        return [torch.relu_(norm(part)) for norm, part in zip((self.bn_l, self.bn_g), self.ffc(x), strict=False)]

    def fold(self) -> None:
        ffc = self.ffc
        self.bn_l = _folded(self.bn_l, ffc.convl2l, *([ffc.convg2l] if ffc.from_wide else []))
        if ffc.to_wide:
            self.bn_g = _folded(self.bn_g, ffc.convl2g, *([ffc.convg2g.conv2] if ffc.from_wide else []))
        if ffc.from_wide:
            ffc.convg2g.fold()


class Block(nn.Module):
    """Two layers, whose result is added to what they were given."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.conv1, self.conv2 = Layer(_below(weights, "conv1.")), Layer(_below(weights, "conv2."))

    def forward(self, x: Parts) -> Parts:
        return [made.add_(given) for made, given in zip(self.conv2(self.conv1(x)), x, strict=True)]

    def fold(self) -> None:
        self.conv1.fold()
        self.conv2.fold()


class Fast(nn.Module):
    """Convolutions from local and global channels to both; from global to global by way of the Fourier transform."""

    def __init__(self, weights: Weights, stride: int) -> None:
        super().__init__()
        self.to_wide, self.from_wide = "convl2g.weight" in weights, "convg2l.weight" in weights
        self.side = weights["convl2l.weight"].shape[-1] // 2
        self.convl2l = _conv(weights["convl2l.weight"], stride)
        if self.to_wide:
            self.convl2g = _conv(weights["convl2g.weight"], stride)
        if self.from_wide:
            self.convg2l = _conv(weights["convg2l.weight"], stride)
            self.convg2g = Spectral(_below(weights, "convg2g."))

    def forward(self, x: Parts) -> Parts:
        near, *wide = x
        padded = _padded(near, self.side)
        made = [self.convl2l(padded)]
        if self.to_wide:
            made.append(self.convl2g(padded))
        del padded
        for part in wide:
            made[0].add_(self.convg2l(_padded(part, self.side)))
            made[1].add_(self.convg2g(part))
        return made


class Spectral(nn.Module):
    """The FFC paper's spectral transform, without its local Fourier unit, which LaMa has not."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(_conv(weights["conv1.0.weight"]), _norm(weights, "conv1.1"))
        self.fu = Fourier(_below(weights, "fu."))
        self.conv2 = _conv(weights["conv2.weight"])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.conv1(x))
        made: Tensor = self.conv2(x.add_(self.fu(x)))
        return made

    def fold(self) -> None:
        self.conv1[1] = _folded(self.conv1[1], self.conv1[0])
        self.fu.bn = _folded(self.fu.bn, self.fu.conv_layer)


class Fourier(nn.Module):
    """A 1x1 convolution, batch norm and ReLU on the transform of height and width: real and imaginary parts in turns."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.conv_layer = _conv(weights["conv_layer.weight"])
        self.bn = _norm(weights, "bn")

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # In fp32 always: cuFFT takes half precision for powers of two alone, and a large tile's sum may overflow it.
        waves = torch.view_as_real(torch.fft.rfft2(x.float(), norm="ortho"))
        parts = waves.permute(0, 1, 4, 2, 3).reshape(batch, 2 * channels, height, -1).to(x.dtype)
        parts = torch.relu_(self.bn(self.conv_layer(parts))).float()
        waves = parts.reshape(batch, channels, 2, height, -1).permute(0, 1, 3, 4, 2).contiguous()
        made: Tensor = torch.fft.irfft2(torch.view_as_complex(waves), s=(height, width), norm="ortho")
        return made.to(x.dtype)


def _below(weights: Weights, prefix: str) -> Weights:
    """The weights of one part, with their names in it."""
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
    """Put a batch norm of the convolutions' sum into them; what is to stand in its place.

    With s = weight / sqrt(var + eps) it makes s (a + b - mean) + bias of a + b: all are scaled, the first is shifted.
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
