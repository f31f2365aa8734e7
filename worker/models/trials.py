"""Tries out a changed copy of an ONNX model, and keeps it as a variant if its output stays the same.

Only the output that nodes read is compared, and only that one is left in a variant: exporters add intermediate maps, which
cost time and memory and may have axes that can't be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from imagemill.shared.errors import sentence
from imagemill.worker.models.checksums import digest
from imagemill.worker.models.files import Kind, record_variant, variant, variant_record
from imagemill.worker.models.own_process import TrialDied, apart
from imagemill.worker.models.workshop import workshop
from imagemill.worker.transfer.files import publish

Outcome = Literal["needless", "made", "refused", "killed"]
"""The original is fine as it is; a variant was made; none has the same output; the trial was killed."""

Make = Callable[[Path, Path, str | None], tuple[Outcome, str]]
"""Writes a changed copy of a model to the second path if needed; returns the outcome and its reason. A module-level
function, because it runs in another process. The last argument names the output that nodes read; None stands for the
first."""

ROUNDING = 1e-4
"""Difference that is always permitted, as a share of the largest value: for outputs that hardly vary."""
SIDE = 320
"""Length used for free input axes in a trial."""


def tried(original: Path, kind: Kind, make: Make, output: str | None = None) -> Outcome:
    """Make a variant next to a model if it is needed and possible, and record the outcome.

    A recorded outcome is not tried again. A trial may need more memory than there is, so it runs in its own process, which
    the kernel kills first; then nothing is recorded. Raises ModuleNotFoundError without onnx or onnxruntime.
    """
    import onnx  # noqa: F401  # fails here rather than in the other process
    import onnxruntime  # noqa: F401

    record, target = variant_record(original, kind), variant(original, kind)
    outcome: Outcome = record.get("outcome", "refused")
    known = outcome in get_args(Outcome) and record.get("original") == digest(original)
    if known and (outcome != "made" or target.is_file()):
        return outcome
    with workshop(target) as work:
        try:
            outcome, reason = apart(make, original, work / target.name, output)
        except TrialDied:
            return "killed"
        if outcome == "made":
            publish(work / target.name, target)
    record_variant(original, kind, accepted=outcome == "made", details={"outcome": outcome, "reason": reason})
    return outcome


def changed(
    original: Path,
    target: Path,
    output: str | None,
    change: Callable[[Any], bool | int],
    compare: Callable[[], str | None],
    *,
    needless: str,
    made: str,
) -> tuple[Outcome, str]:
    """Write a copy of a model, with only the output that nodes read, that `change` has changed; it returns whether it has.

    Returns the outcome and its reason: `needless`, `made`, or what `compare` has found to differ.
    """
    import onnx

    try:
        model = onnx.load(original)
        keep_output(model, output)
        if not change(model):
            return "needless", needless
        onnx.save(model, target)
        del model
        reason = compare()
    except Exception as error:  # noqa: BLE001  # onnx and onnxruntime raise anything on a graph that they can't handle
        reason = sentence(error)
    return ("made", made) if reason is None else ("refused", reason)


def difference(
    original: Path, changed: Path, *, tolerance: float, counts: Sequence[int] = (1,), output: str | None = None
) -> str | None:
    """Compare the outputs of a model and its changed copy for batches of this many images; None if they agree, else a
    sentence.

    `tolerance` is the largest permitted difference, as a share of the output's range.
    """
    import onnx

    inputs = inputs_of(onnx.load(original, load_external_data=False))
    shapes = {value.name: [dim.dim_value or SIDE for dim in value.type.tensor_type.shape.dim] for value in inputs}
    images = [{name: _picture(seed, shape) for name, shape in shapes.items()} for seed in range(1, max(counts) + 1)]
    singles = [_run(original, [image], output) for image in images]
    for count in counts:
        found, expected = _run(changed, images[:count], output), np.concatenate(singles[:count])
        words = "for one image" if count == 1 else f"for {count} images"
        if found.shape != expected.shape:
            return f"{words} the output has shape {found.shape}, not {expected.shape}"
        error, span = float(np.abs(found - expected).max()), float(expected.max() - expected.min())
        allowed = max(tolerance * span, ROUNDING * float(np.abs(expected).max()))
        if not error <= allowed:  # also true for NaN
            return f"{words} the output differs by {error:.2g}, more than {allowed:.2g}"
    return None


def inputs_of(model: Any) -> list[Any]:
    """A graph's inputs, without the weights that old exporters list among them."""
    weights = {weight.name for weight in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def keep_output(model: Any, output: str | None) -> None:
    """Remove all outputs of a graph except the one that nodes read, and everything that only led to the others."""
    graph = model.graph
    wanted = next((value for value in graph.output if value.name == output), graph.output[0])
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output}
    needed, kept, following = {wanted.name}, set(), [wanted.name]
    while following:
        place = makers.get(following.pop())
        if place is not None and place not in kept:
            kept.add(place)
            names = {name for node in _with_inner(graph.node[place]) for name in node.input}
            following += names - needed
            needed |= names
    for entries, unused in (
        (graph.output, [value for value in graph.output if value is not wanted]),
        (graph.node, [node for place, node in enumerate(graph.node) if place not in kept]),
        (graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in needed]),
    ):
        for entry in unused:
            entries.remove(entry)


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph, and those within its nodes, such as the branches of an If."""
    yield graph
    for node in graph.node:
        yield from _inner_graphs(node)


def _inner_graphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from graphs_of(inner)


def _with_inner(node: Any) -> Iterator[Any]:
    """A node, and all nodes of the graphs within it, which may use any tensor outside."""
    yield node
    for graph in _inner_graphs(node):
        yield from graph.node


def _run(model: Path, images: list[dict[str, NDArray[np.float32]]], output: str | None) -> NDArray[np.float32]:
    """The model's output for a batch. One session at a time: two would take twice the memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a graph that can't run is an expected outcome
    options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    kinds = {value.name: np.float16 if value.type == "tensor(float16)" else np.float32 for value in session.get_inputs()}
    batch = {name: np.concatenate([image[name] for image in images]).astype(kinds[name]) for name in images[0]}
    (found,) = session.run([output or session.get_outputs()[0].name], batch)
    return np.asarray(found, np.float32)


def _picture(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Smooth waves and noise, like a prepared photo: from pure noise a model's output is often flat, hiding differences."""
    random = np.random.default_rng(seed)
    picture = random.standard_normal(shape).astype(np.float32) * np.float32(0.1)
    waves = [np.sin(np.linspace(0, random.uniform(3, 12), length, dtype=np.float32)) for length in shape[2:]]
    for axis, wave in enumerate(waves, start=2):
        picture += wave.reshape([-1 if n == axis else 1 for n in range(len(shape))])
    return picture
