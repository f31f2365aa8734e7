"""Which samples share a batch, how large it gets, how long it waits for more, and what happens when it fails."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded

from imagemill.shared.errors import (
    ConfigurationError,
    DeviceLost,
    ImageError,
    InternalError,
    ModelUnavailable,
    OutOfMemory,
    sentence,
)
from imagemill.shared.messages import Policy
from imagemill.worker.hardware.errors import is_out_of_memory, is_sticky
from imagemill.worker.hardware.memory import give_up_caches
from imagemill.worker.line.batch_sizes import BatchSizes, kind_of
from imagemill.worker.operations.base import AnyOperation, Sample, Spec

log = logging.getLogger(__name__)
Owner = TypeVar("Owner")

PATIENCE = 5.0
"""Seconds for which samples may be overtaken."""
CAPS = {"quality": 4, "throughput": 64}
"""The largest batch under each policy; an engine's own `max_batch` may be smaller."""


def cap(policy: Policy, spec: Spec) -> int:
    """The most samples in a batch, regardless of memory."""
    return min(CAPS[policy.batch], spec.max_batch)


@dataclass(frozen=True)
class Recipe:
    """How samples are run. Images of different jobs share a batch if their recipes are equal.

    `options` is the JSON of the job's options; `most` is the largest batch, regardless of memory.
    """

    operation: AnyOperation
    sizes: BatchSizes
    most: int
    options: str


@dataclass(frozen=True)
class Slot(Generic[Owner]):
    """One sample waiting for the device: number `place` of its owner's. It arrived at `came` on the monotonic clock.

    It is `first` if it overtakes those that are not.
    """

    owner: Owner
    place: int
    sample: Sample[Any, Any]
    came: float = 0.0
    first: bool = False


@dataclass
class _Group(Generic[Owner]):
    """Samples that may share a batch. `limit` is how many fit in memory; 0 means ask again."""

    recipe: Recipe
    kind: str
    wait: float
    slots: deque[Slot[Owner]] = field(default_factory=deque)
    limit: int = 0

    def full(self) -> bool:
        self.limit = self.limit or self.recipe.sizes.limit(self.kind, self.recipe.most)
        return len(self.slots) >= self.limit

    def due(self) -> float:
        """When it should not wait any longer, on the monotonic clock."""
        return self.slots[0].came + self.wait


class Batcher(Generic[Owner]):
    """Sorts samples into groups that may share a batch, and hands out the oldest group that is full or has waited long enough.

    A batch has no more samples than its recipe allows and fit into memory. It waits up to `wait` seconds for more samples,
    but only on devices where larger batches are faster.
    """

    def __init__(self, wait: float = 0.0) -> None:
        self._wait = wait
        self._groups: dict[tuple[Recipe, Hashable], _Group[Owner]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __len__(self) -> int:
        return sum(len(group.slots) for group in list(self._groups.values()))

    def add(self, owner: Owner, samples: Sequence[Sample[Any, Any]], recipe: Recipe, *, first: bool = False) -> None:
        """Queue one owner's samples, with `first` before all others unless these have been overtaken for too long."""
        keys = [recipe.operation.group_key(sample) for sample in samples]  # before any is queued, in case one raises
        now = time.monotonic()
        first = first and all(now - slot.came < PATIENCE for group in self._groups.values() for slot in group.slots)
        for place, (key, sample) in enumerate(zip(keys, samples, strict=True)):
            slot = Slot(owner, place, sample, now, first)
            group = self._group((recipe, key), slot)
            if first:
                group.slots.insert(sum(other.first for other in group.slots), slot)
            else:
                group.slots.append(slot)

    def _group(self, key: tuple[Recipe, Hashable], slot: Slot[Owner]) -> _Group[Owner]:
        recipe = key[0]
        if key not in self._groups:
            wait = self._wait if recipe.sizes.memory.grows else 0.0
            self._groups[key] = _Group(recipe, kind_of(recipe.operation, slot.sample), wait)
        return self._groups[key]

    def patience(self, *, coming: bool) -> float | None:
        """How many seconds to wait for more samples before `take`; None if there is nothing to take yet.

        `coming` says whether more samples can arrive; if not, there is no wait.
        """
        if not self._groups:
            return None if coming else 0.0
        if not coming or any(group.full() for group in self._groups.values()):
            return 0.0
        return max(0.0, min(group.due() for group in self._groups.values()) - time.monotonic())

    def take(self) -> tuple[Recipe, list[Slot[Owner]]]:
        """The next batch: one or more samples of one group. Call it only if there is one."""
        now = time.monotonic()
        groups = self._groups.items()
        ripe = [entry for entry in groups if entry[1].due() <= now or entry[1].full()] or groups
        key, group = min(ripe, key=lambda entry: (not entry[1].slots[0].first, entry[1].slots[0].came))
        group.limit = 0  # a child that shares the device may have learned more since
        group.full()
        batch = [group.slots.popleft() for _ in range(min(group.limit, len(group.slots)))]
        for one in self._groups.values():
            one.limit = 0  # this run may change what is known
        if not group.slots:
            del self._groups[key]
        return group.recipe, batch

    def remove(self, unwanted: Callable[[Owner], bool]) -> list[Owner]:
        """Remove the samples of unwanted owners, and return these owners, each once."""
        removed: dict[int, Owner] = {}
        for key, group in list(self._groups.items()):
            kept = [slot for slot in group.slots if not unwanted(slot.owner)]
            if len(kept) < len(group.slots):
                removed |= {id(slot.owner): slot.owner for slot in group.slots if unwanted(slot.owner)}
                group.slots = deque(kept)
            if not kept:
                del self._groups[key]
        return list(removed.values())


def run_parts(
    operation: AnyOperation, samples: Sequence[Sample[Any, Any]], sizes: BatchSizes
) -> Iterator[list[Any | ImageError]]:
    """Run a batch on the device; yields its parts as they ran: for each sample its output, or that sample's own error.

    When memory runs out, the batch is halved and `sizes` learns from it. Without its model, no sample can run. After any
    other error, each sample is run alone, so that a bad image doesn't take its neighbours down. Raises SoftTimeLimitExceeded
    when the task's time is up, and DeviceLost when this process can't use the device any more: neither is an image's fault.
    """
    kind = kind_of(operation, samples[0])
    over, step = 0, len(samples)
    while over < len(samples):
        part = samples[over : over + step]
        level = sizes.relief(kind) if len(part) == 1 else 0
        made = _relieved(operation, part, sizes, level) if level else attempt(operation, part, sizes, kind)
        if isinstance(made, OutOfMemory) and not level:
            give_up_caches()  # outside the except block, whose frames hold the batch's tensors
            sizes.failed(kind, len(part))
            made = made if len(part) > 1 else _relieved(operation, part, sizes, 1, made)
        if isinstance(made, list) or len(part) == 1 or isinstance(made, ModelUnavailable):
            over += len(part)
            yield made if isinstance(made, list) else [made] * len(part)
        else:
            step = -(-len(part) // 2) if isinstance(made, OutOfMemory) else 1


def attempt(
    operation: AnyOperation, samples: Sequence[Sample[Any, Any]], sizes: BatchSizes, kind: str
) -> list[Any] | ImageError:
    """One run: an output per sample, or the error, without the frames that hold the batch's tensors.

    Raises SoftTimeLimitExceeded and DeviceLost.
    """
    try:
        with sizes.running(kind, len(samples)):
            outputs = operation.run(samples)
        if len(outputs) != len(samples):
            raise InternalError(f"{operation.spec.name} returned {len(outputs)} outputs for {len(samples)} samples")
        return list(outputs)
    except (SoftTimeLimitExceeded, DeviceLost):
        raise
    except Exception as error:
        if is_sticky(error) or sizes.memory.broken():
            raise DeviceLost(f"{operation.spec.name} left the device in error: {sentence(error)}") from error
        if is_out_of_memory(error) and not isinstance(error, ModelUnavailable):
            return OutOfMemory(f"{operation.spec.name} ran out of memory: {sentence(error)}")
        if isinstance(error, ConfigurationError):  # all that an engine opens during a run is a model
            return ModelUnavailable(error.message)
        if isinstance(error, ImageError):
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)
        log.exception("batch failed", extra={"action": "run", "samples": len(samples)})
        return InternalError(f"{operation.spec.name} failed: {sentence(error)}")


def _relieved(
    operation: AnyOperation,
    alone: Sequence[Sample[Any, Any]],
    sizes: BatchSizes,
    level: int,
    failure: OutOfMemory | None = None,
) -> list[Any] | ImageError:
    """Run one sample that did not fit with memory-saving measures, at `level` and then above. They end with this run."""
    made: list[Any] | ImageError = failure or OutOfMemory(f"{operation.spec.name} ran out of memory")
    kind = kind_of(operation, alone[0])
    try:
        while isinstance(made, OutOfMemory) and operation.relieve(level):
            made = attempt(operation, alone, sizes, f"{kind}, relieved {level}")
            if isinstance(made, OutOfMemory):
                give_up_caches()
                level += 1
            else:
                sizes.relieved(kind, level)
    finally:
        operation.relieve(0)
    return made
