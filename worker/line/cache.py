"""Earlier results: when the same image is asked for again, in any job, its result is copied instead of computed.

Everything that decides a result's bytes is hashed into a key. Under that key, Redis keeps where the result is and what it
is, for as long as it keeps jobs. Nothing here fails an image: when in doubt, the result is computed. Images with a mask or
control image at a URL and jobs with options that are URLs (`ADDRESSES`) are left out, because the bytes there may change.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from imagemill.shared.connection import connect
from imagemill.shared.errors import ImageError, ImagemillError, sentence
from imagemill.shared.messages import Item, Job
from imagemill.shared.options.base import ADDRESSES
from imagemill.shared.quality import Measures
from imagemill.shared.seeds import item_seed
from imagemill.shared.settings import Settings
from imagemill.worker.checking.quality import REVISION as REPAIRS
from imagemill.worker.imaging.codec import EXTENSIONS, Encoded
from imagemill.worker.line.versions import versions
from imagemill.worker.operations.base import AnyOperation
from imagemill.worker.transfer.store import Store

log = logging.getLogger(__name__)

REVISION = 6
"""Raise this when a change to decoding, scaling or encoding gives the same image different bytes."""

AROUND = ("imagemill", "isal", "numpy", "opencv-python-headless", "pillow", "pillow-heif", "pillow-jxl-plugin", "simplejpeg")
"""Packages that affect the result of every engine; each engine names its own in its `fingerprint`."""

KEY_BYTES = 21  # 168 bits, 28 characters: with the prefix, Redis allocates no more than for a shorter key
QUIET = 600.0  # seconds between warnings
MOST_JOBS = 64  # remembered, with what is the same for all of their images


@dataclass(frozen=True)
class Remembered:
    """A result in a store: its URL, MD5 in hex, format (png, jpeg, webp or avif), bytes, (width, height) and notes.

    `measures` is None if it was not checked; `filled` is the outline of what was filled. Flags are not kept:
    each job judges the measures by its own limits.
    """

    output: str
    md5: str
    format: str
    bytes: int
    size: tuple[int, int]
    notes: tuple[str, ...] = ()
    measures: Measures | None = None
    filled: str | None = None

    @classmethod
    def of(
        cls, encoded: Encoded, *, output: str, notes: tuple[str, ...], measures: Measures | None, filled: str | None
    ) -> Remembered:
        """The entry for a file that has just been stored at `output`."""
        return cls(output, encoded.md5, encoded.format, len(encoded.data), encoded.size, notes, measures, filled)

    async def copied(self, store: Store, key: str) -> Remembered | None:
        """The same result under a key of `store`; None if it no longer exists or can't be copied for any reason."""
        try:
            return replace(self, output=await store.copy(self.output, key, f"image/{self.format}", md5=self.md5))
        except ImageError as error:
            log.info("result not copied", extra={"action": "reuse", "reason": error.message})
            return None


class Cache:
    """Thread-safe. Make one per process, after the fork. `ttl` is in seconds."""

    def __init__(self, url: str, ttl: float) -> None:
        self._redis = connect(url)
        self._redis.set_retry(Retry(NoBackoff(), 1))  # one retry for a stale connection; no image waits longer
        self._ttl_ms = max(1, int(ttl * 1000))
        self._warned = -QUIET
        self._lock = Lock()
        self._unsaved: dict[str, bytes] = {}
        self._known: dict[int, tuple[Job, dict[str, str] | None]] = {}

    @classmethod
    def of(cls, settings: Settings) -> Cache | None:
        """The cache that the settings describe; None if the operator has turned it off."""
        if not settings.worker.reuse:
            return None
        return cls(settings.redis_url.get_secret_value(), settings.expire_days * 86_400)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def key(self, data: bytes, item: Item, spec: Job, operation: AnyOperation) -> str | None:
        """The key of this image file's result: equal keys mean equal bytes. None if the result must not be reused."""
        same = self._same_for_all(spec)
        if item.mask is not None or item.control_image is not None or same is None:
            return None
        try:
            engine = operation.fingerprint(spec.options)
        except (ImagemillError, OSError) as error:
            self._warn(error)
            return None
        own: dict[str, object] = {
            "source": hashlib.sha256(data).hexdigest(),
            "boxes": [box.model_dump() for box in item.boxes],
            "seed": item_seed(spec.options, item.index, item.source),
            "engine": engine,
        }
        if item.points:  # most items have neither, and keep their keys of earlier versions
            own["points"] = [point.model_dump() for point in item.points]
        if item.part is not None:
            own["part"] = item.part
        decides = same | _as_json(own)
        text = ", ".join(f'"{name}": {decides[name]}' for name in sorted(decides))
        digest = hashlib.sha256(f"{{{text}}}".encode()).digest()
        return base64.urlsafe_b64encode(digest[:KEY_BYTES]).decode()

    def _same_for_all(self, spec: Job) -> dict[str, str] | None:
        """What decides the results of all images of a job, as JSON; None if they must not be reused."""
        known, found = self._known.get(id(spec), (None, None))
        if known is spec:
            return found
        options, wanted = spec.options.model_dump(mode="json"), spec.policy.quality
        if all(options.get(name) is None for name in ADDRESSES):
            decides = {
                "operation": spec.operation,
                "options": options,
                "output": {**spec.output.model_dump(include={"format", "quality", "metadata"}), "icc": spec.icc},
                "repair": [REPAIRS, wanted.model_dump()] if wanted.mode == "repair" else None,
                "around": [REVISION, *(versions().get(name) for name in AROUND)],
                "store": urlsplit(spec.output.url).scheme,  # copies are made within one kind of store: each has its own entries
            }
            found = _as_json(decides)
        if len(self._known) >= MOST_JOBS:
            self._known = {}  # anew, since other threads read it
        self._known[id(spec)] = spec, found
        return found

    def get(self, keys: Sequence[str | None]) -> list[Remembered | None]:
        """The entries under keys, as far as Redis answers and has them; `copied` finds out whether a result still exists."""
        names = [_name(key) for key in keys if key is not None]
        entries: dict[str, bytes | None] = {}
        if names:
            with self._tolerated():
                entries = dict(zip(names, self._redis.mget(names), strict=True))
        raw = [entries.get(_name(key)) if key is not None else None for key in keys]
        return [_unpacked(entry) if entry is not None else None for entry in raw]

    def put(self, key: str | None, result: Remembered) -> None:
        """Save the entry of a result that is safely stored, replacing any earlier one, when the next images are recorded."""
        if key is not None:
            with self._lock:
                self._unsaved[_name(key)] = _packed(result)

    def flush(self) -> None:
        """Save all entries now, in one round trip."""
        with self._lock:
            entries, self._unsaved = self._unsaved, {}
        if entries:
            with self._tolerated(), self._redis.pipeline(transaction=False) as pipe:
                for name, entry in entries.items():
                    pipe.set(name, entry, px=self._ttl_ms)
                pipe.execute()

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Redis errors inside, such as a full or unreachable server, end here."""
        try:
            yield
        except redis.RedisError as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Once in a while, not for every image."""
        if time.monotonic() - self._warned >= QUIET:
            self._warned = time.monotonic()
            log.warning("results are not cached", extra={"action": "reuse", "reason": sentence(error)})


def _as_json(values: Mapping[str, object]) -> dict[str, str]:
    return {name: json.dumps(value, sort_keys=True) for name, value in values.items()}


def _name(key: str) -> str:
    return f"imagemill:cache:{key}"


def _packed(result: Remembered) -> bytes:
    md5 = base64.b64encode(bytes.fromhex(result.md5)).decode().rstrip("=")
    measures = result.measures.model_dump(exclude_defaults=True) if result.measures is not None else None
    fields = [result.output, md5, result.format, result.bytes, *result.size, measures, result.filled, *result.notes]
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def _unpacked(raw: bytes) -> Remembered | None:
    """None for an entry of another version."""
    try:
        fields: list[Any] = json.loads(raw)
        output, md5, form, size, width, height, measures, filled, *notes = fields
        digest = base64.b64decode(md5 + "==").hex()
        known = Measures.model_validate(measures) if measures is not None else None
        sides = int(width), int(height)
        found = Remembered(str(output), digest, str(form), int(size), sides, tuple(map(str, notes)), known, filled)
    except (ValueError, TypeError):
        return None
    return found if found.format in EXTENSIONS else None
