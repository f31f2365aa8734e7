"""Runs of `imagemill doctor`, and what they found."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner, Result

from imagemill.producer.cli import main
from imagemill.shared.engines import lane_of
from imagemill.shared.messages import Node
from imagemill.shared.options.base import OPERATIONS
from tests.services.s3 import S3Server, free_ports

PASSWORD = "correct-horse"
Doctor = Callable[..., Result]


def run_doctor(redis_url: str, *flags: str, s3: S3Server | None = None, **settings: str | None) -> Result:
    """Run it; without an `s3` argument, the S3 endpoint is unreachable. A setting of None is removed from the environment."""
    keys = s3.environment if s3 else {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": PASSWORD}
    endpoint = s3.endpoint_url if s3 else f"http://127.0.0.1:{free_ports(1)[0]}"
    # Links that only this host can open are intended here.
    public = {"IMAGEMILL_S3__ENDPOINT_URL": endpoint, "IMAGEMILL_S3__PUBLIC_URL": endpoint}
    environment = {"IMAGEMILL_REDIS_URL": redis_url, **public, **keys, **settings}
    return CliRunner(env=environment).invoke(main, ["doctor", *flags])


def unreachable(user: str = "") -> str:
    """The URL of a Redis that isn't running."""
    return f"redis://{user}127.0.0.1:{free_ports(1)[0]}/0"


def listed(result: Result) -> list[dict[str, Any]]:
    """All findings of a run with --json."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def findings(result: Result) -> dict[str, dict[str, Any]]:
    """The last finding of each check."""
    return {finding["check"]: finding for finding in listed(result)}


def problems(result: Result) -> list[tuple[str, str, str, str]]:
    """What is wrong: the check, the state, what was found and the fix."""
    return [tuple(finding.values()) for finding in listed(result) if finding["state"] != "ok"]


def node(ready: bool = True) -> Node:
    lanes = tuple(lane_of(operation, "opencv") for operation in OPERATIONS)
    return Node(node="cpu@here", host="here", pid=1, device="cpu", lanes=lanes, children=2, ready=ready)
