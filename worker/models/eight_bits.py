"""Makes 8-bit copies of an ONNX model with onnxruntime's quantiser: with calibrated ranges, or with ranges found in each run.

Static copies use QDQ, as onnxruntime's documentation recommends for CPUs: uint8 activations and int8 weights per channel;
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

Its own calibration holds all intermediate maps of all images in memory, which is gigabytes per image. Here, each map is
sampled on a grid, and every way of choosing ranges is computed in the same pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagemill.worker.models.trials import graphs_of, inputs_of, keep_output

Ranges = dict[str, tuple[float, float]]
"""The lowest and highest value of each tensor, by name; what lies outside is clipped."""

CLIPPED = {"percentile 99.9": 1e-3, "percentile 99.99": 1e-4, "min-max": 0.0}
"""Ways of choosing ranges, the best on ISNet's real weights first: the share of an image's values that may lie outside, at
each end."""
SAMPLES = 1024
"""About how many places of each map are sampled."""
WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Kinds of nodes that take nearly all the time, and gain from 8 bits."""
OF_8_BITS = re.compile("[Qq]uantize|QLinear|Integer|NBits")
"""What kinds of nodes are called that calculate with few bits, or change to or from them."""


def is_quantised(model: Any) -> bool:
    """Whether a model calculates with 8 bits already, or with fewer."""
    return any(OF_8_BITS.search(node.op_type) for graph in graphs_of(model.graph) for node in graph.node)


def prepare(source: Path, target: Path, output: str | None, side: int) -> None:
    """Optimise a model, infer its shapes, and give every node a name; only `output`, else the first, is kept.

    Its input gets this `side` in pixels if its sides are free, so that the shapes of all maps are known.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load(source)
    for value in inputs_of(model):
        for length in value.type.tensor_type.shape.dim[2:]:
            length.dim_value = length.dim_value or side
    keep_output(model, output)
    onnx.save(model, target)
    quant_pre_process(target, target, skip_symbolic_shape=True)  # only transformers with free lengths need symbolic shapes
    model = onnx.load(target)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    onnx.save(model, target)


def measured(prepared: Path, images: Iterable[NDArray[np.float32]], folder: Path) -> dict[str, Ranges]:
    """The ranges of all tensors for each way of `CLIPPED`, over some images [1, 3, size, size]: the widest of any image.

    Needs `folder` for a temporary file.
    """
    augmented = folder / "augmented.onnx"
    names = _sampling(prepared, augmented)
    session = opened(augmented)
    lows: dict[str, dict[str, list[float]]] = {way: {name: [] for name in names} for way in CLIPPED}
    highs: dict[str, dict[str, list[float]]] = {way: {name: [] for name in names} for way in CLIPPED}
    for image in images:
        for name, values in zip(names, session.run(None, {session.get_inputs()[0].name: image}), strict=True):
            ends = np.quantile(values, [*CLIPPED.values(), *(1 - share for share in CLIPPED.values())])
            for way, low, high in zip(CLIPPED, ends, ends[len(CLIPPED) :], strict=False):
                lows[way][name].append(float(low))
                highs[way][name].append(float(high))
    augmented.unlink()
    return {way: {name: (min(lows[way][name]), max(highs[way][name])) for name in names} for way in CLIPPED}


def _sampling(prepared: Path, target: Path) -> list[str]:
    """Write a model that returns samples of all tensors of `prepared`; return the tensors' names in that order."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(prepared)
    graph, names = model.graph, []
    values = [*graph.input, *graph.value_info, *graph.output]
    weights = {tensor.name for tensor in graph.initializer}
    del graph.output[:]
    for value in values:
        kind = value.type.tensor_type
        if kind.elem_type != TensorProto.FLOAT or value.name in weights or value.name in names:
            continue
        sample, sides = f"sample of {value.name}", [dim.dim_value for dim in kind.shape.dim[2:]]
        step = max(1, int(math.sqrt(math.prod(sides) / SAMPLES))) if len(sides) == 2 else 1
        constants = [("start", [0] * 2), ("end", [2**31] * 2), ("axes", [2, 3]), ("step", [step] * 2)]
        inputs = [value.name]
        for part, numbers in constants if step > 1 else ():
            graph.initializer.append(numpy_helper.from_array(np.array(numbers), f"{part} of {sample}"))
            inputs.append(f"{part} of {sample}")
        graph.node.append(helper.make_node("Slice" if step > 1 else "Identity", inputs, [sample]))
        graph.output.append(helper.make_tensor_value_info(sample, TensorProto.FLOAT, None))
        names.append(value.name)
    onnx.save(model, target)
    return names


def make_static(prepared: Path, target: Path, ranges: Ranges, *, bits: int = 8, floating: Sequence[str] = ()) -> None:
    """Write an 8-bit copy with fixed ranges; `bits` are the weights', and nodes in `floating` stay as they are."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

    known = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    cache = target.with_suffix(".ranges.json")
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, known), cache)
    quantize_static(
        prepared,
        target,
        None,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=bits < 8,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(floating),
        calibrate_method=CalibrationMethod.MinMax,
        calibration_cache_path=cache,
    )
    cache.unlink()


def make_dynamic(prepared: Path, target: Path) -> None:
    """Write a copy with 8-bit weights that finds the ranges of its activations in each run."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # CPUs have no ConvInteger for signed weights.
    quantize_dynamic(prepared, target, weight_type=QuantType.QUInt8, op_types_to_quantize=list(WEIGHTED))


def blocks(prepared: Path, count: int) -> list[list[str]]:
    """The names of all nodes in `count` stretches, each with about as many nodes that have weights."""
    import onnx

    nodes = onnx.load(prepared, load_external_data=False).graph.node
    weighted = [place for place, node in enumerate(nodes) if node.op_type in WEIGHTED]
    count = max(1, min(count, len(weighted)))
    starts = [0, *(weighted[number * len(weighted) // count] for number in range(1, count)), len(nodes)]
    return [[node.name for node in nodes[start:end]] for start, end in pairwise(starts)]


def opened(path: Path) -> Any:
    """A session on the CPU, with all cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
