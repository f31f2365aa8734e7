"""What is a shortage, what is the end of the process, and what neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imagemill.shared.errors import OperationFailed, OutOfMemory
from imagemill.worker.hardware.errors import is_out_of_memory, is_sticky
from tests.devices import DEAD, HARMLESS, SHORT


def wrapped(error: Exception) -> Exception:
    """As an engine that translates what its library raises."""
    try:
        raise OperationFailed("the model failed") from error
    except OperationFailed as made:
        return made


@pytest.mark.parametrize("made", SHORT.values(), ids=SHORT)
def test_a_shortage_of_memory_is_known_by_its_type_or_its_words(made: Callable[[], Exception]) -> None:
    assert is_out_of_memory(made())
    assert is_out_of_memory(wrapped(made()))
    assert not is_sticky(made())


@pytest.mark.parametrize("made", DEAD.values(), ids=DEAD)
def test_an_error_that_stays_is_known_by_its_words(made: Callable[[], Exception]) -> None:
    assert is_sticky(made())
    assert is_sticky(wrapped(made()))
    assert not is_out_of_memory(made())


@pytest.mark.parametrize("made", HARMLESS.values(), ids=HARMLESS)
def test_all_else_is_neither(made: Callable[[], Exception]) -> None:
    assert not is_sticky(made())
    assert not is_out_of_memory(made())


def test_our_own_error_is_one() -> None:
    assert is_out_of_memory(OutOfMemory("the image does not fit"))
