"""Frees a model's batch axis if it is fixed at 1, provided that the model's output stays the same.

Exporters write the batch size of their example into the graph: as the first dimension of its inputs, and as constants of
its Reshape nodes. Both are rewritten. The new graph is kept only if it returns the original's output for one image, and for
two images what the original returns for each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import sentence
from imagemill.worker.models.checksums import digest
from imagemill.worker.models.files import record_variant, variant, variant_record

Outcome = Literal["free", "made", "refused", "killed"]
"""The original's axis is free; a variant with a free axis was made; none has the same output; the trial was killed."""

TOLERANCE = 1e-3
"""Largest permitted difference, as a share of an output's range: a quarter of one of 255 grey levels."""
ROUNDING = 1e-4
"""The same as a share of the largest value, for outputs that hardly vary."""

BATCH = "batch"
SIDE = 320
"""Length used for free input axes in the trial."""


def free(original: Path) -> Outcome:
    """Make `{name}.dynamic.onnx` next to a model if it is needed and possible, and record the outcome.

    A recorded outcome is not tried again. The trial needs memory for two images, so it runs in its own process, which the
    kernel kills first if memory runs out; then nothing is recorded. Raises ModuleNotFoundError without onnx or onnxruntime.
    """
    import onnx  # noqa: F401  # fails here rather than in the other process
    import onnxruntime  # noqa: F401

    record, target = variant_record(original, "dynamic"), variant(original, "dynamic")
    outcome: Outcome = record.get("outcome", "refused")
    if record.get("original") == digest(original) and (outcome != "made" or target.is_file()):
        return outcome
    with (
        TemporaryDirectory(prefix=".", dir=original.parent) as work,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prefer_as_oom_victim) as pool,
    ):
        try:
            outcome, reason = pool.submit(make, original, Path(work) / target.name).result()
        except BrokenProcessPool:
            return "killed"
        if outcome == "made":
            (Path(work) / target.name).replace(target)
    record_variant(original, "dynamic", accepted=outcome == "made", details={"outcome": outcome, "reason": reason})
    return outcome


def make(original: Path, target: Path) -> tuple[Outcome, str]:
    """Write the model with a free batch axis to `target` if needed; return the outcome and its reason."""
    import onnx

    try:
        model = onnx.load(original)
        if all(value.type.tensor_type.shape.dim[0].dim_value != 1 for value in _inputs(model)):
            return "free", "the batch axis is free"
        _rewrite(model)
        onnx.save(model, target)
        del model
        reason = difference(original, target)
    except Exception as error:  # noqa: BLE001  # onnx and onnxruntime raise anything on a graph that they can't handle
        reason = sentence(error)
    if reason is not None:
        return "refused", reason
    return "made", f"same output within {TOLERANCE:g} of its range, for one image and for two"


def difference(original: Path, changed: Path) -> str | None:
    """Compare a model with a free batch axis to its original; None if the outputs agree, else a sentence."""
    import onnx

    inputs = _inputs(onnx.load(original, load_external_data=False))
    shapes = {value.name: [dim.dim_value or SIDE for dim in value.type.tensor_type.shape.dim] for value in inputs}
    images = [{name: _picture(seed, shape) for name, shape in shapes.items()} for seed in (1, 2)]
    wanted = [_run(original, [image]) for image in images]
    for count, batch, singles in (("one image", images[:1], wanted[:1]), ("two images", images, wanted)):
        for number, output in enumerate(_run(changed, batch)):
            expected = np.concatenate([single[number] for single in singles])
            if output.shape != expected.shape:
                return f"for {count} output {number} has shape {output.shape}, not {expected.shape}"
            error, span = float(np.abs(output - expected).max()), float(expected.max() - expected.min())
            allowed = max(TOLERANCE * span, ROUNDING * float(np.abs(expected).max()))
            if not error <= allowed:  # also true for NaN
                return f"for {count} output {number} differs by {error:.2g}, more than {allowed:.2g}"
    return None


def _run(model: Path, images: list[dict[str, NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
    """The model's outputs for a batch. One session at a time: two would take twice the memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a graph that can't run is an expected outcome
    options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(
        None, {name: np.concatenate([i[name] for i in images]) for name in images[0]}
    )
    return outputs


def _picture(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Smooth waves and noise, like a prepared photo: from pure noise a model's output is often flat, hiding differences."""
    random = np.random.default_rng(seed)
    picture = random.standard_normal(shape).astype(np.float32) * np.float32(0.1)
    waves = [np.sin(np.linspace(0, random.uniform(3, 12), length, dtype=np.float32)) for length in shape[2:]]
    for axis, wave in enumerate(waves, start=2):
        picture += wave.reshape([-1 if n == axis else 1 for n in range(len(shape))])
    return picture


def _inputs(model: Any) -> list[Any]:
    """A graph's inputs, without the weights that old exporters list among them."""
    weights = {weight.name for weight in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


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
    for value in [*_inputs(model), *model.graph.output]:
        if len(value.type.tensor_type.shape.dim):
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del model.graph.value_info[:]  # they have the old sizes


def _prefer_as_oom_victim() -> None:
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.nice(5)
