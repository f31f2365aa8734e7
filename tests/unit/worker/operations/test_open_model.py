"""The one model that an engine keeps open, and what becomes of errors once the node has proven itself."""

from __future__ import annotations

import pytest

from imagemill.shared.errors import ConfigurationError, ModelUnavailable, OperationFailed, OutOfMemory
from imagemill.worker.operations.open_model import OpenModel

FAULTS = [
    ConfigurationError("model x is not in /weights: run `imagemill models pull x`"),
    OperationFailed("opening the model x failed: bad header"),
    FileNotFoundError(2, "No such file or directory", "/weights/x.onnx"),
    PermissionError(13, "Permission denied", "/weights/x.onnx"),
]


def failing(fault: Exception) -> str:
    raise fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_first_model_that_can_not_be_opened_stops_the_node(fault: Exception) -> None:
    with pytest.raises(type(fault)):
        OpenModel[str, str]().get(lambda: "x", lambda _: failing(fault))


@pytest.mark.parametrize("where", ["locate", "load"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_later_model_that_can_not_be_opened_only_fails_images(fault: Exception, where: str) -> None:
    model = OpenModel[str, str]()
    assert model.get(lambda: "a", str.upper) == "A"
    locate, load = (lambda: failing(fault), str.upper) if where == "locate" else (lambda: "x", lambda _: failing(fault))
    with pytest.raises(ModelUnavailable) as caught:
        model.get(locate, load)
    assert caught.value.retryable
    assert getattr(fault, "message", str(fault)) in caught.value.message
    assert model.get(lambda: "a", str.upper) == "A"


def test_model_that_is_too_large_is_out_of_memory() -> None:
    model = OpenModel[str, str]()
    model.get(lambda: "a", str.upper)
    with pytest.raises(OutOfMemory):
        model.get(lambda: "x", lambda _: failing(OutOfMemory("the model x does not fit into memory")))
