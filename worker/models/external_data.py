"""ONNX files with their weights in separate files, as exporters write large models: checked, and merged into one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from imagemill.shared.errors import ConfigurationError
from imagemill.worker.models.sources import HEAD, no_model

MOST = 2**31 - 2**20
"""Maximum bytes of an ONNX file in one piece, as protobuf can't write more."""


def gather(model: Any, folder: Path, target: Path) -> bool:
    """Write a model, together with its weights from other files in `folder`, as one file; False, and nothing, if it has
    none.

    Only files in this folder or below it are read. Raises ConfigurationError for others, and for weights that are missing,
    not complete or too large.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    outside = [tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    total = model.ByteSize() + sum(_length(tensor, folder) for tensor in outside)
    if total > MOST:
        raise ConfigurationError(
            f"with the weights in other files it has {total / 1e9:.1f} GB, and nodes take up to {MOST / 1e9:.1f} GB: "
            "export it in half precision"
        )
    for tensor in outside:
        load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    if outside:
        onnx.save_model(model, str(target))
    return bool(outside)


def _length(tensor: Any, folder: Path) -> int:
    """The bytes of a tensor in another file."""
    values = {entry.key: entry.value for entry in tensor.external_data}
    name = values.get("location", "")
    place = PurePosixPath(name)
    path = folder / place
    if not name or place.is_absolute() or ".." in place.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigurationError(f"its weights are said to lie in {name[:200]!r}; expected a file in its own folder")
    if not path.is_file():
        raise ConfigurationError(f"its weights are in {name[:200]}, which is missing in {folder}")
    with path.open("rb") as file:
        wrong = no_model(file.read(HEAD)) if path.stat().st_size < HEAD else None
    if wrong is not None:
        raise ConfigurationError(f"{path} {wrong}; expected its weights")
    offset, length = _number(values.get("offset", "0")), _number(values.get("length", ""))
    size = path.stat().st_size
    length = size - offset if length is None and offset is not None else length
    if offset is None or length is None or offset + length > size:
        raise ConfigurationError(f"{path} is not complete: {tensor.name[:200]} lies beyond its {size} bytes")
    return length


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None


def _tensors(model: Any) -> Iterator[Any]:
    """All tensors of a model, also those in attributes, functions and inner graphs."""
    nodes = [node for function in model.functions for node in function.node]
    graphs = [model.graph]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            graphs += [attribute.g] if attribute.HasField("g") else []
            graphs += attribute.graphs
            yield from [attribute.t] if attribute.HasField("t") else []
            yield from attribute.tensors
