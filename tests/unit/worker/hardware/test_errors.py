"""Which exceptions mean out of memory, which mean a lost device, and which mean neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imagemill.shared.errors import OperationFailed, OutOfMemory
from imagemill.worker.hardware.errors import is_out_of_memory, is_sticky
from tests.devices import DEAD, HARMLESS, SHORT


def wrapped(error: Exception) -> Exception:
    """The error as raised by an engine that translates its library's exceptions."""
    try:
        raise OperationFailed("the model failed") from error
    except OperationFailed as translated:
        return translated


@pytest.mark.parametrize("make", SHORT.values(), ids=SHORT)
def test_out_of_memory_is_recognised_by_type_or_message(make: Callable[[], Exception]) -> None:
    assert is_out_of_memory(make())
    assert is_out_of_memory(wrapped(make()))
    assert not is_sticky(make())


@pytest.mark.parametrize("make", DEAD.values(), ids=DEAD)
def test_sticky_errors_are_recognised_by_message(make: Callable[[], Exception]) -> None:
    assert is_sticky(make())
    assert is_sticky(wrapped(make()))
    assert not is_out_of_memory(make())


@pytest.mark.parametrize("make", HARMLESS.values(), ids=HARMLESS)
def test_other_errors_are_neither(make: Callable[[], Exception]) -> None:
    assert not is_sticky(make())
    assert not is_out_of_memory(make())


def test_own_out_of_memory_error_is_recognised() -> None:
    assert is_out_of_memory(OutOfMemory("the image does not fit"))
