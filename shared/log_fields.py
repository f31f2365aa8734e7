"""Fields that every log line gets: those of this process, and those of the work that its thread is doing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar

PROCESS: dict[str, object] = {}
"""`node` and `gpu`, set once per process."""
_work: ContextVar[Mapping[str, object] | None] = ContextVar("work", default=None)


def trace_id(job: str) -> str:
    """A job's W3C trace id. Derived from its name, so that all lines and spans of a job agree without passing it on."""
    return hashlib.sha256(f"imagemill job {job}".encode()).hexdigest()[:32]


def describe_process(*, node: str, gpu: int | None = None) -> None:
    """Name the node in every line of this process and of those it forks."""
    PROCESS.update({"node": node} if gpu is None else {"node": node, "gpu": gpu})


class working_on:  # noqa: N801  # a context manager, without the cost of a generator: every image enters several
    """Name the job in every line that this thread logs inside."""

    __slots__ = ("_fields", "_token")

    def __init__(self, *, job: str, owner: str | None, share: str | None = None) -> None:
        self._fields = {"job": job, "owner": owner, "share": share}

    def __enter__(self) -> None:
        self._token = _work.set(self._fields)

    def __exit__(self, *_: object) -> None:
        _work.reset(self._token)


def current() -> dict[str, object]:
    """The fields of this process and of what this thread is working on."""
    work = {name: value for name, value in (_work.get() or {}).items() if value is not None}
    return {**PROCESS, **work}
