"""What may share a batch, and what to do when a batch fails."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded

from shared.errors import ImageError, InternalError, OutOfMemory, sentence
from worker.operations.base import Operation, Sample

log = logging.getLogger(__name__)
Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Slot(Generic[Owner]):
    """One sample on its way to the device: the `place`-th of its owner's."""

    owner: Owner
    place: int
    sample: Sample


class Batcher(Generic[Owner]):
    """Sorts samples into groups that may share a batch; gives the oldest group first.

    Nothing is held back for company: whoever asks gets what is there, up to `limit` samples.
    """

    def __init__(self, operation: Operation, limit: int) -> None:
        self._operation = operation
        self._limit = limit
        self._groups: OrderedDict[Hashable, deque[Slot[Owner]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, owner: Owner, samples: Sequence[Sample]) -> None:
        """Queue an owner's samples."""
        keys = [self._operation.group_key(sample) for sample in samples]  # all or none of them, should one raise
        for place, (key, sample) in enumerate(zip(keys, samples, strict=True)):
            self._groups.setdefault(key, deque()).append(Slot(owner, place, sample))

    def take(self) -> list[Slot[Owner]]:
        """The next batch, 1 to `limit` samples of one group; only when there is one."""
        key, group = next(iter(self._groups.items()))
        batch = [group.popleft() for _ in range(min(self._limit, len(group)))]
        if group:
            self._groups.move_to_end(key)
        else:
            del self._groups[key]
        return batch

    def drain(self) -> list[Owner]:
        """Empty it; the owners whose samples were in it, each once."""
        owners = {id(slot.owner): slot.owner for group in self._groups.values() for slot in group}
        self._groups.clear()
        return list(owners.values())


def run_batch(operation: Operation, samples: Sequence[Sample]) -> list[Any | ImageError]:
    """The device step on a batch: per sample its output, or the error of that sample alone.

    When memory runs out the batch is halved; on any other error each sample is run alone, so that
    a bad image does not take its neighbours along. Raises SoftTimeLimitExceeded when the chunk's time
    is up: that is no image's fault.
    """
    try:
        outputs = operation.run(samples)
        if len(outputs) != len(samples):
            raise InternalError(f"{operation.spec.name} returned {len(outputs)} outputs for {len(samples)} samples")
        return list(outputs)
    except (MemoryError, OutOfMemory) as error:
        failure: ImageError = OutOfMemory(f"{operation.spec.name} ran out of memory: {sentence(error)}")
        parts = 2
    except SoftTimeLimitExceeded:
        raise
    except ImageError as error:
        failure, parts = error, len(samples)
    except Exception as error:
        log.exception("batch failed", extra={"action": "run", "samples": len(samples)})
        failure, parts = InternalError(f"{operation.spec.name} failed: {sentence(error)}"), len(samples)
    if isinstance(failure, OutOfMemory):
        gc.collect()  # out of the except block: its frames no longer hold the batch's arrays
    if len(samples) == 1:
        return [failure.with_traceback(None)]
    step = -(-len(samples) // parts)
    return [output for start in range(0, len(samples), step) for output in run_batch(operation, samples[start : start + step])]
