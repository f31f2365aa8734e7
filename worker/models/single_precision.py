"""Converts a model in half precision (fp16) to single precision, for CPUs, provided that its output stays the same.

CPUs calculate in single precision: onnxruntime would convert every tensor before and after each step. GPUs run the file as
it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from imagemill.worker.models.trials import Outcome, changed, difference, graphs_of

TOLERANCE = 1e-2
"""Largest permitted difference, as a share of an output's range: half precision adds up to 7e-4 in ISNet's real weights."""


def make(original: Path, target: Path, output: str | None = None) -> tuple[Outcome, str]:
    """Write the model in single precision to `target` if needed; return the outcome and its reason."""
    return changed(
        original,
        target,
        output,
        _widen,
        lambda: difference(original, target, tolerance=TOLERANCE, output=output),
        needless="the model is in single precision",
        made=f"same output within {TOLERANCE:g} of its range",
    )


def _widen(model: Any) -> int:
    """Turn everything that is in half precision into single precision, in place; return how much that was."""
    from onnx import TensorProto

    half, single, changed = TensorProto.FLOAT16, TensorProto.FLOAT, 0
    for graph in graphs_of(model.graph):
        tensors = [*graph.initializer]
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            tensors += [attribute.t, *attribute.tensors]
            if attribute.name in ("to", "dtype") and attribute.i == half:  # the type that a Cast or the like returns
                attribute.i = single
                changed += 1
        for tensor in (tensor for tensor in tensors if tensor.data_type == half):
            _widen_tensor(tensor)
            changed += 1
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == half:
                value.type.tensor_type.elem_type = single
                changed += 1
        del graph.value_info[:]  # they have the old types
    return changed


def _widen_tensor(tensor: Any) -> None:
    from onnx import numpy_helper

    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
