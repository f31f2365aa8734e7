"""What Redis holds of jobs, for tests that check every key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from imagemill.shared.ledger.ranges import indexes_in
from imagemill.shared.messages import Priority


@dataclass(frozen=True)
class Contents:
    """One job. `back` and `counted` are numbers of images given back and of suspects, as counted and as listed; a suspect
    group is its deaths and indexes; a share is its child, owner and images."""

    owner: str
    free: list[int]
    back: tuple[int, int]
    counted: tuple[int, int]
    groups: list[tuple[int, set[int]]]
    shares: dict[int, dict[str, Any]]
    results: set[int]
    in_line: bool
    has_turn: bool
    line: bool
    manifest: bool

    @property
    def suspects(self) -> list[int]:
        return [index for _, indexes in self.groups for index in indexes]

    @property
    def shared(self) -> list[int]:
        return [index for share in self.shares.values() for index in indexes_in(share["ranges"])]


def contents(raw: Any, jobs: Sequence[tuple[str, str, Priority, str]]) -> list[Contents]:
    """Read jobs, given as (ID, lane, priority, owner), in one round trip."""
    pipe = raw.pipeline(transaction=False)
    for job, lane, priority, owner in jobs:
        key, line = f"imagemill:job:{job}", f"imagemill:waiting:{lane}:{priority}:{owner}"
        pipe.hmget(key, "size", "next", "back", "suspects").lrange(f"{key}:back", 0, -1).lrange(f"{key}:suspects", 0, -1)
        pipe.hgetall(f"{key}:shares").hkeys(f"{key}:results").zscore(line, job)
        pipe.zscore(f"imagemill:turns:{lane}:{priority}", owner).exists(line).zscore(f"imagemill:manifests:{lane}", job)
    answers = iter(pipe.execute())
    found = []
    for _, _, _, owner in jobs:
        (size, following, back, suspects), ranges, listed, shares, results, place, clock, line, manifest = (
            next(answers) for _ in range(9)
        )
        groups = [(float(deaths), indexes_in(part)) for deaths, _, part in (text.partition(":") for text in listed)]
        returned = [index for part in ranges for index in indexes_in(part)]
        found.append(
            Contents(
                owner,
                [*range(int(following or 0), int(size)), *returned],
                (int(back or 0), len(returned)),
                (int(suspects or 0), sum(len(indexes) for _, indexes in groups)),
                groups,
                {int(number): json.loads(share) for number, share in shares.items()},
                {int(index) for index in results},
                place is not None,
                clock is not None,
                bool(line),
                manifest is not None,
            )
        )
    return found


def everything(raw: Any) -> dict[str, Any]:
    """Every key with its value, but for packs, which are not text, and marks that expire."""
    names = [name for name in sorted(raw.keys()) if not name.endswith(":packs") and ":draining:" not in name]
    pipe = raw.pipeline(transaction=False)
    for name in names:
        pipe.type(name)
    kinds = dict(zip(names, pipe.execute(), strict=True))
    read = {"string": pipe.get, "hash": pipe.hgetall, "list": lambda name: pipe.lrange(name, 0, -1), "set": pipe.smembers}
    read |= {"zset": lambda name: pipe.zrange(name, 0, -1, withscores=True), "stream": pipe.xlen}
    known = {name: kind for name, kind in kinds.items() if kind in read}
    for name, kind in known.items():
        read[kind](name)
    return dict(zip(known, pipe.execute(), strict=True))
