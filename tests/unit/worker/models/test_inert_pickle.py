from __future__ import annotations

import builtins
import copyreg
import os
import pickle
import struct
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.worker.models.inert_pickle import LARGEST, Made, Name, Unreadable, read

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner)
    ),
)


@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_is_read_as_it_was_written(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


@given(st.binary(max_size=300), st.integers(3, pickle.HIGHEST_PROTOCOL))
def test_bytes_are_read(value: bytes, protocol: int) -> None:
    assert read(pickle.dumps((value, value), protocol)) == (value, value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_is_shared_stays_shared_and_sets_are_lists(protocol: int) -> None:
    one = ["shared"]
    found = read(pickle.dumps({"first": one, "second": one, 3: "not under a text"}, protocol))
    assert found == {"first": one, "second": one}
    assert found["first"] is found["second"]
    if protocol >= 4:
        assert sorted(read(pickle.dumps({1, 2, 3}, protocol))) == [1, 2, 3]


class Own:
    """An object with an attribute, which leads back to it."""

    def __init__(self) -> None:
        self.number, self.self = 7, self


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_are_told_by_name_and_content(protocol: int) -> None:
    own, ordered, kind = read(pickle.dumps([Own(), OrderedDict(a=1, b=2), Own], protocol))
    assert isinstance(own, Made)
    assert isinstance(own.by, Name)
    assert own.by.name == "Own"
    assert own.state["number"] == 7
    assert own.state["self"] is own
    assert str(ordered.by) == "collections.OrderedDict"
    assert ordered.items == {"a": 1, "b": 2}
    assert isinstance(kind, Name)


class Reduced:
    """An object that is pickled as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def by_name(canary: Path) -> bytes:
    """`posix.system` by names on the stack, which `find_class` splits at dots: through a module that may be allowed."""
    command = f"touch {canary}".encode()
    words = [b"shutil", b"os.system"]
    pushed = b"".join(b"\x8c" + bytes([len(word)]) + word for word in words)
    return b"\x80\x04" + pushed + b"\x93" + b"\x8c" + bytes([len(command)]) + command + b"\x85R."


ATTACKS: dict[str, Callable[[Path], bytes]] = {
    "a command": lambda canary: pickle.dumps(Reduced(os.system, (f"touch {canary}",))),
    "eval": lambda canary: pickle.dumps(Reduced(eval, (f"__import__('os').mkdir({str(canary)!r})",))),
    "exec in a list": lambda canary: pickle.dumps([Reduced(exec, (f"import os; os.mkdir({str(canary)!r})",))]),
    "a chain of getattr": lambda canary: pickle.dumps(
        Reduced(map, (Reduced(getattr, (Reduced(__import__, ("os",)), "system")), [f"touch {canary}"]), None, None)
    ),
    "copyreg": lambda canary: pickle.dumps(
        [Reduced(copyreg._reconstructor, (Own, object, None)), Reduced(os.mkdir, (str(canary),))]
    ),
    "by its name on the stack": by_name,
    "an object's own state": lambda canary: pickle.dumps(Reduced(Path, (), {"_cached": Reduced(os.mkdir, (str(canary),))})),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_nothing_in_it_is_called(attack: Callable[[Path], bytes], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data, modules = attack(canary), set(sys.modules)
    with suppress(Unreadable):
        read(data)
    assert not canary.exists()
    assert set(sys.modules) == modules, "nothing in it is imported"


@pytest.mark.parametrize("name", ["a command", "eval", "exec in a list", "copyreg", "by its name on the stack"])
def test_these_attacks_would_work_on_pickle(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(ATTACKS[name](canary))  # noqa: S301  # our own
    assert canary.exists()


def test_functions_and_builtins_can_not_be_changed_by_it() -> None:
    before = dict(vars(builtins))
    state = pickle.dumps({"__defaults__": (1,), "len": None}, 2)[2:-1]
    found = read(b"\x80\x02cbuiltins\nlen\n" + state + b"b.")
    assert isinstance(found, Name)
    assert dict(vars(builtins)) == before


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"short.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"short.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    ],
    ids=["a place in the memo", "bytes", "a bytearray", "a frame"],
)
def test_a_short_pickle_takes_little_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with suppress(Unreadable):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_long_pickle_is_refused_unread() -> None:
    with pytest.raises(Unreadable, match="at most are read"):
        read(pickle.dumps(bytes(LARGEST)))


GOOD = pickle.dumps({"a": [1, (2.5, "three")], "b": OrderedDict(c=Own())}, 2)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_pickle_that_ends_early_is_refused(length: int) -> None:
    with pytest.raises(Unreadable):
        read(GOOD[:length])


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_damaged_pickle_is_data_or_refused(place: int, byte: int) -> None:
    with suppress(Unreadable):
        read(GOOD[:place] + bytes([byte]) + GOOD[place + 1 :])


@given(st.binary())
def test_any_bytes_are_data_or_refused(data: bytes) -> None:
    with suppress(Unreadable):
        read(data)


@pytest.mark.parametrize(
    "data", [b"(i__main__\nA\n.", b"\x80\x02\x82\x01.", b"\x80\x05\x97."], ids=["INST", "EXT1", "NEXT_BUFFER"]
)
def test_instructions_that_no_checkpoint_has_are_refused(data: bytes) -> None:
    with pytest.raises(Unreadable, match="that no checkpoint has"):
        read(data)


def test_a_deep_pickle_is_read() -> None:
    depth = 200_000
    found = read(b"]" * depth + b"a" * (depth - 1) + b".")
    assert isinstance(found, list)
