"""The models that engines keep open, and what happens to errors."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest

from imagemill.shared.errors import ConfigurationError, ModelUnavailable, OperationFailed, OutOfMemory
from imagemill.worker.hardware.errors import DeviceUnusable
from imagemill.worker.hardware.memory import freeze
from imagemill.worker.hardware.model_memory import ModelMemory
from imagemill.worker.operations.open_model import OpenModel

FAULTS = [
    ConfigurationError("model x is not in /weights: run `imagemill models pull x`"),
    OperationFailed("opening the model x failed: bad header"),
    FileNotFoundError(2, "No such file or directory", "/weights/x.onnx"),
    PermissionError(13, "Permission denied", "/weights/x.onnx"),
]


@dataclass
class Net:
    """A model that takes as many bytes as its name has letters, or as many as `bytes` says."""

    name: str
    version: str
    bytes: int


class Engine:
    """Opens models. `opened` are the names of those that it has opened; `heavy` holds the real sizes of some."""

    def __init__(self, memory: ModelMemory, **heavy: int) -> None:
        self.models: OpenModel[str, str, Net] = OpenModel(len)
        self.models.memory = memory
        self.opened: list[str] = []
        self.heavy = heavy
        self.faults: list[Exception] = []

    def use(self, name: str, version: str = "1") -> Net:
        return self.models.get(lambda: (name, version), self._load)

    def _load(self, key: tuple[str, str]) -> Net:
        if self.faults:
            raise self.faults.pop(0)
        self.opened.append(key[0])
        return Net(*key, self.heavy.get(key[0], len(key[0])))


@pytest.mark.parametrize("where", ["locate", "load"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_model_that_can_not_be_opened_is_unavailable(fault: Exception, where: str) -> None:
    def failing(*_: object) -> tuple[str, str]:
        raise fault

    engine = Engine(ModelMemory(10))
    for _ in range(2):  # whether or not another has been opened
        engine.faults = [fault]
        with pytest.raises(ModelUnavailable) as caught:
            engine.models.get(failing, engine._load) if where == "locate" else engine.use("x")
        assert not caught.value.passing
        assert getattr(fault, "message", str(fault)) in caught.value.message
        engine.faults = []
        assert engine.use("a").name == "a"


def test_device_on_which_no_model_can_run_is_not_the_models_fault() -> None:
    engine = Engine(ModelMemory())
    engine.faults = [DeviceUnusable("no driver")]
    with pytest.raises(DeviceUnusable):
        engine.use("x")


@pytest.mark.parametrize("limit", [None, 0, 3])
def test_one_model_is_always_kept(limit: int | None) -> None:
    engine = Engine(ModelMemory(limit))
    for name in ("aaaa", "aaaa", "bbbb", "bbbb", "aaaa"):
        assert engine.use(name).name == name
    assert engine.opened == ["aaaa", "bbbb", "aaaa"]


def test_least_recently_used_model_is_closed_first_whichever_engine_opened_it() -> None:
    memory = ModelMemory(6)
    one, other = Engine(memory), Engine(memory)
    one.use("aa"), one.use("bb"), other.use("cc")
    assert memory.taken == 6
    assert memory.roomy
    one.use("aa"), other.use("dd")  # bb is closed
    assert not memory.roomy, "models have to take turns"
    one.use("aa"), other.use("cc"), other.use("dd")
    assert (one.opened, other.opened) == (["aa", "bb"], ["cc", "dd"])
    one.use("bb")
    assert one.opened == ["aa", "bb", "bb"]
    assert one.models.current == Net("bb", "1", 2)


def test_room_is_made_before_a_model_is_opened() -> None:
    memory = ModelMemory(4)
    engine = Engine(memory)
    engine.use("aa"), engine.use("bb")
    taken: list[int] = []
    engine.models.get(lambda: ("cc", "1"), lambda key: taken.append(memory.taken) or Net(*key, 2))  # type: ignore[func-returns-value]
    assert taken == [2]


def test_model_that_is_larger_than_its_file_takes_the_place_of_others() -> None:
    memory = ModelMemory(6)
    engine = Engine(memory, cc=5)
    for name in ("aa", "bb", "cc"):
        engine.use(name)
    assert memory.taken == 5
    engine.use("cc")
    assert engine.opened == ["aa", "bb", "cc"]


def test_closed_model_is_freed_even_if_it_was_frozen_and_refers_to_itself() -> None:
    class Knot:
        def __init__(self) -> None:
            self.me = self

    models: OpenModel[str, str, Knot] = OpenModel(len)
    alive = weakref.ref(models.get(lambda: ("a", "1"), lambda _: Knot()))
    freeze()
    models.close()
    assert alive() is None


def test_model_is_opened_again_when_its_files_have_changed() -> None:
    memory = ModelMemory(10)
    engine = Engine(memory)
    engine.use("aa"), engine.use("bb")
    assert engine.use("aa", version="2").version == "2"
    assert memory.taken == 4, "the old version is closed"
    engine.use("bb")
    assert engine.opened == ["aa", "bb", "aa"]


def test_all_others_are_closed_when_a_model_finds_no_memory() -> None:
    memory = ModelMemory(100)
    one, other = Engine(memory), Engine(memory)
    one.use("aa"), one.use("bb")
    other.faults = [OutOfMemory("the model cc does not fit into memory")]
    assert other.use("cc").name == "cc"
    assert memory.taken == 2
    assert one.models.current is None


@pytest.mark.parametrize("before", [[], ["aa"]])
def test_model_that_does_not_fit_alone_is_unavailable_for_a_while(before: list[str]) -> None:
    engine = Engine(ModelMemory(100))
    for name in before:
        engine.use(name)
    engine.faults = [OutOfMemory("the model x does not fit into memory")] * 2
    with pytest.raises(ModelUnavailable, match="the model x does not fit into memory") as caught:
        engine.use("x")
    assert caught.value.passing
    engine.faults = []
    assert engine.use("x").name == "x"


def grow(engine: Engine, size: int, fail: int = 0) -> None:
    """Load a part for the model in use, after it has found no memory `fail` times."""
    faults, net = [OutOfMemory("the ControlNet does not fit into memory")] * fail, engine.models.current
    assert net is not None

    def load() -> int:
        if faults:
            raise faults.pop()
        return size

    net.bytes += engine.models.load_part("mine", size, load)
    engine.models.measure()


def test_parts_that_a_model_loads_later_take_the_place_of_other_models() -> None:
    memory = ModelMemory(8)
    one, other = Engine(memory), Engine(memory)
    one.use("aa"), one.use("bb"), other.use("cc")
    grow(other, 2)
    assert memory.taken == 8
    grow(other, 1)
    assert memory.taken == 7, "the model that was used least recently is closed"
    assert other.models.current is not None, "and not the one in use, however large it becomes"
    grow(other, 20)
    assert memory.taken == 25
    other.models.current.bytes = 2  # its parts are dropped
    other.models.measure()
    one.use("aa"), one.use("bb")
    assert memory.taken == 6


def test_room_is_made_before_a_part_is_loaded() -> None:
    memory = ModelMemory(4)
    engine = Engine(memory)
    engine.use("aa"), engine.use("bb")
    assert engine.models.load_part("mine", 2, lambda: memory.taken) == 2


def test_other_models_are_closed_when_a_part_finds_no_memory() -> None:
    memory = ModelMemory(100)
    engine = Engine(memory)
    engine.use("aa"), engine.use("bb")
    grow(engine, 1, fail=1)
    assert memory.taken == 3
    with pytest.raises(ModelUnavailable, match="the ControlNet does not fit") as caught:
        grow(engine, 1, fail=1)
    assert (caught.value.part, caught.value.passing, caught.value.misfit) == ("mine", True, True)
    assert engine.use("bb").bytes == 3, "the model itself stays"
