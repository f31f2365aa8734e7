"""Faults of Redis and of the network to it."""

from __future__ import annotations

from bench.fault_run import Row

ROWS: list[Row] = []
