"""Sets a model's batch axis free where it is fixed at 1, if the model then still gives the same.

Exporters write the batch size that they were shown into the graph: as its input's first dimension, and as
constants of its Reshape nodes. Both are rewritten, and the result is tried: only a graph that gives for
one image what the original gives, and for two images what it gives for each of them, is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import sentence
from imagemill.worker.models.checksums import digest
from imagemill.worker.models.files import made_of, put_on_record, variant

Outcome = Literal["free", "made", "refused", "killed"]
"""The original's axis is free; a file with a free one was made; none could be made that gives the same; the trial was ended."""

TOLERANCE = 1e-3
"""How far an output may be off, as a share of its span from smallest to largest: a quarter of one of 255 greys."""
ROUNDING = 1e-4
"""And as a share of its largest value, for outputs that hardly vary."""

BATCH = "batch"
SIDE = 320
"""Length of the input's axes whose length is free."""


def free(original: Path) -> Outcome:
    """Make `{name}.dynamic.onnx` beside a model where that is needed and possible, and put on record what came of it.

    What is on record is not tried again. The trial takes the memory of two images, so it runs in a process of its own
    that the kernel ends first; then nothing is put on record. Raises ModuleNotFoundError where onnx or onnxruntime is
    not installed.
    """
    import onnx  # noqa: F401  # said here rather than in the other process
    import onnxruntime  # noqa: F401

    made = made_of(original, "dynamic")
    if made.get("original") == digest(original) and (made.get("outcome") != "made" or variant(original, "dynamic").is_file()):
        outcome: Outcome = made["outcome"]
        return outcome
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_me_first) as pool:
        try:
            outcome, told = pool.submit(make, original, variant(original, "dynamic")).result()
        except BrokenProcessPool:
            _part(variant(original, "dynamic")).unlink(missing_ok=True)
            return "killed"
    put_on_record(original, "dynamic", accepted=outcome == "made", told={"outcome": outcome, "told": told})
    return outcome


def make(original: Path, target: Path) -> tuple[Outcome, str]:
    """Write the model with a free batch axis to `target`, if it is fixed and this can be done; and a sentence about it."""
    import onnx

    part = _part(target)
    try:
        model = onnx.load(original)
        if not any(_length(value, 0) == 1 for value in _inputs(model)):
            return "free", "the batch axis is free"
        _rewrite(model)
        onnx.save(model, part)
        del model
        off = difference(original, part)
        if off is not None:
            return "refused", off
        part.replace(target)
    except Exception as error:  # noqa: BLE001  # whatever onnx and onnxruntime raise on a graph that they can't work with
        return "refused", sentence(error)
    finally:
        part.unlink(missing_ok=True)
    return "made", f"the same within {TOLERANCE:g} of each output's span, for one image and for two"


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def difference(original: Path, changed: Path) -> str | None:
    """In what a model with a free batch axis differs from its original beyond the tolerance; None where in nothing."""
    images = [{name: _picture(seed, shape) for name, shape in _shapes(original)} for seed in (1, 2)]
    wanted = [_run(original, [image]) for image in images]
    cases = [("one image", [images[0]], [wanted[0]]), ("two images", images, wanted)]
    for what, batch, singles in cases:
        for place, found in enumerate(_run(changed, batch)):
            expected = np.concatenate([single[place] for single in singles])
            if found.shape != expected.shape:
                return f"for {what} output {place} is {found.shape}, not {expected.shape}"
            off, allowed = float(np.abs(found - expected).max()), _allowed(expected)
            if not off <= allowed:  # true of NaN, too
                return f"for {what} output {place} is off by {off:.2g}, and {allowed:.2g} is allowed"
    return None


def _allowed(expected: NDArray[np.float32]) -> float:
    span = float(expected.max() - expected.min())
    return max(TOLERANCE * span, ROUNDING * float(np.abs(expected).max()))


def _run(model: Path, images: list[dict[str, NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
    """The model's outputs for a batch. A session per call: two at once would take twice the memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a graph that can't run is an answer, not a mishap
    options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(
        None, {name: np.concatenate([i[name] for i in images]) for name in images[0]}
    )
    return outputs


def _picture(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Smooth blobs, as a prepared photo has them; on noise alone a model's output is often flat, which shows no difference."""
    random = np.random.default_rng(seed)
    picture = random.standard_normal(shape).astype(np.float32) * np.float32(0.1)
    waves = [np.sin(np.linspace(0, random.uniform(3, 12), length, dtype=np.float32)) for length in shape[2:]]
    for axis, wave in enumerate(waves, start=2):
        picture += wave.reshape([-1 if n == axis else 1 for n in range(len(shape))])
    return picture


def _shapes(model: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    import onnx

    for value in _inputs(onnx.load(model, load_external_data=False)):
        yield value.name, tuple(_length(value, axis) or SIDE for axis in range(len(value.type.tensor_type.shape.dim)))


def _inputs(model: Any) -> list[Any]:
    """A graph's inputs without its weights, which old exporters list there too."""
    weights = {weight.name for weight in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _length(value: Any, axis: int) -> int:
    """Of an input's axis; 0 where it is free."""
    return int(value.type.tensor_type.shape.dim[axis].dim_value)


def _rewrite(model: Any) -> None:
    """In place: the first axis of inputs and outputs is free, and Reshape nodes take it from what they are given."""
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
        # The batch is the slowest axis, alone or as a factor of the first one: what is over goes there.
        # Where no batch goes through (a table of positions), nothing is over, and the shape stays what it was.
        if len(shape) and shape[0] > 0 and -1 not in shape[1:]:
            shape[0] = -1
            name = f"{BATCH}_free_shape_{number}"  # of its own: others may share the constant
            model.graph.initializer.append(numpy_helper.from_array(shape, name))
            node.input[1] = name
    for value in [*_inputs(model), *model.graph.output]:
        if len(value.type.tensor_type.shape.dim):
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
    del model.graph.value_info[:]  # of the old sizes


def _end_me_first() -> None:
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.nice(5)
