"""Small ONNX models with the inputs and outputs of rembg's special ones: garments, and Segment Anything's two networks.

And one that finds what is bright, of few nodes, where the structure of a real network doesn't matter.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FRAME = (684, 1024)
COARSE = (171, 256)
"""Height and width at which the decoder's mask is made, a quarter of the frame."""


class Graph:
    """A graph under construction: each method adds a part and returns the name of its tensor."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, values: object, kind: type[np.generic] = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, kind), name))
        return name

    def node(self, kind: str, *sources: str, **attributes: object) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(sources), [name], **attributes))
        return name

    def resized(self, source: str, sizes: str) -> str:
        return self.node("Resize", source, "", "", sizes, mode="linear")

    def save(self, path: Path, inputs: dict[str, list[int | str]], outputs: dict[str, str]) -> None:
        """Write the graph; `outputs` maps names to tensors."""
        self.nodes += [helper.make_node("Identity", [tensor], [name]) for name, tensor in outputs.items()]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.constants,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def garments_onnx(path: Path, *, size: int = 768) -> None:
    """Four maps [1, 4, size, size], each strongest where the image has another colour."""
    graph = Graph()
    colours = [[1, 1, 1], [-2, 0, 1], [1, -2, 0], [0, 1, -2]]
    small = graph.node("AveragePool", "input", kernel_shape=[8, 8], strides=[8, 8])
    maps = graph.node("Conv", small, graph.constant(np.reshape(colours, (4, 3, 1, 1))), graph.constant([-1.5, 0, 0, 0]))
    result = graph.resized(maps, graph.constant([1, 4, size, size], np.int64))
    graph.save(path, {"input": ["batch", 3, size, size]}, {"output": result, "side": maps})


def bright_onnx(path: Path, *, size: int) -> Path:
    """Four convolutions: a matte [batch, 1, size, size] that is 1 where the image is bright, and a side output."""
    graph, random, tensor = Graph(), np.random.default_rng(0), "input"
    maps = [3, 24, 24, 24, 1]
    for before, after in pairwise(maps):
        weights: NDArray[np.float64] = random.uniform(0, 2 / (9 * before), (after, before, 3, 3))
        tensor = graph.node("Conv", tensor, graph.constant(weights), graph.constant([0.1] * after), pads=[1] * 4)
        tensor = graph.node("Relu" if after > 1 else "Sigmoid", tensor)
    side = graph.node("AveragePool", tensor, kernel_shape=[8, 8], strides=[8, 8])
    graph.save(path, {"input": ["batch", 3, size, size]}, {"matte": tensor, "side": side})
    return path


def sam_onnx(encoder: Path, decoder: Path) -> None:
    """Masks whose extent depends on the image's brightness and on the distance to each point and corner."""
    graph, random = Graph(), np.random.default_rng(0)
    turned = graph.node("Unsqueeze", graph.node("Transpose", "input_image", perm=[2, 0, 1]), graph.constant([0], np.int64))
    small = graph.resized(turned, graph.constant([1, 3, 64, 64], np.int64))
    weights: NDArray[np.float64] = random.normal(0.004, 0.002, (256, 3, 1, 1))
    graph.save(encoder, {"input_image": [*FRAME, 3]}, {"image_embeddings": graph.node("Conv", small, graph.constant(weights))})

    graph = Graph()
    near = _near(graph)
    brightness = graph.node("ReduceMean", "image_embeddings", axes=[1], keepdims=1)
    both = graph.node("Add", near, graph.resized(brightness, graph.constant([1, 1, *COARSE], np.int64)))
    earlier = graph.node("Mul", "has_mask_input", graph.node("ReduceMean", "mask_input", keepdims=0))
    coarse = graph.node("Add", graph.node("Sub", both, graph.constant(np.reshape([2.2, 2.3], (1, 2, 1, 1)))), earlier)
    size = graph.node("Cast", "orig_im_size", to=TensorProto.INT64)
    masks = graph.resized(coarse, graph.node("Concat", graph.constant([1, 2], np.int64), size, axis=0))
    inputs = {
        "image_embeddings": [1, 256, 64, 64],
        "point_coords": [1, "points", 2],
        "point_labels": [1, "points"],
        "mask_input": [1, 1, 256, 256],
        "has_mask_input": [1],
        "orig_im_size": [2],
    }
    quality = graph.node("ReduceMean", coarse, axes=[2, 3], keepdims=0)
    graph.save(decoder, inputs, {"masks": masks, "iou_predictions": quality, "low_res_masks": coarse})


def _near(graph: Graph) -> str:
    """[1, 1, height, width]: 2 at a point on the object, -2 at one beside it, 1 at corners, falling off around them."""
    strengths = graph.constant([0, -2, 2, 1, 1])
    places = graph.node("Cast", graph.node("Add", "point_labels", graph.constant([1])), to=TensorProto.INT64)
    strength = graph.node("Unsqueeze", graph.node("Gather", strengths, places), graph.constant([2, 3], np.int64))
    away = ""
    for axis, shape in ((0, (1, 1, 1, COARSE[1])), (1, (1, 1, COARSE[0], 1))):
        at = graph.node("Gather", "point_coords", graph.constant(axis, np.int64), axis=2)
        at = graph.node("Unsqueeze", at, graph.constant([2, 3], np.int64))
        grid = graph.constant(np.reshape(np.arange(max(shape)) * 4 + 2, shape))
        apart = graph.node("Div", graph.node("Sub", grid, at), graph.constant(150))
        square = graph.node("Mul", apart, apart)
        away = graph.node("Add", away, square) if away else square
    each = graph.node("Mul", strength, graph.node("Exp", graph.node("Neg", away)))
    return graph.node("ReduceSum", each, graph.constant([1], np.int64), keepdims=1)


def special_folder(folder: Path) -> Path:
    """Add small files of `u2net_cloth_seg` and `sam` to `folder`, where nodes look for them, unless they are there."""
    rembg = folder / "rembg"
    if not (rembg / "u2net_cloth_seg.onnx").is_file():
        garments_onnx(rembg / "u2net_cloth_seg.onnx")
    if not (rembg / "sam.decoder.onnx").is_file():
        sam_onnx(rembg / "sam.encoder.onnx", rembg / "sam.decoder.onnx")
    return folder
