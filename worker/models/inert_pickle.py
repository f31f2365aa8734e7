"""A pickle read as data: no class in it is looked up, nothing in it is called.

A machine of its own instead of `pickle.Unpickler` with a list of allowed names: what it has no instruction for can't be
reached by any trick, and a short pickle can't make it take much memory. `pickletools` says what each instruction does.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

from imagemill.shared.errors import sentence

LARGEST = 8 * 2**20
"""Bytes of a pickle; the tensors of a checkpoint lie outside of it. Each may take up to a hundred bytes of memory."""

NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
VALUES = frozenset((*NUMBERS, *TEXTS, *BYTES))
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function, as a pickle calls it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Made:
    """What a call of `by` would have made, with what would have been put into it."""

    by: Any
    arguments: Any
    state: Any = None
    items: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class Kept:
    """Something outside of the pickle, which knows it as `key`."""

    key: Any


class Unreadable(ValueError):
    """No pickle, a damaged one, or one with instructions that no checkpoint has."""


def read(data: bytes) -> Any:
    """What a pickle holds, of lists, tuples, dictionaries, numbers and texts, and of the classes above for all else.

    Dictionaries keep only what they have under texts, sets are lists. Raises Unreadable.
    """
    if len(data) > LARGEST:
        raise Unreadable(f"its pickle has {len(data)} bytes, and {LARGEST} at most are read")
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(data):
            if instruction.name == "STOP":
                return machine.pop()
            machine.step(instruction.name, argument)
    except (IndexError, KeyError, ValueError, TypeError, OverflowError, UnicodeError) as error:
        raise Unreadable(sentence(error)) from error
    raise Unreadable("its pickle ends early")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        found = self.stack.pop()
        if found is _MARK:
            raise Unreadable("its pickle is damaged")
        return found

    def since_mark(self) -> list[Any]:
        found = []
        while (one := self.stack.pop()) is not _MARK:
            found.append(one)
        return found[::-1]

    def step(self, name: str, argument: Any) -> None:
        """One instruction. Raises Unreadable for one that there is no need of."""
        push = self.stack.append
        if name in VALUES:
            push(argument)
        elif name in CONSTANTS:
            push(CONSTANTS[name])
        elif name in EMPTY:
            push(EMPTY[name]())
        elif name in TUPLES:
            push(tuple([self.pop() for _ in range(TUPLES[name])][::-1]))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif name == "MARK":
            push(_MARK)
        elif name == "POP":
            self.stack.pop()
        elif name == "DUP":
            push(self.stack[-1])
        elif name not in ("PROTO", "FRAME"):
            self._compose(name, argument)

    def _compose(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in ("TUPLE", "LIST", "FROZENSET"):
            found = self.since_mark()
            push(tuple(found) if name == "TUPLE" else found)
        elif name == "DICT":
            found = self.since_mark()
            push({})
            self._put(found)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            found = [self.pop()] if name == "APPEND" else self.since_mark()
            if isinstance(self.stack[-1], list):
                self.stack[-1].extend(found)
        elif name in ("SETITEM", "SETITEMS"):
            self._put([self.pop(), self.pop()][::-1] if name == "SETITEM" else self.since_mark())
        elif name == "GLOBAL":
            push(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            last, module = self.pop(), self.pop()
            push(Name(str(module), str(last)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, by = self.pop(), self.pop()
            push(Made(by, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, by = self.pop(), self.pop(), self.pop()
            push(Made(by, arguments))
        elif name == "BUILD":
            state = self.pop()
            if isinstance(self.stack[-1], Made):
                self.stack[-1].state = state
        elif name == "BINPERSID":
            push(Kept(self.pop()))
        else:
            raise Unreadable(f"its pickle has an instruction that no checkpoint has, {name}")

    def _put(self, found: list[Any]) -> None:
        """Keys and values in turns into the dictionary on the stack, or what stands for one."""
        target = self.stack[-1]
        place = target.items if isinstance(target, Made) else target
        if not isinstance(place, dict):
            raise Unreadable("its pickle is damaged")
        place.update((key, value) for key, value in zip(found[::2], found[1::2], strict=True) if isinstance(key, str))
