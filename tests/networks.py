"""Tiny ONNX files as operators add them, and files that are no models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str]


def network(
    path: Path,
    *,
    source: tuple[str, int, Shape] = ("input", TensorProto.FLOAT, (1, 3, 32, 32)),
    outputs: Sequence[str] = ("output",),
    channels: int = 1,
    sigmoid: bool = True,
    weight: Any = 1.0,
    part: str = "weight",
    outside: str | None = None,
) -> Path:
    """A network with one layer: each pixel's brightness times `weight`, brought to 0..1 by a sigmoid.

    `part` is the name of the layer's weights, which lie in the file `outside` if it is given.
    """
    kernel = np.full((channels, source[2][1] if isinstance(source[2][1], int) else 3, 1, 1), weight, np.float32)
    nodes = [helper.make_node("Conv", [source[0], part], ["map"], name="/layer/Conv")]
    nodes += [helper.make_node("Sigmoid", ["map"], ["matte"])] if sigmoid else []
    nodes += [helper.make_node("Identity", ["matte" if sigmoid else "map"], [name]) for name in outputs]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(*source)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(kernel, part)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if outside is None:
        onnx.save_model(model, str(path))
    else:
        onnx.save_model(model, str(path), save_as_external_data=True, location=outside, size_threshold=0)
    return path


NO_MODELS: dict[str, bytes] = {
    "is empty": b"",
    "is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 176173887\n",
    "is a web page": b"\n<!DOCTYPE html>\n<html><title>404</title></html>",
    "is a text file": b"A model, perhaps, or a list of URLs.\n",
    "is a pickle": b"\x80\x02}q\x00X\x05\x00\x00\x00state",
    "is an image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "is an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "is a TensorFlow Lite file": b"\x1c\x00\x00\x00TFL3" + bytes(100),
    "is a tar archive: unpack it first": b"u2net.onnx".ljust(257, b"\x00") + b"ustar\x0000" + bytes(248),
    "is a GGUF file": b"GGUF\x03\x00\x00\x00",
    "is a compressed archive": b"\x1f\x8b\x08\x00\x00",
    "is a zip archive that is damaged": b"PK\x03\x04\x14\x00\x00\x00",
}
"""Files that are no models, by what is said about them."""
