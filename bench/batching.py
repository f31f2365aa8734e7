"""CPU time that batching takes per image: grouping, choosing sizes and running, with a model that does nothing.

    python -m bench.batching [ROUNDS]

Measured on one thread, once with host memory, as on CPU nodes, and once with a fake GPU.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.figures import Figure, figure, print_figures
from imagemill.worker.hardware.memory import HostMemory, Memory, Peak
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import Batcher, Recipe
from imagemill.worker.operations.base import Sample, Spec
from tests.batches import run_batch

IMAGES, BATCH = 4096, 16


class Nothing:
    """Returns each sample unchanged. It implements only the parts of an operation that batching uses."""

    spec = Spec("stylize", "opencv", max_batch=BATCH)

    def group_key(self, sample: Sample) -> Hashable:
        return sample.data

    def run(self, samples: Sequence[Sample]) -> list[Any]:
        return list(samples)


class Gpu:
    """The memory of a fake GPU, which never fills up and answers at once."""

    name, grows = "none", True

    def free(self) -> int:
        return 80 * 10**9

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        yield Peak(10**9, 0.5)

    def broken(self) -> bool:
        return False


def run(rounds: int = 15) -> list[Figure]:
    memories: dict[str, Memory] = {"a CPU": HostMemory(), "a GPU, without its library's calls": Gpu()}
    times: dict[str, list[float]] = {name: [] for name in memories}
    for number in range(rounds + 1):
        for name, memory in memories.items():
            spent = _microseconds(BatchSizes(memory))
            if number:
                times[name].append(spent)
    name = f"batching: CPU per image, batches of up to {BATCH} on"
    return [figure(f"{name} {kind}", values, "us") for kind, values in times.items()]


def _microseconds(sizes: BatchSizes) -> float:
    operation: Any = Nothing()
    batcher, recipe = Batcher[int](0.05), Recipe(operation, sizes, BATCH, "{}")
    samples = [Sample((512, 512), None) for _ in range(IMAGES)]
    start = time.process_time()
    for number, sample in enumerate(samples):
        batcher.add(number, [sample], recipe)
        if batcher.patience(coming=True) == 0:
            run_batch(operation, [slot.sample for slot in batcher.take()[1]], sizes)
    while batcher:
        run_batch(operation, [slot.sample for slot in batcher.take()[1]], sizes)
    return 1e6 * (time.process_time() - start) / IMAGES


if __name__ == "__main__":
    print_figures(run)
