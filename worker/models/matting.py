"""Looks at an ONNX file that the operator adds: whether it finds subjects in pictures, and how it wants them prepared.

What the operator doesn't say is read from the graph: the names of its parts, the sizes of its input and outputs, and whether
it ends in a sigmoid. Then it runs on a synthetic photo.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from imagemill.shared.errors import ConfigurationError, sentence
from imagemill.worker.imaging.picture import Pixels
from imagemill.worker.models.added import Added
from imagemill.worker.models.adding import Made, copied
from imagemill.worker.models.external_data import gather
from imagemill.worker.models.own_process import apart
from imagemill.worker.operations.remove_background.model_families import FAMILIES, FLAT, Family

_HALF = (0.5, 0.5, 0.5)

KINDS: dict[str, Family] = {
    "u2net": FAMILIES["u2net"],
    "isnet": FAMILIES["isnet-general-use"],
    "birefnet": FAMILIES["birefnet-general"],
    "modnet": Family(512, _HALF, _HALF),
    "ben": Family(1024, _HALF, (1.0, 1.0, 1.0)),
}
"""How each family of networks was trained, by the name that `imagemill models add --family` takes."""

CUSTOM = "custom"
"""The family of a network about which the operator has said everything."""

PARTS: dict[str, tuple[str, ...]] = {
    "modnet": ("lr_branch", "hr_branch"),
    "ben": ("multifieldcrossatt", "insmask_head"),
    "birefnet": ("squeeze_module", "input_image"),
    "isnet": ("conv_in", "rebnconv"),
    "u2net": ("rebnconv",),
}
"""Names of parts by which a graph shows its family, unless the exporter has dropped them; the first family that fits is it.

All of them must be found, but for birefnet, whose second is the name of the input in rembg's files, where one will do.
"""

MATTES = {7: "u2net", 6: "isnet"}
"""The family by the number of mattes that a network returns: U2-Net's and IS-Net's side outputs are exported with the last."""

SIZES = {320: "u2net", 1024: "isnet"}
"""The family by the input's side in pixels, of a network with one output that ends in a sigmoid."""

LARGEST_SIDE = 4096
"""Maximum side of a network's input, in pixels."""
PROBABLE = 0.05
"""How far below 0 a matte may reach without being taken for logits, as a share of its maximum; resizing overshoots."""
ALIKE = 1e-2
"""By how much a matte may differ in a batch, as a share of its range."""
PASSING = frozenset({"Identity", "Cast", "Resize", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Slice", "Clip", "Upsample"})
"""Nodes that change a matte's form, but not what its values mean."""
BOUNDED = {"Sigmoid": "a sigmoid", "HardSigmoid": "a sigmoid", "Tanh": "a tanh"}
"""Nodes after which no sigmoid is needed: mattes are stretched to 0 to 1, wherever they begin and end."""


@dataclass(frozen=True)
class Said:
    """What the operator has said about a network; None where nothing. `output` is an output's name or its place, from 0."""

    family: str | None = None
    size: int | None = None
    mean: tuple[float, float, float] | None = None
    deviation: tuple[float, float, float] | None = None
    output: str | None = None
    logits: bool | None = None

    def agrees(self, record: Added) -> bool:
        """Whether a model that was added is used as the operator says now."""
        has = TypeAdapter(Family).validate_python(record.parameters)
        wanted = {"size": self.size, "mean": self.mean, "deviation": self.deviation, "logits": self.logits}
        return (
            self.family in (None, record.family)
            and self.output in (None, has.output)
            and all(value is None or getattr(has, name) == value for name, value in wanted.items())
        )


@dataclass(frozen=True)
class Seen:
    """A graph's input and outputs; a length of 0 is free. `parts` are the names of its nodes, weights and input.

    `bounded` are the outputs that end in one of `BOUNDED`, with its name.
    """

    input: str
    shape: tuple[int, ...]
    outputs: dict[str, tuple[int, ...] | None]
    parts: str
    bounded: Mapping[str, str]


@dataclass(frozen=True)
class Recognised:
    """The family of a network, its parameters, and sentences about how they were found."""

    family: str
    parameters: Family
    found: tuple[str, ...]


def make(name: str, source: Path, said: Said, work: Path) -> Made:
    """A copy of an ONNX file in the folder `work`, with all of its weights, recognised and tried out.

    Raises ConfigurationError, which says what was expected, if it doesn't fit, and ModuleNotFoundError without onnx or
    onnxruntime.
    """
    import onnx  # noqa: F401  # fails here rather than in the other process
    import onnxruntime  # noqa: F401

    copy = copied(source, work / f"{name}.onnx")
    try:
        recognised = apart(recognise, copy, said, source.parent)
    except ConfigurationError as error:
        raise ConfigurationError(f"{source} is not a model for remove-background: {error.message}") from error
    parameters = TypeAdapter(Family).dump_python(recognised.parameters, mode="json")
    return Made("matting", recognised.family, copy, f"rembg/{copy.name}", parameters, recognised.found)


def recognise(path: Path, said: Said, folder: Path) -> Recognised:
    """What a network is and wants, after a test run. Takes the memory of a run: call it in a process of its own.

    Weights in other files of `folder` are taken into the file. Raises ConfigurationError if the network doesn't fit.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        gather(model, folder, path)
        seen = _seen(model)
        del model
    except ConfigurationError:
        raise
    except Exception as error:  # onnx and protobuf raise anything on a file that is not theirs
        raise ConfigurationError(f"it is not an ONNX file, or it is damaged: {sentence(error)}") from error
    name, kind, reason = _family(seen, said)
    size, where = _size(seen, said, kind)
    family = replace(kind, size=size, mean=said.mean or kind.mean, deviation=said.deviation or kind.deviation)
    output, mattes = _run(path, seen, said, family)
    logits, why = _logits(seen, said, output, mattes)
    family = replace(family, logits=logits, output=output if output != next(iter(seen.outputs)) else None)
    _check(mattes, output)
    return Recognised(
        name,
        family,
        (
            f"family: {name} ({reason})",
            f"input: {seen.input}, {size} x {size} pixels ({where}), mean {_list(family.mean)}, "
            f"deviation {_list(family.deviation)}",
            f"output: {output} of {len(seen.outputs)}, {'logits' if logits else 'a matte'} ({why})",
        ),
    )


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _seen(model: Any) -> Seen:
    """What is to be seen of a graph. Raises ConfigurationError if its input is no picture."""
    from onnx import TensorProto

    weights = [weight.name for weight in model.graph.initializer]
    inputs = [value for value in model.graph.input if value.name not in set(weights)]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs[:5]) or "none"
        raise ConfigurationError(f"it has {len(inputs)} inputs ({names}); expected one, a picture")
    if not model.graph.output:
        raise ConfigurationError("it has no output; expected a matte")
    (source,) = inputs
    kind = source.type.tensor_type.elem_type
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        found = TensorProto.DataType.Name(kind).lower() if kind in TensorProto.DataType.values() else "no tensor"
        raise ConfigurationError(f"its input {source.name} takes {found}; expected floats of 32 or 16 bits")
    shape = _shape(source)
    last = shape is not None and len(shape) == 4 and shape[3] == 3 != shape[1]
    if shape is None or len(shape) != 4 or shape[1] not in (0, 3) or last:
        form = "of any shape" if shape is None else f"of the shape {_form(shape)}"
        hint = "; this one has its channels last" if last else ""
        raise ConfigurationError(
            f"its input {source.name} is {form}; expected batch x 3 x height x width, an RGB picture{hint}"
        )
    if shape[0] > 1:
        raise ConfigurationError(f"it takes {shape[0]} pictures at a time; expected one, or any number of them")
    producers = {name: node for node in model.graph.node for name in node.output}
    outputs = {value.name: _shape(value) for value in model.graph.output}
    parts = "\n".join([source.name, *weights, *(node.name for node in model.graph.node)])
    bounded = {name: end for name in outputs if (end := _end(producers, name)) in BOUNDED}
    return Seen(source.name, shape, outputs, parts, bounded)


def _shape(value: Any) -> tuple[int, ...] | None:
    """The lengths of a tensor, 0 where they are free; None if even their number is unknown."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _form(shape: Sequence[int]) -> str:
    return " x ".join(str(length or "?") for length in shape)


def _end(producers: dict[str, Any], name: str) -> str:
    """The kind of the last node that changes what an output's values mean; empty if there is none."""
    for _ in range(len(producers)):
        node = producers.get(name)
        if node is None or node.op_type not in PASSING or not node.input:
            return "" if node is None else str(node.op_type)
        name = node.input[0]
    return ""


def _family(seen: Seen, said: Said) -> tuple[str, Family, str]:
    """A graph's family, as trained, and the reason. Raises ConfigurationError if it is none of the known ones."""
    if said.family is not None:
        if said.family not in KINDS:
            raise ConfigurationError(f"there is no family {said.family!r} of ONNX models; there are {', '.join(KINDS)}")
        return said.family, KINDS[said.family], "as you said"
    if None not in (said.mean, said.deviation):
        return CUSTOM, KINDS["u2net"], "mean and deviation are yours"
    for name, parts in PARTS.items():
        present = [part for part in parts if part in seen.parts]
        if len(present) == len(parts) or (name == "birefnet" and present):
            return name, KINDS[name], f"its graph names {' and '.join(present)}"
    mattes = sum(shape is None or len(shape) < 2 or shape[1] in (0, 1) for shape in seen.outputs.values())
    if mattes in MATTES:
        return MATTES[mattes], KINDS[MATTES[mattes]], f"it returns {mattes} mattes"
    side = seen.shape[2]
    if len(seen.outputs) == 1 and seen.bounded and side in SIZES:
        return (
            SIZES[side],
            KINDS[SIZES[side]],
            f"it takes {side} pixels and ends in {BOUNDED[next(iter(seen.bounded.values()))]}",
        )
    raise ConfigurationError(
        f"can't tell which family it is (input {_form(seen.shape)}, {len(seen.outputs)} outputs): "
        f"add --family with one of {', '.join(KINDS)}, or --mean and --deviation"
    )


def _size(seen: Seen, said: Said, kind: Family) -> tuple[int, str]:
    """The side of the input in pixels, and where it comes from."""
    height, width = seen.shape[2:]
    if height and width and height != width:
        raise ConfigurationError(f"its input has {width} x {height} pixels; expected a square")
    fixed = height or width
    if fixed and said.size not in (None, fixed):
        raise ConfigurationError(f"its input has {fixed} x {fixed} pixels, so --input-size can't be {said.size}")
    size = fixed or said.size or kind.size
    if size > LARGEST_SIDE:
        raise ConfigurationError(f"its input has {size} x {size} pixels; expected at most {LARGEST_SIDE}")
    return size, "fixed in its graph" if fixed else "as you said" if said.size else "its graph takes any, its family this"


def _run(path: Path, seen: Seen, said: Said, family: Family) -> tuple[str, list[NDArray[np.float32]]]:
    """The output with the matte, and what it returns for each synthetic photo."""
    import onnxruntime

    names = list(seen.outputs)
    wanted = names[0] if said.output is None else said.output
    if wanted not in names and wanted.isdecimal() and int(wanted) < len(names):
        wanted = names[int(wanted)]
    if wanted not in names:
        raise ConfigurationError(f"it has no output {wanted!r}; it has {', '.join(names[:20])}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
        pictures = [family.tensor(photo)[None].astype(kind) for photo in photos()]
        outputs = [session.run([wanted], {seen.input: picture})[0] for picture in pictures]
    except Exception as error:  # onnxruntime raises anything on a graph that it can't run
        raise ConfigurationError(_reason(error, f"it does not run on a picture of {family.size} pixels")) from error
    for output in outputs:
        if not isinstance(output, np.ndarray) or not np.issubdtype(output.dtype, np.floating):
            raise ConfigurationError(f"its output {wanted} has no floats; expected a matte")
        if output.ndim not in (3, 4) or output.shape[0] != 1 or (output.ndim == 4 and output.shape[1] != 1):
            form = _form(output.shape)
            raise ConfigurationError(
                f"its output {wanted} is {form}; expected one channel, 1 x 1 x {family.size} x {family.size}"
            )
        if output.shape[-1] != output.shape[-2] or output.shape[-1] < family.size // 32:
            raise ConfigurationError(f"its output {wanted} is {_form(output.shape)}; expected a square matte of the picture")
    mattes = [np.asarray(output[0], np.float32) for output in outputs]
    if not seen.shape[0]:
        _check_batch(lambda: session.run([wanted], {seen.input: np.concatenate(pictures)})[0], mattes)
    return wanted, mattes


def _check_batch(run: Callable[[], Any], mattes: Sequence[NDArray[np.float32]]) -> None:
    """Raise ConfigurationError if a network with a free batch axis doesn't give the same for both pictures at once."""
    try:
        together = np.asarray(run(), np.float32)
        same = np.allclose(together, np.stack(mattes), rtol=ALIKE, atol=ALIKE * max(map(np.ptp, mattes)), equal_nan=True)
        reason = "" if same else ": it returns something else then"
    except Exception as error:  # noqa: BLE001  # what works for one picture was exported for one
        reason = _reason(error, "")
    if reason:
        raise ConfigurationError(
            f"its graph takes any number of pictures, but fails with two; export it with a batch of 1{reason}"
        )


def _reason(error: Exception, otherwise: str) -> str:
    """Why onnxruntime refuses a model, without the places in its own code."""
    import onnxruntime

    text = str(error)
    if newest := re.search(r"max supported (IR version): (\d+)|till (opset) (\d+)", text):
        kind, number = (part for part in newest.groups() if part)
        return f"it is too new: onnxruntime {onnxruntime.__version__} runs models up to {kind} {number}; export it for that"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", text.strip())
    return f"{otherwise}: {text.splitlines()[0][:300] if text else type(error).__name__}"


def _logits(seen: Seen, said: Said, output: str, mattes: Sequence[NDArray[np.float32]]) -> tuple[bool, str]:
    """Whether an output needs a sigmoid, and the reason."""
    if said.logits is not None:
        return said.logits, "as you said"
    if output in seen.bounded:
        return False, f"it ends in {BOUNDED[seen.bounded[output]]}"
    low, high = min(float(matte.min()) for matte in mattes), max(float(matte.max()) for matte in mattes)
    return low < -PROBABLE * max(high, 1), f"it lies between {low:.3g} and {high:.3g} for a synthetic photo"


def _check(mattes: Sequence[NDArray[np.float32]], output: str) -> None:
    """Raise ConfigurationError for mattes that show no picture."""
    if not all(np.isfinite(matte).all() for matte in mattes):
        raise ConfigurationError(f"its output {output} has values that are not finite numbers; expected a matte")
    first, second = mattes
    if all(float(np.ptp(matte)) < FLAT for matte in mattes):
        raise ConfigurationError(f"its output {output} is the same everywhere in a picture; expected a matte with the subject")
    if np.array_equal(first, second):
        raise ConfigurationError(f"its output {output} is the same for any picture; expected a matte with the subject")


def photos() -> Iterator[Pixels]:
    """Two synthetic photos, RGB uint8 [384, 512, 3]: a textured subject on a plain backdrop, and one that is all texture."""
    random = np.random.default_rng(7)
    down, across = np.mgrid[-1:1:384j, -1.33:1.33:512j]
    subject = np.clip(8 * (0.55 - np.hypot(across, down * 0.8)), 0, 1)[..., None]
    texture = random.normal(0, 18, (384, 512, 3)) + 40 * np.sin(9 * across + 5 * down)[..., None]
    backdrop = 205 + 20 * down[..., None] * np.ones(3)
    for share in (subject, np.ones_like(subject)):
        yield np.clip(backdrop * (1 - share) + (np.array([150, 90, 60]) + texture) * share, 0, 255).astype(np.uint8)
