"""LaMa's generator with random weights, in any size and in all formats that it is published in."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imagemill.worker.operations.inpaint.lama_generator import PREFIX, Generator

FULL: dict[str, Any] = dict(width=64, blocks=18)
"""The size of the published generator: 51.0 million parameters."""


class _Random:
    """Random weights by name: signals neither vanish nor explode with depth, and batch norms are not the identity."""

    def __init__(self, seed: int) -> None:
        self.weights: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(seed)

    def conv(self, name: str, shape: tuple[int, int, int], *, gain: float = 1.0, up: bool = False, bias: bool = False) -> None:
        """`shape` is output channels, input channels and kernel size."""
        out, into, side = shape
        size = (into, out, side, side) if up else (out, into, side, side)
        scale = gain * (2 / (into * side * side)) ** 0.5
        self.weights[f"{name}.weight"] = torch.randn(size, generator=self._random) * scale
        if bias:
            self.weights[f"{name}.bias"] = torch.randn(out, generator=self._random) * 0.1

    def norm(self, name: str, channels: int) -> None:
        def uniform(least: float, most: float) -> Tensor:
            return torch.rand(channels, generator=self._random) * (most - least) + least

        self.weights |= {
            f"{name}.weight": uniform(0.5, 1.5),
            f"{name}.bias": uniform(-0.2, 0.2),
            f"{name}.running_mean": uniform(-0.3, 0.3),
            f"{name}.running_var": uniform(0.5, 1.5),
            f"{name}.num_batches_tracked": torch.tensor(1),
        }

    def block(self, name: str, near: int, wide: int) -> None:
        half = wide // 2
        for layer in (f"{name}.conv1", f"{name}.conv2"):
            for part, out, into in (("l2l", near, near), ("l2g", wide, near), ("g2l", near, wide)):
                self.conv(f"{layer}.ffc.conv{part}", (out, into, 3), gain=0.3)
            spectral = f"{layer}.ffc.convg2g"
            self.conv(f"{spectral}.conv1.0", (half, wide, 1))
            self.norm(f"{spectral}.conv1.1", half)
            self.conv(f"{spectral}.fu.conv_layer", (2 * half, 2 * half, 1))
            self.norm(f"{spectral}.fu.bn", 2 * half)
            self.conv(f"{spectral}.conv2", (wide, half, 1), gain=0.3)
            self.norm(f"{layer}.bn_l", near)
            self.norm(f"{layer}.bn_g", wide)


def lama_weights(*, width: int = 4, blocks: int = 1, levels: int = 3, ratio: float = 0.75, seed: int = 0) -> dict[str, Tensor]:
    """Tensors by name, `generator.model...`; `levels` is the number of downsamplings, `ratio` the share of global channels."""
    random = _Random(seed)
    random.conv(f"{PREFIX}1.ffc.convl2l", (width, 4, 7))
    random.norm(f"{PREFIX}1.bn_l", width)
    deepest = width << levels
    wide = int(deepest * ratio)
    for level in range(1, levels + 1):
        name, into, last = f"{PREFIX}{level + 1}", width << (level - 1), level == levels
        near = deepest - wide if last else width << level
        random.conv(f"{name}.ffc.convl2l", (near, into, 3))
        random.norm(f"{name}.bn_l", near)
        if last:
            random.conv(f"{name}.ffc.convl2g", (wide, into, 3))
            random.norm(f"{name}.bn_g", wide)
    for place in range(levels + 2, levels + 2 + blocks):
        random.block(f"{PREFIX}{place}", deepest - wide, wide)
    place = levels + blocks + 3  # skip the layer that joins the channels
    for level in range(levels, 0, -1):
        random.conv(f"{PREFIX}{place}", (width << (level - 1), width << level, 3), gain=2, up=True, bias=True)
        random.norm(f"{PREFIX}{place + 1}", width << (level - 1))
        place += 3
    random.conv(f"{PREFIX}{place + 1}", (3, width, 7), bias=True)
    return random.weights


def lama_file(path: Path, **size: Any) -> Path:
    """Write weights to `path`; nodes look for them in `{folder}/lama/lama.safetensors`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lama_weights(**size), path)
    return path


class Callback:
    """An object that a checkpoint stores besides the weights, such as a trainer's or one of Lightning's."""

    def __init__(self, best: Tensor) -> None:
        self.best, self.again = best, self


def lama_checkpoint(path: Path, **size: Any) -> Path:
    """A file like upstream's best.ckpt: the generator among other networks, optimizer state and a trainer's objects."""
    weights = lama_weights(**size)
    others = {"discriminator.model0.0.weight": torch.ones(3, 3), "loss_resnet_pl.impl.conv1.weight": torch.ones(2)}
    content = {
        "epoch": 39,
        "pytorch-lightning_version": "0.9.0",
        "callbacks": {Callback: {"best_model_score": torch.tensor(0.5), "it": Callback(torch.ones(2))}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}],
        "state_dict": OrderedDict(others | weights),
        "hyper_parameters": Callback(torch.ones(1)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


class _Trainer(nn.Module):
    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator


class _Wrapper(nn.Module):
    """Wraps a trainer as upstream's `bin/to_jit.py` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        predicted = self.model.generator(torch.cat([image * (1 - mask), mask], dim=1))
        return mask * predicted + (1 - mask) * image


def lama_script(path: Path, **size: Any) -> Path:
    """A TorchScript archive like big-lama.pt, written by torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wrapped = _Wrapper(_Trainer(Generator(lama_weights(**size))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch deprecates TorchScript
        example = (torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16))
        torch.jit.save(torch.jit.trace(wrapped, example, check_trace=False), path)
    return path
