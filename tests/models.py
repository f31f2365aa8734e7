"""Models of rembg's families with random weights, as ONNX files: the real ones' architecture and format, quick to build.

The U-shaped network is U^2-Net (Qin et al., "U^2-Net: Going Deeper with Nested U-Structure for Salient Object
Detection", Pattern Recognition 106, 2020), batch normalisation folded into the convolutions as exporters do it.
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
"""Millions of parameters that the published network has."""

SHARES = (0.02, 0.03, 0.05, 0.2, 0.6, 1.0)
"""How much each side counts in the fused map, from the finest to the coarsest."""

SPREAD = 25.0
"""Standard deviation of the fused map's logits; a fifth of it where they leave the network as they are."""


class Net:
    """A graph that grows call by call; each method takes and gives names of tensors."""

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
        """A convolution with He's initialisation, so that signals neither die nor grow with depth."""
        fan_in = self.channels[source] * kernel * kernel
        weight = self._random.standard_normal((out, self.channels[source], kernel, kernel), np.float32)
        weight -= weight.mean((1, 2, 3), keepdims=True)  # what is the same all over an image must not drown the rest
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
        how = dict(mode="linear", coordinate_transformation_mode="half_pixel")
        return self.node("Resize", [source, "", scales], self.channels[source], **how)

    def join(self, *sources: str) -> str:
        return self.node("Concat", list(sources), sum(self.channels[source] for source in sources), axis=1)

    def add(self, one: str, other: str) -> str:
        return self.node("Add", [one, other], self.channels[one])

    def rsu(self, source: str, depth: int, mid: int, out: int) -> str:
        """A residual U-block, RSU-L of the paper: a small U-Net of `depth` levels, added to its own input layer."""
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
        """RSU-4F: dilated convolutions in place of pooling, for where the map is small already."""
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
        """The nested U: logits of the fused map and of its six sides, each 1 channel at the size of `source`."""
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
        """Write the graph with its input `source` (name, shape); `results` is output name to tensor, 1 channel each."""
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
        """Fuse the sides so that the map looks like a trained one: nearly all of it sure, in few large regions, a third inside.

        What comes after the network costs what it would on a real matte only then.
        """
        sides, weight, bias = self._fuse
        session = onnxruntime.InferenceSession(
            self._model(source, dict.fromkeys(sides)).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        maps = [found[0, 0] for found in session.run(None, {source[0]: _scene(size)})]
        gains = np.array([share / max(found.std(), 1e-6) for share, found in zip(SHARES, maps, strict=True)])
        mixed = np.tensordot(gains, np.stack(maps), 1)
        rim = np.ones_like(mixed, dtype=bool)
        rim[size // 16 : -size // 16, size // 16 : -size // 16] = False
        sharpness = (
            self.spread / mixed.std() * (1 if mixed[rim].mean() < mixed[~rim].mean() else -1)
        )  # the outside is at the border
        threshold = np.quantile(mixed * sharpness, 0.67)
        for name, value in ((weight, (gains * sharpness).reshape(1, 6, 1, 1)), (bias, [-threshold])):
            place = next(place for place, tensor in enumerate(self.weights) if tensor.name == name)
            self.weights[place].CopyFrom(numpy_helper.from_array(np.asarray(value, np.float32), name))


def u2net_onnx(
    path: Path, *, width: int = 4, size: int = 320, dynamic: bool = True, seed: int = 0, spread: float = SPREAD
) -> Path:
    """U^2-Net: input [batch, 3, size, size] float32; seven outputs [batch, 1, size, size] in 0..1, the fused map first.

    `width` 64 is the published network; `size` is a multiple of 32. Without `dynamic` the batch axis is 1, but
    nothing in the graph depends on that. The larger `spread`, the narrower the rims between subject and ground.
    """
    assert size % 32 == 0, "the sixth level halves five times"
    net = Net(width, seed, spread=spread)
    net.channels["input.1"] = 3
    maps = [net.node("Sigmoid", [logits], 1) for logits in net.u2net("input.1")]
    assert width != FULL_WIDTH or round(net.parameters / 1e6, 1) == FULL_PARAMETERS, net.parameters
    results = {str(1959 + place): tensor for place, tensor in enumerate(maps)}  # so they are called in rembg's file
    return net.save(path, ("input.1", ["batch" if dynamic else 1, 3, size, size]), results, size)


def isnet_onnx(path: Path, *, width: int = 2, size: int = 1024, dynamic: bool = True, seed: int = 0) -> Path:
    """IS-Net's shape: a halving layer, then the nested U; one output [batch, 1, size, size] in 0..1."""
    net = Net(width, seed)
    net.channels["input"] = 3
    logits, *_ = net.u2net(net.block("input", net.scaled(64), stride=2))
    result = net.enlarge(net.node("Sigmoid", [logits], 1), 2)
    return net.save(path, ("input", ["batch" if dynamic else 1, 3, size, size]), {"output": result}, size)


def birefnet_like_onnx(path: Path, *, width: int = 2, size: int = 1024, seed: int = 0) -> Path:
    """BiRefNet's format: one output [1, 1, size, size] of logits. A reshape inside holds the batch axis to 1."""
    net = Net(width, seed, spread=SPREAD / 5)
    net.channels["input_image"] = 3
    inside = net.block("input_image", net.scaled(64), stride=2)
    windows = net.node("Reshape", [inside, net.constant(np.array([1, net.channels[inside], -1]))], net.channels[inside])
    shape = net.constant(np.array([1, net.channels[inside], size // 2, size // 2]))
    logits, *_ = net.u2net(net.node("Reshape", [windows, shape], net.channels[inside]))
    return net.save(path, ("input_image", [1, 3, size, size]), {"output_image": net.enlarge(logits, 2)}, size)


def _scene(size: int) -> NDArray[np.float32]:
    """[1, 3, size, size], normalised: a dark subject before a bright ground, with some texture."""
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
    """`folder`, with a small file for each of rembg's `models` where nodes look for them; what is there already stays.

    Meant for a folder that lives as long as the tests, such as `tmp_path_factory.getbasetemp() / "weights"`.
    """
    for model in models:
        path = folder / "rembg" / f"{model}.onnx"
        if not path.is_file():
            _builder(model)(path)
    return folder
