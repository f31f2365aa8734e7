"""Repairs a ledger that somebody else has written to: what can't be read is set aside, and damaged jobs end.

The scripts trust what they find, so that they stay short. When one fails over a key of the wrong type or a wrong value, its
caller repairs the ledger and runs it once more; the node that tends the ledger also looks now and then. Nothing is changed
that is as the scripts write it, whatever they do meanwhile.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import redis
from pydantic import ValidationError

from imagemill.shared.dead import DEAD, VERSION, put_aside, reason_of, version_of
from imagemill.shared.errors import sentence
from imagemill.shared.ledger.scripts import PACK, Scripts, key
from imagemill.shared.messages import ENDED, LANE, PRIORITIES, Job, Node
from imagemill.shared.options.base import STORED

log = logging.getLogger(__name__)

Lua = Mapping[str, Callable[..., Any]]
Line = tuple[str, str, str]

UNWELL = ("OOM ", "MISCONF ", "READONLY ", "NOREPLICAS ", "NOPERM ", "NOAUTH ", "MASTERDOWN ", "BUSY ", "NOSCRIPT ")
"""Errors of Redis itself, which say nothing about what it holds."""
MOST_JOBS = 200
"""Jobs that one look inspects, chosen at random."""
MOST_ENTRIES = 10_000
"""Entries of a key that one look reads."""
LARGEST = 2**53
"""No number in the ledger is larger, or Lua could not count any further."""
MOST_ROWS = 10**9
HASHES = ("latest", "weights", "running", "children", "speed", "nodes", "node-children", "memory")
ZSETS = ("alarms", "leased", "jobs")
JOB_KEYS = {
    None: "hash", "packs": "hash", "results": "hash", "events": "stream", "duplicates": "hash", "shares": "hash",
    "back": "list", "suspects": "list",
}  # fmt: skip
FIGURES = (
    *("next", "back", "done", "failed", "dup", "shares", "suspects", "attempts"),
    *("manifest_since", "manifest_leases", "later", "until", "started"),
)
STATES = ("queued", "running", "finishing")
RANGE = re.compile(r"(\d{1,16})-(\d{1,16})")
GROUP = re.compile(r"\d{1,9}(?:\.5)?:\d{1,16}-\d{1,16}(,\d{1,16}-\d{1,16})*")


def is_damage(error: BaseException | None) -> bool:
    """Whether Redis refused a command because of what a key holds."""
    return isinstance(error, redis.ResponseError) and not any(code in f"{error} " for code in UNWELL)


class Repairing(Scripts):
    """A ledger that is repaired when a script fails over damage."""

    scripts: ClassVar[tuple[str, ...]] = ("condemn", "relink", "unline", "take_out")

    def repair(self) -> int:
        """Set aside what can't be read, and end damaged jobs; returns how much was found."""
        return self._repair().run()

    def relink(self) -> None:
        """Put jobs back into the keys that jobs share, as far as they are missing there."""
        self._repair().relink()

    def condemn(self, job: str, reason: str) -> bool:
        """End a job whose record is damaged; what has no result counts as failed. False if it was over."""
        repair = self._repair()
        repair.run()
        return repair.condemn(job, reason)

    def _repair(self) -> Repair:
        return Repair(self._redis, self._lua, lease_ms=self._lease_ms, rise_ms=self._rise_ms, seconds=self._ttl)

    def _script(self, name: str, *args: Any, job: str | None = None) -> Any:
        """Run a script; over damage, repair the ledger and run it again. `job` is ended if that does not help."""
        try:
            return super()._script(name, *args)
        except redis.ResponseError as error:
            if not is_damage(error):
                raise
        self._repair().run([job] if job else [])
        try:
            return super()._script(name, *args)
        except redis.ResponseError as error:
            if not is_damage(error) or job is None:
                raise
            self._repair().condemn(job, f"its record can't be used: {sentence(error)}")
        return super()._script(name, *args)


class Repair:
    """One inspection of the ledger. `lua` are the scripts `condemn`, `relink`, `unline` and `take_out`."""

    def __init__(self, client: Any, lua: Lua, *, lease_ms: int, rise_ms: int, seconds: int) -> None:
        self._redis, self._lua = client, lua
        self._lease_ms, self._rise_ms, self._seconds = lease_ms, rise_ms, seconds
        self.found = 0
        """What was set aside so far."""

    def run(self, more: Iterable[str] = ()) -> int:
        """Look at what jobs share, and at a number of jobs, `more` among them; returns how much was set aside."""
        lanes = self._lanes()
        self._shared(lanes)
        lines, jobs = self._lines(lanes), self._others(lanes)
        places: dict[str, list[Line]] = {job: [] for job in {*jobs, *more}}
        for line, members in lines.items():
            for job in members:
                places.setdefault(job, []).append(line)
        named = list(places)
        for job in named if len(named) <= MOST_JOBS else random.sample(named, MOST_JOBS):
            self._job(job, places[job])
        for line in lines:
            for job in self._lua["unline"](args=line):
                self._letter(f"waiting in lane {line[0]}", "there is no such job in this line", job)
        if self.found:
            self.relink()
        return self.found

    def condemn(self, job: str, reason: str, lines: Iterable[Line] = ()) -> bool:
        """End a job whose record is damaged; False if it was over."""
        places = [part for line in lines for part in line]
        ended = bool(self._lua["condemn"](args=[job, reason, self._seconds, PACK, *places]))
        if ended:
            self.found += 1
            log.error("damaged job ended", extra={"action": "repair", "job": job, "reason": reason})
        return ended

    # --- what jobs share --------------------------------------------------------------------------

    def _lanes(self) -> list[str]:
        """The lanes with work or nodes, without those that no job can have."""
        self._typed("imagemill:lanes", "set")
        self._typed("imagemill:nodes", "hash")
        good = set()
        for raw in self._redis.smembers("imagemill:lanes"):
            lane = raw.decode(errors="replace")
            if LANE.fullmatch(lane):
                good.add(lane)
            else:
                self._take_out("imagemill:lanes", "set", raw, "", "not a lane")
        for name, raw in self._hash("imagemill:nodes"):
            try:
                good.update(lane for lane in Node.model_validate_json(raw).lanes if LANE.fullmatch(lane))
            except ValidationError as error:
                if version_of(raw) <= VERSION:
                    self._take_out("imagemill:nodes", "hash", name, raw, reason_of(error))
        return sorted(good)

    def _shared(self, lanes: list[str]) -> None:
        for name in HASHES:
            self._typed(f"imagemill:{name}", "hash")
        for name in (*ZSETS, *(f"clocks:{priority}" for priority in PRIORITIES)):
            self._typed(f"imagemill:{name}", "zset")
        self._typed(DEAD, "list")
        for name in ("tender", "tended", "sequence"):
            self._typed(f"imagemill:{name}", "string")
        for lane in lanes:
            self._typed(f"imagemill.{lane}", "list")
            self._typed(f"imagemill:rates:{lane}", "hash")
            for name in ("manifests", "nodes", *(f"turns:{priority}" for priority in PRIORITIES)):
                first, _, last = name.partition(":")
                self._typed(f"imagemill:{first}:{lane}" + (f":{last}" if last else ""), "zset")
        self._values(lanes)
        self._scores(lanes)

    def _values(self, lanes: list[str]) -> None:
        whole = {"running", "children", "node-children"}
        for name in (
            "latest",
            "weights",
            "running",
            "children",
            "speed",
            "node-children",
            *(f"rates:{lane}" for lane in lanes),
        ):
            for field, raw in self._hash(f"imagemill:{name}"):
                if not _figure(raw, whole=name in whole):
                    self._take_out(f"imagemill:{name}", "hash", field, raw, "not a figure")
        for name in ("tended", "sequence"):
            raw = self._redis.get(f"imagemill:{name}")
            if raw is not None and not _figure(raw, whole=True):
                self._take_out(f"imagemill:{name}", "string", raw, "", "not a figure")
        if not self._redis.exists("imagemill:sequence") and self._redis.exists("imagemill:jobs"):
            seconds, micros = self._redis.time()  # later than every place in the order of submission
            self._redis.set("imagemill:sequence", seconds * 1_000_000 + micros, nx=True)

    def _scores(self, lanes: list[str]) -> None:
        """Times and clocks that never come: members without a place are given one by `relink`."""
        names = ["alarms", "leased", "jobs", *(f"clocks:{priority}" for priority in PRIORITIES)]
        names += [f"manifests:{lane}" for lane in lanes]
        names += [f"turns:{lane}:{priority}" for lane in lanes for priority in PRIORITIES]
        for name in names:
            full = f"imagemill:{name}"
            wrong = self._redis.zrangebyscore(full, "-inf", "(0", 0, MOST_ENTRIES)
            wrong += self._redis.zrangebyscore(full, f"({LARGEST}", "+inf", 0, MOST_ENTRIES)
            for member in wrong:
                self._take_out(full, "zset", member, "", "its score is not a time")
        for name, form in (("leased", r".+:\d+"), ("alarms", r"(begin|end|rise) .+")):
            for member in self._redis.zrange(f"imagemill:{name}", 0, MOST_ENTRIES):
                if not re.fullmatch(form, _text(member)):
                    self._take_out(f"imagemill:{name}", "zset", member, "", "not an entry of this key")

    def _lines(self, lanes: list[str]) -> dict[Line, list[str]]:
        """The lines and the jobs in them."""
        found: dict[Line, list[str]] = {}
        for lane in lanes:
            for priority in PRIORITIES:
                turns = f"imagemill:turns:{lane}:{priority}"
                for raw in self._redis.zrange(turns, 0, MOST_ENTRIES):
                    if not _text(raw):
                        self._take_out(turns, "zset", raw, "", "not an owner")
                        continue
                    line = lane, priority, _text(raw)
                    name = f"imagemill:waiting:{lane}:{priority}:{line[2]}"
                    self._typed(name, "zset")
                    members = self._redis.zrange(name, 0, MOST_ENTRIES)
                    for member in members:
                        if not _text(member):
                            self._take_out(name, "zset", member, "", "not a job")
                    found[line] = [_text(member) for member in members if _text(member)]
        return found

    def _others(self, lanes: list[str]) -> set[str]:
        """The jobs with leases, alarms or manifests that are due."""
        members = self._redis.zrange("imagemill:leased", 0, MOST_ENTRIES)
        jobs = {_text(member).rpartition(":")[0] for member in members}
        jobs |= {_text(alarm).partition(" ")[2] for alarm in self._redis.zrange("imagemill:alarms", 0, MOST_ENTRIES)}
        for lane in lanes:
            jobs |= {_text(member) for member in self._redis.zrange(f"imagemill:manifests:{lane}", 0, MOST_ENTRIES)}
        return jobs - {""}

    # --- jobs -------------------------------------------------------------------------------------

    def _job(self, job: str, lines: list[Line]) -> None:
        self._typed(f"imagemill:draining:{job}", "string")
        reason = self._wrong_type(job) or self._wrong_content(job)
        if reason:
            self.condemn(job, reason, lines)

    def _wrong_type(self, job: str) -> str | None:
        with self._redis.pipeline(transaction=False) as pipe:
            for part in JOB_KEYS:
                pipe.type(key(job, part))
            types = pipe.execute()
        for (part, wanted), found in zip(JOB_KEYS.items(), types, strict=True):
            if found.decode() not in ("none", wanted):
                return f"its {part or 'record'} in Redis is a {found.decode()}"
        return None

    def _wrong_content(self, job: str) -> str | None:
        with self._redis.pipeline() as pipe:  # at one moment
            pipe.hgetall(key(job))
            pipe.lrange(key(job, "back"), 0, MOST_ENTRIES)
            pipe.lrange(key(job, "suspects"), 0, MOST_ENTRIES)
            pipe.hgetall(key(job, "shares"))
            pipe.hlen(key(job, "results"))
            raw, back, suspects, shares, results = pipe.execute()
        fields = {_text(name): value for name, value in raw.items()}
        state = _text(fields.get("state", b""))
        if not raw or state in ENDED or state == "submitting" or version_of(fields.get("spec", b"")) > VERSION:
            return None
        try:
            _check_fields(job, state, fields, results)
            size = int(fields["size"])
            _check_back(back, int(fields.get("back", 0)), size)
            _check_suspects(suspects, int(fields.get("suspects", 0)), size)
            for number, share in shares.items():
                _check_share(number, share, size)
        except ValidationError as error:
            return f"its spec can't be read: {reason_of(error)}"[:300]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            return str(error)[:300]
        return None

    def relink(self) -> None:
        """After damage, make sure that no job is missing from the keys that jobs share."""
        names: set[str] = set()
        for raw in self._redis.scan_iter("imagemill:job:*", count=1000, _type="hash"):
            job = _text(raw).removeprefix("imagemill:job:")
            if job and job.rpartition(":")[2] not in JOB_KEYS:
                names.add(job)
        for job in sorted(names):
            try:
                created = self._redis.hget(key(job), "created")
                if created is not None and _figure(created) and self._redis.hexists(key(job), "order"):
                    self._redis.zadd("imagemill:jobs", {job: float(created)}, nx=True)
                self._lua["relink"](args=[self._lease_ms, self._rise_ms, job])
            except redis.ResponseError as error:
                if not is_damage(error):
                    raise
                self.condemn(job, f"its record can't be used: {error}"[:300])

    # --- setting aside ----------------------------------------------------------------------------

    def _typed(self, name: str, wanted: str) -> None:
        """Set a key of another type aside."""
        found = self._redis.type(name).decode()
        if found not in ("none", wanted):
            content = self._lua["take_out"](args=[name, wanted])
            if content is not None:
                self._letter(name, f"a {found} instead of a {wanted}", content)

    def _take_out(self, name: str, kind: str, part: bytes, value: bytes | str, reason: str) -> None:
        """Set a field or a member aside, unless it has changed meanwhile."""
        if self._lua["take_out"](args=[name, kind, part, value]) is not None:
            self._letter(f"{name} {part.decode(errors='backslashreplace')}", reason, value or part)

    def _letter(self, where: str, reason: str, content: bytes | str) -> None:
        self.found += 1
        put_aside(self._redis, where, reason, content, seconds=self._seconds)

    def _hash(self, name: str) -> list[tuple[bytes, bytes]]:
        return list(self._redis.hgetall(name).items())


def _text(raw: bytes) -> str:
    """Text, or '' if it isn't any."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return ""


def _figure(raw: bytes, *, whole: bool = False) -> bool:
    """Whether this is a number that the ledger can count with."""
    try:
        number = int(raw) if whole else float(raw)
    except ValueError:
        return False
    return math.isfinite(number) and 0 <= number < LARGEST


def _check_fields(job: str, state: str, fields: Mapping[str, bytes], results: int) -> None:
    spec = Job.model_validate_json(fields["spec"], context=STORED)
    known = state in STATES and _text(fields["priority"]) in PRIORITIES
    owner = spec.policy.owner or f"~{job}"
    if not known or (_text(fields["lane"]), _text(fields["owner"])) != (spec.lane, owner):
        raise ValueError("its state, priority, lane or owner is wrong")
    for name in ("size", "total", "open", "order", "ttl", "created"):
        if not _figure(fields[name], whole=True):
            raise ValueError(f"its {name} is not a number")
    for name in FIGURES:
        if name in fields and not _figure(fields[name], whole=True):
            raise ValueError(f"its {name} is not a number")
    size, total, opened, begun, dup, done, failed = (
        int(fields.get(name, 0)) for name in ("size", "total", "open", "next", "dup", "done", "failed")
    )
    if not begun <= size <= MOST_ROWS or total > size or opened != total - dup - results or done + failed > total:
        raise ValueError("its counts are wrong")


def _check_back(entries: list[bytes], count: int, size: int) -> None:
    for entry in entries:
        if not RANGE.fullmatch(_text(entry)):
            raise ValueError("what was given back is not a range")
    images = sum(_images(_text(entry), size) for entry in entries)
    if images != count and len(entries) < MOST_ENTRIES:
        raise ValueError("the images given back are not those counted")


def _check_suspects(groups: list[bytes], count: int, size: int) -> None:
    for group in groups:
        if not GROUP.fullmatch(_text(group)):
            raise ValueError("its suspects are not groups of images")
    images = sum(_images(_text(group), size) for group in groups)
    if images != count and len(groups) < MOST_ENTRIES:
        raise ValueError("its suspects are not those counted")


def _check_share(number: bytes, raw: bytes, size: int) -> None:
    share = json.loads(raw)
    if not re.fullmatch(rb"\d{1,20}", number) or not isinstance(share, dict):
        raise ValueError("one of its shares is not a share")
    texts = [share.get(name) for name in ("child", "owner", "ranges")]
    if not all(isinstance(text, str) for text in texts) or not _figure(str(share.get("images")).encode()):
        raise ValueError("one of its shares is damaged")
    _images(str(share["ranges"]), size)


def _images(ranges: str, size: int) -> int:
    """The number of images in ranges, which must be within the job."""
    bounds = [(int(first), int(last)) for first, last in RANGE.findall(ranges)]
    if any(first >= last or last > size for first, last in bounds):
        raise ValueError("a range has images that the job doesn't have")
    return sum(last - first for first, last in bounds)
