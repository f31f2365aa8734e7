"""What the images of one job share on their way down the line."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Event
from typing import Any

from imagemill.shared.messages import Job
from imagemill.shared.settings import Settings
from imagemill.worker.line.batch_sizes import BatchSizes
from imagemill.worker.line.batching import Recipe, cap
from imagemill.worker.line.cache import Cache
from imagemill.worker.line.pixel_budget import PixelBudget
from imagemill.worker.line.references import References
from imagemill.worker.operations.base import AnyOperation
from imagemill.worker.transfer.fetch import Fetcher
from imagemill.worker.transfer.objects import Readable
from imagemill.worker.transfer.store import Store


@dataclass(frozen=True)
class Context:
    """What the images of one job share on their way down the line. Once `stop` is set, no more of them begin.

    `companions` are the names of the models that the job needs besides its `model`.
    """

    job: str
    spec: Job
    recipe: Recipe
    fetcher: Fetcher
    references: References
    store: Store
    budget: PixelBudget
    max_pixels: int
    stop: Event
    cache: Cache | None = None
    companions: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        job: str,
        spec: Job,
        settings: Settings,
        *,
        operation: AnyOperation,
        sizes: BatchSizes,
        fetcher: Fetcher,
        store: Store,
        budget: PixelBudget,
        cache: Cache | None = None,
    ) -> Context:
        """A job's context, with its own references. Raises ModelUnavailable."""
        most, stop = settings.worker.max_pixels, Event()
        fetcher = fetcher.within(Readable.of(settings.s3, spec.output.url))
        references = References(fetcher, max_pixels=most, attempts=spec.policy.attempts, stop=stop, budget=budget)
        recipe = Recipe(operation, sizes, cap(spec.policy, operation.spec), spec.options.model_dump_json())
        companions = tuple(operation.companions(spec.options))
        return cls(job, spec, recipe, fetcher, references, store, budget, most, stop, cache, companions)

    @property
    def log_fields(self) -> dict[str, Any]:
        """What log lines say of the job."""
        return {"job": self.job, "owner": self.spec.policy.owner}

    @property
    def needs(self) -> list[tuple[str, str]]:
        """The models without which nothing of the job can run: its lane's, and each companion with that one."""
        return [(self.spec.lane, part) for part in ("", *self.companions)]

    @property
    def operation(self) -> AnyOperation:
        """The job's engine."""
        return self.recipe.operation

    @property
    def repairs(self) -> bool:
        """Whether the job wants bad results repaired."""
        return self.spec.policy.quality.mode == "repair"
