"""Small ONNX models with random weights in the architecture and format of rembg's model families.

The U-shaped network is U^2-Net (Qin et al., "U^2-Net: Going Deeper with Nested U-Structure for Salient Object
Detection", Pattern Recognition 106, 2020), with batch normalisation folded into the convolutions, as exporters do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
FULL_WIDTH = 64
FULL_PARAMETERS = 44.0
"""Millions of parameters of the published network."""

SHARES = (0.02, 0.03, 0.05, 0.2, 0.6, 1.0)
"""Weight of each side output in the fused map, from the finest to the coarsest."""

SPREAD = 25.0
"""Standard deviation of the fused map's logits; a fifth of it in models that output logits."""


class Net:
    """A graph under construction: each method adds nodes, and takes and returns names of tensors."""

    def __init__(self, width: int, seed: int, *, spread: float = SPREAD) -> None:
        self.width, self.spread, self.parameters = width, spread, 0
        self.channels: dict[str, int] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._fuse: tuple[list[str], str, str] = ([], "", "")
        self._random = np.random.default_rng(seed)

    def scaled(self, channels: int) -> int:
        """The published number of channels, narrowed to this network's width."""
        return max(1, channels * self.width // FULL_WIDTH)

    def node(self, kind: str, inputs: list[str], channels: int, **attributes: object) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        self.channels[name] = channels
        return name

    def constant(self, value: NDArray[np.generic]) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def conv(self, source: str, out: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1, gain: float = 1.0) -> str:
        """A convolution with He initialisation, so that signals neither vanish nor explode with depth."""
        fan_in = self.channels[source] * kernel * kernel
        weight = self._random.standard_normal((out, self.channels[source], kernel, kernel), np.float32)
        weight -= weight.mean((1, 2, 3), keepdims=True)  # a constant image must not dominate the output
        bias = 0.1 * self._random.standard_normal(out, np.float32)
        self.parameters += weight.size + bias.size
        weight *= np.float32(gain * np.sqrt(2.0 / fan_in))
        padding = dilation * (kernel // 2)
        return self.node(
            "Conv",
            [source, self.constant(weight), self.constant(bias)],
            out,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            dilations=[dilation, dilation],
            pads=[padding] * 4,
        )

    def block(self, source: str, out: int, *, dilation: int = 1, stride: int = 1) -> str:
        return self.node("Relu", [self.conv(source, out, dilation=dilation, stride=stride)], out)

    def pool(self, source: str) -> str:
        return self.node("MaxPool", [source], self.channels[source], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)

    def enlarge(self, source: str, factor: int) -> str:
        scales = self.constant(np.array([1, 1, factor, factor], np.float32))
        attributes = dict(mode="linear", coordinate_transformation_mode="half_pixel")
        return self.node("Resize", [source, "", scales], self.channels[source], **attributes)

    def join(self, *sources: str) -> str:
        return self.node("Concat", list(sources), sum(self.channels[source] for source in sources), axis=1)

    def add(self, first: str, second: str) -> str:
        return self.node("Add", [first, second], self.channels[first])

    def rsu(self, source: str, depth: int, mid: int, out: int) -> str:
        """The paper's residual U-block, RSU-L: a small U-Net of `depth` levels, added to its input layer."""
        mid, out = self.scaled(mid), self.scaled(out)
        inlet = self.block(source, out)
        levels = [self.block(inlet, mid)]
        for _ in range(depth - 2):
            levels.append(self.block(self.pool(levels[-1]), mid))
        now = self.block(levels[-1], mid, dilation=2)
        for level in reversed(levels[1:]):
            now = self.enlarge(self.block(self.join(now, level), mid), 2)
        return self.add(self.block(self.join(now, levels[0]), out), inlet)

    def rsu_4f(self, source: str, mid: int, out: int) -> str:
        """RSU-4F: dilated convolutions instead of pooling, for maps that are already small."""
        mid, out = self.scaled(mid), self.scaled(out)
        inlet = self.block(source, out)
        levels = [self.block(inlet, mid)]
        for dilation in (2, 4):
            levels.append(self.block(levels[-1], mid, dilation=dilation))
        now = self.block(levels[-1], mid, dilation=8)
        now = self.block(self.join(now, levels[2]), mid, dilation=4)
        now = self.block(self.join(now, levels[1]), mid, dilation=2)
        return self.add(self.block(self.join(now, levels[0]), out), inlet)

    def u2net(self, source: str) -> list[str]:
        """The nested U: logits of the fused map and of six side outputs, each with 1 channel and the size of `source`."""
        encoders = [(7, 32, 64), (6, 32, 128), (5, 64, 256), (4, 128, 512)]
        now, skips = source, []
        for depth, mid, out in encoders:
            skips.append(self.rsu(now, depth, mid, out))
            now = self.pool(skips[-1])
        skips.append(self.rsu_4f(now, 256, 512))
        now = self.rsu_4f(self.pool(skips[-1]), 256, 512)
        stages = [now]
        now = self.rsu_4f(self.join(self.enlarge(now, 2), skips[4]), 256, 512)
        stages.append(now)
        for (depth, mid, out), skip in zip([(4, 128, 256), (5, 64, 128), (6, 32, 64), (7, 16, 64)], skips[3::-1], strict=True):
            now = self.rsu(self.join(self.enlarge(now, 2), skip), depth, mid, out)
            stages.append(now)
        sides = []
        for level, stage in enumerate(reversed(stages)):
            side = self.conv(stage, 1, gain=0.5)
            sides.append(self.enlarge(side, 2**level) if level else side)
        fused = self.conv(self.join(*sides), 1, kernel=1)
        self._fuse = (sides, *self.nodes[-1].input[1:])
        return [fused, *sides]

    def save(self, path: Path, source: tuple[str, list[int | str]], results: dict[str, str], size: int) -> Path:
        """Write the graph with the input `source` (name, shape); `results` maps output names to 1-channel tensors."""
        self._settle(source, size)
        for result, tensor in results.items():
            self.nodes.append(helper.make_node("Identity", [tensor], [result]))
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(self._model(source, {result: [source[1][0], 1, size, size] for result in results}), path)
        return path

    def _model(self, source: tuple[str, list[int | str]], outputs: dict[str, list[int | str] | None]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(source[0], TensorProto.FLOAT, source[1])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)

    def _settle(self, source: tuple[str, list[int | str]], size: int) -> None:
        """Set the fusing layer so that the map looks trained: mostly near 0 or 1, in few large regions, a third of it inside.

        Only then does post-processing cost as much as for a real matte.
        """
        sides, weight, bias = self._fuse
        session = onnxruntime.InferenceSession(
            self._model(source, dict.fromkeys(sides)).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        maps = [output[0, 0] for output in session.run(None, {source[0]: _scene(size)})]
        gains = np.array([share / max(side.std(), 1e-6) for share, side in zip(SHARES, maps, strict=True)])
        mixed = np.tensordot(gains, np.stack(maps), 1)
        border = np.ones_like(mixed, dtype=bool)
        border[size // 16 : -size // 16, size // 16 : -size // 16] = False
        sign = 1 if mixed[border].mean() < mixed[~border].mean() else -1  # the border is background
        sharpness = sign * self.spread / mixed.std()
        threshold = np.quantile(mixed * sharpness, 0.67)
        for name, value in ((weight, (gains * sharpness).reshape(1, 6, 1, 1)), (bias, [-threshold])):
            index = next(index for index, tensor in enumerate(self.weights) if tensor.name == name)
            self.weights[index].CopyFrom(numpy_helper.from_array(np.asarray(value, np.float32), name))


def u2net_onnx(
    path: Path, *, width: int = 4, size: int = 320, dynamic: bool = True, seed: int = 0, spread: float = SPREAD
) -> Path:
    """U^2-Net: input [batch, 3, size, size] float32; seven outputs [batch, 1, size, size] in 0..1, the fused map first.

    `width` 64 is the published network; `size` is a multiple of 32. Without `dynamic` the batch axis is fixed at 1, though
    nothing in the graph depends on it. A larger `spread` gives sharper edges between subject and background.
    """
    assert size % 32 == 0, "the sixth level is 32 times smaller"
    net = Net(width, seed, spread=spread)
    net.channels["input.1"] = 3
    maps = [net.node("Sigmoid", [logits], 1) for logits in net.u2net("input.1")]
    assert width != FULL_WIDTH or round(net.parameters / 1e6, 1) == FULL_PARAMETERS, net.parameters
    results = {str(1959 + place): tensor for place, tensor in enumerate(maps)}  # the output names in rembg's file
    return net.save(path, ("input.1", ["batch" if dynamic else 1, 3, size, size]), results, size)


def isnet_onnx(path: Path, *, width: int = 2, size: int = 1024, dynamic: bool = True, seed: int = 0) -> Path:
    """IS-Net's structure: a layer with stride 2, then the nested U; one output [batch, 1, size, size] in 0..1."""
    net = Net(width, seed)
    net.channels["input"] = 3
    logits, *_ = net.u2net(net.block("input", net.scaled(64), stride=2))
    result = net.enlarge(net.node("Sigmoid", [logits], 1), 2)
    return net.save(path, ("input", ["batch" if dynamic else 1, 3, size, size]), {"output": result}, size)


def birefnet_like_onnx(path: Path, *, width: int = 2, size: int = 1024, seed: int = 0) -> Path:
    """BiRefNet's format: one output [1, 1, size, size] of logits. A Reshape node fixes the batch axis at 1."""
    net = Net(width, seed, spread=SPREAD / 5)
    net.channels["input_image"] = 3
    inside = net.block("input_image", net.scaled(64), stride=2)
    windows = net.node("Reshape", [inside, net.constant(np.array([1, net.channels[inside], -1]))], net.channels[inside])
    shape = net.constant(np.array([1, net.channels[inside], size // 2, size // 2]))
    logits, *_ = net.u2net(net.node("Reshape", [windows, shape], net.channels[inside]))
    return net.save(path, ("input_image", [1, 3, size, size]), {"output_image": net.enlarge(logits, 2)}, size)


def in_half_precision(source: Path, target: Path, *, keep_io: bool = True) -> Path:
    """Write a model with weights and calculations in fp16 to `target`; with `keep_io`, input and output stay in fp32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16  # takes half a second

    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep_io), target)
    return target


def _scene(size: int) -> NDArray[np.float32]:
    """A dark subject on a bright background with some texture, normalised: [1, 3, size, size] float32."""
    down, across = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    inside = (across * across + (down * 0.8) ** 2 < 0.3) * 1.0
    texture = np.random.default_rng(1).standard_normal((3, size, size))
    tints = np.array([-2.0, -1.4, -1.0])[:, None, None]
    return (1.2 + 0.5 * down + inside * tints + 0.1 * texture)[None].astype(np.float32)


def _builder(model: str) -> Callable[[Path], Path]:
    if model.startswith("birefnet"):
        return birefnet_like_onnx
    return isnet_onnx if model.startswith("isnet") else u2net_onnx


def weights_folder(folder: Path, *models: str) -> Path:
    """Add a small file for each of rembg's `models` that `folder` lacks, where nodes look for them; return `folder`.

    Meant for a folder that all tests of a run share, such as `tmp_path_factory.getbasetemp() / "weights"`.
    """
    for model in models:
        path = folder / "rembg" / f"{model}.onnx"
        if not path.is_file():
            _builder(model)(path)
    return folder
