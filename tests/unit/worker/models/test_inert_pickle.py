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

from imagemill.worker.models.inert_pickle import LARGEST, Call, Global, Unreadable, read

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner)
    ),
)


@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_read_returns_plain_data_unchanged(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


@given(st.binary(max_size=300), st.integers(3, pickle.HIGHEST_PROTOCOL))
def test_read_returns_bytes_unchanged(value: bytes, protocol: int) -> None:
    assert read(pickle.dumps((value, value), protocol)) == (value, value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_read_keeps_shared_objects_shared_and_returns_sets_as_lists(protocol: int) -> None:
    one = ["shared"]
    found = read(pickle.dumps({"first": one, "second": one, 3: "key is not text"}, protocol))
    assert found == {"first": one, "second": one}
    assert found["first"] is found["second"]
    if protocol >= 4:
        assert sorted(read(pickle.dumps({1, 2, 3}, protocol))) == [1, 2, 3]


class Cyclic:
    """An object with an attribute that refers back to it."""

    def __init__(self) -> None:
        self.number, self.self = 7, self


@pytest.mark.parametrize("protocol", [2, 4])
def test_read_records_class_name_state_and_items_of_objects(protocol: int) -> None:
    cyclic, ordered, kind = read(pickle.dumps([Cyclic(), OrderedDict(a=1, b=2), Cyclic], protocol))
    assert isinstance(cyclic, Call)
    assert isinstance(cyclic.function, Global)
    assert cyclic.function.name == "Cyclic"
    assert cyclic.state["number"] == 7
    assert cyclic.state["self"] is cyclic
    assert str(ordered.function) == "collections.OrderedDict"
    assert ordered.items == {"a": 1, "b": 2}
    assert isinstance(kind, Global)


class Reduced:
    """An object that is pickled as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def dotted_stack_global(canary: Path) -> bytes:
    """STACK_GLOBAL with a dotted name, which pickle's own `find_class` follows: `os.system` through an innocent module."""
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
        [Reduced(copyreg._reconstructor, (Cyclic, object, None)), Reduced(os.mkdir, (str(canary),))]
    ),
    "a dotted name on the stack": dotted_stack_global,
    "an object's state": lambda canary: pickle.dumps(Reduced(Path, (), {"_cached": Reduced(os.mkdir, (str(canary),))})),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_read_calls_and_imports_nothing(attack: Callable[[Path], bytes], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data, modules = attack(canary), set(sys.modules)
    with suppress(Unreadable):
        read(data)
    assert not canary.exists()
    assert set(sys.modules) == modules


@pytest.mark.parametrize("name", ["a command", "eval", "exec in a list", "copyreg", "a dotted name on the stack"])
def test_pickle_itself_runs_these_attacks(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(ATTACKS[name](canary))  # noqa: S301  # data from this file
    assert canary.exists()


def test_build_does_not_change_builtins() -> None:
    before = dict(vars(builtins))
    state = pickle.dumps({"__defaults__": (1,), "len": None}, 2)[2:-1]
    found = read(b"\x80\x02cbuiltins\nlen\n" + state + b"b.")
    assert isinstance(found, Global)
    assert dict(vars(builtins)) == before


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"short.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"short.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    ],
    ids=["memo index", "bytes", "bytearray", "frame"],
)
def test_short_pickle_takes_little_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with suppress(Unreadable):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_pickle_over_the_size_limit_is_refused() -> None:
    with pytest.raises(Unreadable, match="the limit is"):
        read(pickle.dumps(bytes(LARGEST)))


GOOD = pickle.dumps({"a": [1, (2.5, "three")], "b": OrderedDict(c=Cyclic())}, 2)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_truncated_pickle_is_refused(length: int) -> None:
    with pytest.raises(Unreadable):
        read(GOOD[:length])


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_damaged_pickle_is_read_or_refused(place: int, byte: int) -> None:
    with suppress(Unreadable):
        read(GOOD[:place] + bytes([byte]) + GOOD[place + 1 :])


@given(st.binary())
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(Unreadable):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        b"(i__main__\nA\n.",
        b"(c__main__\nA\no.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02\x83\x01\x00.",
        b"\x80\x02\x84\x01\x00\x00\x00.",
        b"\x80\x05\x96" + bytes(8) + b".",
        b"\x80\x05\x97.",
        b"\x80\x05N\x98.",
    ],
    ids=["INST", "OBJ", "EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"],
)
def test_opcodes_that_no_checkpoint_contains_are_refused(data: bytes) -> None:
    with pytest.raises(Unreadable, match="no checkpoint contains"):
        read(data)


def test_cached_extension_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg._extension_cache, 1, os.system)  # type: ignore[attr-defined]
    with pytest.raises(Unreadable):
        read(b"\x80\x02\x82\x01.")


@pytest.mark.parametrize("data", [b"N)R.", b"]}R.", b"K\x01)\x81.", b"NQ)R."], ids=["None", "list", "number", "persistent id"])
def test_calling_anything_but_a_stand_in_is_refused(data: bytes) -> None:
    with pytest.raises(Unreadable):
        read(data)


@pytest.mark.parametrize("data", [b"}}X\x05\x00\x00\x00itemsNsb.", b"]}X\x01\x00\x00\x00aNsb."], ids=["dictionary", "list"])
def test_state_of_a_container_is_refused(data: bytes) -> None:
    with pytest.raises(Unreadable):
        read(data)


NESTED_TUPLE = b")" + b"\x85" * 300_000
BRANCHING_TUPLE = b")" + b"2\x86" * 60


@pytest.mark.parametrize("key", [NESTED_TUPLE, BRANCHING_TUPLE], ids=["deep", "exponential"])
@pytest.mark.parametrize(
    "around",
    [(b"}", b"Ns."), (b"}(", b"Nu."), (b"(", b"Nd."), (b"\x8f(", b"\x90."), (b"(", b"\x91."), (b"cA\nB\n)R", b"Ns.")],
    ids=["SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET", "SETITEM of an object"],
)
def test_keys_and_set_members_are_not_hashed(key: bytes, around: tuple[bytes, bytes]) -> None:
    read(around[0] + key + around[1])


def test_deeply_nested_lists_are_read() -> None:
    depth = 200_000
    assert isinstance(read(b"]" * depth + b"a" * (depth - 1) + b"."), list)
