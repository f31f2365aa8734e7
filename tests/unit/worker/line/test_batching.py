"""Which samples share a batch, which batch is next, and how long it waits."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagemill.shared.messages import Policy
from imagemill.worker.line import batching
from imagemill.worker.line.batch_sizes import BatchSizes, Known
from imagemill.worker.line.batching import PATIENCE, Batcher, Recipe, Slot, cap
from imagemill.worker.operations.base import Sample
from tests.devices import FakeGpu
from tests.fakes import Invert

NAMES = st.sampled_from("abcd")


class Grouped(Invert):
    """A sample's data is (group, number)."""

    def group_key(self, sample: Sample[Any, Any]) -> Hashable:
        if sample.data[0] == "?":
            raise ValueError("this sample belongs nowhere")
        return sample.data[0]


OPERATION, SIZES = Grouped(), BatchSizes()


def recipe(most: int = 4, options: str = "{}") -> Recipe:
    return Recipe(OPERATION, SIZES, most, options)


def samples(*names: str) -> list[Sample[Any, Any]]:
    return [Sample((name, number), None) for number, name in enumerate(names)]


def group(batch: list[Slot[int]]) -> str:
    (name,) = {slot.sample.data[0] for slot in batch}
    return str(name)


def owners(batcher: Batcher[int]) -> list[int]:
    """The owners in the next batch."""
    return [slot.owner for slot in batcher.take()[1]]


class Clock:
    """Replaces the `time` module; the test sets the time."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batching, "time", clock)
    return clock


# --- what shares a batch ---


@given(st.lists(st.lists(NAMES, max_size=6) | st.none()), st.integers(1, 4))
def test_every_sample_comes_out_once_oldest_group_first(steps: list[list[str] | None], limit: int) -> None:
    """A list adds an owner with these samples, None takes a batch; the rest is taken at the end."""
    batcher: Batcher[int] = Batcher()
    came: list[tuple[int, int, str]] = []
    out: list[tuple[int, int, str]] = []

    def take() -> None:
        taken, batch = batcher.take()
        assert taken == recipe(limit)
        assert 1 <= len(batch) <= limit
        name = group(batch)
        waiting = [one for one in came if one not in out]
        assert min(owner for owner, *_ in waiting) in [owner for owner, _, other in waiting if other == name]
        out.extend((slot.owner, slot.place, slot.sample.data[0]) for slot in batch)
        left = [one for one in came if one[2] == name and one not in out]
        assert len(batch) == limit or not left, "a batch must be as large as possible"

    for owner, names in enumerate(steps):
        if names is not None:
            batcher.add(owner, samples(*names), recipe(limit))
            came.extend((owner, place, name) for place, name in enumerate(names))
        elif batcher:
            take()
    while batcher:
        take()
    assert sorted(out) == sorted(came)
    for name in "abcd":
        assert [one for one in out if one[2] == name] == [one for one in came if one[2] == name], "first come, first served"


def test_samples_share_a_batch_only_if_their_recipes_are_equal() -> None:
    batcher: Batcher[int] = Batcher()
    other = [recipe(options='{"style": "detail"}'), recipe(most=3), Recipe(Grouped(), SIZES, 4, "{}")]
    for owner, one in enumerate([recipe(), *other, recipe(), *other]):
        batcher.add(owner, samples("a"), one)
    taken = []
    while batcher:
        used, batch = batcher.take()
        taken.append((used, [slot.owner for slot in batch]))
    assert taken == [(recipe(), [0, 4]), (other[0], [1, 5]), (other[1], [2, 6]), (other[2], [3, 7])]


def test_image_whose_group_key_raises_leaves_nothing_behind() -> None:
    batcher: Batcher[int] = Batcher()
    with pytest.raises(ValueError, match="belongs nowhere"):
        batcher.add(0, samples("a", "?"), recipe())
    assert not batcher


@pytest.mark.parametrize(("batch", "own", "most"), [("quality", 64, 4), ("quality", 2, 2), ("throughput", 16, 16)])
def test_policy_and_engine_both_cap_the_batch(batch: str, own: int, most: int) -> None:
    policy = Policy.model_validate({"batch": batch})
    assert cap(policy, replace(Invert.spec, max_batch=own)) == most


# --- who is first, and who leaves ---


def test_first_samples_overtake_those_of_their_group_and_other_groups(clock: Clock) -> None:
    batcher: Batcher[int] = Batcher()
    batcher.add(0, samples("a"), recipe(2))
    batcher.add(1, samples("b", "b"), recipe(2))
    batcher.add(2, samples("b"), recipe(2), first=True)
    assert [owners(batcher) for _ in range(3)] == [[2, 1], [0], [1]]


def test_first_samples_of_another_recipe_are_all_run_before_the_rest(clock: Clock) -> None:
    batcher: Batcher[int] = Batcher()
    batcher.add(0, samples("a", "a"), recipe(1))
    batcher.add(1, samples("a"), recipe(1, "{}{}"), first=True)
    batcher.add(2, samples("a"), recipe(1, "{}{}"), first=True)
    assert [owners(batcher) for _ in range(4)] == [[1], [2], [0], [0]]


def test_samples_of_a_first_image_keep_their_order(clock: Clock) -> None:
    batcher: Batcher[int] = Batcher()
    batcher.add(0, samples("a"), recipe(3))
    batcher.add(1, samples("a", "a"), recipe(3), first=True)
    _, batch = batcher.take()
    assert [(slot.owner, slot.place) for slot in batch] == [(1, 0), (1, 1), (0, 0)]


def test_nobody_is_overtaken_for_ever(clock: Clock) -> None:
    """However many first samples come, the one that waits has its turn soon after it has lost patience."""
    batcher: Batcher[int] = Batcher()
    batcher.add(0, samples("a"), recipe(1))
    served = []
    for owner in range(1, 20):
        clock.now += PATIENCE / 4
        batcher.add(owner, samples("a"), recipe(1), first=True)
        served += owners(batcher)
    assert served[:3] == [1, 2, 3], "it can be overtaken for a while"
    assert served.index(0) == 3
    served += owners(batcher)
    assert sorted(served) == list(range(20))


@given(st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=8), st.sets(st.integers(0, 7)))
def test_removed_owners_leave_no_sample_and_the_others_stay(names: list[list[str]], unwanted: set[int]) -> None:
    batcher: Batcher[int] = Batcher()
    for owner, some in enumerate(names):
        batcher.add(owner, samples(*some), recipe())
    assert sorted(batcher.remove(lambda owner: owner in unwanted)) == sorted(unwanted & set(range(len(names)))), "each once"
    left: list[int] = []
    while batcher:
        left += owners(batcher)
    assert sorted(left) == [owner for owner, some in enumerate(names) if owner not in unwanted for _ in some]


# --- how long to wait for more samples ---


def waiting(limit: int, wait: float = 2.0) -> tuple[Batcher[int], Recipe]:
    """A batcher, and a recipe of a device where `limit` samples of the groups a and b fit."""
    sizes = BatchSizes(FakeGpu(1000 * limit), {repr(name): Known({1: 800}, fits=limit) for name in "ab"})
    return Batcher(wait), Recipe(OPERATION, sizes, 64, "{}")


def test_batch_waits_until_full_but_no_longer_than_the_setting(clock: Clock) -> None:
    batcher, large = waiting(limit=3)
    assert batcher.patience(coming=True) is None, "there is nothing to take yet"
    assert batcher.patience(coming=False) == 0
    batcher.add(0, samples("a"), large)
    assert batcher.patience(coming=True) == 2
    clock.now += 1.5
    batcher.add(1, samples("a"), large)
    assert batcher.patience(coming=True) == 0.5, "the oldest counts"
    batcher.add(2, samples("a", "a"), large)
    assert batcher.patience(coming=True) == 0, "it is full"
    assert owners(batcher) == [0, 1, 2]
    assert batcher.patience(coming=True) == 2, "the rest arrived last"
    clock.now += 3
    assert batcher.patience(coming=True) == 0
    assert owners(batcher) == [2]


def test_no_wait_when_no_more_samples_can_arrive(clock: Clock) -> None:
    batcher, large = waiting(limit=3)
    batcher.add(0, samples("a"), large)
    assert batcher.patience(coming=False) == 0


def test_full_group_runs_after_overdue_groups_and_before_the_rest(clock: Clock) -> None:
    batcher, large = waiting(limit=2)
    batcher.add(0, samples("a"), large)
    batcher.add(1, samples("b", "b", "b", "b"), large)
    assert batcher.patience(coming=True) == 0
    assert owners(batcher) == [1, 1]
    clock.now += 2
    assert owners(batcher) == [0]
    assert owners(batcher) == [1, 1]


def test_no_wait_without_a_gpu(clock: Clock) -> None:
    batcher: Batcher[int] = Batcher(wait=60)
    batcher.add(0, samples("a"), recipe())
    assert batcher.patience(coming=True) == 0
