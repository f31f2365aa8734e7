"""Five hosts in network namespaces: one is cut off for a minute while Redis fails over. Needs root.

    python -m bench.hosts [--seconds N] [--images N]

What must hold, and how the hosts are made, is in tests/faults/several_hosts.py. Leases last as long as by default.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.several_hosts import SeveralHosts, cut_off_and_fail_over


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hosts", description="Cut off a host while Redis fails over.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the host is cut off")
    parser.add_argument("--images", type=int, default=600, help="images of each of the two jobs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-hosts-") as folder, SeveralHosts(Path(folder), lease=20) as site:
        print(cut_off_and_fail_over(site, arguments.seconds, arguments.images))
    return 0


if __name__ == "__main__":
    sys.exit(main())
