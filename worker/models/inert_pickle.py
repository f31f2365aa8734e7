"""Reads a pickle as plain data: imports nothing, looks up no class and calls no function that the pickle names.

Every object that the pickle would create becomes a stand-in that only records what the pickle says about it.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from typing import Any, ClassVar

from imagemill.shared.errors import sentence

LARGEST = 8 * 2**20
"""Maximum bytes of a pickle, which holds no tensor data. Each byte can take up to a hundred bytes of memory."""

REFUSED = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.POP_MARK),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4),  # fetch objects from copyreg's cache, past find_class
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),  # BYTEARRAY8 allocates whatever length it is given
)
"""Opcodes that no checkpoint contains."""


class Unreadable(ValueError):
    """Not a pickle, damaged, too large, or with opcodes that no checkpoint contains."""


class TextKeys(dict[str, Any]):
    """A dictionary that drops keys that aren't text: hashing nested tuples can take ages or overflow the C stack."""

    __slots__ = ()  # no attributes for BUILD to set

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            super().__setitem__(key, value)


@dataclass(frozen=True, eq=False)
class Global:
    """Stands for the class or function of this name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def __call__(self, *arguments: Any) -> Call:
        return Call(self, arguments)

    def __setstate__(self, state: Any) -> None:
        """Ignored."""


@dataclass(eq=False, repr=False, slots=True)
class Call:
    """Stands for the object that calling `function` would return, with the state and items then put into it."""

    function: Global | Call
    arguments: tuple[Any, ...]
    state: Any = None
    items: TextKeys = field(default_factory=TextKeys)

    def __call__(self, *arguments: Any) -> Call:
        return Call(self, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def extend(self, _values: Any) -> None:
        """Ignored: no tensor is looked for in a list."""

    append = extend


@dataclass(frozen=True, eq=False, repr=False)
class PersistentId:
    """Stands for an object outside the pickle, which refers to it by `key`."""

    key: Any

    def __setstate__(self, state: Any) -> None:
        """Ignored."""


def read(data: bytes) -> Any:
    """Return a pickle's content: numbers, text, bytes, tuples, lists (also for sets), TextKeys, and the stand-ins above.

    Raises Unreadable.
    """
    if len(data) > LARGEST:
        raise Unreadable(f"the pickle has {len(data)} bytes; the limit is {LARGEST}")
    try:
        return _Unpickler(io.BytesIO(data), encoding="latin-1").load()
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"the pickle is damaged: {sentence(error)}") from error


_PurePython: Any = pickle._Unpickler
"""The one in C allocates memory for whatever memo index or length a pickle announces."""


class _Unpickler(_PurePython):
    def find_class(self, module: str, name: str) -> Global:
        return Global(module, name)

    def persistent_load(self, pid: Any) -> PersistentId:
        return PersistentId(pid)

    def _load_empty_dict(self) -> None:
        self.append(TextKeys())

    def _load_dict(self) -> None:
        pairs = self.pop_mark()
        self.append(TextKeys())
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self.stack[-1][key] = value

    def _refuse(self) -> None:
        raise Unreadable("the pickle has an opcode that no checkpoint contains")

    dispatch: ClassVar = {
        **_PurePython.dispatch,
        **dict.fromkeys((opcode[0] for opcode in REFUSED), _refuse),
        pickle.DICT[0]: _load_dict,
        pickle.EMPTY_DICT[0]: _load_empty_dict,
        pickle.EMPTY_SET[0]: _PurePython.load_empty_list,  # a set would hash its members
        pickle.ADDITEMS[0]: _PurePython.load_appends,
        pickle.FROZENSET[0]: _PurePython.load_list,
        pickle.NEWOBJ[0]: _PurePython.load_reduce,  # calls the stand-in, which has no __new__ of its own
    }
