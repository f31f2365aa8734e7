"""What batching costs per image: sorting into groups, sizing, and the run's bookkeeping, with a model that does nothing.

    python -m bench.batching [ROUNDS]

CPU microseconds of one thread, on the machine's own memory (as CPU engines have it) and on a GPU that isn't there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from imagemill.worker.hardware.memory import HostMemory, Memory, Peak
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import Batcher
from imagemill.worker.operations.base import Sample, Spec
from tests.batches import run_batch

IMAGES, BATCH = 4096, 16

Figure = dict[str, Any]


class Nothing:
    """Gives each sample back. Of an operation it has what batching asks for."""

    spec = Spec("stylize", "opencv", max_batch=BATCH)

    def group_key(self, sample: Sample) -> Hashable:
        return sample.data

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        return list(samples)


class Gpu:
    """Of endless memory, which costs nothing to ask."""

    name, grows = "none", True

    def free(self) -> int:
        return 80 * 10**9

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        yield Peak(10**9, 0.5)

    def broken(self) -> bool:
        return False


def run(rounds: int = 15) -> list[Figure]:
    """Measure `rounds` times; per figure its name, the median, no goal, unit, and how many rounds."""
    memories: dict[str, Memory] = {"a CPU, where nobody waits": HostMemory(), "a GPU, without what its library takes": Gpu()}
    found: dict[str, list[float]] = {name: [] for name in memories}
    for number in range(rounds + 1):
        for name, memory in memories.items():
            taken = _microseconds(BatchSizes(memory))
            if number:
                found[name].append(taken)
    return [
        {
            "name": f"batching: CPU per image, batches of up to {BATCH} on {name}",
            "value": float(f"{median(values):.3g}"),
            "goal": None,
            "unit": "us",
            "holds": None,
            "rounds": len(values),
        }
        for name, values in found.items()
    ]


def _microseconds(sizes: BatchSizes) -> float:
    operation: Any = Nothing()
    batcher: Batcher[int] = Batcher(operation, sizes, BATCH, 0.05)
    samples = [Sample((512, 512), None) for _ in range(IMAGES)]
    start = time.process_time()
    for number, sample in enumerate(samples):
        batcher.add(number, [sample])
        if batcher.patience(coming=True) == 0:
            run_batch(operation, [slot.sample for slot in batcher.take()], sizes)
    while batcher:
        run_batch(operation, [slot.sample for slot in batcher.take()], sizes)
    return 1e6 * (time.process_time() - start) / IMAGES


if __name__ == "__main__":
    for figure in run(*(int(argument) for argument in sys.argv[1:2])):
        print(json.dumps(figure))
