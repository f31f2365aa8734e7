"""Frees a model's batch axis if it is fixed at 1, provided that the model's output stays the same.

Exporters write the batch size of their example into the graph: as the first dimension of its inputs, and as constants of
its Reshape nodes. Both are rewritten. The new graph is kept only if it returns the original's output for one image, and for
two images what the original returns for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from imagemill.worker.models.trials import Outcome, changed, difference, inputs_of

TOLERANCE = 1e-3
"""Largest permitted difference, as a share of an output's range: a quarter of one of 255 grey levels."""

BATCH = "batch"


def make(original: Path, target: Path, output: str | None = None) -> tuple[Outcome, str]:
    """Write the model with a free batch axis to `target` if needed; return the outcome and its reason."""
    return changed(
        original,
        target,
        output,
        _free,
        lambda: difference(original, target, tolerance=TOLERANCE, counts=(1, 2), output=output),
        needless="the batch axis is free",
        made=f"same output within {TOLERANCE:g} of its range, for one image and for two",
    )


def _free(model: Any) -> bool:
    """Free the batch axis in place, unless it is free."""
    if all(value.type.tensor_type.shape.dim[0].dim_value != 1 for value in inputs_of(model)):
        return False
    _rewrite(model)
    return True


def _rewrite(model: Any) -> None:
    """Free the first axis of inputs and outputs in place, and let Reshape nodes infer it from their input."""
    import onnx
    from onnx import numpy_helper

    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = {value.name: value.type.tensor_type.shape for value in inferred.graph.value_info}
    del inferred
    constants = {weight.name: weight for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for number, node in enumerate(model.graph.node):
        if node.op_type != "Reshape" or node.input[1] not in constants:
            continue
        shape = numpy_helper.to_array(constants[node.input[1]]).astype(np.int64).ravel()
        known = shapes.get(node.output[0])
        lengths = [dim.dim_value for dim in known.dim] if known is not None else []
        for axis, length in enumerate(shape[1:], start=1):
            if length == -1 and axis < len(lengths) and lengths[axis]:
                shape[axis] = lengths[axis]
        # The batch is the slowest axis, alone or as a factor of the first, so the first length is the one to infer.
        # Without a batch in the input, such as for a table of positions, the inferred length is the old one.
        if len(shape) and shape[0] > 0 and -1 not in shape[1:]:
            shape[0] = -1
            name = f"{BATCH}_free_shape_{number}"  # a new constant: other nodes may share the old one
            model.graph.initializer.append(numpy_helper.from_array(shape, name))
            node.input[1] = name
    for value in [*inputs_of(model), *model.graph.output]:
        if len(value.type.tensor_type.shape.dim):
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del model.graph.value_info[:]  # they have the old sizes
