"""Hosts of their own network, one of which is cut off; see several_hosts.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.several_hosts import SeveralHosts, cut_off_and_fail_over

pytestmark = pytest.mark.integration


def test_a_host_is_cut_off_while_redis_fails_over_clocks_differ_and_hostnames_do_not(tmp_path: Path) -> None:
    with SeveralHosts(tmp_path) as site:
        cut_off_and_fail_over(site, seconds=8, count=60)
