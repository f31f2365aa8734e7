"""Fields that log lines have without being told: those of this process, and those of the work that a thread is doing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PROCESS: dict[str, object] = {}
"""`node` and `gpu`, set once per process."""
_work: ContextVar[dict[str, object] | None] = ContextVar("work", default=None)


def trace_id(job: str) -> str:
    """A job's W3C trace id. Derived from its name, so that all lines and spans of a job agree without passing it on."""
    return hashlib.sha256(f"imagemill job {job}".encode()).hexdigest()[:32]


def describe_process(*, node: str, gpu: int | None = None) -> None:
    """Name the node in every line of this process and of those it forks."""
    PROCESS.update({"node": node} if gpu is None else {"node": node, "gpu": gpu})


@contextmanager
def working_on(*, job: str, owner: str | None, share: str | None = None) -> Iterator[None]:
    """Name the job in every line that this thread logs inside."""
    fields = {"job": job, "owner": owner, "share": share}
    token = _work.set({name: value for name, value in fields.items() if value is not None})
    try:
        yield
    finally:
        _work.reset(token)


def current() -> dict[str, object]:
    """The fields of this process and of what this thread is working on."""
    return {**PROCESS, **(_work.get() or {})}
