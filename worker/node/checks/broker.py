"""Checks of Redis and of what it knows: entries set aside, and nodes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError

from imagemill.shared import connection
from imagemill.shared.connection import connect
from imagemill.shared.dead import DeadLetters
from imagemill.shared.errors import ServiceUnavailable, sentence
from imagemill.shared.fleet import Fleet
from imagemill.shared.redis_url import RedisUrl
from imagemill.shared.settings import Settings
from imagemill.worker.node.checks.finding import START_REDIS, Finding
from imagemill.worker.node.offer import lanes

MOST_APART = 60
"""Seconds by which clocks may differ."""
MOST_FULL = 0.9
"""Share of `maxmemory` that Redis may use."""
SET_CLOCKS = "synchronise the clocks of all hosts: timedatectl set-ntp true"
LOG_OF_REDIS = "make room on the disk of Redis and read its log; redis-cli INFO persistence shows whether it has recovered"


def check_redis(settings: Settings) -> Iterator[Finding]:
    """Can Redis be reached and written to, and does it keep what it is given? If so, what do its entries say?"""
    url = settings.redis_url.get_secret_value()
    try:
        # Without redis-py's own retries, which take half a minute if the host does not respond, and its PING, which Redis
        # refuses while it can't save.
        with connect(url, socket_timeout=5, retry=Retry(NoBackoff(), 0), health_check_interval=0) as client:
            info: Any = client.info()
            seconds, _ = client.time()
            saves = _saves(client)
    except (redis.RedisError, OSError, ValueError) as error:
        yield Finding("redis", "failed", *explain(error, url))
        return
    yield Finding("redis", "ok", f"version {info['redis_version']}, {info['used_memory_human']} used")
    apart = abs(time.time() - seconds)
    if apart > MOST_APART:
        found = f"this host's clock and that of Redis are {apart:.0f} s apart; logs don't compare, certificates may be refused"
        yield Finding("redis", "warning", found, SET_CLOCKS)
    yield from _persistence(info, saves)
    yield from _memory(info)
    if info.get("role") == "slave":
        yield Finding("redis", "failed", "it is a replica, which refuses writes", "set IMAGEMILL_REDIS_URL to the primary")
    yield from _dead_letters(settings)
    yield from _workers(settings)


def explain(error: Exception, url: str) -> tuple[str, str]:
    """Why Redis can't be used, in plain words and without the password, and how to fix it."""
    parts = RedisUrl.parse(url)
    host, port = parts.hosts[0]
    where, encrypted = f"{host}:{port}", parts.encrypted
    other = f"{'redis' if encrypted else 'rediss'}://"
    text = sentence(error)
    if isinstance(error, MasterNotFoundError):
        fix = "compare the Sentinels and the primary's name in IMAGEMILL_REDIS_URL with redis-cli -p 26379 SENTINEL masters"
        return connection.explain(error), fix
    if isinstance(error, NoPermissionError):
        return f"Redis at {where}: this user may not run the commands needed", "allow the user all commands: redis-cli ACL LIST"
    if isinstance(error, AuthenticationError | AuthorizationError):
        return _explain_refusal(where, parts.password, parts.username)
    if isinstance(error, redis.BusyLoadingError):
        return f"Redis at {where} is still loading its data", "wait, then run imagemill doctor again"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        fix = "add ?ssl_ca_certs=FILE, the certificate of the CA that signed Redis' own, to IMAGEMILL_REDIS_URL"
        return f"the TLS certificate of Redis at {where} is not trusted, or is for another name", fix
    if encrypted and ("SSL" in text or "TLS" in text):
        fix = f"use {other} in IMAGEMILL_REDIS_URL if Redis has no TLS there; otherwise compare their TLS settings"
        return f"Redis at {where} doesn't speak TLS on this port, or not as this host expects", fix
    if isinstance(error, redis.TimeoutError):
        tls = f"; use {other} if it has no TLS there" if encrypted else ""  # it would wait for a line
        fix = f"{START_REDIS}; open port {port} in the firewall between the two hosts{tls}"
        return f"Redis at {where} does not respond within 5 s", fix
    if "reset" in text or "closed" in text.lower():
        fix = f"set IMAGEMILL_REDIS_URL to {other}... if Redis has {'no ' if encrypted else ''}TLS on this port"
        return f"Redis at {where} closes the connection", fix
    reason = re.sub(r"^Error -?\d+ connecting to \S+ ", "", text)
    if "Name or service" in reason or "name resolution" in reason:
        fix = "set IMAGEMILL_REDIS_URL to the address of Redis; only containers know the names of a compose file's services"
        return f"this host can't resolve Redis' host name, {host!r}", fix
    return f"no connection to Redis at {where}: {reason}", START_REDIS


def _explain_refusal(where: str, password: str | None, user: str) -> tuple[str, str]:
    whose = f"the password of the user {user!r}" if user else "the password"
    if not password:
        found = f"Redis at {where} asks for a password, and IMAGEMILL_REDIS_URL has none"
        return found, f"IMAGEMILL_REDIS_URL=redis://{user}:PASSWORD@{where}/0, with special characters percent-encoded"
    fix = (
        "put the right one into IMAGEMILL_REDIS_URL, with special characters percent-encoded; "
        f"on the host of Redis, redis-cli CONFIG GET requirepass{' or ACL LIST' if user else ''} shows what it expects"
    )
    return f"Redis at {where} refuses {whose} in IMAGEMILL_REDIS_URL", fix


def _saves(client: Any) -> bool | None:
    """Whether Redis takes snapshots; None if it doesn't say, as with managed services."""
    with suppress(redis.ResponseError):
        return bool(client.config_get("save").get("save"))
    return None


def _persistence(info: Any, saves: bool | None) -> Iterator[Finding]:
    """Does Redis write to disk, and did that succeed lately?"""
    if not info.get("aof_enabled"):
        lost = "all jobs are lost on a restart" if saves is False else "jobs since the last snapshot are lost on a restart"
        also = " and no snapshots" if saves is False else ""
        fix = "redis-cli CONFIG SET appendonly yes, and the same in Redis' configuration: appendonly yes"
        yield Finding("redis", "warning", f"no append-only file{also}: {lost}", fix)
    fields = {"aof_last_write_status": "write to its append-only file", "aof_last_bgrewrite_status": "rewrite that file"}
    snapshots = {"rdb_last_bgsave_status": "save a snapshot"} if saves is not False else {}
    failed = [what for field, what in (fields | snapshots).items() if info.get(field, "ok") != "ok"]
    if failed:
        found = f"Redis could not {' or '.join(failed)}; it refuses new jobs, or loses them on a restart"
        yield Finding("redis", "failed", found, LOG_OF_REDIS)


def _memory(info: Any) -> Iterator[Finding]:
    """Does Redis refuse writes rather than evict data when it is full, and is it?"""
    policy, limit, used = info.get("maxmemory_policy", "noeviction"), info.get("maxmemory", 0), info["used_memory"]
    if policy != "noeviction":
        fix = "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in Redis' configuration"
        when = "when full" if limit else "as soon as it has a memory limit"
        yield Finding("redis", "warning", f"may evict jobs {when}: its maxmemory-policy is {policy}", fix)
    if limit and used > MOST_FULL * limit:
        found = f"{used / limit:.0%} of its memory limit is used; a full Redis refuses new jobs"
        fix = "redis-cli CONFIG SET maxmemory BYTES, and the same in Redis' configuration; or wait for jobs to expire"
        yield Finding("redis", "warning", found, fix)


def _dead_letters(settings: Settings) -> Iterator[Finding]:
    """Was anything in Redis unreadable?"""
    with suppress(ServiceUnavailable):  # it has just answered
        count = DeadLetters.of(settings).count()
        if count:
            found = f"entries that could not be read and were set aside: {count}"
            fix = "imagemill jobs --dead shows them; find out what else writes to this Redis"
            yield Finding("redis", "warning", found, fix)


def _workers(settings: Settings) -> Iterator[Finding]:
    """Does a node work in every lane?"""
    try:
        nodes = Fleet.of(settings).nodes()
    except ServiceUnavailable:
        return  # it has just answered
    for node in nodes:
        found = f"{node.node}: {node.children} children, {'ready' if node.ready else 'loading'}"
        yield Finding("workers", "ok" if node.ready else "warning", found)
        for reason in node.lacks:
            yield Finding("workers", "warning", f"{node.node} lacks {reason}")
        for lane, reason in node.faults.items():
            found = f"{node.node}: {lane} is out of service: {reason}"
            yield Finding("workers", "failed", found, "repair or replace its files; the node notices")
    served = {lane for node in nodes for lane in (*node.lanes, *node.faults)}
    unserved = [lane for lane in lanes(settings) if lane not in served]
    if unserved:
        fix = "start a node: imagemill worker --cpu, --gpu N or --gpus all"
        which = f"1 lane has no node ({unserved[0]})"
        if len(unserved) > 1:
            which = f"{len(unserved)} lanes have no node ({unserved[0]}, ...)"
        yield Finding("workers", "warning", which, fix)
