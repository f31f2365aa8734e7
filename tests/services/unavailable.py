"""What a test does when the machine lacks a service it needs."""

from __future__ import annotations

import os

import pytest


def unavailable(reason: str) -> BaseException:
    """An outcome to raise: skips the test, or in CI, where nobody would notice a skip, fails it."""
    return pytest.fail.Exception(reason) if os.environ.get("CI") == "true" else pytest.skip.Exception(reason)
